"""The chunked op on one process against `ops/reference.py` in float64 from float64 operands."""

import itertools
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_tcod.ops import backends, reference
from megatron_tcod.ops.divergence import KINDS, align_head, linear_divergence, linear_logprob

NATIVE = [name for name in backends.BACKENDS if name != "torch" and "cpu" in backends.DEVICES[name]]
"""Backends that run here beside the plain one."""


def _operands(
    rows: int, vocab: int, *, padded: int | None = None, dtype: torch.dtype = torch.float32, std: float = 2.0, gap=None
) -> dict[str, torch.Tensor]:
    """Hidden states and heads whose logits have about this std; with `gap` the teacher is the student nudged by it."""
    generator = torch.Generator().manual_seed(rows * 7919 + vocab)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    padded = padded or vocab
    student_hidden, student_head = draw(rows, 24), draw(padded, 24) * std / 24**0.5
    if gap is None:
        teacher_hidden, teacher_head = draw(rows, 40), draw(padded, 40) * std / 40**0.5
    else:
        teacher_hidden, teacher_head = student_hidden + gap * draw(rows, 24), student_head.clone()
    operands = {
        "student_hidden": student_hidden,
        "student_head": student_head,
        "teacher_hidden": teacher_hidden,
        "teacher_head": teacher_head,
    }
    operands = {name: tensor.to(dtype) for name, tensor in operands.items()}
    return operands | {"target_ids": torch.randint(vocab, (rows,), generator=generator)}


def _reference_loss(
    kind, student_logits, teacher_logits, target_ids, *, beta=0.5, vocab_size=None, temperatures=(1.0, 1.0)
):
    if kind == "nll":
        return -reference.logprob(student_logits, target_ids, vocab_size=vocab_size, temperature=temperatures[0])
    settings = {
        "vocab_size": vocab_size,
        "student_temperature": temperatures[0],
        "teacher_temperature": temperatures[1],
    }
    if kind == "jsd":
        return reference.jsd(student_logits, teacher_logits, beta=beta, **settings)
    return {"reverse_kl": reference.reverse_kl, "forward_kl": reference.forward_kl}[kind](
        student_logits, teacher_logits, **settings
    )


def _ordinary(kind, operands, weight, *, dtype, **settings):
    """Loss and both gradients by autograd over whole logits in `dtype`, from the operands as they are."""
    hidden, head = (operands[f"student_{name}"].to(dtype).clone().requires_grad_() for name in ("hidden", "head"))
    teacher_logits = operands["teacher_hidden"].to(dtype) @ operands["teacher_head"].to(dtype).T  # [S, V]
    loss = _reference_loss(kind, hidden @ head.T, teacher_logits, operands["target_ids"], **settings)
    (loss * weight.to(dtype)).sum().backward()
    return loss.detach(), hidden.grad, head.grad


def _chunked(kind, operands, weight, *, vocab_size, temperatures=(1.0, 1.0), mode="rows", **settings):
    """The op's result and both gradients. `mode`: a differentiable row loss, a total, or a total with head_grad."""
    hidden, head = (operands[f"student_{name}"].clone().requires_grad_() for name in ("hidden", "head"))
    if mode != "rows":
        settings["loss_weight"] = weight
    if mode == "head_grad":
        settings["head_grad"] = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32))
    out = linear_divergence(
        hidden,
        head,
        operands["teacher_hidden"],
        operands["teacher_head"],
        target_ids=operands["target_ids"],
        kind=kind,
        vocab_size=vocab_size,
        student_temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        **settings,
    )
    if mode == "rows":
        (out.loss * weight.to(out.loss.dtype)).sum().backward()
        return out, hidden.grad, head.grad
    out.total.backward()
    return out, hidden.grad, settings.get("head_grad", head.grad)


MODES = ("rows", "total", "head_grad")


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows, vocab, chunk_size", [(1, 507, None), (37, 507, 10), (6, 32000, 4)])
def test_float64_equals_the_reference(kind: str, mode: str, rows: int, vocab: int, chunk_size: int | None):
    operands = _operands(rows, vocab, dtype=torch.float64)
    weight = torch.linspace(0.2, 1.0, rows, dtype=torch.float64)
    for beta, temperatures in [(0.1, (0.5, 1.0)), (0.5, (1.0, 1.0)), (0.9, (2.0, 0.5))]:
        settings = {"beta": beta, "temperatures": temperatures, "vocab_size": vocab}
        truth = _ordinary(kind, operands, weight, dtype=torch.float64, **settings)
        out, *grads = _chunked(kind, operands, weight, chunk_size=chunk_size, mode=mode, **settings)
        assert out.loss.dtype == torch.float64
        for value, expected in zip((out.loss.detach(), *grads), truth, strict=True):
            assert _error(value, expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torch", *NATIVE])
@pytest.mark.parametrize("gap", [None, 0.3, 0.02], ids=["far", "near", "converged"])
def test_fp32_error_is_no_larger_than_that_of_an_ordinary_fp32_computation(kind, mode, backend, gap):
    operands, weight = _operands(64, 2003, std=4.0, gap=gap), torch.linspace(0.2, 1.0, 64)
    truth = _ordinary(kind, operands, weight, dtype=torch.float64)
    ordinary = _ordinary(kind, operands, weight, dtype=torch.float32)
    settings = {"mode": mode, "backend": backend}
    out, *grads = _chunked(kind, operands, weight, vocab_size=2003, chunk_size=20, **settings)
    for value, usual, expected in zip((out.loss.detach(), *grads), ordinary, truth, strict=True):
        assert _error(value, expected) <= max(1.1 * _error(usual, expected), 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_bf16_operands_give_fp32_logits(kind: str):
    operands, weight = _operands(64, 1009, std=4.0, gap=0.05, dtype=torch.bfloat16), torch.ones(64)
    truth = _ordinary(kind, operands, weight, dtype=torch.float64)
    out, *grads = _chunked(kind, operands, weight, vocab_size=1009)
    assert out.loss.dtype == torch.float32 and all(grad.dtype == torch.bfloat16 for grad in grads)
    ordinary_loss, *ordinary_grads = _ordinary(kind, operands, weight, dtype=torch.bfloat16)
    rounding = [_error(expected.to(torch.bfloat16), expected) for expected in truth[1:]]
    assert _error(out.loss.detach(), truth[0]) < 1e-4 * _error(ordinary_loss, truth[0])
    for grad, ordinary, expected, once in zip(grads, ordinary_grads, truth[1:], rounding, strict=True):
        assert _error(grad, expected) <= 1.01 * once < _error(ordinary, expected) / 4


def test_statistics_equal_the_reference_and_do_not_depend_on_the_kind():
    operands, weight = _operands(37, 507, dtype=torch.float64, gap=0.2), torch.ones(37)
    student, teacher = (operands[f"{s}_hidden"] @ operands[f"{s}_head"].T for s in ("student", "teacher"))
    temperatures, target_ids = (0.7, 1.3), operands["target_ids"]
    both = {"student_temperature": 0.7, "teacher_temperature": 1.3}
    expected = {
        "reverse_kl": reference.reverse_kl(student, teacher, **both),
        "forward_kl": reference.forward_kl(student, teacher, **both),
        "student_entropy": reference.entropy(student, temperature=0.7),
        "teacher_entropy": reference.entropy(teacher, temperature=1.3),
        "student_logprob": reference.logprob(student, target_ids, temperature=0.7),
        "teacher_logprob": reference.logprob(teacher, target_ids, temperature=1.3),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
    }
    assert 0 < expected["top1_agreement"].sum() < 37
    for kind in KINDS:
        out, *_ = _chunked(kind, operands, weight, vocab_size=507, temperatures=temperatures, chunk_size=8)
        for name, value in expected.items():
            assert not getattr(out, name).requires_grad
            torch.testing.assert_close(getattr(out, name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_float64(kind: str):
    operands = _operands(3, 11, padded=13, dtype=torch.float64)
    hidden, head = (operands[f"student_{name}"][:, :4].clone().requires_grad_() for name in ("hidden", "head"))

    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return linear_divergence(
            hidden,
            head,
            operands["teacher_hidden"],
            operands["teacher_head"],
            kind=kind,
            beta=0.3,
            vocab_size=11,
            student_temperature=0.6,
            target_ids=operands["target_ids"],
            chunk_size=2,
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))


def test_linear_logprob_equals_the_reference():
    operands = _operands(37, 507, padded=512, dtype=torch.float64)
    hidden, head = (operands[f"student_{name}"].clone().requires_grad_() for name in ("hidden", "head"))
    weight = torch.linspace(0, 1, 37, dtype=torch.float64)
    read = linear_logprob(hidden, head, operands["target_ids"], vocab_size=507, temperature=0.7, chunk_size=10)
    grads = torch.autograd.grad((weight * read.logprob).sum(), (hidden, head))
    logits = hidden @ head.T
    expected = reference.logprob(logits, operands["target_ids"], vocab_size=507, temperature=0.7)
    torch.testing.assert_close(read.logprob, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(read.entropy, reference.entropy(logits, vocab_size=507, temperature=0.7))
    for grad, truth in zip(grads, torch.autograd.grad((weight * expected).sum(), (hidden, head)), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_rows_of_the_heads_are_never_read(kind: str):
    operands, weight = _operands(9, 507, padded=640), torch.ones(9)
    clean, clean_hidden, clean_head = _chunked(kind, operands, weight, vocab_size=507)
    for side in ("student", "teacher"):
        operands[f"{side}_head"][507:] = torch.nan
    operands["teacher_head"] = operands["teacher_head"][:576]  # unequal padding is no problem for one rank
    out, hidden_grad, head_grad = _chunked(kind, operands, weight, vocab_size=507)
    assert torch.equal(out.loss, clean.loss) and torch.equal(hidden_grad, clean_hidden)
    assert torch.equal(head_grad[:507], clean_head[:507])
    assert torch.equal(head_grad[507:], torch.zeros(133, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_1e4_stay_finite_and_exact(kind: str):
    """Logits that are powers of two times small integers: fp32 holds them exactly, so only the op can lose digits."""
    pattern = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]])
    operands = {
        "student_hidden": pattern * 8192,
        "student_head": torch.eye(3)[[0, 1, 2, 0]],
        "teacher_hidden": pattern.flip(0) * 8192
        if kind in ("jsd", "nll")
        else pattern * 8192 + torch.tensor([0, 0, 2.0]),
        "teacher_head": torch.eye(3)[[0, 1, 2, 0]],
        "target_ids": torch.tensor([0, 2]),
    }
    truth = _ordinary(kind, operands, torch.ones(2), dtype=torch.float64)
    out, *grads = _chunked(kind, operands, torch.ones(2), vocab_size=4)
    assert torch.isfinite(out.loss).all()
    for value, expected in zip((out.loss.detach(), *grads), truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_opposed_huge_logits_give_their_difference(kind: str):
    operands = {
        "student_hidden": torch.tensor([[1e4]]),
        "student_head": torch.tensor([[1.0], [-1.0]]),
        "teacher_hidden": torch.tensor([[1e4]]),
        "teacher_head": torch.tensor([[-1.0], [1.0]]),
        "target_ids": torch.tensor([0]),
    }
    out, hidden_grad, _ = _chunked(kind, operands, torch.ones(1), vocab_size=2)
    assert out.loss.item() == 2e4 and torch.isfinite(hidden_grad).all()


def test_minus_infinity_is_dropped_without_weight_and_surfaces_with_it():
    def read(student_last: float, teacher_last: float, kind: str):
        student_head = torch.tensor([[0.5], [-1.0], [student_last]], requires_grad=True)
        hidden = torch.tensor([[1.0]], requires_grad=True)
        teacher_head = torch.tensor([[0.1], [0.2], [teacher_last]])
        out = linear_divergence(hidden, student_head, torch.ones(1, 1), teacher_head, kind=kind, vocab_size=3)
        return out, torch.autograd.grad(out.loss.sum(), student_head)[0]

    for kind in ("reverse_kl", "forward_kl", "jsd"):
        out, head_grad = read(-math.inf, -math.inf, kind)
        expected = _reference_loss(kind, torch.tensor([[0.5, -1.0]]), torch.tensor([[0.1, 0.2]]), None)
        torch.testing.assert_close(out.loss, expected)
        assert head_grad[2] == 0 and torch.isfinite(head_grad).all()
    absent_in_teacher, _ = read(0.3, -math.inf, "reverse_kl")
    assert absent_in_teacher.reverse_kl.item() == math.inf and math.isfinite(absent_in_teacher.forward_kl.item())
    absent_in_student, _ = read(-math.inf, 0.3, "reverse_kl")
    assert absent_in_student.forward_kl.item() == math.inf and math.isfinite(absent_in_student.reverse_kl.item())
    for last in ((-math.inf, 0.3), (0.3, -math.inf)):
        out, _ = read(*last, "jsd")
        logits = torch.tensor([[0.5, -1.0, last[0]]]), torch.tensor([[0.1, 0.2, last[1]]])
        torch.testing.assert_close(out.loss, reference.jsd(*logits))


@pytest.mark.parametrize("side", ["student_hidden", "teacher_hidden"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("mode", MODES)
def test_nan_surfaces_in_its_row_and_an_idle_row_leaves_no_trace(mode: str, kind: str, side: str):
    operands, weight = _operands(6, 507), torch.tensor([1.0, 1, 0, 1, 1, 1])
    clean, *clean_grads = _chunked(kind, operands, weight, vocab_size=507, mode=mode)
    operands[side][2, 5] = torch.nan
    out, hidden_grad, head_grad = _chunked(kind, operands, weight, vocab_size=507, mode=mode)
    assert torch.equal(hidden_grad, clean_grads[0]) and torch.equal(head_grad, clean_grads[1])
    assert torch.equal(hidden_grad[2], torch.zeros(24))
    if mode == "rows":
        assert out.loss.isnan().tolist() == [False, False, True, False, False, False]
    else:
        assert torch.equal(out.loss, clean.loss) and out.loss[2] == 0 and torch.equal(out.total, clean.total)
    out, hidden_grad, head_grad = _chunked(kind, operands, torch.ones(6), vocab_size=507, mode=mode)
    assert out.loss.isnan().tolist() == [False, False, True, False, False, False]
    assert hidden_grad[2].isnan().all() and head_grad.isnan().all()


def test_infinite_logit_surfaces_as_nan():
    operands = _operands(2, 11)
    operands["student_head"][3] = math.inf
    operands["student_hidden"].abs_()
    out, *_ = _chunked("reverse_kl", operands, torch.ones(2), vocab_size=11)
    assert out.loss.isnan().all() and out.student_entropy.isnan().all()


def test_target_outside_the_vocabulary_has_probability_zero():
    operands = _operands(2, 507, padded=512)
    operands["target_ids"] = torch.tensor([508, -100])
    out, *_ = _chunked("nll", operands, torch.ones(2), vocab_size=507)
    assert out.loss.tolist() == [math.inf, math.inf] and out.teacher_logprob.tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_an_empty_loss_and_zero_gradients(kind: str):
    out, hidden_grad, head_grad = _chunked(kind, _operands(0, 507), torch.ones(0), vocab_size=507)
    assert out.loss.shape == out.reverse_kl.shape == (0,)
    assert hidden_grad.shape == (0, 24) and torch.equal(head_grad, torch.zeros(507, 24))


def test_frozen_head_or_hidden_states_get_no_gradient():
    operands = _operands(5, 507)
    _, _, full_head = _chunked("reverse_kl", operands, torch.ones(5), vocab_size=507)
    head = operands["student_head"].clone().requires_grad_()
    out = linear_divergence(
        operands["student_hidden"],
        head,
        operands["teacher_hidden"].requires_grad_(),
        operands["teacher_head"].requires_grad_(),
        kind="reverse_kl",
        vocab_size=507,
    )
    out.loss.sum().backward()
    assert torch.equal(head.grad, full_head)
    assert operands["teacher_hidden"].grad is None and operands["teacher_head"].grad is None
    assert out.student_logprob is None and out.teacher_logprob is None


def _peak_bytes(run) -> int:
    """Most bytes that lived at once during run(), beyond those that lived before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("backend", ["torch", *NATIVE])
@pytest.mark.parametrize("with_weight", [True, False], ids=["total", "rows"])
def test_peak_memory_is_the_gradients_and_one_chunk_of_logits(backend: str, with_weight: bool):
    vocab, chunk_size = 8001, 64
    chunk = 4 * chunk_size * vocab
    temporaries = 14 if backend == "torch" else 2  # chunks of logits at a time: plain torch is not fused
    for rows in (256, 1024):
        operands, weight = _operands(rows, vocab), torch.ones(rows)
        inputs = {name: tensor.requires_grad_(name.startswith("student")) for name, tensor in operands.items()
                  if name != "target_ids"}  # fmt: skip
        gradients = 4 * (rows * 24 + vocab * 24)

        def run():
            out = linear_divergence(  # noqa: B023
                **inputs, kind="reverse_kl", vocab_size=vocab, chunk_size=chunk_size, backend=backend,  # noqa: B023
                loss_weight=weight if with_weight else None,  # noqa: B023
            )  # fmt: skip
            (out.total if with_weight else (out.loss * weight).sum()).backward()  # noqa: B023

        peak = _peak_bytes(run)
        assert chunk < peak < 2 * gradients + temporaries * chunk + 1000 * rows, (peak / chunk, rows)
        assert rows < 1024 or peak < 4 * rows * vocab  # less than one tensor of all logits


def test_result_does_not_depend_on_chunks():
    operands, weight = _operands(50, 507), torch.linspace(0.1, 1, 50)
    whole, *whole_grads = _chunked("reverse_kl", operands, weight, vocab_size=507, chunk_size=50)
    for chunk_size in (1, 7, 49, 1000):
        out, *grads = _chunked("reverse_kl", operands, weight, vocab_size=507, chunk_size=chunk_size)
        torch.testing.assert_close(out.loss, whole.loss, rtol=2e-6, atol=2e-6)
        for grad, expected in zip(grads, whole_grads, strict=True):
            assert _error(grad, expected.double()) < 2e-6


def test_align_head_without_a_group_pads_or_cuts_rows():
    head = torch.randn(640, 8)
    aligned = align_head(head, 507, 512, None)
    assert torch.equal(aligned[:507], head[:507]) and torch.equal(aligned[507:], torch.zeros(5, 8))
    with pytest.raises(ValueError, match="padded_to 500 must be a multiple of tp size 1 and at least vocab_size 507"):
        align_head(head, 507, 500, None)
    with pytest.raises(ValueError, match="do not hold vocab_size 641"):
        align_head(head, 641, 700, None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "reverse"}, "kind 'reverse' is unknown; it must be one of reverse_kl, forward_kl, jsd, nll"),
        ({"kind": "jsd", "beta": 0.0}, "beta must lie strictly between 0 and 1, got 0.0"),
        ({"kind": "nll", "target_ids": None}, "at target_ids"),
        ({"student_temperature": 0.0}, "student_temperature must be positive and finite, got 0.0"),
        ({"teacher_temperature": -1.0}, "teacher_temperature must be positive and finite, got -1.0"),
        ({"vocab_size": 508}, r"vocab_size 508 is outside \[1, 507\]"),
        ({"chunk_size": 0}, "chunk_size must be at least 1 row, got 0"),
        ({"target_ids": torch.zeros(3, dtype=torch.int64)}, r"target_ids must be \[S\] = \[4\]"),
        ({"teacher_hidden": torch.zeros(3, 40), "target_ids": None}, "teacher_hidden has 3 rows, student_hidden 4"),
        ({"teacher_head": torch.zeros(507, 39)}, r"teacher hidden states must be \[S, H\] and the head shard"),
    ],
)
def test_errors_say_what_was_expected(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        linear_divergence(**({"kind": "reverse_kl", "vocab_size": 507} | _operands(4, 507) | change))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_operands_on_a_gpu_keep_fp32_logits(kind: str):
    operands, weight = _operands(64, 2003, std=4.0, gap=0.05, dtype=torch.bfloat16), torch.ones(64)
    truth = _ordinary(kind, operands, weight, dtype=torch.float64)
    on_gpu = {name: tensor.cuda() for name, tensor in operands.items()}
    out, *grads = _chunked(kind, on_gpu, weight.cuda(), vocab_size=2003, chunk_size=20)
    assert _error(out.loss.detach().cpu(), truth[0]) < 1e-4
    for grad, expected in zip(grads, truth[1:], strict=True):
        assert _error(grad.cpu(), expected) < 3 * _error(expected.to(torch.bfloat16), expected)
