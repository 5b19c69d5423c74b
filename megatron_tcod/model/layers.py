"""The modules that replace Megatron's own inside a GPTModel: norm, SwiGLU, packed attention with RoPE, output layer.

    rows = PackedRows.build(microbatch.cu_seqlens, microbatch.parents, head_dim=32, rotary_base=1e6, dtype=torch.float32)
    hidden = model(token_ids[None], None, None, packed_seq_params=rows)      # [1, T, H] on the last stage

Rows of a packed microbatch attend only to themselves, and those that share a prefix attend to it together. `PackedRows`
works out once per microbatch what every layer needs: the rotation of each token, and how segments are laid side by side
for attention (`segments.py`, or a kernel of `flash_attention.py` where there is one).

RoPE is applied here and not by Megatron, which splits the packed tensor into rows and takes cos and sin anew for q and
k in every layer; the model is therefore built with `position_embedding_type="none"`.

Not here: dropout, biases of the dense layers, sliding windows, KV caches, Transformer Engine.
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
from megatron_tcod.model.flash_attention import find_kernel
from megatron_tcod.model.segments import SegmentPlan, kv_index, path_lengths, segment_attention
from megatron_tcod.model.shape import RopeScaling, rotary_frequencies
from megatron_tcod.trajectory import first_positions


@dataclass
class PackedRows(PackedSeqParams):
    """What the attention layers need to know about one packed microbatch."""

    cos: Tensor | None = None  # [T, 1, D/2]
    sin: Tensor | None = None  # [T, 1, D/2]
    kv_index: Tensor | None = None  # [cu_seqlens_kv[-1]] packed token of each key; None where keys lie as queries do
    parents: Tensor | None = None  # [B] the segment that each segment continues
    _plan: SegmentPlan | None = None

    @classmethod
    def build(
        cls,
        cu_seqlens: Tensor,
        parents: Tensor | None = None,
        *,
        head_dim: int,
        rotary_base: float,
        rope_scaling: RopeScaling | None = None,
        dtype: torch.dtype,
    ) -> PackedRows:
        """From a microbatch's `cu_seqlens [B+1]` and `parents`. Positions restart at 0 in every row, and go on from the
        segment that a segment continues; rows of no token are allowed."""
        device, lengths = cu_seqlens.device, cu_seqlens.diff().cpu()
        # Position minus packed index is the same for all tokens of a segment.
        offsets = torch.tensor(first_positions(cu_seqlens, parents), dtype=torch.int64) - cu_seqlens[:-1].cpu()  # [B]
        positions = torch.arange(int(cu_seqlens[-1])) + offsets.repeat_interleave(lengths)  # [T]
        # fp32 like the Hugging Face models: the angle of a long row loses too much in bf16.
        frequencies = rotary_frequencies(head_dim, rotary_base, rope_scaling)  # [D/2]
        angles = positions.float()[:, None, None] * frequencies  # [T, 1, D/2]
        paths = path_lengths(cu_seqlens, parents)  # [B]
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens if parents is None else F.pad(paths.cumsum(0, dtype=torch.int32), (1, 0)),
            max_seqlen_q=max(lengths.tolist(), default=0),
            max_seqlen_kv=max(paths.tolist(), default=0),
            cos=angles.cos().to(device, dtype),
            sin=angles.sin().to(device, dtype),
            kv_index=None if parents is None else kv_index(cu_seqlens, parents),
            parents=parents,
        )

    @property
    def plan(self) -> SegmentPlan:
        """For torch's attention, made once, when it is asked for."""
        if self._plan is None:
            self._plan = SegmentPlan.build(self.cu_seqlens_q, self.parents)
        return self._plan


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
    """Causal attention along each row. query [T, n, D], key and value [T, n_kv, D] -> [T, n, D]."""
    kernel = find_kernel(query.device.type, query.dtype)
    if kernel is None:
        return segment_attention(query, key, value, rows.plan, scale=scale)
    return kernel(query, key, value, rows, scale=scale)


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

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's MLP asks each of its parts; this one has no weights."""
        return {}


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
