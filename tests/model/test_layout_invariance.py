"""One training step in every parallel layout and packing, against one process.

The parent process computes the reference; two spawns of 2 and 4 gloo ranks run all layouts one after another, gather
their gradients and weights as full tensors by name, and leave them in files.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from gloo_world import run_ranks
from tiny_models import VOCAB, pack_rows, random_rows, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.families import kind_of, rules
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.objective import make_objective

TOLERANCE = 1e-5
ROWS = random_rows([14, 3, 22, 9, 17, 6, 11], seed=3)
UNTIED, BOTH = (False,), (False, True)
LAYOUTS = {  # world size -> (tp, pp, virtual): tied embeddings or not; what remains is data parallel
    2: {(1, 1, None): UNTIED, (2, 1, None): BOTH, (1, 2, None): BOTH, (1, 2, 2): BOTH},
    4: {
        (1, 1, None): UNTIED,  # three microbatches: one replica has none
        (2, 1, None): UNTIED,
        (4, 1, None): BOTH,  # more ranks than key-value heads
        (1, 2, None): UNTIED,
        (2, 2, None): BOTH,
        (2, 2, 2): BOTH,
    },
}
CASES = [
    (world, *sizes, is_tied)
    for world, layouts in LAYOUTS.items()
    for sizes, kinds in layouts.items()
    for is_tied in kinds
]


def _shapes(is_tied: bool):
    student = tiny_shape(tie_word_embeddings=is_tied, qk_layernorm=True, add_qkv_bias=True)
    teacher = tiny_shape(num_layers=2, hidden_size=32, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=64)
    return student, teacher


def _microbatches(split: list[list[int]]):
    return [pack_rows([ROWS[index] for index in indices]) for indices in split]


def _step(layout: ParallelLayout, is_tied: bool, split: list[list[int]], objective: str = "reverse_kl"):
    """One step on this rank's share of the microbatches; full gradients and weights by name, loss and norm."""
    parallel.initialize(layout)
    student_shape, teacher_shape = _shapes(is_tied)
    student = Student(student_shape, layout, OptimizerSettings(lr=1e-3, clip_grad=0.0), seed=1)
    teacher = Teacher(teacher_shape, layout, seed=2)
    initial = _full(student.chunks, lambda parameter: parameter.data)
    microbatches = _microbatches(split)[parallel.dp_rank() :: parallel.dp_size()]
    make = make_objective(objective, vocab_size=VOCAB)
    targets = teacher.score(microbatches)
    measured = student.measure(microbatches, targets, make)
    stats = student.train_step(microbatches, targets, make)
    for before, trained in zip(measured, stats.per_token, strict=True):
        assert all(torch.equal(before[key], values) for key, values in trained.items()), "measuring is not training"
    gradients = _full(student.chunks, lambda parameter: parameter.main_grad)
    tensors = {f"initial.{name}": tensor for name, tensor in initial.items()}
    tensors |= {f"gradient.{name}": tensor for name, tensor in gradients.items()}
    tensors |= {"loss": torch.tensor(stats.loss), "norm": torch.tensor(stats.grad_norm)}
    figures = [{key: values.tolist() for key, values in each.items()} for each in stats.per_token]
    everyone = [json.loads(data) for data in parallel.all_gather_bytes(json.dumps([parallel.dp_rank(), figures]).encode())]
    by_replica: dict[int, list] = {}
    for replica, theirs in everyone:
        assert by_replica.setdefault(replica, theirs) == theirs, "ranks of one replica disagree on per-token figures"
    return tensors, by_replica


def _full(chunks, read) -> dict[str, torch.Tensor]:
    """Every parameter of the model as a full tensor, real vocabulary rows only; replicas must agree bit for bit."""
    mine = {name: read(parameter).detach().contiguous() for name, parameter in build.named_parameters(chunks)}
    place = f"{parallel.dp_rank()} {parallel.tp_rank()} "
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
        if kind == "replicated":
            assert all(torch.equal(part, ordered[0]) for part in ordered), f"tensor-parallel ranks disagree on {name}"
        full[name] = rules.LAYOUTS[kind].uncut(ordered)
        if kind == "vocab":
            assert not full[name][VOCAB:].any(), f"padding of {name} is not zero"
            full[name] = full[name][:VOCAB].contiguous()
    if build.unwrap(chunks[0]).share_embeddings_and_output_weights and "output_layer.weight" in full:
        assert torch.equal(full.pop("output_layer.weight"), full["embedding.word_embeddings.weight"])
    return full


def _run_layouts(world: int, directory: str) -> None:
    warnings.simplefilter("ignore")
    for (tp, pp, virtual), kinds in LAYOUTS[world].items():
        layout = ParallelLayout(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=virtual
        )
        for is_tied in kinds:
            tensors, figures = _step(layout, is_tied, [[0, 1], [2], [3, 4, 5, 6]])
            if parallel.rank() == 0:
                path = Path(directory) / f"{world}_{tp}_{pp}_{virtual}_{is_tied}"
                safetensors.torch.save_file(tensors, f"{path}.safetensors")
                path.with_suffix(".json").write_text(json.dumps(figures))
    parallel.shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("layouts")
    for world in LAYOUTS:
        run_ranks(world, _run_layouts, world, str(directory))
    return directory


@pytest.fixture(scope="module")
def reference():
    """is_tied -> tensors and figures of one process with one microbatch."""
    found = {is_tied: _step(ParallelLayout(), is_tied, [[0, 1, 2, 3, 4, 5, 6]]) for is_tied in (False, True)}
    yield found
    parallel.shutdown()


def _assert_equal_step(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        if name.startswith("initial."):
            assert torch.equal(actual[name], tensor), f"{name} differs before the step"
            continue
        difference = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert tensor.any() and difference <= TOLERANCE, f"{name} differs by {float(difference):.1e}"


@pytest.mark.parametrize(("world", "tp", "pp", "virtual", "is_tied"), CASES)
def test_weights_and_gradient_of_one_step_are_invariant_to_the_parallel_layout(
    runs, reference, world, tp, pp, virtual, is_tied
):
    path = runs / f"{world}_{tp}_{pp}_{virtual}_{is_tied}"
    expected, figures = reference[is_tied]
    _assert_equal_step(safetensors.torch.load_file(f"{path}.safetensors"), expected)
    replicas = json.loads(path.with_suffix(".json").read_text())
    dp = world // (tp * pp)
    assert len(replicas) == dp
    order = [index for replica in range(dp) for index in range(replica, 3, dp)]
    parts = dict(zip(order, [part for replica in range(dp) for part in replicas[str(replica)]], strict=True))
    for key, values in figures[0][0].items():
        gathered = [value for index in range(3) for value in parts[index][key]]
        assert gathered == pytest.approx(values, rel=1e-4, abs=2e-5), key


@pytest.mark.parametrize(
    "split",
    [[[0], [1], [2], [3], [4], [5], [6]], [[6, 2], [5, 0, 3], [1, 4]], [[3, 1, 0, 6, 5, 4, 2]]],
    ids=["one row each", "three", "shuffled"],
)
@pytest.mark.parametrize("objective", ["reverse_kl", "sampled_token"])
def test_gradient_is_invariant_to_packing_and_to_the_order_of_rows(split, objective):
    expected, _ = _step(ParallelLayout(), False, [[0, 1, 2, 3, 4, 5, 6]], objective)
    actual, _ = _step(ParallelLayout(), False, split, objective)
    parallel.shutdown()
    _assert_equal_step(actual, expected)


def test_gradient_of_one_row_per_trajectory_equals_that_of_one_row_per_turn():
    ids, positions, weights = random_rows([60], seed=8)[0]
    turns = [(0, 15), (15, 38), (38, 60)]
    per_turn = []
    for start, stop in turns:
        inside = [place for place, position in enumerate(positions) if start <= position + 1 < stop]
        per_turn.append((ids[:stop], [positions[place] for place in inside], [weights[place] for place in inside]))
    results = []
    for rows in ([(ids, positions, weights)], per_turn):
        parallel.initialize(ParallelLayout())
        student_shape, teacher_shape = _shapes(False)
        student = Student(student_shape, ParallelLayout(), OptimizerSettings(lr=1e-3), seed=1)
        teacher = Teacher(teacher_shape, ParallelLayout(), seed=2)
        microbatches = [pack_rows(rows)]
        objective = make_objective("reverse_kl", vocab_size=VOCAB)
        student.compute_gradients(microbatches, teacher.score(microbatches), objective)
        results.append(_full(student.chunks, lambda parameter: parameter.main_grad))
        parallel.shutdown()
    _assert_equal_step(results[1], results[0])
