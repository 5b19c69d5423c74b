"""A teacher whose vocabulary is padded to another size than the student's, cut over tensor-parallel ranks."""

import json

from gloo_world import run_ranks
from tiny_models import VOCAB, pack_rows, random_rows, tiny_shape

from megatron_tcod.model import parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.objective import make_objective


def measure(tp):
    layout = ParallelLayout(tensor_model_parallel_size=tp)
    parallel.initialize(layout)
    shape = tiny_shape()
    student = Student(shape, layout, OptimizerSettings(lr=1e-3), seed=1)
    teacher = Teacher(tiny_shape(num_layers=2, vocab_size=VOCAB + 300), layout, seed=2)
    teacher.align_vocabulary(shape)
    microbatch = pack_rows(random_rows([12, 7]))
    objective = make_objective("reverse_kl", vocab_size=VOCAB)
    (figures,) = student.measure([microbatch], teacher.score([microbatch]), objective)
    return {key: values.tolist() for key, values in figures.items()}


def worker(path):
    figures = measure(2)
    if parallel.rank() == 0:
        path.write_text(json.dumps(figures))
    parallel.shutdown()


def test_unequal_padding_gives_the_divergence_of_one_process(single_process, tmp_path):
    expected = measure(1)
    run_ranks(2, worker, tmp_path / "figures.json")
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found.keys() == expected.keys() and "reverse_kl" in found
    for key, values in expected.items():
        assert max(abs(a - b) for a, b in zip(found[key], values, strict=True)) < 1e-4, key
    assert max(expected["reverse_kl"]) > 0.1
