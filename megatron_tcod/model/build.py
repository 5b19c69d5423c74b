"""Decoder models, dense or with a mixture of experts, as megatron-core GPTModel chunks.

    chunks = build_model(shape, layout, dtype=torch.float32, seed=0, wrap_ddp=True)   # this rank's chunks
    hidden = forward_hidden(chunks[-1], microbatch)                                   # [T, H] on the last stage
    head = output_head(chunks)                                                        # [V_padded/tp, H]

A `ModelShape` says all that matters about an architecture without naming Megatron. Weights are drawn per parameter
name, so one seed gives one model in every layout. Experts run one after the other (Megatron's SequentialMLP), every
rank holding its tensor-parallel part of its expert-parallel share of them. Sliding windows and Transformer Engine layers
are not built here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tcod.model import accelerators, cpu, parallel
from megatron_tcod.model.experts import check_experts, check_trainable, expert_mlp, expert_options
from megatron_tcod.model.families import kind_of
from megatron_tcod.model.families.rules import LAYOUTS
from megatron_tcod.model.layers import HiddenOutput, PackedAttention, PackedRows, RMSNorm, SwiGLU
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.shape import ModelShape, padded_vocab_size
from megatron_tcod.trajectory import Microbatch


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which activations the backward pass computes again instead of keeping them, under Megatron's names.

    Example: `Recompute(granularity="full", method="uniform", num_layers=1)`
    """

    granularity: str | None = None
    """`full`: whole layers. `selective`: the core attention. None keeps everything."""
    method: str | None = None
    """With full: `uniform` keeps the input of every unit of `num_layers` layers, `block` recomputes the first
    `num_layers` layers of each chunk and keeps the others whole."""
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if self.granularity not in (None, "full", "selective"):
            raise ValueError(f"recompute_granularity {self.granularity!r} is neither full nor selective")
        if self.granularity != "full" and (self.method or self.num_layers):
            raise ValueError(
                f"recompute_method {self.method} and recompute_num_layers {self.num_layers} choose among whole layers; "
                f"set recompute_granularity full (now {self.granularity}) or leave them unset"
            )
        if self.granularity == "full" and (self.method not in ("uniform", "block") or not self.num_layers):
            raise ValueError(
                f"recompute_granularity full needs recompute_method uniform or block, got {self.method}, and "
                f"recompute_num_layers of at least 1, got {self.num_layers}; uniform with 1 keeps least"
            )


def check_layout(shape: ModelShape, layout: ParallelLayout, *, whose: str = "the model's") -> None:
    """ValueError when a model cannot be cut this way, naming the size at fault."""
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    for name in ("num_attention_heads", "ffn_hidden_size"):
        if getattr(shape, name) % tp:
            raise ValueError(
                f"tensor_model_parallel_size {tp} does not divide {whose} {name} {getattr(shape, name)}; choose a divisor"
            )
    check_experts(shape, layout, whose=whose)
    groups = shape.num_query_groups
    if groups % tp and tp % groups:
        raise ValueError(
            f"tensor_model_parallel_size {tp} and {whose} num_query_groups {groups}: one must divide the other; choose such "
            "a size"
        )
    heads, groups = shape.num_attention_heads // tp, max(groups // tp, 1)
    if heads % cp or (groups % cp and cp % groups):
        raise ValueError(
            f"context_parallel_size {cp} shares out {whose} {heads} query and {groups} key-value heads of a tensor-parallel "
            "rank: it must divide the first, and divide or be a multiple of the second; choose such a cp"
        )
    num_chunks = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size or 1)
    if shape.num_layers % num_chunks:
        raise ValueError(
            f"{whose} num_layers {shape.num_layers} is not a multiple of the {num_chunks} pipeline chunks (pp "
            f"{layout.pipeline_model_parallel_size} x virtual {layout.virtual_pipeline_model_parallel_size or 1}); change "
            "one of them"
        )


def check_recompute(shape: ModelShape, layout: ParallelLayout, recompute: Recompute) -> None:
    """ValueError when the units of `uniform` do not fill a model chunk; Megatron would run past its last layer."""
    num_chunks = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size or 1)
    held = shape.num_layers // num_chunks
    if recompute.method == "uniform" and recompute.num_layers and held % recompute.num_layers:
        raise ValueError(
            f"recompute_num_layers {recompute.num_layers} with recompute_method uniform does not divide the {held} layers "
            "of a model chunk; choose a divisor, 1 keeps least"
        )


def transformer_config(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    recompute: Recompute | None = None,
    transformer_impl: str = "auto",
) -> TransformerConfig:
    """Megatron's configuration of `shape`, with the settings that packed rows, CPU hosts and our loss rely on."""
    recompute = recompute or Recompute()
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    found = accelerators.find()
    impl = accelerators.choose(transformer_impl, found)
    accelerators.log_choice(impl, found)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.layernorm_epsilon,
        qk_layernorm=shape.qk_layernorm,
        add_qkv_bias=shape.add_qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # Megatron's hook for an activation module: layers.SwiGLU
        hidden_dropout=0.0,
        attention_dropout=0.0,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity=recompute.granularity,
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers,
        variable_seq_lengths=True,  # microbatches differ in T; the config check ties it to the alltoall dispatcher
        moe_token_dispatcher_type="alltoall",
        **expert_options(shape, layout),
        overlap_p2p_comm=interleaved,  # interleaving without it receives wrong tensors in silence
        batch_p2p_comm=not interleaved,
        calculate_per_token_loss=True,  # loss_weight already normalises: no division by data-parallel size
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # initialize_weights draws per name instead
        **accelerators.config_settings(impl, found),
        cuda_graph_scope=[],  # the default is a deprecated word for this
    )


def _block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's local layer with our norm, attention and activation in it, for the layers of this chunk."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    expert_mlp(parts.mlp).submodules.activation_func = SwiGLU
    accelerators.fit_layer(layer, config.transformer_impl)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def build_model(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int | None,
    wrap_ddp: bool,
    recompute: Recompute | None = None,
    use_distributed_optimizer: bool = False,
    transformer_impl: str = "auto",
) -> list[torch.nn.Module]:
    """This rank's model chunks: one, or `virtual_pipeline_model_parallel_size` of them. Collective.

    `seed` None leaves the weights unset for a loader that sets every one of them. With `wrap_ddp` each chunk is wrapped
    in Megatron's DistributedDataParallel and holds fp32 `main_grad` buffers, otherwise no parameter takes gradients. With
    `use_distributed_optimizer` gradients are reduced to the rank that owns a part of them and are whole on none.
    ValueError when the layout does not divide the shape.
    """
    check_layout(shape, layout)
    check_recompute(shape, layout, recompute or Recompute())
    if wrap_ddp:
        check_trainable(shape, layout)
    config = transformer_config(shape, layout, dtype=dtype, recompute=recompute, transformer_impl=transformer_impl)
    num_chunks = layout.virtual_pipeline_model_parallel_size or 1
    stages = [None] if num_chunks == 1 else list(range(num_chunks))
    chunks: list[torch.nn.Module] = [_build_chunk(shape, config, vp_stage) for vp_stage in stages]
    mark_parameters(chunks)
    if seed is not None:
        initialize_weights(chunks, shape, seed=seed)
    if not wrap_ddp:
        return [chunk.requires_grad_(False) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=use_distributed_optimizer
    )
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def _build_chunk(shape: ModelShape, config: TransformerConfig, vp_stage: int | None) -> GPTModel:
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    chunk_index = vp_stage or 0
    with cpu.tensor_cuda_is_identity():
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(config, vp_stage),
            vocab_size=padded_vocab_size(shape.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=parallel.is_first_stage() and chunk_index == 0,
            post_process=parallel.is_last_stage() and chunk_index == num_chunks - 1,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="none",  # PackedAttention rotates
            vp_stage=vp_stage,
        )
    if chunk.post_process:
        chunk.output_layer.__class__ = HiddenOutput  # GPTModel's constructor takes no output layer; weight and keys stay
    chunk.shape = shape
    return chunk.to(parallel.device())


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel, or the chunk itself."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk


def named_parameters(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under their name in the whole model: layers are counted over all stages, and experts over all
    expert-parallel ranks.

    The output layer of a tied model is a copy of the embedding on a last stage that is not the first; it appears there
    as `output_layer.weight`.
    """
    for chunk in map(unwrap, chunks):
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer = chunk.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
                if "local_experts" in parts:
                    place = parts.index("local_experts") + 1
                    parts[place] = str(layer.mlp.local_expert_indices[int(parts[place])])
            yield ".".join(parts), parameter


def mark_parameters(chunks: list[torch.nn.Module]) -> None:
    """Set what Megatron's own initialisation would: which parameters are cut, so that the norm counts each once."""
    for name, parameter in named_parameters(chunks):
        layout = LAYOUTS[kind_of(name)]
        if layout.dim is not None:
            for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)
            set_tensor_model_parallel_attributes(parameter, True, layout.dim, layout.stride)


def initialize_weights(chunks: list[torch.nn.Module], shape: ModelShape, *, seed: int) -> None:
    """Draw every weight from a generator of its own, seeded by `seed` and its name: equal in every layout.

    Normal with `init_std`, divided by sqrt(2 * num_layers) where a layer adds to the residual stream; norms one, biases
    and vocabulary padding zero.
    """
    for name, parameter in named_parameters(chunks):
        kind = kind_of(name)
        full = _draw(name, kind, parameter, shape, seed=seed)
        part = LAYOUTS[kind].cut(full, tp_size=parallel.tp_size(), tp_rank=parallel.tp_rank())
        parameter.data.copy_(part)


def _draw(name: str, kind: str, parameter: Tensor, shape: ModelShape, *, seed: int) -> Tensor:
    """The full fp32 tensor of one parameter, vocabulary padding included."""
    sizes = list(parameter.shape)
    if LAYOUTS[kind].dim is not None:
        sizes[LAYOUTS[kind].dim] *= parallel.tp_size()
    if name.endswith("layernorm.weight"):
        return torch.ones(sizes)
    if name.endswith(".bias"):
        return torch.zeros(sizes)
    if shape.tie_word_embeddings and name == "output_layer.weight":
        name = "embedding.word_embeddings.weight"
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    std = shape.init_std / (2 * shape.num_layers) ** 0.5 if kind == "row" else shape.init_std
    if kind != "vocab":
        return torch.empty(sizes).normal_(0.0, std, generator=generator)
    full = torch.zeros(sizes)  # [V_padded, H]
    full[: shape.vocab_size] = torch.empty(shape.vocab_size, sizes[1]).normal_(0.0, std, generator=generator)
    return full


def packed_rows(chunk: torch.nn.Module, microbatch: Microbatch) -> PackedRows:
    """What the attention of `chunk` needs to know about the rows of a microbatch.

    ValueError when a row is longer than the positions that the model knows.
    """
    model: Any = unwrap(chunk)
    shape: ModelShape = model.shape
    rows = PackedRows.build(
        microbatch.cu_seqlens,
        microbatch.parents,
        head_dim=shape.kv_channels,
        rotary_base=shape.rotary_base,
        rope_scaling=shape.rope_scaling,
        dtype=model.config.params_dtype,
    )
    if rows.max_seqlen_kv > shape.max_position_embeddings:
        raise ValueError(
            f"a row has {rows.max_seqlen_kv} tokens, the model knows {shape.max_position_embeddings} positions "
            "(max_position_embeddings); limit the context of the rollouts to that"
        )
    return rows


def forward_hidden(chunk: torch.nn.Module, microbatch: Microbatch, *, rows: PackedRows | None = None) -> Tensor:
    """One chunk's forward pass over packed rows; `rows` saves working them out again for a further chunk.

    `microbatch` is what `context.own_part` returns. The last chunk of the pipeline returns the hidden states after the
    final norm [1, T/cp, H] (batch first, as Megatron leaves its output), any other chunk [T/cp, 1, H] for the next stage,
    or this rank's [T/cp/tp, 1, H] under sequence parallelism. The input of a chunk that is not the first is what the
    schedule set with `set_input_tensor`.
    """
    if rows is None:
        rows = packed_rows(chunk, microbatch)
    return chunk(microbatch.token_ids[None], None, None, packed_seq_params=rows)


def output_head(chunks: list[torch.nn.Module]) -> Tensor:
    """This rank's shard of the output head [V_padded/tp, H], the embedding where tied. Last stage only."""
    model = unwrap(chunks[-1])
    assert model.post_process, "only the last pipeline stage holds the output head"
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight
