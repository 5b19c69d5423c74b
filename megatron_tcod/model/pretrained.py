"""Student and teacher from Hugging Face directories or checkpoints, and training state to and from checkpoints.

    student = PretrainedStudent(directory, layout, settings, init="load", seed=0)
    engine.load_weights(student.hf_weights(), version=0)
    student.save(run / "checkpoints", step=10, state={...}, keep=2)      # with_hf_weights, in_background
    student.finish_saving()
    loaded = student.resume(run / "checkpoints")                        # None: nothing there yet
    teacher = load_teacher(directory, layout, student=student.shape)

What a family's tensors are called is `families/`, how they are cut is `mapping.py`, what a checkpoint is made of is
`checkpoint.py`; this file only holds the pieces of one model together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_tcod.model import checkpoint
from megatron_tcod.model.build import Recompute
from megatron_tcod.model.mapping import export_hf, load_hf, read_hf_config
from megatron_tcod.model.parallel import ParallelLayout, build_mesh
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.model.weight_files import MANIFEST_FILE


class PretrainedStudent(Student):
    """A `Student` that knows the names its weights have outside."""

    def __init__(
        self,
        directory: str | Path,
        layout: ParallelLayout,
        settings: OptimizerSettings,
        *,
        init: Literal["load", "random"] = "load",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        recompute: Recompute | None = None,
        transformer_impl: str = "auto",
    ):
        """Collective. `init` random reads config.json alone and draws the weights from `seed`, equally in every layout.

        ValueError when the directory, its config and its tensors do not agree.
        """
        self.directory = Path(directory)
        self._saver = checkpoint.BackgroundSaver()
        self.family, shape = read_hf_config(directory)
        drawn = seed if init == "random" else None
        super().__init__(
            shape, layout, settings, seed=drawn, dtype=dtype, recompute=recompute, transformer_impl=transformer_impl
        )
        if init == "load":
            verify_if_listed(directory)
            load_hf(self.chunks, directory, self.family, shape)
            self.weights_loaded()

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under Hugging Face names on every rank; every rank must take every item."""
        return export_hf(self.chunks, self.family, self.shape)

    def save(
        self,
        root: str | Path,
        *,
        step: int,
        state: Mapping[str, Any],
        keep: int,
        with_hf_weights: bool = False,
        in_background: bool = False,
    ) -> Path:
        """Write a checkpoint of weights, optimizer, scheduler, generators and `state`. Collective.

        `in_background` returns once all is copied to host memory; `finish_saving`, or the next save, raises what failed.
        """
        self.finish_saving()
        return checkpoint.save(
            root,
            step=step,
            chunks=self.chunks,
            family=self.family,
            shape=self.shape,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state=state,
            tokenizer=self.directory,
            keep=keep,
            with_hf_weights=with_hf_weights,
            saver=self._saver if in_background else None,
        )

    def finish_saving(self) -> None:
        """Return when no save is in progress; every rank must call it."""
        self._saver.wait()

    def resume(self, root: str | Path, *, allow_pickle: bool = False) -> checkpoint.Loaded | None:
        """Continue from the newest intact checkpoint, if there is one. Collective."""
        return checkpoint.load_latest(
            root,
            chunks=self.chunks,
            family=self.family,
            shape=self.shape,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            allow_pickle=allow_pickle,
        )


def verify_if_listed(directory: str | Path) -> None:
    """A directory with a manifest, a checkpoint for one, must be as the manifest says; others are as they are."""
    if (Path(directory) / MANIFEST_FILE).exists():
        checkpoint.verify(Path(directory))


def load_teacher(
    directory: str | Path,
    layout: ParallelLayout,
    *,
    student: ModelShape,
    dtype: torch.dtype = torch.float32,
    own_layout: ParallelLayout | None = None,
    offload: bool = False,
    transformer_impl: str = "auto",
    timeout_minutes: float = 10,
) -> Teacher:
    """The frozen teacher of a Hugging Face directory, its vocabulary cut like the student's. Collective.

    `layout` and `student` are the student's. With `own_layout` the teacher is cut by that over the same ranks; with
    `offload` its weights stay in host memory between scores. `timeout_minutes` is that of its groups' collectives.
    """
    family, shape = read_hf_config(directory)
    verify_if_listed(directory)
    mesh = build_mesh(own_layout, timeout_minutes=timeout_minutes) if own_layout else None
    teacher = Teacher(shape, layout, seed=None, dtype=dtype, mesh=mesh, transformer_impl=transformer_impl)
    with teacher.active():
        load_hf(teacher.chunks, directory, family, shape)
    teacher.align_vocabulary(student)
    if offload:
        teacher.offload()
    return teacher
