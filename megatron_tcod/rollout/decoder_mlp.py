"""What a decoder layer does after its attention: one SwiGLU, or a router over many of them.

    mlp = take_dense(take, "model.layers.0.mlp.", hidden=64, ffn=192, has_bias=False)
    x = mlp(normed, residual=x)                                # [T, H]

`take(name, *size)` hands over a weight of that name and size. Matrices are kept as [in, out]; gate and up are copied into
one, everything else is kept by reference. Experts run one after the other over the tokens that chose them: no grouped
products, no dropping, no shared expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Take = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """How a router chooses. Example: `ExpertChoice(num_experts=128, num_chosen=8, normalizes=True)`"""

    num_experts: int
    num_chosen: int
    """Per token."""
    normalizes: bool
    """Whether the weights of the chosen experts are divided by their sum."""


def affine(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, *, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """residual + x @ matrix + bias, with whatever of it there is."""
    if residual is None:
        return torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)
    y = torch.addmm(residual, x, matrix)
    return y if bias is None else y.add_(bias)


@dataclass
class DenseMLP:
    """SwiGLU."""

    gate_up: torch.Tensor  # [H, 2 F]
    gate_up_bias: torch.Tensor | None  # [2 F]
    down: torch.Tensor  # [F, H]
    down_bias: torch.Tensor | None  # [H]

    def __call__(self, x: torch.Tensor, *, residual: torch.Tensor | None) -> torch.Tensor:
        gate, up = affine(x, self.gate_up, self.gate_up_bias).chunk(2, dim=-1)  # [T, F] each
        return affine(F.silu(gate).mul_(up), self.down, self.down_bias, residual=residual)


@dataclass
class ExpertMLP:
    """A weighted sum over the experts that each token's router logits choose."""

    router: torch.Tensor  # [H, E]
    experts: list[DenseMLP]
    choice: ExpertChoice

    def __call__(self, x: torch.Tensor, *, residual: torch.Tensor | None) -> torch.Tensor:
        shares = torch.softmax(torch.mm(x, self.router), dim=-1, dtype=torch.float32)  # [T, E]
        weights, chosen = shares.topk(self.choice.num_chosen, dim=-1)  # [T, k]
        if self.choice.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        total = torch.zeros_like(x) if residual is None else residual.clone()  # [T, H]
        for expert in chosen.unique().tolist():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            output = self.experts[expert](x[rows], residual=None)  # [rows, H]
            total.index_add_(0, rows, output * weights[rows, place, None].to(output.dtype))
        return total


def take_dense(take: Take, prefix: str, *, hidden: int, ffn: int, has_bias: bool) -> DenseMLP:
    """The SwiGLU whose weights are named `<prefix>gate_proj.weight` and so on."""
    names = ("gate_proj", "up_proj")
    bias = torch.cat([take(f"{prefix}{name}.bias", ffn) for name in names]) if has_bias else None
    return DenseMLP(
        gate_up=torch.cat([take(f"{prefix}{name}.weight", ffn, hidden) for name in names]).t().contiguous(),
        gate_up_bias=bias,
        down=take(f"{prefix}down_proj.weight", hidden, ffn).t(),
        down_bias=take(f"{prefix}down_proj.bias", hidden) if has_bias else None,
    )


def take_experts(take: Take, prefix: str, *, hidden: int, ffn: int, choice: ExpertChoice) -> ExpertMLP:
    """The experts `<prefix>experts.<number>.` under the router `<prefix>gate.weight`."""
    experts = [
        take_dense(take, f"{prefix}experts.{number}.", hidden=hidden, ffn=ffn, has_bias=False)
        for number in range(choice.num_experts)
    ]
    return ExpertMLP(router=take(f"{prefix}gate.weight", choice.num_experts, hidden).t(), experts=experts, choice=choice)
