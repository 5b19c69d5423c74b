"""A Qwen2, Qwen3, Llama or Mistral decoder in plain torch over Hugging Face names, for decoding many rows at once.

    shape = DecoderShape.from_hf(json.load(open("config.json")))
    decoder = Decoder(shape, max_positions=4096)
    decoder.load_weights(safetensors_items)              # (name, tensor) pairs
    hidden = decoder.extend(ids, positions, attend)      # [T, H], rows of any length packed back to back
    logits = decoder.logits(hidden)                      # [T, V]

`extend` does not know how tokens are grouped into sequences: `attend(layer, q, k, v)` stores the new keys and values and
returns what each token sees. `KVSlots` (kv_slots.py) makes such functions for prefill and for decoding.

Weights given to `load_weights` are kept by reference; only q/k/v and gate/up are copied, because one matrix product
instead of three is what makes small batches fast. A weight that changes in place afterwards therefore leaves the decoder
inconsistent: load again before decoding again.

It computes no gradients, shards nothing, and refuses what it does not compute (sliding windows, other RoPE scalings)
instead of approximating it. What follows the attention in a layer, experts included, is `decoder_mlp.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_tcod.rollout.decoder_mlp import DenseMLP, ExpertChoice, ExpertMLP, affine, take_dense, take_experts

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`attend(layer, q [T, heads, d], k [T, kv_heads, d], v [T, kv_heads, d]) -> [T, heads * d]`."""

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral")


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What a config.json says about a decoder, with the defaults of its family filled in."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Of one expert where there are `experts`."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any]
    """Empty, or the `llama3` parameters."""
    tie_embeddings: bool
    has_qkv_bias: bool
    has_output_bias: bool
    """On the attention's output projection."""
    has_mlp_bias: bool
    experts: ExpertChoice | None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> DecoderShape:
        """Raises ValueError for a field that this decoder does not compute."""
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"config.json model_type {kind!r} is not one of {MODEL_TYPES}; serve it with SGLang instead")
        _refuse_unsupported(config)
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = float(rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0))
        rope_type = rope.pop("rope_type", rope.pop("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"config.json rope type {rope_type!r} is not supported; expected 'default' or 'llama3'")
        heads = config["num_attention_heads"]
        return cls(
            model_type=kind,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=rope if rope_type == "llama3" else {},
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            has_qkv_bias=kind == "qwen2" or bool(config.get("attention_bias")),
            has_output_bias=kind != "qwen2" and bool(config.get("attention_bias")),
            has_mlp_bias=kind == "llama" and bool(config.get("mlp_bias")),
            experts=_expert_choice(config) if kind == "qwen3_moe" else None,
        )


def _expert_choice(config: dict[str, Any]) -> ExpertChoice:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ValueError("config.json has layers without experts, which is not supported; serve it with SGLang instead")
    return ExpertChoice(
        num_experts=config.get("num_experts") or config["num_local_experts"],  # transformers 5 writes the longer name
        num_chosen=config["num_experts_per_tok"],
        normalizes=bool(config.get("norm_topk_prob", False)),
    )


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json hidden_act {config['hidden_act']!r} is not supported; expected 'silu'")
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    is_on = window is not None if config["model_type"] == "mistral" else config.get("use_sliding_window")
    if window is not None and longest is not None and window >= longest:
        return  # every position sees all before it
    if is_on or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError("config.json asks for sliding-window attention, which is not supported; expected full attention")


def rope_frequencies(shape: DecoderShape) -> torch.Tensor:
    """Rotations per position of each pair of channels, [d/2] float64; `llama3` stretches the slow ones."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    frequency = shape.rope_theta**-exponent  # [d/2]
    if not shape.rope_scaling:
        return frequency
    scaling = shape.rope_scaling
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = context * frequency / (2 * math.pi)  # [d/2] full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched by factor, 1: as it was
    return frequency * (keep + (1 - keep) / scaling["factor"])


@dataclass
class _Layer:
    """Weights of one layer. Matrices are [in, out]."""

    input_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [H, (heads + 2 kv_heads) d]
    qkv_bias: torch.Tensor | None  # [(heads + 2 kv_heads) d]
    qk_norm: torch.Tensor | None  # [heads + kv_heads, d]
    output: torch.Tensor  # [heads d, H]
    output_bias: torch.Tensor | None  # [H]
    mlp_norm: torch.Tensor  # [H]
    mlp: DenseMLP | ExpertMLP


class Decoder:
    """Weights and forward pass; holds no state about any sequence."""

    def __init__(self, shape: DecoderShape, *, max_positions: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape
        self.dtype = dtype
        self.layers: list[_Layer] = []
        angle = torch.outer(torch.arange(max_positions, dtype=torch.float64), rope_frequencies(shape))  # [P, d/2]
        self._cos = torch.cat([angle.cos(), angle.cos()], dim=-1).to(dtype)  # [P, d]
        self._sin = angle.sin().to(dtype)  # [P, d/2]

    @property
    def has_weights(self) -> bool:
        return bool(self.layers)

    def release_weights(self) -> None:
        self.layers = []
        self.embedding = self.final_norm = self.head = None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take Hugging Face named tensors. Raises ValueError naming missing, unknown or misshapen ones."""
        named = dict(weights)
        named = {name: tensor.detach().to(self.dtype) for name, tensor in named.items()}
        taken: set[str] = set()

        def take(name: str, *size: int) -> torch.Tensor:
            if name not in named:
                raise ValueError(f"weights lack {name!r}; got {len(named)} tensors such as {sorted(named)[:3]}")
            if tuple(named[name].shape) != size:
                raise ValueError(f"weight {name!r} is {tuple(named[name].shape)}, the config says {size}")
            taken.add(name)
            return named[name]

        shape = self.shape
        embedding = take("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size)
        final_norm = take("model.norm.weight", shape.hidden_size)
        if shape.tie_embeddings:
            taken.add("lm_head.weight")  # some exports repeat the embedding under this name
        head = embedding if shape.tie_embeddings else take("lm_head.weight", shape.vocab_size, shape.hidden_size)
        layers = [_take_layer(take, shape, f"model.layers.{index}.") for index in range(shape.num_layers)]
        unknown = {name for name in named if not name.endswith("rotary_emb.inv_freq")} - taken
        if unknown:
            raise ValueError(f"weights hold {len(unknown)} tensors the config has no place for: {sorted(unknown)[:3]}")
        self.embedding, self.final_norm, self.layers = embedding, final_norm, layers
        self.head = head.t()  # [H, V]

    def extend(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states after the final norm, [T, H], of `ids` [T] at `positions` [T] (both int64)."""
        shape = self.shape
        rotated = shape.num_heads + shape.num_kv_heads
        cos = self._cos[positions].unsqueeze(1)  # [T, 1, d]
        sin = self._sin[positions].unsqueeze(1)  # [T, 1, d/2]
        x = F.embedding(ids, self.embedding)  # [T, H]
        for index, layer in enumerate(self.layers):
            qkv = affine(self._norm(x, layer.input_norm), layer.qkv, layer.qkv_bias)  # [T, (heads + 2 kv_heads) d]
            qkv = qkv.view(len(ids), -1, shape.head_dim)
            qk = qkv[:, :rotated]  # [T, heads + kv_heads, d]
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk, (shape.head_dim,), None, shape.norm_eps) * layer.qk_norm
            qk = _rotate(qk, cos, sin)
            seen = attend(index, qk[:, : shape.num_heads], qk[:, shape.num_heads :], qkv[:, rotated:])
            x = affine(seen, layer.output, layer.output_bias, residual=x)
            x = layer.mlp(self._norm(x, layer.mlp_norm), residual=x)
        return self._norm(x, self.final_norm)

    def logits(self, hidden: torch.Tensor, num_ids: int | None = None) -> torch.Tensor:
        """[T, V] from `hidden` [T, H], or only the first `num_ids` columns."""
        head = self.head if num_ids is None else self.head[:, :num_ids]
        return torch.mm(hidden, head).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.shape.hidden_size,), weight, self.shape.norm_eps)


def _rotate(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on channel pairs (i, i + d/2), Hugging Face's convention."""
    half = sin.shape[-1]
    rotated = qk * cos  # [T, heads, d]
    rotated[..., :half].addcmul_(qk[..., half:], sin, value=-1)
    rotated[..., half:].addcmul_(qk[..., :half], sin)
    return rotated


def _take_layer(take: Callable[..., torch.Tensor], shape: DecoderShape, prefix: str) -> _Layer:
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def linear(names: tuple[str, ...], size_in: int, sizes_out: tuple[int, ...], has_bias: bool) -> tuple:
        matrices = [take(f"{prefix}{n}.weight", o, size_in) for n, o in zip(names, sizes_out, strict=True)]
        bias = None
        if has_bias:
            bias = torch.cat([take(f"{prefix}{n}.bias", o) for n, o in zip(names, sizes_out, strict=True)])
        if len(matrices) == 1:
            return matrices[0].t(), bias
        return torch.cat(matrices).t().contiguous(), bias  # [in, out]

    def norms() -> torch.Tensor | None:
        if shape.model_type not in ("qwen3", "qwen3_moe"):
            return None
        query = take(f"{prefix}self_attn.q_norm.weight", shape.head_dim)
        key = take(f"{prefix}self_attn.k_norm.weight", shape.head_dim)
        return torch.cat([query.expand(shape.num_heads, -1), key.expand(shape.num_kv_heads, -1)])

    attn = tuple(f"self_attn.{part}_proj" for part in "qkv")
    qkv, qkv_bias = linear(attn, hidden, (q_size, kv_size, kv_size), shape.has_qkv_bias)
    output, output_bias = linear(("self_attn.o_proj",), q_size, (hidden,), shape.has_output_bias)
    if shape.experts is None:
        mlp = take_dense(take, f"{prefix}mlp.", hidden=hidden, ffn=ffn, has_bias=shape.has_mlp_bias)
    else:
        mlp = take_experts(take, f"{prefix}mlp.", hidden=hidden, ffn=ffn, choice=shape.experts)
    return _Layer(
        input_norm=take(f"{prefix}input_layernorm.weight", hidden),
        qkv=qkv,
        qkv_bias=qkv_bias,
        qk_norm=norms(),
        output=output,
        output_bias=output_bias,
        mlp_norm=take(f"{prefix}post_attention_layernorm.weight", hidden),
        mlp=mlp,
    )
