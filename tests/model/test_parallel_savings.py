"""Each parallel setting saves what it is there to save; that none changes the step is test_layout_invariance.py."""

import json

import pytest
import torch
from gloo_world import run_ranks
from layout_steps import shapes
from tiny_models import pack_rows, random_rows

from megatron_tcod.model import build, parallel
from megatron_tcod.model.adam_shards import adam_shards
from megatron_tcod.model.build import Recompute
from megatron_tcod.model.context import own_part
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher

SHAPE, TEACHER = shapes(False)
MICROBATCH = pack_rows(random_rows([30, 21, 14], seed=3))  # 65 tokens
SP2 = ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True)
CP2 = ParallelLayout(context_parallel_size=2)


def _student(layout: ParallelLayout, *, recompute: Recompute | None = None, **settings) -> Student:
    parallel.initialize(layout)
    return Student(SHAPE, layout, OptimizerSettings(lr=1e-3, **settings), seed=1, recompute=recompute)


def _kept_bytes(student: Student) -> int:
    """What the forward pass of a training step keeps for the backward pass, weights aside."""
    weights = {each.untyped_storage().data_ptr() for _, each in build.named_parameters(student.chunks)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    chunk = student.chunks[0].train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = build.forward_hidden(chunk, own_part(MICROBATCH, student.layout))
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.fixture
def alone():
    yield
    parallel.shutdown()


def test_recomputing_keeps_less_the_more_is_recomputed(alone):
    uniform = dict(granularity="full", method="uniform")
    kept = [
        _kept_bytes(_student(ParallelLayout(), recompute=recompute))
        for recompute in (
            Recompute(),
            Recompute(granularity="full", method="block", num_layers=2),
            Recompute(**uniform, num_layers=1),
            Recompute(**uniform, num_layers=2),
        )
    ]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4, kept
    assert kept[2] < 0.2 * kept[0], kept
    assert _kept_bytes(_student(ParallelLayout(), recompute=Recompute(granularity="selective"))) < 0.9 * kept[0]


def _tokens_between_layers(layout: ParallelLayout) -> int:
    student = _student(layout)
    seen = []
    layer = build.unwrap(student.chunks[0]).decoder.layers[1]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).size(0)), with_kwargs=True
    )
    build.forward_hidden(student.chunks[0], own_part(MICROBATCH, layout))
    return seen[0]


def _check_savings() -> None:
    assert _tokens_between_layers(SP2) == 33, "65 tokens and one of padding over two ranks"
    assert _tokens_between_layers(CP2) == 33
    whole = _kept_bytes(_student(ParallelLayout(tensor_model_parallel_size=2)))
    cut = _kept_bytes(_student(SP2))
    assert cut < 0.9 * whole, f"norms and residuals are cut: {cut} of {whole} bytes"
    whole, cut = (_kept_bytes(_student(layout)) for layout in (ParallelLayout(), CP2))
    assert cut < 0.6 * whole, f"everything is cut: {cut} of {whole} bytes"

    for dtype in (torch.float32, torch.bfloat16):
        parallel.initialize(ParallelLayout())
        settings = OptimizerSettings(lr=1e-3, use_distributed_optimizer=True)
        student = Student(SHAPE, ParallelLayout(), settings, seed=1, dtype=dtype)
        shards = list(adam_shards(student.chunks, student.optimizer))
        assert all(shard.state["exp_avg"].numel() == shard.main.numel() == shard.stop - shard.start for shard in shards)
        spans = {shard.name: [shard.start, shard.stop, shard.parameter.numel()] for shard in shards}
        everyone = [json.loads(data) for data in parallel.all_gather_bytes(json.dumps(spans).encode())]
        for name, (_, _, size) in spans.items():
            parts = sorted((start, stop) for start, stop, _ in (each[name] for each in everyone) if stop > start)
            bounds = [bound for part in parts for bound in part]
            assert bounds[0] == 0 and bounds[-1] == size and bounds[1:-1:2] == bounds[2:-1:2], f"{name} {parts}"
        held = [sum(stop - start for start, stop, _ in each.values()) for each in everyone]
        assert max(held) <= 0.55 * sum(held), held

    parallel.initialize(ParallelLayout())
    mesh = parallel.build_mesh(ParallelLayout(pipeline_model_parallel_size=2))
    assert (parallel.pp_size(), parallel.dp_size()) == (1, 2), "the student's groups stay in force"
    with mesh.active():
        assert (parallel.pp_size(), parallel.dp_size()) == (2, 1)
    assert (parallel.pp_size(), parallel.dp_size()) == (1, 2)
    teacher = Teacher(TEACHER, ParallelLayout(), seed=2, mesh=mesh)
    assert len(build.unwrap(teacher.chunks[0]).decoder.layers) == 1, "each rank holds one of two layers"
    with pytest.raises(ValueError, match="world size 2"):
        parallel.build_mesh(ParallelLayout(tensor_model_parallel_size=4))
    assert parallel.dp_size() == 2
    parallel.shutdown()


def test_sequence_context_optimizer_and_teacher_layouts_cut_what_they_are_to_cut():
    run_ranks(2, _check_savings)
