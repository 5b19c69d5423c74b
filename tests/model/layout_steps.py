"""One training step of a tiny student in a parallel layout, with everything it left behind as full tensors by name.

    tensors, figures = run_step(Case(tp=2, sequence_parallel=True), split)      # on every rank of the case's world
    run_ranks(2, run_cases, cases, directory)                                   # leaves CASE.safetensors and CASE.json
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tiny_models import VOCAB, pack_forest, pack_rows, random_rows, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.build import Recompute
from megatron_tcod.model.families import kind_of, rules
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.shape import ExpertShape
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.objective import make_objective
from megatron_tcod.trajectory import Microbatch

TOLERANCE = 1e-5
"""Relative difference of an fp32 gradient, in the Euclidean norm of each parameter."""
ROWS = random_rows([14, 3, 22, 9, 17, 6, 11], seed=3)
PREFIXES = random_rows([12, 8], seed=4)
BRANCHES = [
    (PREFIXES[index % 2][0] + ids, [place + len(PREFIXES[index % 2][0]) for place in places], weights)
    for index, (ids, places, weights) in enumerate(ROWS)
]
"""The rows with one of two prefixes in front, which carry no loss."""
WHOLE = ((0, 1, 2, 3, 4, 5, 6),)
THREE = ((0, 1), (2,), (3, 4, 5, 6))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and what else must not change the step. Example: `Case(world=4, tp=2, cp=2, sequence_parallel=True)`"""

    world: int = 1
    tp: int = 1
    pp: int = 1
    virtual: int | None = None
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    is_tied: bool = False
    has_experts: bool = False
    is_router_open: bool = False
    """Tokens go to every expert: no choice that rounding could turn."""
    branches: str = ""
    """`rows` or `forest`: BRANCHES, computed one by one, or each shared prefix once."""
    recompute: Recompute = Recompute()
    distributed_optimizer: bool = False
    clip_grad: float = 0.0
    dtype: torch.dtype = torch.float32
    teacher: tuple[int, int] | tuple[int, int, int] | None = None
    """tp and pp, and ep where it is not 1, of the teacher where they differ."""
    offload: bool = False
    is_rounded: bool = False
    """fp32 arithmetic on weights rounded to bf16: what a bf16 step is measured against."""

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.virtual,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            sequence_parallel=self.sequence_parallel,
        )

    def __str__(self) -> str:
        words = [f"world{self.world}", f"tp{self.tp}", f"pp{self.pp}"]
        words += [f"virtual{self.virtual}"] if self.virtual else []
        words += [f"cp{self.cp}"] if self.cp > 1 else []
        words += [f"ep{self.ep}"] if self.ep > 1 else []
        words += ["sp"] if self.sequence_parallel else []
        words += ["tied"] if self.is_tied else []
        words += ["experts"] if self.has_experts else []
        words += ["open"] if self.is_router_open else []
        words += [self.branches] if self.branches else []
        words += [str(value) for value in vars(self.recompute).values() if value]
        words += ["distributed_optimizer"] if self.distributed_optimizer else []
        words += [f"clip{self.clip_grad}"] if self.clip_grad else []
        words += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        words += ["teacher_" + "_".join(map(str, self.teacher))] if self.teacher else []
        words += ["offload"] if self.offload else []
        words += ["rounded"] if self.is_rounded else []
        return "-".join(words)


def shapes(is_tied: bool, has_experts: bool = False, is_router_open: bool = False):
    chosen = 4 if is_router_open else 2
    experts = ExpertShape(num_experts=4, num_experts_per_token=chosen, ffn_hidden_size=32) if has_experts else None
    student = tiny_shape(tie_word_embeddings=is_tied, qk_layernorm=True, add_qkv_bias=True, experts=experts)
    sizes = dict(
        num_layers=2, hidden_size=32, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=64, experts=experts
    )
    teacher = tiny_shape(vocab_size=VOCAB + 23, **sizes)  # padded otherwise, so cut at other tokens
    return student, teacher


def run_step(
    case: Case, split: tuple[tuple[int, ...], ...], objective: str = "reverse_kl"
) -> tuple[dict[str, torch.Tensor], dict[int, Any]]:
    """One step on this rank's share of the microbatches: full gradients and weights by name, loss, norm and the loss
    after the step; per-token figures by replica."""
    parallel.initialize(case.layout)
    student_shape, teacher_shape = shapes(case.is_tied, case.has_experts, case.is_router_open)
    student = Student(
        student_shape,
        case.layout,
        OptimizerSettings(
            lr=1e-3, clip_grad=case.clip_grad, use_distributed_optimizer=case.distributed_optimizer
        ),
        seed=1,
        dtype=case.dtype,
        recompute=case.recompute,
    )
    teacher = Teacher(teacher_shape, case.layout, seed=2, dtype=case.dtype, mesh=_teacher_mesh(case))
    if case.is_rounded:
        for _, parameter in [*build.named_parameters(student.chunks), *build.named_parameters(teacher.chunks)]:
            parameter.data.copy_(parameter.data.bfloat16())
    teacher.align_vocabulary(student_shape)  # it may copy the head
    if case.offload:
        teacher.offload()
        assert not any(parameter.numel() for chunk in teacher.chunks for parameter in chunk.parameters())
    initial = full_tensors(student.chunks, lambda parameter: parameter.data)
    microbatches = [pack(case, indices) for indices in split]
    microbatches = microbatches[parallel.dp_rank() :: parallel.dp_size()]
    make = make_objective(objective, vocab_size=VOCAB)
    targets = teacher.score(microbatches)
    measured = student.measure(microbatches, targets, make)
    stats = student.train_step(microbatches, targets, make)
    for before, trained in zip(measured, stats.per_token, strict=True):
        assert all(torch.equal(before[key], values) for key, values in trained.items()), "measuring is not training"
    gradients = full_tensors(student.chunks, gradient_of(student))
    tensors = {f"initial.{name}": tensor for name, tensor in initial.items()}
    tensors |= {f"gradient.{name}": tensor for name, tensor in gradients.items()}
    tensors |= {"loss": torch.tensor(stats.loss), "norm": torch.tensor(stats.grad_norm)}
    tensors["next loss"] = torch.tensor(student.train_step(microbatches, targets, make).loss)
    figures = [{key: values.tolist() for key, values in each.items()} for each in stats.per_token]
    told = json.dumps([parallel.dp_rank(), figures, stats.loss, stats.grad_norm]).encode()
    everyone = [json.loads(data) for data in parallel.all_gather_bytes(told)]
    assert len({(loss, norm) for *_, loss, norm in everyone}) == 1, "ranks disagree on the loss or the gradient norm"
    by_replica: dict[int, list] = {}
    for replica, theirs, *_ in everyone:
        assert by_replica.setdefault(replica, theirs) == theirs, "ranks of one replica disagree on per-token figures"
    return tensors, by_replica


def pack(case: Case, indices: tuple[int, ...]) -> Microbatch:
    rows = [(BRANCHES if case.branches else ROWS)[index] for index in indices]
    return pack_forest(rows, least=4) if case.branches == "forest" else pack_rows(rows)


def _teacher_mesh(case: Case) -> parallel.Mesh | None:
    if case.teacher is None:
        return None
    tp, pp, ep = (*case.teacher, 1)[:3]
    return parallel.build_mesh(ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        sequence_parallel=case.sequence_parallel and tp > 1,
    ))


def gradient_of(student: Student):
    """Reads a parameter's reduced gradient; where the optimizer is distributed, from its first moment after one step."""
    if not student.settings.use_distributed_optimizer:
        return lambda parameter: parameter.main_grad
    by_parameter = {id(parameter): state for _, parameter, state in student.adam_states()}
    return lambda parameter: by_parameter[id(parameter)]["exp_avg"] / (1 - student.settings.adam_beta1)


def full_tensors(chunks, read) -> dict[str, torch.Tensor]:
    """Every parameter of the model as a full tensor, real vocabulary rows only; replicas must agree bit for bit."""
    mine = {name: read(parameter).detach().contiguous() for name, parameter in build.named_parameters(chunks)}
    place = f"{parallel.dp_rank()}.{parallel.cp_rank()} {parallel.tp_rank()} "
    packed = safetensors.torch.save({place + name: tensor for name, tensor in mine.items()})
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for data in parallel.all_gather_bytes(packed):
        for key, tensor in safetensors.torch.load(data).items():
            replica, tp_rank, name = key.split(" ")
            known = shards.setdefault(name, {}).setdefault(int(tp_rank), tensor)
            assert torch.equal(known, tensor), f"replica {replica} disagrees on {name}"
    full = {}
    for name, parts in shards.items():
        kind = kind_of(name)
        ordered = [parts[tp_rank] for tp_rank in sorted(parts)]
        if rules.LAYOUTS[kind].dim is None:
            assert all(torch.equal(part, ordered[0]) for part in ordered), f"tensor-parallel ranks disagree on {name}"
        full[name] = rules.LAYOUTS[kind].uncut(ordered)
        if kind == "vocab":
            assert not full[name][VOCAB:].any(), f"padding of {name} is not zero"
            full[name] = full[name][:VOCAB].contiguous()
    if build.unwrap(chunks[0]).share_embeddings_and_output_weights and "output_layer.weight" in full:
        assert torch.equal(full.pop("output_layer.weight"), full["embedding.word_embeddings.weight"])
    return full


def run_cases(cases: list[Case], directory: str) -> None:
    """Run every case on the three microbatches; rank 0 writes what came of it. Every rank of a world calls it."""
    warnings.simplefilter("ignore")
    for case in cases:
        tensors, figures = run_step(case, THREE)
        if parallel.rank() == 0:
            safetensors.torch.save_file(tensors, Path(directory) / f"{case}.safetensors")
            (Path(directory) / f"{case}.json").write_text(json.dumps(figures))
    parallel.shutdown()


def read_case(directory: Path, case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What `run_cases` left: the tensors, and the figures of all replicas in the order of one microbatch of all rows."""
    tensors = safetensors.torch.load_file(directory / f"{case}.safetensors")
    replicas = json.loads((directory / f"{case}.json").read_text())
    order = [index for replica in range(case.dp) for index in range(replica, len(THREE), case.dp)]
    parts = dict(zip(order, [part for replica in range(case.dp) for part in replicas[str(replica)]], strict=True))
    figures = {key: torch.tensor([value for index in range(len(THREE)) for value in parts[index][key]]) for key in parts[0]}
    return tensors, figures


def assert_equal_step(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal weights before the step, and fp32 gradients within TOLERANCE."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        if name.startswith("initial."):
            assert torch.equal(actual[name], tensor), f"{name} differs before the step"
            continue
        difference = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert tensor.any() and difference <= TOLERANCE, f"{name} differs by {float(difference):.1e}"
