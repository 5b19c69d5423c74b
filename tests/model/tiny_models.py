"""Small models, random packed rows, and a Hugging Face twin with the same weights, for the model tests."""

from __future__ import annotations

import math
import random

import torch

from megatron_tcod.model import build
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.packing import WeightedRow, build_microbatch
from megatron_tcod.trajectory import Microbatch, TokenRow

VOCAB = 507


def tiny_shape(**changes) -> ModelShape:
    """Everything odd on purpose: vocabulary off any multiple, fewer key-value than query heads, D unlike H / n."""
    sizes = dict(
        num_layers=4,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=VOCAB,
        rotary_base=10_000.0,
        init_std=0.1,
    )
    return ModelShape(**{**sizes, **changes})


def pack_rows(rows: list[tuple[list[int], list[int], list[float]]]) -> Microbatch:
    """A microbatch from (token ids, trained positions, weights) of each row, as packing lays rows out."""
    ids, positions, weights, bounds, episodes = [], [], [], [0], []
    for index, (row_ids, row_positions, row_weights) in enumerate(rows):
        positions += [bounds[-1] + position for position in row_positions]
        ids += row_ids
        weights += row_weights
        episodes += [index] * len(row_positions)
        bounds.append(len(ids))
    token_ids, where = torch.tensor(ids), torch.tensor(positions, dtype=torch.int64)
    return Microbatch(
        token_ids=token_ids,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        positions=where,
        target_ids=token_ids[where + 1],
        loss_weight=torch.tensor(weights),
        old_logprobs=torch.full((len(positions),), -math.log(VOCAB)),
        turn_ids=torch.zeros(len(positions), dtype=torch.int64),
        episode_ids=torch.tensor(episodes, dtype=torch.int64),
    )


def pack_forest(rows: list[tuple[list[int], list[int], list[float]]], *, least: int) -> Microbatch:
    """`pack_rows`, but the prefixes of `least` tokens and more that rows share are there once."""
    weighted = []
    for index, (ids, positions, weights) in enumerate(rows):
        mask = [int(place - 1 in positions) for place in range(len(ids))]
        logprobs = [-math.log(VOCAB)] * len(positions)
        row = TokenRow(token_ids=ids, turn_ids=[0] * len(ids), loss_mask=mask, logprobs=logprobs)
        weighted.append(WeightedRow(row, weights, index))
    return build_microbatch(weighted, least_shared=least)


def microbatch_of(rows: list[list[int]], *, least: int | None, seed: int = 0) -> Microbatch:
    """Rows as a forest whose branches share at least `least` tokens; about half of the tokens trained."""
    draw = random.Random(seed)
    weighted = []
    for index, ids in enumerate(rows):
        mask = [0] + [int(draw.random() < 0.5) for _ in ids[1:]]
        logprobs = [-math.log(VOCAB)] * sum(mask)
        row = TokenRow(token_ids=ids, turn_ids=[0] * len(ids), loss_mask=mask, logprobs=logprobs)
        weighted.append(WeightedRow(row, [draw.uniform(0.1, 1.0) / 20 for _ in logprobs], index))
    return build_microbatch(weighted, least_shared=least)


def random_rows(lengths: list[int], *, seed: int = 0) -> list[tuple[list[int], list[int], list[float]]]:
    """Rows of random ids; about half of the predicting positions trained, unequal weights."""
    draw = random.Random(seed)
    rows = []
    for length in lengths:
        positions = [position for position in range(length - 1) if draw.random() < 0.5]
        weights = [draw.uniform(0.1, 1.0) / 20 for _ in positions]
        rows.append(([draw.randrange(VOCAB) for _ in range(length)], positions, weights))
    return rows


def hugging_face_twin(chunks: list[torch.nn.Module], shape: ModelShape, dtype: torch.dtype) -> torch.nn.Module:
    """A Qwen3 of `transformers` holding the weights of unsharded chunks."""
    import transformers  # heavy, and spawned ranks import this module without needing it

    config = transformers.Qwen3Config(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.layernorm_epsilon,
        tie_word_embeddings=shape.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rotary_base},
        attn_implementation="eager",
    )
    model = transformers.Qwen3ForCausalLM(config).to(dtype)
    weights = {name: parameter.detach() for name, parameter in build.named_parameters(chunks)}
    model.load_state_dict(to_hugging_face(weights, shape), strict=not shape.tie_word_embeddings)
    return model


def to_hugging_face(full: dict[str, torch.Tensor], shape: ModelShape) -> dict[str, torch.Tensor]:
    """Full tensors under Megatron's names -> under Qwen3's, written out longhand."""
    out = {"model.embed_tokens.weight": full["embedding.word_embeddings.weight"][: shape.vocab_size]}
    out["model.norm.weight"] = full["decoder.final_layernorm.weight"]
    if not shape.tie_word_embeddings:
        out["lm_head.weight"] = full["output_layer.weight"][: shape.vocab_size]
    heads_per_group = shape.num_attention_heads // shape.num_query_groups
    for index in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        for name in ("input_layernorm", "self_attention.q_layernorm", "self_attention.k_layernorm"):
            new = name.replace("self_attention.", "self_attn.").replace("layernorm", "norm")
            out[theirs + ("input_layernorm" if name == "input_layernorm" else new) + ".weight"] = full[f"{ours}{name}.weight"]
        out[f"{theirs}post_attention_layernorm.weight"] = full[f"{ours}pre_mlp_layernorm.weight"]
        groups = full[f"{ours}self_attention.linear_qkv.weight"].view(
            shape.num_query_groups, heads_per_group + 2, shape.kv_channels, shape.hidden_size
        )
        parts = (groups[:, :heads_per_group], groups[:, heads_per_group], groups[:, heads_per_group + 1])
        for letter, part in zip("qkv", parts, strict=True):
            out[f"{theirs}self_attn.{letter}_proj.weight"] = part.reshape(-1, shape.hidden_size)
        out[f"{theirs}self_attn.o_proj.weight"] = full[f"{ours}self_attention.linear_proj.weight"]
        gate, up = full[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        out[f"{theirs}mlp.gate_proj.weight"], out[f"{theirs}mlp.up_proj.weight"] = gate, up
        out[f"{theirs}mlp.down_proj.weight"] = full[f"{ours}mlp.linear_fc2.weight"]
    return out
