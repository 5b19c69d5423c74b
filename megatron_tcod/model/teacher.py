"""The frozen model whose distribution the student follows.

    teacher = Teacher(shape, layout, seed=None)       # then load its weights into teacher.chunks
    targets = teacher.score(microbatches)             # [TeacherTarget] on the last stage, [None] elsewhere

It shares the student's process groups, not its shape: width, depth, heads and the shapes that travel between stages are
its own. It keeps hidden states at the trained positions, not logits, and never gradients or optimizer state.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_tcod.model import build, parallel
from megatron_tcod.model.build import ModelShape
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.schedule import run_schedule
from megatron_tcod.ops.vocab_shard import align_head
from megatron_tcod.trajectory import Microbatch, TeacherTarget


class Teacher:
    """Frozen model chunks of this rank: `chunks` holds one GPTModel."""

    def __init__(
        self,
        shape: ModelShape,
        layout: ParallelLayout,
        *,
        seed: int | None,
        dtype: torch.dtype = torch.float32,
        transformer_impl: str = "auto",
    ):
        """Collective. With `seed` None the weights are unset until they are loaded.

        A forward pass gains nothing from interleaving, so a virtual pipeline in `layout` is the student's alone.
        """
        self.shape = shape
        self.layout = dataclasses.replace(layout, virtual_pipeline_model_parallel_size=None)
        self.chunks = build.build_model(
            shape, self.layout, dtype=dtype, seed=seed, wrap_ddp=False, transformer_impl=transformer_impl
        )
        for chunk in self.chunks:
            chunk.eval()
        self._head: Tensor | None = None

    @torch.no_grad()
    def align_vocabulary(self, student: ModelShape) -> None:
        """Cut the head at the student's shard boundaries. Collective; call it once, after the weights are loaded.

        Vocabularies that are padded to different sizes have different ids on a rank. Ids that only the teacher has are
        dropped; they must not be among the objective's `vocab_size`.
        """
        tp = self.layout.tensor_model_parallel_size
        ours, theirs = (build.padded_vocab_size(shape.vocab_size, tp) for shape in (self.shape, student))
        if ours != theirs and tp > 1 and parallel.is_last_stage():
            known = min(self.shape.vocab_size, student.vocab_size)
            self._head = align_head(build.output_head(self.chunks).detach(), known, theirs, parallel.tp_group())

    @torch.no_grad()
    def score(self, microbatches: list[Microbatch]) -> list[TeacherTarget | None]:
        """Hidden states at each microbatch's positions [S, H_t] with this rank's head shard. Collective in the replica.

        None on every stage but the last.
        """
        targets: list[TeacherTarget | None] = [None for _ in microbatches]
        if parallel.is_last_stage():
            head = build.output_head(self.chunks).detach() if self._head is None else self._head  # [V_padded/tp, H_t]
            nothing = head.new_empty(0, self.shape.hidden_size)  # [0, H_t]
            targets = [TeacherTarget(hidden=nothing, head=head) for _ in microbatches]

        def on_hidden(index: int, hidden: Tensor) -> Tensor:
            targets[index] = dataclasses.replace(targets[index], hidden=hidden)
            return hidden.new_zeros(())

        run_schedule(self.chunks, self.layout, microbatches, on_hidden, forward_only=True)
        return targets
