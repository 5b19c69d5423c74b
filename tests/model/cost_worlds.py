"""What one rank of a small real model holds and sends, for `test_cost_model.py`; run in worlds of gloo ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import pack_rows, random_rows, tiny_shape
from torch.profiler import ProfilerActivity, profile

from megatron_tcod.model import build, parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.schedule import run_schedule
from megatron_tcod.model.shape import ExpertShape, padded_vocab_size
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.ops.divergence import linear_divergence

SHAPES = {
    "plain": tiny_shape(),
    "tied, head norms": tiny_shape(tie_word_embeddings=True, qk_layernorm=True),
    "bias": tiny_shape(add_qkv_bias=True),
    "experts": tiny_shape(experts=ExpertShape(num_experts=6, num_experts_per_token=2, ffn_hidden_size=32)),
}
TOKENS = 96
IN_FLIGHT_CHUNKS = (1, 2)
IN_FLIGHT_MICROBATCHES = 5


def one_row(length: int = TOKENS):
    """A microbatch of one row: no padding in the attention."""
    return pack_rows(random_rows([length]))


def backward(student: Student) -> None:
    """A forward and a backward pass with a loss that needs no teacher."""
    run_schedule(
        student.chunks, student.layout, [one_row()], lambda index, hidden: hidden.square().sum(), forward_only=False
    )


def held_bytes(student: Student) -> dict[str, int]:
    """Weights, main gradients and the optimizer's own numbers of this rank."""
    parameters = [parameter for _, parameter in build.named_parameters(student.chunks)]
    states = [state for *_, state in student.adam_states()]
    copies = [
        parameter.main_param.numel() * 4 for parameter in parameters if getattr(parameter, "main_param", None) is not None
    ]
    return {
        "weights": sum(one.numel() * one.element_size() for one in parameters),
        "gradients": sum(one.main_grad.numel() * one.main_grad.element_size() for one in parameters),
        "optimizer": sum(copies)
        + sum(state[key].numel() * state[key].element_size() for state in states for key in ("exp_avg", "exp_avg_sq")),
    }


CHUNKED = tiny_shape(vocab_size=8000)
CHUNKED_ROWS = {"fewer than a chunk": 60, "three chunks": 700}


def divergence_peak(rows: int, tp: int) -> int:
    """Bytes that torch allocates at most at a time for one microbatch's divergence and its gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(size, CHUNKED.hidden_size, generator=generator, requires_grad=True)
        for size in (rows, padded_vocab_size(CHUNKED.vocab_size, tp) // tp)
    )
    main_grad = torch.zeros_like(head)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        out = linear_divergence(
            hidden,
            head,
            hidden.detach(),
            head.detach(),
            kind="reverse_kl",
            vocab_size=CHUNKED.vocab_size,
            tp_group=parallel.tp_group() if tp > 1 else None,
            loss_weight=torch.ones(rows),
            head_grad=main_grad,
        )
        out.total.backward()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # what is freed is negative
    return max(itertools.accumulate(sizes))


def report_ranks(directory: str) -> None:
    """Of each layout of two ranks and each shape: held bytes, and those that all-reduces over tp carry in one pass; of
    two shards of a vocabulary the peak of the divergence."""
    found: dict[str, Any] = {}
    for tp, pp, ep in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        for name, shape in SHAPES.items():
            if ep > 1 and shape.experts is None:
                continue
            layout = ParallelLayout(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                expert_model_parallel_size=ep,
                sequence_parallel=tp > 1 and shape.experts is not None,  # Megatron refuses experts without
            )
            parallel.initialize(layout, seed=0)
            student = Student(shape, layout, OptimizerSettings(lr=1e-3), seed=0)
            held = {"held": held_bytes(student), "reduced": reduced_bytes(student), "stage": parallel.pp_rank()}
            found[f"{name} {tp} {pp}" if ep == 1 else f"{name} ep {ep}"] = held
        if tp > 1:
            found["peaks"] = {name: divergence_peak(rows, tp) for name, rows in CHUNKED_ROWS.items()}
        if pp > 1:
            found["in flight"] = [passes_in_flight(pp, chunks) for chunks in IN_FLIGHT_CHUNKS]
    (Path(directory) / f"{parallel.rank()}.json").write_text(json.dumps(found))
    parallel.shutdown()


def passes_in_flight(pp: int, chunks: int) -> int:
    """Most forward passes through a chunk of this rank whose backward pass had not begun."""
    layout = ParallelLayout(
        pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
    )
    parallel.initialize(layout, seed=0)
    student = Student(SHAPES["plain"], layout, OptimizerSettings(lr=1e-3), seed=0)
    now, most = 0, 0

    def began(*_: Any) -> None:
        nonlocal now
        now -= 1

    def passed(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        output.register_hook(began)

    for chunk in student.chunks:
        build.unwrap(chunk).decoder.register_forward_hook(passed)
    rows = [one_row() for _ in range(IN_FLIGHT_MICROBATCHES)]
    run_schedule(student.chunks, layout, rows, lambda index, hidden: hidden.square().sum(), forward_only=False)
    assert now == 0
    return most


def reduced_bytes(student: Student) -> int:
    """Bytes given to all-reduces over the tensor-parallel group in one forward and backward pass."""
    total, real = 0, dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal total
        if kwargs.get("group") is parallel.tp_group() and tensor.dtype.is_floating_point and tensor.numel() >= TOKENS:
            total += tensor.numel() * tensor.element_size()
        return real(tensor, *args, **kwargs)

    dist.all_reduce = torch.distributed.all_reduce = counting
    try:
        backward(student)
    finally:
        dist.all_reduce = torch.distributed.all_reduce = real
    return total
