import math

import pytest
import torch
from tiny_models import VOCAB, hugging_face_twin, pack_rows, random_rows, tiny_shape, to_hugging_face

from megatron_tcod.model import build, parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher
from megatron_tcod.objective import TokenLosses, make_objective

LENGTHS = [[9, 14, 2], [21], [6, 6, 5]]


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    parallel.initialize(ParallelLayout())
    yield
    parallel.shutdown()


def _microbatches():
    return [pack_rows(random_rows(lengths, seed=seed)) for seed, lengths in enumerate(LENGTHS)]


def _student(shape=None, **settings):
    settings = OptimizerSettings(**{"lr": 3e-3, **settings})
    return Student(shape or tiny_shape(), ParallelLayout(), settings, seed=1)


def _weights(student):
    return {name: parameter.detach().clone() for name, parameter in build.named_parameters(student.chunks)}


@pytest.mark.parametrize("is_tied", [False, True])
def test_three_steps_equal_those_of_a_float64_transformers_model_with_torch_adamw(is_tied):
    shape = tiny_shape(qk_layernorm=True, tie_word_embeddings=is_tied)
    settings = dict(lr=3e-3, min_lr=1e-3, lr_decay_style="cosine", lr_warmup_iters=1, lr_decay_iters=5)
    student = _student(shape, weight_decay=0.1, clip_grad=0.05, **settings)
    heads = dict(num_attention_heads=2, num_query_groups=1)
    teacher_shape = tiny_shape(num_layers=6, hidden_size=32, qk_layernorm=True, **heads)
    teacher = Teacher(teacher_shape, ParallelLayout(), seed=2)
    twin = hugging_face_twin(student.chunks, shape, torch.float64)
    teacher_twin = hugging_face_twin(teacher.chunks, teacher_shape, torch.float64)
    decayed = [parameter for parameter in twin.parameters() if parameter.ndim > 1]
    kept = [parameter for parameter in twin.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)

    objective = make_objective("reverse_kl", vocab_size=VOCAB)
    microbatches = _microbatches()
    for step in range(3):
        stats = student.train_step(microbatches, teacher.score(microbatches), objective)
        lr = 0.0 if step == 0 else 1e-3 + 2e-3 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 4))
        for group in adamw.param_groups:
            group["lr"] = lr
        loss = _twin_loss(twin, teacher_twin)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        adamw.step()
        assert stats.is_finite and stats.lr == pytest.approx(adamw.param_groups[0]["lr"], abs=1e-12)
        assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
        assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-5) and norm > 0.05
    expected = twin.state_dict()
    for name, weight in to_hugging_face(_weights(student), shape).items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=0, atol=3e-5, msg=name)


def _twin_loss(twin, teacher_twin):
    """sum(loss_weight * KL(student || teacher)), each row on its own, unpacked."""
    total = torch.zeros((), dtype=torch.float64)
    for seed, lengths in enumerate(LENGTHS):
        for ids, positions, weights in random_rows(lengths, seed=seed):
            student = twin(torch.tensor([ids])).logits[0, positions].log_softmax(-1)
            with torch.no_grad():
                teacher = teacher_twin(torch.tensor([ids])).logits[0, positions].log_softmax(-1)
            kl = (student.exp() * (student - teacher)).sum(-1)
            total = total + torch.dot(kl, torch.tensor(weights, dtype=torch.float64))
    return total


def test_per_token_figures_belong_to_their_microbatch_and_equal_a_measurement_without_training():
    student = _student()
    microbatches = _microbatches()
    objective = make_objective("sft", vocab_size=VOCAB)
    measured = student.measure(microbatches, [None] * 3, objective)
    alone = [student.measure([microbatch], [None], objective)[0] for microbatch in microbatches]
    stats = student.train_step(microbatches, [None] * 3, objective)
    total = 0.0
    for microbatch, trained, before, single in zip(microbatches, stats.per_token, measured, alone, strict=True):
        assert set(trained) == {"loss", "student_logprob", "student_entropy"}
        for key, values in trained.items():
            assert values.shape == microbatch.positions.shape and torch.equal(values, before[key])
            torch.testing.assert_close(values, single[key])
        total += float((trained["loss"].double() * microbatch.loss_weight).sum())
    assert stats.loss == pytest.approx(total, rel=1e-9)
    changed = student.measure(microbatches, [None] * 3, objective)
    assert not torch.equal(changed[0]["loss"], stats.per_token[0]["loss"])


def test_microbatch_without_trained_position_changes_nothing():
    objective = make_objective("sft", vocab_size=VOCAB)
    microbatches = _microbatches()
    silent = pack_rows([([5, 6, 7, 8], [], [])])
    with_silent, without = _student(), _student()
    stats = with_silent.train_step([silent, *microbatches, silent], [None] * 5, objective)
    expected = without.train_step(microbatches, [None] * 3, objective)
    assert stats.grad_norm == expected.grad_norm and stats.loss == expected.loss
    assert [len(figures["loss"]) for figures in stats.per_token] == [0, *(len(m.positions) for m in microbatches), 0]
    for name, weight in _weights(without).items():
        assert torch.equal(_weights(with_silent)[name], weight)


def test_no_microbatch_at_all_is_a_step_with_zero_gradient():
    student = _student()
    before = _weights(student)
    stats = student.train_step([], [], make_objective("sft", vocab_size=VOCAB))
    assert (stats.loss, stats.grad_norm, stats.is_finite, stats.per_token) == (0.0, 0.0, True, [])
    assert all(torch.equal(weight, before[name]) for name, weight in _weights(student).items())


class _Poisoned:
    """An objective whose loss or gradient is not finite at one position."""

    needs_teacher = False

    def __init__(self, poison):
        self.poison = poison

    def __call__(self, student_hidden, student_head, target, microbatch, *, tp_group, head_grad):
        loss = student_hidden.sum(-1)
        if self.poison == "loss":
            loss = loss + torch.zeros_like(loss).index_fill(0, torch.tensor([1]), float("nan"))
        else:  # the square root's gradient at 0 is infinite, its value is not
            loss = loss + (student_hidden[:, 0] * 0.0).sqrt()
        total = torch.dot(microbatch.loss_weight, loss)
        return TokenLosses(loss=loss.detach(), total=total, stats={})


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_step_that_is_not_finite_changes_no_weight_and_does_not_advance_the_schedule(poison):
    objective = make_objective("sft", vocab_size=VOCAB)
    microbatches = _microbatches()
    student, clean = _student(lr_warmup_iters=3), _student(lr_warmup_iters=3)
    for each in (student, clean):
        for _ in range(2):
            each.train_step(microbatches, [None] * 3, objective)
    before = _weights(student)
    stats = student.train_step(microbatches, [None] * 3, _Poisoned(poison))
    assert not stats.is_finite and student.scheduler.num_steps == 2
    assert math.isfinite(stats.loss) == (poison == "gradient")
    assert math.isfinite(stats.grad_norm) == (poison == "loss")
    assert all(torch.equal(weight, before[name]) for name, weight in _weights(student).items())
    for each in (student, clean):
        assert each.train_step(microbatches, [None] * 3, objective).is_finite
    assert all(torch.equal(weight, _weights(clean)[name]) for name, weight in _weights(student).items())


def test_adam_state_made_before_the_first_step_is_the_one_the_step_would_have_made():
    objective = make_objective("sft", vocab_size=VOCAB)
    touched, untouched = _student(), _student()
    names = [name for name, _, _ in touched.adam_states()]
    assert names == [name for name, _ in build.named_parameters(touched.chunks)]
    for _ in range(2):
        for each in (touched, untouched):
            each.train_step(_microbatches(), [None] * 3, objective)
    for (name, _, mine), (_, _, theirs) in zip(touched.adam_states(), untouched.adam_states(), strict=True):
        assert float(mine["step"]) == 2.0
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(mine[key], theirs[key]), name
    assert all(torch.equal(weight, _weights(untouched)[name]) for name, weight in _weights(touched).items())


def test_bfloat16_student_keeps_fp32_masters_that_follow_loaded_weights():
    shape = tiny_shape()
    student = Student(shape, ParallelLayout(), OptimizerSettings(lr=1e-4), seed=None, dtype=torch.bfloat16)
    source = Student(shape, ParallelLayout(), OptimizerSettings(lr=1e-4), seed=9, dtype=torch.bfloat16)
    for (_, mine), (_, theirs) in zip(
        build.named_parameters(student.chunks), build.named_parameters(source.chunks), strict=True
    ):
        mine.data.copy_(theirs.data)
    student.weights_loaded()
    objective = make_objective("sft", vocab_size=VOCAB)
    losses = [each.train_step(_microbatches(), [None] * 3, objective).loss for each in (student, source)]
    assert losses[0] == losses[1]
    for (_, mine), (_, theirs) in zip(
        build.named_parameters(student.chunks), build.named_parameters(source.chunks), strict=True
    ):
        assert mine.main_param.dtype is torch.float32 and torch.equal(mine.main_param, theirs.main_param)
    first = [student.train_step(_microbatches(), [None] * 3, objective).loss for _ in range(5)]
    assert first[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1e-4, "min_lr": 1e-3}, "min_lr 0.001 must lie between 0 and lr 0.0001"),
        ({"lr": 1e-4, "lr_decay_style": "cosin"}, "'cosin' is none of"),
        ({"lr": 1e-4, "lr_decay_style": "cosine", "lr_warmup_iters": 9, "lr_decay_iters": 9}, "lr_warmup_iters 9"),
    ],
)
def test_optimizer_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**settings)


def test_targets_that_do_not_match_the_microbatches_are_refused():
    with pytest.raises(ValueError, match="1 targets for 3 microbatches"):
        _student().train_step(_microbatches(), [None], make_objective("sft", vocab_size=VOCAB))
