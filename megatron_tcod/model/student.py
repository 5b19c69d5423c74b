"""The trained model: Megatron chunks, gradients, clipping, Adam and its schedule.

    student = Student(shape, layout, OptimizerSettings(lr=1e-4, lr_decay_iters=1000), seed=0)
    stats = student.train_step(microbatches, targets, objective)        # every rank calls it

The loss is sum(loss_weight * per_token) over all microbatches of all replicas: `loss_weight` carries every
normalisation, so nothing here divides by tokens, microbatches or replicas, and the gradient does not depend on how rows
are packed or ranks are laid out.

Weights come from and go to Hugging Face names in `mapping.py`; files are `checkpoint.py`'s matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_tcod.model import build, context, cpu, parallel
from megatron_tcod.model.adam_shards import MOMENTS, adam_shards, gather
from megatron_tcod.model.build import Recompute
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.schedule import run_schedule
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.objective import Objective
from megatron_tcod.trajectory import Microbatch, TeacherTarget


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate, under Megatron's names.

    Example: `OptimizerSettings(lr=1e-4, lr_decay_style="cosine", lr_warmup_iters=10, lr_decay_iters=1000)`
    """

    lr: float
    lr_decay_iters: int = 1
    """Optimizer steps until `min_lr` is reached; of no effect with the constant style."""
    min_lr: float = 0.0
    lr_decay_style: str = "constant"
    """`constant`, `linear`, `cosine` or `inverse-square-root`."""
    lr_warmup_iters: int = 0
    """Optimizer steps of linear warm-up from 0; as in Megatron the first of them runs at 0."""
    weight_decay: float = 0.0
    """Decoupled; not applied to norms and biases."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    use_distributed_optimizer: bool = False
    """Each data-parallel rank holds and steps its part of Adam's state (and of the fp32 master weights)."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}")
        if self.lr_decay_style != "constant" and self.lr_warmup_iters >= self.lr_decay_iters:
            raise ValueError(
                f"lr_warmup_iters {self.lr_warmup_iters} must be smaller than lr_decay_iters {self.lr_decay_iters}"
            )
        if self.lr_decay_style not in ("constant", "linear", "cosine", "inverse-square-root"):
            raise ValueError(
                f"lr_decay_style {self.lr_decay_style!r} is none of constant, linear, cosine, inverse-square-root"
            )


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one optimizer step did; equal on every rank, but for `per_token`, which is the replica's own."""

    loss: float
    """sum(loss_weight * per_token) over all replicas."""
    grad_norm: float
    """Of the whole model, before clipping."""
    lr: float
    """That this step used."""
    is_finite: bool
    """False when the loss or the gradient was not finite: no weight has changed, the schedule has not advanced."""
    per_token: list[dict[str, Tensor]]
    """Per microbatch of this replica: `loss` and the objective's figures, fp32 [S], on every rank. A microbatch with no
    trained position has the same keys with empty tensors."""


class Student:
    """Model chunks of this rank with their optimizer.

    `chunks`: GPTModels inside Megatron's DistributedDataParallel. `optimizer`: a MegatronOptimizer around torch's or
    the fused AdamW. `scheduler`: an OptimizerParamScheduler that counts optimizer steps.
    """

    def __init__(
        self,
        shape: ModelShape,
        layout: ParallelLayout,
        settings: OptimizerSettings,
        *,
        seed: int | None,
        dtype: torch.dtype = torch.float32,
        recompute: Recompute | None = None,
        transformer_impl: str = "auto",
    ):
        """Collective. With `seed` None the weights are unset: load them, then call `weights_loaded`."""
        self.shape, self.layout, self.settings = shape, layout, settings
        self.chunks = build.build_model(
            shape,
            layout,
            dtype=dtype,
            seed=seed,
            wrap_ddp=True,
            recompute=recompute,
            use_distributed_optimizer=settings.use_distributed_optimizer,
            transformer_impl=transformer_impl,
        )
        build.unwrap(self.chunks[0]).config.finalize_model_grads_func = _reduce_gradients
        self.optimizer = _adam(self.chunks, settings, dtype)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.lr_warmup_iters,
            lr_decay_steps=max(settings.lr_decay_iters, settings.lr_warmup_iters + 1),
            lr_decay_style=settings.lr_decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,  # after a resume the settings given now count, and Megatron does not assert
        )

    def weights_loaded(self) -> None:
        """Tell a mixed-precision optimizer that the model's weights were set from outside."""
        self.optimizer.reload_model_params()

    def train_step(
        self, microbatches: list[Microbatch], targets: list[TeacherTarget | None], objective: Objective
    ) -> StepStats:
        """One optimizer step on the microbatches of all replicas. Collective over the world.

        `targets[i]` belongs to `microbatches[i]` and is read on the last stage only; its rows are the trained positions
        in `context.own_span`, all of them where there is no context parallelism.
        """
        per_token = self.compute_gradients(microbatches, targets, objective)
        loss = _global_loss(microbatches, per_token)
        grad_norm, is_finite = self._prepare_gradients(loss)
        lr = self.optimizer.param_groups[0]["lr"]
        if is_finite:
            self.optimizer.step_with_ready_grads()
            self.scheduler.step(1)
        return StepStats(loss=loss, grad_norm=grad_norm, lr=lr, is_finite=is_finite, per_token=per_token)

    def compute_gradients(
        self, microbatches: list[Microbatch], targets: list[TeacherTarget | None], objective: Objective
    ) -> list[dict[str, Tensor]]:
        """Fill every parameter's `main_grad` with the gradient summed over replicas; the per-token figures."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(microbatches, targets, objective, forward_only=False)

    @torch.no_grad()
    def measure(
        self, microbatches: list[Microbatch], targets: list[TeacherTarget | None], objective: Objective
    ) -> list[dict[str, Tensor]]:
        """The per-token figures of `train_step`, without gradients. Collective in the replica, and over all replicas where
        they share out experts."""
        return self._run(microbatches, targets, objective, forward_only=True)

    def adam_states(self) -> Iterator[tuple[str, torch.nn.Parameter, dict[str, Tensor]]]:
        """Name in the whole model, parameter, and its Adam state (`exp_avg`, `exp_avg_sq` of the parameter's shape, `step`),
        zeros where the optimizer has not stepped yet.

        Without the distributed optimizer, writing into the tensors writes the optimizer's state. With it they are gathered,
        so every rank must take every item, and `adam_shards` has what can be written.
        """
        for shard in adam_shards(self.chunks, self.optimizer):
            whole = {kind: gather(shard, shard.state[kind]) for kind in MOMENTS}
            yield shard.name, shard.parameter, {"step": shard.state["step"], **whole}

    def _run(
        self,
        microbatches: list[Microbatch],
        targets: list[TeacherTarget | None],
        objective: Objective,
        *,
        forward_only: bool,
    ) -> list[dict[str, Tensor]]:
        if len(targets) != len(microbatches):
            raise ValueError(f"{len(targets)} targets for {len(microbatches)} microbatches; pass one each, or None")
        per_token: list[dict[str, Tensor]] = [{} for _ in microbatches]
        head = build.output_head(self.chunks) if parallel.is_last_stage() else None
        own = [context.own_part(microbatch, self.layout) for microbatch in microbatches]

        def on_hidden(index: int, hidden: Tensor) -> Tensor:
            assert head is not None
            losses = objective(
                hidden,
                head if forward_only else _HeadWithMainGrad.apply(head),
                targets[index],
                own[index],
                tp_group=parallel.tp_group(),
                head_grad=None if forward_only else head.main_grad,
            )
            per_token[index] = {"loss": losses.loss, **losses.stats}
            return losses.total

        run_schedule(self.chunks, self.layout, microbatches, on_hidden, forward_only=forward_only)
        spans = [context.own_span(microbatch, self.layout) for microbatch in microbatches]
        return _share_per_token([len(microbatch.positions) for microbatch in microbatches], spans, per_token)

    @torch.no_grad()
    def _prepare_gradients(self, loss: float) -> tuple[float, bool]:
        """Hand the gradients to the optimizer, clipped. The global norm before clipping; whether a step may be made."""
        overflow = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        is_finite = not overflow and math.isfinite(grad_norm) and math.isfinite(loss)
        clip = self.settings.clip_grad
        # Megatron's own clipping asserts the string type of a CUDA tensor; the public parts of its step do not.
        if is_finite and 0.0 < clip < grad_norm:
            optimizers = getattr(self.optimizer, "chained_optimizers", [self.optimizer])  # shared experts have their own
            parameters = [parameter for optimizer in optimizers for parameter in optimizer.get_parameters()]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, clip / (grad_norm + 1e-6))
        return grad_norm, is_finite


class _HeadWithMainGrad(torch.autograd.Function):
    """The output head for an objective that adds the head's gradient to `main_grad` itself.

    Megatron's protocol for that (its LinearWithGradAccumulationAndAsyncCommunication): hand a gradient on all the same, so
    that DistributedDataParallel learns that the parameter is ready, and mark it as one not to be added. A weight that is
    the embedding too gets its other part by that way, so there the gradient must be zero (`zero_out_wgrad`).
    """

    @staticmethod
    def forward(ctx: Any, head: torch.nn.Parameter) -> Tensor:
        ctx.head = head
        ctx.set_materialize_grads(False)
        return head.view_as(head)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor:  # type: ignore[override]
        if grad is not None:  # an objective without use for head_grad
            return grad
        ctx.head.grad_added_to_main_grad = True
        return torch.zeros_like(ctx.head) if getattr(ctx.head, "zero_out_wgrad", False) else torch.empty_like(ctx.head)


def _reduce_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None, **groups: Any) -> None:
    """Megatron's reduction over replicas, tied embeddings and norms, without its division by the number of tokens.

    The one place where Megatron's normalisation is undone: `calculate_per_token_loss` keeps the schedules from dividing
    by microbatches and DistributedDataParallel from dividing by replicas, and num_tokens=None skips the division that
    is meant to take their place. `loss_weight` has divided already.
    """
    finalize_model_grads(model, None, **groups)


def _adam(chunks: list[torch.nn.Module], settings: OptimizerSettings, dtype: torch.dtype) -> Any:
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=0.0,  # Student clips
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        params_dtype=dtype,
    )
    with cpu.tensor_type_names_cuda():
        return get_megatron_optimizer(
            config, chunks, config_overrides=get_standard_config_overrides(config), use_gloo_process_groups=False
        )


def _global_loss(microbatches: list[Microbatch], per_token: list[dict[str, Tensor]]) -> float:
    """sum(loss_weight * per_token) over all replicas, in float64."""
    total = torch.zeros(1, dtype=torch.float64, device=parallel.device())
    for microbatch, figures in zip(microbatches, per_token, strict=True):
        if len(microbatch.positions):
            total += torch.dot(microbatch.loss_weight.double(), figures["loss"].double())
    dist.all_reduce(total, group=parallel.dp_group())
    return float(total)


def _share_per_token(
    sizes: list[int], spans: list[slice], per_token: list[dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """Give every rank of the replica what its last stage computed, as one fp32 tensor [keys, sum of S].

    `sizes` are the S of each microbatch, `spans` the part of them that this rank's figures are about.
    """
    names = {key for figures in per_token for key in figures}
    for data in parallel.all_gather_bytes(json.dumps(sorted(names)).encode(), group=parallel.cp_group()):
        names.update(json.loads(data))
    source, group = parallel.last_stage_rank(), parallel.pp_group()
    keys = json.loads(parallel.broadcast_bytes(json.dumps(sorted(names)).encode(), source=source, group=group))
    table = torch.zeros(len(keys), sum(sizes), device=parallel.device())  # [keys, sum of S]
    if parallel.is_last_stage():
        for row, key in zip(table, keys, strict=True):
            for part, span, figures in zip(row.split(sizes), spans, per_token, strict=True):
                if key in figures:
                    part[span] = figures[key].float()
        if parallel.cp_size() > 1:  # the spans of different ranks do not overlap
            dist.all_reduce(table, group=parallel.cp_group())
    if parallel.pp_size() > 1 and table.numel():
        dist.broadcast(table, source, group=group)
    parts = table.split(sizes, 1)  # [keys, S] each
    return [dict(zip(keys, part, strict=True)) for part in parts]
