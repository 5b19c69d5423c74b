"""The frozen model whose distribution the student follows.

    teacher = Teacher(shape, layout, seed=None)       # then load its weights into teacher.chunks
    targets = teacher.score(microbatches)             # [TeacherTarget] on the last stage, [None] elsewhere

It keeps hidden states at the trained positions, not logits, and never gradients or optimizer state. Width, depth, heads
and the shapes that travel between stages are its own. So may be its layout: with a `mesh`, the same ranks form other
groups for it. The microbatches of all student replicas are then dealt to the teacher's replicas by their tokens, and the
hidden states travel back to the last-stage ranks of the student that own them, as do, once, the rows of its head.
`offload` keeps its weights in host memory between scores.
"""

from __future__ import annotations

import contextlib
import dataclasses

import safetensors.torch
import torch
from torch import Tensor

from megatron_tcod.model import build, context, parallel
from megatron_tcod.model.host_weights import HostWeights
from megatron_tcod.model.parallel import Mesh, ParallelLayout
from megatron_tcod.model.resharding import Transfer, exchange, gather_places, last_stage_of
from megatron_tcod.model.schedule import run_schedule
from megatron_tcod.model.shape import ModelShape
from megatron_tcod.ops.vocab_shard import VocabShard, align_head
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
        mesh: Mesh | None = None,
        transformer_impl: str = "auto",
    ):
        """Collective. `layout` is the student's; with a `mesh` the teacher is cut by the mesh's own layout instead. With
        `seed` None the weights are unset until they are loaded.

        A forward pass gains nothing from interleaving, so a virtual pipeline in `layout` is the student's alone.
        """
        self.shape, self.dtype, self.student_layout, self.mesh = shape, dtype, layout, mesh
        own = mesh.layout if mesh else layout
        self.layout = dataclasses.replace(own, virtual_pipeline_model_parallel_size=None)
        if mesh and own.context_parallel_size > 1:
            raise ValueError(
                f"a teacher of its own layout has context_parallel_size {own.context_parallel_size}, expected 1; give it "
                "more tensor parallel ranks, or the student's layout"
            )
        with self.active():
            self.chunks = build.build_model(
                shape, self.layout, dtype=dtype, seed=seed, wrap_ddp=False, transformer_impl=transformer_impl
            )
            self._places = gather_places()
        self._student_places = gather_places()
        for chunk in self.chunks:
            chunk.eval()
        self._head: Tensor | None = None
        self._host: HostWeights | None = None

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `parallel` tells the teacher's groups: for loading its weights."""
        return self.mesh.active() if self.mesh else contextlib.nullcontext()

    def offload(self) -> None:
        """From now on keep the weights in host memory between scores. Call it after `align_vocabulary`."""
        self._host = HostWeights(self.chunks)

    @torch.no_grad()
    def align_vocabulary(self, student: ModelShape) -> None:
        """Cut the head at the student's shard boundaries. Collective; call it once, after the weights are loaded.

        Vocabularies that are padded to different sizes have different ids on a rank. Ids that only the teacher has are
        dropped; they must not be among the objective's `vocab_size`.
        """
        known = min(self.shape.vocab_size, student.vocab_size)
        tp = self.student_layout.tensor_model_parallel_size
        theirs = build.padded_vocab_size(student.vocab_size, tp)
        if self.mesh:
            self._head = self._moved_head(known, theirs // tp)
            return
        ours = build.padded_vocab_size(self.shape.vocab_size, tp)
        if ours != theirs and tp > 1 and parallel.is_last_stage():
            self._head = align_head(build.output_head(self.chunks).detach(), known, theirs, parallel.tp_group())

    @torch.no_grad()
    def score(self, microbatches: list[Microbatch]) -> list[TeacherTarget | None]:
        """Hidden states [S/cp, H_t] at the positions of each microbatch that are this rank's (`context.own_span`), with
        its head shard [V_padded/tp, H_t] as the student is cut. Collective in the replica, and over the world where the
        teacher has a layout of its own or shares out experts.

        None on every stage of the student but the last.
        """
        with self._host.on_device() if self._host else contextlib.nullcontext():
            if self.mesh:
                hidden = self._score_in_mesh(microbatches)
            else:
                hidden = self._score_here(microbatches)
            if not parallel.is_last_stage():
                return [None for _ in microbatches]
            assert self._head is not None or not self.mesh, "call align_vocabulary first"
            head = build.output_head(self.chunks).detach() if self._head is None else self._head  # [V_padded/tp, H_t]
        return [TeacherTarget(hidden=each, head=head) for each in hidden]

    def _score_here(self, microbatches: list[Microbatch]) -> list[Tensor]:
        """Hidden states [S/cp, H_t] of each microbatch, filled on the last stage of the groups that are active."""
        nothing = torch.empty(0, self.shape.hidden_size, dtype=self.dtype, device=parallel.device())
        found = [nothing for _ in microbatches]

        def on_hidden(index: int, hidden: Tensor) -> Tensor:
            found[index] = hidden
            return hidden.new_zeros(())

        run_schedule(self.chunks, self.layout, microbatches, on_hidden, forward_only=True)
        return found

    def _score_in_mesh(self, microbatches: list[Microbatch]) -> list[Tensor]:
        """The same for a student on other ranks than the teacher's: dealt out, scored, sent back."""
        replicas = parallel.all_gather_bytes(_to_bytes(microbatches), group=parallel.dp_group())
        everything = [(replica, each) for replica, data in enumerate(replicas) for each in _from_bytes(data)]
        num_replicas = 1 + max(place.dp for place in self._places)
        owners = deal([each.num_tokens for _, each in everything], num_replicas)
        with self.active():
            mine = [index for index, owner in enumerate(owners) if owner == parallel.dp_rank()]
            scored = dict(zip(mine, self._score_here([everything[index][1] for index in mine]), strict=True))
        transfers = []
        for index, ((replica, microbatch), owner) in enumerate(zip(everything, owners, strict=True)):
            sources = last_stage_of(self._places, owner)
            for number, place in enumerate(last_stage_of(self._student_places, replica)):
                span = context.own_span(microbatch, self.student_layout, cp_rank=place.cp)
                transfers.append(Transfer(
                    source=sources[number % len(sources)].rank,  # each tensor-parallel rank has all of them
                    destination=place.rank,
                    size=(span.stop - span.start, self.shape.hidden_size),
                    read=lambda index=index, span=span: scored[index][span],
                ))
        return [part for part in exchange(transfers, dtype=self.dtype) if part is not None]

    def _moved_head(self, vocab_size: int, rows: int) -> Tensor | None:
        """The student's shard [rows, H_t] of the head, from the ranks of the teacher that hold its tokens."""
        with self.active():
            head = build.output_head(self.chunks).detach() if parallel.is_last_stage() else None
            held = build.padded_vocab_size(self.shape.vocab_size, parallel.tp_size()) // parallel.tp_size()
        num_replicas = 1 + max(place.dp for place in self._places)
        transfers, firsts = [], []
        wanting = [place for place in self._student_places if place.is_last_stage]
        for number, place in enumerate(wanting):
            wanted = VocabShard.of(vocab_size, rows, place.tp)
            for source in last_stage_of(self._places, number % num_replicas):
                there = VocabShard.of(vocab_size, held, source.tp)
                first, count = max(wanted.first, there.first), wanted.overlap(there)
                firsts.append(first - wanted.first)
                transfers.append(Transfer(
                    source=source.rank,
                    destination=place.rank,
                    size=(count, self.shape.hidden_size),
                    read=lambda start=first - there.first, count=count: head[start : start + count],
                ))
        parts = exchange(transfers, dtype=self.dtype)
        if not parallel.is_last_stage():
            return None
        moved = torch.zeros(rows, self.shape.hidden_size, dtype=self.dtype, device=parallel.device())
        for first, part in zip(firsts, parts, strict=True):
            if part is not None and len(part):
                moved[first : first + len(part)] = part
        return moved


def deal(sizes: list[int], num_replicas: int) -> list[int]:
    """Who takes each microbatch: the largest first, each to the replica with the fewest tokens so far."""
    loads, owners = [0] * num_replicas, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners


def _to_bytes(microbatches: list[Microbatch]) -> bytes:
    return safetensors.torch.save({
        f"{index}.{name}": value.contiguous()
        for index, microbatch in enumerate(microbatches)
        for name, value in vars(microbatch).items()
        if isinstance(value, Tensor)
    })


def _from_bytes(data: bytes) -> list[Microbatch]:
    fields: dict[int, dict[str, Tensor]] = {}
    for key, value in safetensors.torch.load(data).items():
        index, name = key.split(".")
        fields.setdefault(int(index), {})[name] = value.to(parallel.device())
    return [Microbatch(**fields[index]) for index in sorted(fields)]
