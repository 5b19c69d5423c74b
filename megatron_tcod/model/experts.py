"""A mixture of experts in Megatron's layers: the settings of its router and the modules that stand in for its own.

    config = TransformerConfig(..., **expert_options(shape, layout))   # nothing for a dense shape
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, ...)
    mlp = expert_mlp(layer.submodules.mlp)                             # the spec of one expert, to put an activation in

Top-k softmax routing as the Qwen models are trained: no token is dropped, and no balancing loss is added, because the
distillation loss alone is to train the router. Experts run one after the other (SequentialMLP).

Under expert parallelism each rank of `parallel.ep_group` holds an equal run of a layer's experts, and in every layer, in
the forward and in the backward pass, tokens travel to the ranks of their experts and back. These ranks belong to different
replicas, so all replicas must run the same number of microbatches: `schedule.py` sees to that. Megatron keeps gradients and
Adam's state of such experts apart from the rest, and reduces them over the ranks that hold the same experts.

Not here: shared experts, grouped products, and experts that are cut over fewer tensor-parallel ranks than the attention.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.shape import ModelShape


class Router(TopKRouter):
    """Megatron's router with its logits from torch: the stock ones call a Transformer Engine name that may be unbound."""

    def gating(self, input: Tensor) -> Tensor:
        """fp32 logits [T, 1, E] of hidden states [T, 1, H], from whichever precision both come in."""
        return F.linear(input.float(), self.weight.float())


def expert_options(shape: ModelShape, layout: ParallelLayout) -> dict[str, Any]:
    """What a `TransformerConfig` needs to know about the experts of `shape`."""
    experts = shape.experts
    if experts is None:
        return {}
    return dict(
        num_moe_experts=experts.num_experts,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.tensor_model_parallel_size,
        moe_ffn_hidden_size=experts.ffn_hidden_size,
        moe_router_topk=experts.num_experts_per_token,
        moe_router_pre_softmax=not experts.normalizes_weights,  # a softmax over the chosen ones is the normalised one
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
    )


def expert_mlp(mlp: ModuleSpec) -> ModuleSpec:
    """The spec of one MLP within a layer's: itself, or that of an expert beside our router."""
    if not hasattr(mlp.submodules, "experts"):
        return mlp
    mlp.submodules.router = Router
    return mlp.submodules.experts


def check_experts(shape: ModelShape, layout: ParallelLayout, *, whose: str = "the model's") -> None:
    """ValueError when tensor parallelism does not divide an expert, or expert parallelism their number.

    A dense model passes: beside one with experts, under the same layout, it has nothing to share out.
    """
    tp, ep = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    if shape.experts is not None and shape.experts.ffn_hidden_size % tp:
        raise ValueError(
            f"tensor_model_parallel_size {tp} does not divide {whose} ffn_hidden_size {shape.experts.ffn_hidden_size} of an "
            "expert; choose a divisor"
        )
    if shape.experts is not None and shape.experts.num_experts % ep:
        raise ValueError(
            f"expert_model_parallel_size {ep} does not divide {whose} {shape.experts.num_experts} experts of a layer; choose "
            "a divisor"
        )


def check_trainable(shape: ModelShape, layout: ParallelLayout) -> None:
    """ValueError for a layout in which Megatron runs experts but refuses to train them, or which shares out experts that
    the trained model does not have."""
    tp, ep = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    if shape.experts is None and ep > 1:
        raise ValueError(
            f"expert_model_parallel_size {ep} shares out experts and the trained model has none; set it to 1 (a teacher's "
            "experts have teacher_expert_model_parallel_size)"
        )
    if shape.experts is not None and tp > 1 and not layout.sequence_parallel:
        raise ValueError(
            f"a model with experts trains at tensor_model_parallel_size {tp} only with sequence_parallel, Megatron refuses "
            "the slow path without; set sequence_parallel, or tensor_model_parallel_size 1"
        )
