"""The modules that replace Megatron's own inside a GPTModel: norm, SwiGLU, packed attention with RoPE, output layer.

    rows = PackedRows.build(microbatch.cu_seqlens, head_dim=32, rotary_base=1e6, dtype=torch.float32)
    hidden = model(token_ids[None], None, None, packed_seq_params=rows)      # [1, T, H] on the last stage

Rows of a packed microbatch attend only to themselves. `PackedRows` works out once per microbatch what every layer
needs: the rotation of each token, and how rows are laid side by side. Rows of similar length form a group, padded on
the right to the longest: one causal call of torch's scaled_dot_product_attention a group. Right padding is invisible
to the real tokens, because a causal query never looks right. A row that nothing resembles is a group of one.

RoPE is applied here and not by Megatron, which splits the packed tensor into rows and takes cos and sin anew for q and
k in every layer; the model is therefore built with `position_embedding_type="none"`.

Not here: dropout, biases of the dense layers, sliding windows, RoPE scaling, KV caches, Transformer Engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_tcod.model import parallel
from megatron_tcod.model.context import to_heads, to_tokens

SIMILAR_LENGTH = 0.7
"""A row joins a group when it is at least this fraction of the group's longest: padding stays under 1 / 0.7 in tokens
and 1 / 0.49 in attention scores."""


@dataclass(frozen=True)
class RowGroup:
    """Rows of similar length, padded to the longest.

    Example: rows [0, 3) and [3, 5) of a packed microbatch: `num_rows=2, length=3, gather=[0, 1, 2, 3, 4, 4]`,
    `slots=[0, 1, 2, 3, 4]`, `tokens=[0, 1, 2, 3, 4]`.
    """

    num_rows: int
    length: int
    gather: Tensor  # [num_rows * length] packed index of each slot; padding repeats the row's last token
    slots: Tensor  # [N] slots that are not padding, in the order of `tokens`
    tokens: Tensor  # [N] their packed index


@dataclass
class PackedRows(PackedSeqParams):
    """What the attention layers need to know about one packed microbatch."""

    cos: Tensor | None = None  # [T, 1, D/2]
    sin: Tensor | None = None  # [T, 1, D/2]
    groups: tuple[RowGroup, ...] = ()
    restore: Tensor | None = None  # [T] position of each packed token in the concatenated groups; None when in order

    @classmethod
    def build(cls, cu_seqlens: Tensor, *, head_dim: int, rotary_base: float, dtype: torch.dtype) -> PackedRows:
        """From `cu_seqlens [B+1]`. Positions restart at 0 in every row; rows of no token are allowed."""
        bounds = cu_seqlens.tolist()
        device = cu_seqlens.device
        starts = cu_seqlens[:-1].cpu().long().repeat_interleave(cu_seqlens.diff().cpu())  # [T] of each token's row
        positions = torch.arange(len(starts)) - starts  # [T]
        # fp32 like the Hugging Face models: the angle of a long row loses too much in bf16.
        frequencies = 1.0 / rotary_base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)  # [D/2]
        angles = positions.float()[:, None, None] * frequencies  # [T, 1, D/2]
        groups = tuple(_row_group(rows, device) for rows in _similar_rows(bounds))
        order = torch.cat([group.tokens for group in groups]) if groups else torch.empty(0, dtype=torch.int64)
        in_order = bool((order[1:] > order[:-1]).all())
        longest = max((group.length for group in groups), default=0)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            cos=angles.cos().to(device, dtype),
            sin=angles.sin().to(device, dtype),
            groups=groups,
            restore=None if in_order else torch.argsort(order),
        )


def _similar_rows(bounds: list[int]) -> list[list[tuple[int, int]]]:
    """Rows `[start, stop)` sorted into groups of similar length, longest group first, packed order within a group."""
    rows = [(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False) if stop > start]
    groups: list[list[tuple[int, int]]] = []
    for start, stop in sorted(rows, key=lambda row: row[0] - row[1]):
        if groups and stop - start >= SIMILAR_LENGTH * (groups[-1][0][1] - groups[-1][0][0]):
            groups[-1].append((start, stop))
        else:
            groups.append([(start, stop)])
    return [sorted(group) for group in groups]


def _row_group(rows: list[tuple[int, int]], device: torch.device) -> RowGroup:
    length = max(stop - start for start, stop in rows)
    starts = torch.tensor([start for start, _ in rows])[:, None]  # [rows, 1]
    lengths = torch.tensor([stop - start for start, stop in rows])[:, None]  # [rows, 1]
    offsets = torch.arange(length)[None]  # [1, length]
    gather = (starts + torch.minimum(offsets, lengths - 1)).flatten()  # [rows * length]
    slots = (offsets < lengths).flatten().nonzero().flatten()  # [N]
    return RowGroup(len(rows), length, gather.to(device), slots.to(device), gather[slots].to(device))


class _ToSlots(torch.autograd.Function):
    """Packed [T, n, D] -> padded [rows, n, length, D]. A padded slot has no gradient, so backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, group: RowGroup) -> Tensor:
        ctx.group, ctx.num_tokens = group, packed.size(0)
        padded = packed.index_select(0, group.gather)
        return padded.view(group.num_rows, group.length, *packed.shape[1:]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        group = ctx.group
        flat = grad.transpose(1, 2).reshape(group.num_rows * group.length, grad.size(1), grad.size(3))
        real = flat.index_select(0, group.slots)  # [N, n, D]
        if real.size(0) == ctx.num_tokens:  # the only group: its tokens are in packed order
            return real, None
        return grad.new_zeros(ctx.num_tokens, *real.shape[1:]).index_copy_(0, group.tokens, real), None


class _FromSlots(torch.autograd.Function):
    """Padded [rows, n, length, D] -> real tokens [N, n, D] of the group."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, group: RowGroup) -> Tensor:
        ctx.group = group
        flat = padded.transpose(1, 2).reshape(group.num_rows * group.length, padded.size(1), padded.size(3))
        return flat.index_select(0, group.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        group = ctx.group
        flat = grad.new_zeros(group.num_rows * group.length, *grad.shape[1:]).index_copy_(0, group.slots, grad)
        return flat.view(group.num_rows, group.length, *grad.shape[1:]).transpose(1, 2), None


class _Rotate(torch.autograd.Function):
    """RoPE on halves: (a, b) -> (a cos - b sin, b cos + a sin). Backward is the rotation the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def packed_attention(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, *, scale: float) -> Tensor:
    """Causal attention within each row. query [T, n, D], key and value [T, n_kv, D] -> [T, n, D]."""
    outputs = []
    for group in rows.groups:
        q, k, v = (_ToSlots.apply(x, group) for x in (query, key, value))  # [rows, n, length, D]
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
        outputs.append(_FromSlots.apply(attended, group))
    if not outputs:
        return query * 0.0
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return packed if rows.restore is None else packed.index_select(0, rows.restore)


class PackedAttention(MegatronModule):
    """The `core_attention` of a layer, RoPE included; `packed_seq_params` must be `PackedRows`."""

    def __init__(self, config: Any, layer_number: int, *args: Any, softmax_scale: float | None = None, **kwargs: Any):
        super().__init__(config=config)
        assert config.attention_dropout == 0.0
        self.cp_group = parallel.cp_group()
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,  # [T/cp, n/tp, D]
        key: Tensor,  # [T/cp, n_kv/tp, D]
        value: Tensor,  # [T/cp, n_kv/tp, D]
        attention_mask: None = None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> Tensor:
        """[T/cp, n/tp * D]"""
        assert attention_mask is None and attention_bias is None, "packed rows are causal and carry no mask"
        assert isinstance(packed_seq_params, PackedRows), "pass PackedRows as packed_seq_params"
        rows = packed_seq_params
        query, key, value = (to_heads(x, self.cp_group) for x in (query, key, value))  # [T, n/tp/cp, D]
        query, key = _Rotate.apply(query, rows.cos, rows.sin), _Rotate.apply(key, rows.cos, rows.sin)
        output = packed_attention(query, key, value, rows, scale=self.scale)  # [T, n/tp/cp, D]
        return to_tokens(output, self.cp_group).flatten(1)


class _RMSNorm(torch.autograd.Function):
    """x * rsqrt(mean(x^2) + eps) * weight, statistics in fp32 or wider; x itself and one number a row are saved.

    With n = x * rstd: dx = rstd * (dy * weight - n * mean(dy * weight * n)), dweight = sum(dy * n). Torch's own backward
    on a CPU takes four times as long, a fifth of a small model's step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        flat = x.reshape(-1, x.size(-1))  # [N, H]
        length = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=wide)  # [N, 1]
        rstd = length.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # [N, 1]
        ctx.save_for_backward(flat, weight, rstd)
        return (flat * rstd).mul_(weight).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        flat, weight, rstd = ctx.saved_tensors
        normed = flat * rstd  # [N, H]
        grad_wide, weight_wide = grad.reshape(flat.shape).to(normed.dtype), weight.to(normed.dtype)
        product = grad_wide * normed  # [N, H]
        grad_weight = product.sum(0)  # [H]
        mean = (product @ weight_wide).div_(flat.size(-1))[:, None]  # [N, 1]
        grad_x = torch.mul(grad_wide, weight_wide, out=product).addcmul_(normed, mean, value=-1).mul_(rstd)
        return grad_x.to(grad.dtype).view(grad.shape), grad_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, with Megatron's constructor.

    Under sequence parallelism a rank sees only its tokens, and Megatron sums the gradients of weights so marked.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up; only the input is saved."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


class SwiGLU(torch.nn.Module):
    """The MLP's activation on the fused gate-up projection: [..., 2F/tp] -> [..., F/tp]."""

    def __init__(self, config: Any):
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return _SwiGLU.apply(gate_up)


class HiddenOutput(ColumnParallelLinear):
    """An output layer that owns its weight and its checkpoint keys but hands the hidden states on.

    The loss projects to the vocabulary at the trained positions only. What the stock forward does besides the product
    is the objective's part: summing the hidden gradient over the tensor-parallel ranks. Under sequence parallelism the
    ranks' tokens are gathered here: the objective wants the same rows on each of them.
    """

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if self.config.sequence_parallel:  # [T/cp/tp, 1, H] -> [T/cp, 1, H]; the gradient comes back already summed
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=False)
        return input_, None
