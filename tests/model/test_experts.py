"""A mixture of experts as student and as teacher: loss and gradients against transformers in float64."""

import dataclasses
import warnings

import pytest
import torch
from tiny_models import VOCAB, pack_rows, random_rows, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.experts import check_trainable
from megatron_tcod.model.families import find_family
from megatron_tcod.model.mapping import export_hf, save_hf
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.shape import ExpertShape
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.objective import make_objective

LENGTHS = [9, 30, 2, 17]
EXPERTS = ExpertShape(num_experts=6, num_experts_per_token=2, ffn_hidden_size=24)
FAMILY = find_family("qwen3_moe")


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    warnings.simplefilter("ignore")
    parallel.initialize(ParallelLayout())
    yield
    parallel.shutdown()


def shape_of(experts, **changes):
    return tiny_shape(num_layers=2, qk_layernorm=True, experts=experts, **changes)


def twin_of(chunks, shape, directory):
    """The same weights as a float64 model of transformers."""
    import transformers

    save_hf(directory, chunks, FAMILY, shape)
    how = dict(dtype=torch.float64, experts_implementation="eager")  # the grouped product knows no float64
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **how)


def gradients_by_name(twin):
    """Gradients under the names of the files, where every expert has matrices of its own."""
    gradients = {}
    for name, parameter in twin.named_parameters():
        if ".experts." not in name:
            gradients[name] = parameter.grad
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, grad in enumerate(parameter.grad):
            parts = zip(("gate_proj", "up_proj"), grad.chunk(2), strict=True) if kind == "gate_up_proj" else [(kind, grad)]
            gradients.update({f"{prefix}.{expert}.{part}.weight": tensor for part, tensor in parts})
    return gradients


@pytest.mark.parametrize(("num_chosen", "normalizes"), [(2, True), (3, False), (1, False)])
def test_loss_and_gradient_of_experts_under_a_teacher_of_experts_equal_float64_transformers(tmp_path, num_chosen, normalizes):
    experts = dataclasses.replace(EXPERTS, num_experts_per_token=num_chosen, normalizes_weights=normalizes)
    shape = shape_of(experts)
    student = Student(shape, ParallelLayout(), OptimizerSettings(lr=1e-3), seed=1)
    teacher_shape = shape_of(EXPERTS, hidden_size=32)
    teacher = Teacher(teacher_shape, ParallelLayout(), seed=2)
    rows = random_rows(LENGTHS)
    microbatches = [pack_rows(rows[:3]), pack_rows(rows[3:])]
    objective = make_objective("reverse_kl", vocab_size=VOCAB)
    per_token = student.compute_gradients(microbatches, teacher.score(microbatches), objective)
    ours = dict(export_hf(student.chunks, FAMILY, shape, read=lambda parameter: parameter.main_grad))

    twin = twin_of(student.chunks, shape, tmp_path / "student")
    teacher_twin = twin_of(teacher.chunks, teacher_shape, tmp_path / "teacher")
    losses, total = [], torch.zeros((), dtype=torch.float64)
    for ids, positions, weights in rows:
        log_s = twin(torch.tensor([ids])).logits[0, positions].log_softmax(-1)
        with torch.no_grad():
            log_t = teacher_twin(torch.tensor([ids])).logits[0, positions].log_softmax(-1)
        losses.append((log_s.exp() * (log_s - log_t)).sum(-1))
        total = total + torch.dot(losses[-1], torch.tensor(weights, dtype=torch.float64))
    total.backward()
    measured = torch.cat([figures["loss"] for figures in per_token]).double()
    torch.testing.assert_close(measured, torch.cat(losses).detach(), rtol=1e-4, atol=1e-6)
    theirs = gradients_by_name(twin)
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max() for grad in theirs.values())
    for name, grad in ours.items():
        torch.testing.assert_close(grad.double(), theirs[name], rtol=0, atol=1e-5 * largest.item(), msg=name)
    routers = [grad for name, grad in ours.items() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2 and all(grad.abs().max() > 1e-3 * largest for grad in routers)


def test_a_step_changes_router_and_experts():
    student = Student(shape_of(EXPERTS), ParallelLayout(), OptimizerSettings(lr=1e-3), seed=1)
    before = {name: tensor.clone() for name, tensor in export_hf(student.chunks, FAMILY, student.shape)}
    microbatch = pack_rows(random_rows([40, 40]))
    stats = student.train_step([microbatch], [None], make_objective("sft", vocab_size=VOCAB))
    assert stats.is_finite
    for name, tensor in export_hf(student.chunks, FAMILY, student.shape):
        assert not torch.equal(tensor, before[name]), name


def test_experts_at_tp_2_are_trained_only_under_sequence_parallelism():
    layout = ParallelLayout(tensor_model_parallel_size=2)
    with pytest.raises(ValueError, match="trains at tensor_model_parallel_size 2 only with sequence_parallel"):
        check_trainable(shape_of(EXPERTS), layout)
    check_trainable(tiny_shape(), layout)


def test_experts_that_tensor_parallelism_does_not_divide_are_refused():
    shape = shape_of(dataclasses.replace(EXPERTS, ffn_hidden_size=26))
    with pytest.raises(ValueError, match="size 4 does not divide the model's ffn_hidden_size 26 of an expert"):
        build.check_layout(shape, ParallelLayout(tensor_model_parallel_size=4))
