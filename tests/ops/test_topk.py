"""The top-k op against `ops/reference.py` in float64, its properties, and two gloo processes against one."""

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tcod.ops import reference
from megatron_tcod.ops.topk import KINDS, linear_topk_divergence, sound_rows, student_topk

BETA = 0.3


def _operands(
    rows: int, vocab: int, k: int, *, padded: int | None = None, dtype=torch.float64, std=2.0, gap=None
) -> dict[str, torch.Tensor]:
    """Student operands and what a teacher sends for them; with `gap` the teacher is the student nudged by it.

    Rows take turns: all k ids, every second place unused, no id at all.
    """
    generator = torch.Generator().manual_seed(rows * 7919 + vocab)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head = draw(rows, 24), draw(padded or vocab, 24) * std / 24**0.5
    head[vocab:] = torch.nan  # whoever reads padding shows it
    hidden, head = hidden.to(dtype), head.to(dtype)
    near = hidden.double() @ head[:vocab].double().T
    teacher = std * draw(rows, vocab) if gap is None else near + gap * draw(rows, vocab)
    ids = (teacher + std * draw(rows, vocab)).topk(k).indices  # [S, k] mostly what the teacher likes
    if rows > 2 and k > 1:
        ids[1::3, ::2] = -1
        ids[2::3] = -1
    logprobs = teacher.log_softmax(-1).gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, torch.nan)
    targets = torch.randint(vocab, (rows,), generator=generator)
    operands = {"hidden": hidden, "head": head, "ids": ids, "logprobs": logprobs.to(dtype), "targets": targets}
    return operands | {"weight": torch.linspace(0.2, 1.0, rows, dtype=dtype)}


def _ordinary(kind, operands, *, dtype, vocab, tau=1.0, tail_floor=1e-6):
    """Loss and both gradients by autograd over whole logits in `dtype`."""
    hidden, head = (operands[name].to(dtype, copy=True) for name in ("hidden", "head"))
    hidden, head = hidden.requires_grad_(), head[:vocab].clone().requires_grad_()
    loss = reference.topk_divergence(
        hidden @ head.T,
        operands["ids"],
        operands["logprobs"].to(dtype),
        kind=kind,
        beta=BETA,
        student_temperature=tau,
        tail_floor=tail_floor,
    )
    (loss * operands["weight"].to(dtype)).sum().backward()
    return loss.detach(), hidden.grad, head.grad


def _called(kind, operands, hidden, head, *, vocab, tau=1.0, **options):
    return linear_topk_divergence(
        hidden,
        head,
        operands["ids"],
        operands["logprobs"],
        kind=kind,
        beta=BETA,
        vocab_size=vocab,
        student_temperature=tau,
        target_ids=operands["targets"],
        **options,
    )


def _chunked(kind, operands, **options):
    hidden, head = operands["hidden"].clone().requires_grad_(), operands["head"].clone().requires_grad_()
    out = _called(kind, operands, hidden, head, **options)
    (out.loss * operands["weight"].to(out.loss.dtype)).sum().backward()
    return out, hidden.grad, head.grad


def _weighted(kind, operands, *, main_grad=None, **options):
    """The form that knows the weights; the head's gradient is what was added to `main_grad` where that is given."""
    hidden, head = operands["hidden"].clone().requires_grad_(), operands["head"].clone().requires_grad_()
    out = _called(kind, operands, hidden, head, loss_weight=operands["weight"], head_grad=main_grad, **options)
    out.total.backward()
    assert not out.loss.requires_grad and (main_grad is None or head.grad is None)
    return out, hidden.grad, head.grad if main_grad is None else main_grad


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, vocab, k, chunk_size", [(5, 507, 1, None), (37, 507, 20, 10), (7, 32000, 64, 4)])
def test_float64_equals_the_reference(kind: str, rows: int, vocab: int, k: int, chunk_size: int | None):
    operands = _operands(rows, vocab, k, padded=vocab + 5)
    for tau in (0.5, 1.0, 2.0):
        truth = _ordinary(kind, operands, dtype=torch.float64, vocab=vocab, tau=tau)
        out, hidden_grad, head_grad = _chunked(kind, operands, vocab=vocab, tau=tau, chunk_size=chunk_size)
        for value, expected in zip((out.loss.detach(), hidden_grad, head_grad[:vocab]), truth, strict=True):
            assert _error(value, expected) < 1e-11
        assert torch.equal(head_grad[vocab:], torch.zeros(5, 24, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [None, 0.3, 0.02], ids=["far", "near", "converged"])
def test_fp32_error_is_no_larger_than_that_of_an_ordinary_fp32_computation(kind: str, gap: float | None):
    operands = _operands(64, 2003, 32, std=4.0, gap=gap, dtype=torch.float32)
    truth = _ordinary(kind, operands, dtype=torch.float64, vocab=2003)
    usual = _ordinary(kind, operands, dtype=torch.float32, vocab=2003)
    out, *grads = _chunked(kind, operands, vocab=2003, chunk_size=20)
    for value, other, expected in zip((out.loss.detach(), *grads), usual, truth, strict=True):
        assert _error(value, expected) <= max(1.1 * _error(other, expected), 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_listing_the_whole_vocabulary_gives_the_whole_divergence(kind: str):
    operands = _operands(2, 31, 31)
    hidden, head = (operands[name].clone().requires_grad_() for name in ("hidden", "head"))
    teacher = torch.empty_like(operands["logprobs"]).scatter_(-1, operands["ids"], operands["logprobs"])
    whole = {"reverse_kl": reference.reverse_kl, "forward_kl": reference.forward_kl}.get(kind)
    loss = whole(hidden @ head.T, teacher) if whole else reference.jsd(hidden @ head.T, teacher, beta=BETA)
    (loss * operands["weight"]).sum().backward()
    for sent in (operands["logprobs"], operands["logprobs"] - 1e-4, operands["logprobs"] + 1e-4):  # roundings
        out, hidden_grad, head_grad = _chunked(kind, operands | {"logprobs": sent}, vocab=31)
        assert out.student_tail.tolist() == out.teacher_tail.tolist() == [0, 0]
        for value, truth in ((out.loss.detach(), loss), (hidden_grad, hidden.grad), (head_grad, head.grad)):
            assert _error(value, truth.detach()) < 1e-12


def test_statistics_equal_the_reference_and_do_not_depend_on_the_kind():
    operands = _operands(37, 507, 20)
    logits, ids = operands["hidden"] @ operands["head"].T, operands["ids"]
    log_p = reference.log_softmax(logits, temperature=0.7)
    is_complete = torch.zeros(37, dtype=torch.bool)
    expected = {
        name: _ordinary(name, operands, dtype=torch.float64, vocab=507, tau=0.7)[0] for name in ("reverse_kl", "forward_kl")
    } | {
        "student_entropy": reference.entropy(logits, temperature=0.7),
        "student_tail": reference.student_buckets(log_p, ids)[:, -1].exp(),
        "teacher_tail": reference.teacher_buckets(operands["logprobs"], ids, is_complete)[:, -1].exp(),
        "student_logprob": reference.logprob(logits, operands["targets"], temperature=0.7),
    }
    for kind in KINDS:
        out, *_ = _chunked(kind, operands, vocab=507, tau=0.7, chunk_size=8)
        for name, value in expected.items():
            assert not getattr(out, name).requires_grad
            torch.testing.assert_close(getattr(out, name), value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_float64(kind: str):
    operands = _operands(4, 11, 3, padded=13)
    hidden, head = operands["hidden"][:, :4].clone().requires_grad_(), operands["head"][:11, :4].clone().requires_grad_()

    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        settings = {"kind": kind, "beta": BETA, "vocab_size": 11, "student_temperature": 0.6, "chunk_size": 2}
        return linear_topk_divergence(hidden, head, operands["ids"], operands["logprobs"], **settings).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))


LOGITS = st.floats(-5, 5, allow_nan=False, width=32)


@st.composite
def _pairs(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and teacher logits [1, V], and a permutation of the vocabulary."""
    vocab = draw(st.integers(2, 9))
    student, teacher = (draw(st.lists(LOGITS, min_size=vocab, max_size=vocab)) for _ in range(2))
    order = draw(st.permutations(range(vocab)))
    return torch.tensor([student]).double(), torch.tensor([teacher]).double(), torch.tensor([order])


def _of_logits(kind: str, student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, **options):
    """The op on logits themselves: the head is the identity."""
    sent = teacher.log_softmax(-1).gather(-1, ids)
    eye = torch.eye(student.shape[1], dtype=student.dtype)
    return linear_topk_divergence(
        student, eye, ids, sent, kind=kind, beta=BETA, vocab_size=len(eye), **{"tail_floor": 0.0} | options
    )


@settings(max_examples=60, deadline=None)
@given(_pairs(), st.sampled_from(KINDS))
def test_it_grows_with_each_listed_token_up_to_the_whole_divergence(pair, kind: str):
    student, teacher, order = pair
    losses = [_of_logits(kind, student, teacher, order[:, :k]).loss.item() for k in range(1, order.shape[1] + 1)]
    whole = _ordinary_divergence(kind, student, teacher)
    assert all(lower <= upper + 1e-9 for lower, upper in zip(losses, (*losses[1:], whole), strict=True))
    assert losses[-1] == pytest.approx(whole, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(_pairs(), st.sampled_from(KINDS), st.sampled_from([torch.float32, torch.float64]), st.floats(-8, 0), st.data())
def test_it_is_never_negative_also_near_agreement_in_fp32(pair, kind: str, dtype, exponent: float, data):
    student, teacher, order = pair
    teacher = student + 10**exponent * teacher
    ids = order[:, : data.draw(st.integers(1, order.shape[1]))]
    for floor in (0.0, 1e-6):
        out = _of_logits(kind, student.to(dtype), teacher.to(dtype), ids, tail_floor=floor)
        assert min(out.loss.item(), out.reverse_kl.item(), out.forward_kl.item()) >= 0


@settings(max_examples=40, deadline=None)
@given(_pairs(), st.sampled_from(KINDS), st.data())
def test_it_is_zero_without_gradient_where_all_buckets_agree_and_only_there(pair, kind: str, data):
    student, _, order = pair
    student.requires_grad_()
    k = data.draw(st.integers(1, order.shape[1] - 1))
    rest = order[:, k:]
    teacher = student.detach().scatter(-1, rest, student.detach().gather(-1, rest.flip(-1)))  # same mass, other tokens
    out = _of_logits(kind, student, teacher, order[:, :k])
    assert out.loss.item() < 1e-14
    assert torch.autograd.grad(out.loss.sum(), student)[0].abs().max() < 1e-9
    teacher[0, order[0, 0]] += 0.5
    assert _of_logits(kind, student, teacher, order[:, :k]).loss.item() > 1e-9


def _ordinary_divergence(kind: str, student: torch.Tensor, teacher: torch.Tensor) -> float:
    if kind == "jsd":
        return reference.jsd(student, teacher, beta=BETA).item()
    return {"reverse_kl": reference.reverse_kl, "forward_kl": reference.forward_kl}[kind](student, teacher).item()


@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits_and_tails_below_any_fp32_number_stay_exact(kind: str):
    """Logits of multiples of 64 that fp32 holds exactly; the student's rest has probability e^-16384."""
    operands = {
        "hidden": torch.tensor([[8192.0], [8192.0], [64.0]]),
        "head": torch.tensor([[1.0], [-1.0], [-1.0], [0.0]]),
        "ids": torch.tensor([[0, 3], [0, 3], [1, 0]]),
        "logprobs": torch.tensor([[-0.5, -1.0], [-1.0, -0.5], [-0.25, -2.0]]),
        "targets": torch.tensor([0, 3, 2]),
        "weight": torch.tensor([1.0, 0.5, 0.25]),
    }
    out, *grads = _chunked(kind, operands, vocab=4)
    assert out.student_logprob.tolist() == [0, -8192, -128] and torch.isfinite(out.loss).all()
    p = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]  # listed and rest, as good as
    log_p = torch.tensor([[0.0, -8192, -16384 + math.log(2)]] * 2 + [[-128, 0.0, -64]], dtype=torch.float64)
    log_q = operands["logprobs"].double()
    log_q = torch.cat([log_q, torch.log1p(-log_q.exp().sum(-1, keepdim=True))], -1)
    p, q = torch.tensor(p, dtype=torch.float64), log_q.exp()
    mix = (BETA * q + (1 - BETA) * p).log()
    kl_p_mix, kl_q_mix = (torch.special.xlogy(p, p) - p * mix).sum(-1), (q * (log_q - mix)).sum(-1)
    loss, slope = {
        "reverse_kl": ((p * (log_p - log_q)).sum(-1), torch.zeros(3, 3)),
        "forward_kl": ((q * (log_q - log_p)).sum(-1), p - q),
        "jsd": (BETA * kl_q_mix + (1 - BETA) * kl_p_mix, torch.zeros(3, 3)),
    }[kind]
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    head_grad = torch.zeros(4, 1, dtype=torch.float64)
    for row, (ids, rest) in enumerate(zip(operands["ids"], ([1, 2], [1, 2], [3]), strict=True)):
        scale = operands["hidden"][row] * operands["weight"][row]
        head_grad[ids] += slope[row, :2, None] * scale
        head_grad[rest] += slope[row, 2] / len(rest) * scale
    torch.testing.assert_close(grads[1].double(), head_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_without_a_rest_is_infinite_only_without_the_floor(kind: str):
    student = torch.tensor([[1.0, 0.0, -1.0]])
    sent = torch.full((1, 2), math.log(0.5) + 1e-6)  # above 1 by rounding
    settings = {"kind": kind, "vocab_size": 3}
    ids = torch.tensor([[1, 0]])
    bare = linear_topk_divergence(student, torch.eye(3), ids, sent, tail_floor=0.0, **settings)
    assert bare.teacher_tail.item() == 0
    assert math.isinf(bare.reverse_kl.item()) and math.isfinite(bare.forward_kl.item())
    floored = linear_topk_divergence(student, torch.eye(3), ids, sent, tail_floor=1e-6, **settings)
    assert floored.teacher_tail.item() == pytest.approx(1e-6)
    p, q = student.double().softmax(-1)[0], torch.tensor([0.5 - 5e-7, 0.5 - 5e-7, 1e-6], dtype=torch.float64)
    assert floored.reverse_kl.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_token_that_the_teacher_excludes_and_the_student_too_is_dropped(kind: str):
    student = torch.tensor([[1.0, 0.0, -1.0, -math.inf]], dtype=torch.float64)
    teacher = torch.tensor([[0.3, 0.5, 0.1, -math.inf]], dtype=torch.float64)
    sent = teacher.log_softmax(-1)
    head = torch.eye(4, dtype=torch.float64)
    student = torch.where(student.isinf(), -1e30, student).requires_grad_()  # 0 * inf has no product with the identity
    losses = [
        linear_topk_divergence(student, head, ids, sent.gather(-1, ids), kind=kind, beta=BETA, vocab_size=4).loss
        for ids in (torch.tensor([[1, 3]]), torch.tensor([[1]]))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss.sum(), student)[0] for loss in losses]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_surfaces_in_its_row_and_an_idle_row_leaves_no_trace(kind: str):
    operands = _operands(6, 507, 20, dtype=torch.float32)
    operands["weight"][4] = 0
    _, clean_hidden, clean_head = _chunked(kind, operands, vocab=507)
    operands["hidden"][4, 5] = torch.nan
    out, hidden_grad, head_grad = _chunked(kind, operands, vocab=507)
    assert out.loss.isnan().tolist() == out.student_entropy.isnan().tolist() == [False] * 4 + [True, False]
    assert torch.equal(hidden_grad, clean_hidden) and torch.equal(head_grad, clean_head)
    assert torch.equal(hidden_grad[4], torch.zeros(24))
    _, hidden_grad, head_grad = _chunked(kind, operands | {"weight": torch.ones(6)}, vocab=507)
    assert hidden_grad[4].isnan().all() and head_grad.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [None, 10, 1])
def test_the_form_with_weights_gives_the_same_values_and_gradients(kind: str, chunk_size: int | None):
    operands = _operands(37, 507, 20, padded=512)
    expected, hidden_grad, head_grad = _chunked(kind, operands, vocab=507, tau=0.7)
    before = torch.linspace(-1, 1, 512 * 24, dtype=torch.float64).view(512, 24)
    for main_grad in (None, before.clone()):
        out, *grads = _weighted(kind, operands, vocab=507, tau=0.7, chunk_size=chunk_size, main_grad=main_grad)
        assert out.total.item() == pytest.approx((expected.loss * operands["weight"]).sum().item(), rel=1e-12)
        for name in (name for name in vars(expected) if name != "total"):
            torch.testing.assert_close(getattr(out, name), getattr(expected, name).detach(), rtol=1e-11, atol=1e-12)
        added = grads[1] if main_grad is None else grads[1] - before
        torch.testing.assert_close(grads[0], hidden_grad, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(added, head_grad, rtol=1e-9, atol=1e-12)


def test_rows_without_weight_leave_no_trace_in_the_form_with_weights():
    operands = _operands(6, 507, 20, dtype=torch.float32)
    operands["weight"][4] = 0
    clean, *clean_grads = _weighted("reverse_kl", operands, vocab=507)
    operands["hidden"][4, 5] = torch.nan
    out, *grads = _weighted("reverse_kl", operands, vocab=507)
    assert out.total.item() == clean.total.item() and out.loss[4].item() == out.student_entropy[4].item() == 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, clean_grads, strict=True))
    assert torch.equal(grads[0][4], torch.zeros(24))
    spoilt, *_ = _weighted("reverse_kl", operands | {"weight": torch.ones(6)}, vocab=507)
    assert spoilt.total.isnan() and spoilt.loss.isnan().tolist() == [False] * 4 + [True, False]


def test_the_form_with_weights_scales_by_the_upstream_gradient_runs_once_with_main_grad_and_not_without_gradients():
    operands = _operands(5, 507, 20)
    weighted = dict(kind="jsd", vocab_size=507, loss_weight=operands["weight"])
    arguments = (operands["ids"], operands["logprobs"])
    hidden = operands["hidden"].clone().requires_grad_()
    (3 * linear_topk_divergence(hidden, operands["head"], *arguments, **weighted).total).backward()
    plain = linear_topk_divergence(hidden, operands["head"], *arguments, kind="jsd", vocab_size=507).loss
    (truth,) = torch.autograd.grad((3 * operands["weight"] * plain).sum(), hidden)
    torch.testing.assert_close(hidden.grad, truth, rtol=1e-11, atol=1e-13)
    main_grad = torch.zeros_like(operands["head"])
    total = linear_topk_divergence(hidden, operands["head"], *arguments, **weighted, head_grad=main_grad).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    with torch.no_grad():
        bare = linear_topk_divergence(hidden, operands["head"], *arguments, **weighted)
    assert not bare.total.requires_grad and bare.total.item() == pytest.approx(total.item(), rel=1e-12)


def test_no_rows_give_an_empty_loss_and_zero_gradients():
    out, hidden_grad, head_grad = _chunked("jsd", _operands(0, 507, 20), vocab=507)
    assert out.loss.shape == out.student_tail.shape == (0,) and hidden_grad.shape == (0, 24)
    assert torch.equal(head_grad, torch.zeros(507, 24, dtype=torch.float64))
    out, hidden_grad, _ = _weighted("jsd", _operands(0, 507, 20), vocab=507)
    assert out.total.item() == 0 and hidden_grad.shape == (0, 24)


def test_student_topk_lists_the_likeliest_real_tokens_in_order():
    operands = _operands(37, 507, 1, padded=512)
    expected = (operands["hidden"] @ operands["head"][:507].T).topk(20)
    ids = student_topk(operands["hidden"], operands["head"], k=20, vocab_size=507, chunk_size=10)
    assert ids.dtype is torch.int64 and torch.equal(ids, expected.indices)
    with pytest.raises(ValueError, match=r"k must lie in \[1, vocab_size\] = \[1, 507\], got 508"):
        student_topk(operands["hidden"], operands["head"], k=508, vocab_size=507)


UNSOUND = {
    "row 1 has id 507, outside the vocabulary": {"ids": [7, 507, 2], "probabilities": [0.1, 0.2, 0.3]},
    "row 1 has id -2, outside the vocabulary": {"ids": [7, -2, 2], "probabilities": [0.1, 0.2, 0.3]},
    "row 1 lists token 7 twice": {"ids": [7, 2, 7], "probabilities": [0.1, 0.2, 0.3]},
    "row 1 sums up to probability 1.002 over 3 of 507": {"ids": [7, 2, 8], "probabilities": [0.5, 0.002, 0.5]},
    "row 1 sums up to probability nan": {"ids": [7, 2, 8], "probabilities": [0.1, math.nan, 0.3]},
}


@pytest.mark.parametrize("message", UNSOUND)
def test_a_row_that_is_no_teachers_word_is_refused_by_name(message: str):
    operands = _operands(2, 507, 3)
    operands["ids"][1] = torch.tensor(UNSOUND[message]["ids"])
    operands["logprobs"][1] = torch.tensor(UNSOUND[message]["probabilities"]).log()
    assert sound_rows(operands["ids"], operands["logprobs"], 507).tolist() == [True, False]
    with pytest.raises(ValueError, match=message):
        _chunked("reverse_kl", operands, vocab=507)


def test_a_whole_vocabulary_with_missing_mass_is_refused():
    operands = _operands(2, 5, 5)
    operands["logprobs"] -= torch.tensor([[0.0], [0.01]])
    with pytest.raises(ValueError, match="row 1 sums up to probability 0.99005 over 5 of 5 tokens"):
        _chunked("reverse_kl", operands, vocab=5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "nll"}, "kind 'nll' is unknown; it must be one of reverse_kl, forward_kl, jsd"),
        ({"kind": "jsd", "beta": 1.0}, "beta must lie strictly between 0 and 1, got 1.0"),
        ({"tail_floor": 0.5}, "tail_floor is a small probability"),
        ({"vocab_size": 508}, r"vocab_size 508 is outside \[1, 507\]"),
        ({"chunk_size": 0}, "chunk_size must be at least 1 row, got 0"),
        ({"student_temperature": 0.0}, "student_temperature must be positive, got 0.0"),
        ({"backend": "fast"}, "'fast' is unknown"),
        ({"support_ids": torch.zeros(3, 4, dtype=torch.int64)}, r"support_ids must be \[S, k\] = \[2, k\]"),
        ({"support_ids": torch.zeros(2, 0, dtype=torch.int64)}, "with k at least 1"),
        ({"support_ids": torch.zeros(2, 3, dtype=torch.int32)}, "support_ids must be int64"),
        ({"teacher_logprobs": torch.zeros(2, 4)}, r"teacher_logprobs must be \[S, k\] = \[2, 3\]"),
        ({"target_ids": torch.zeros(3, dtype=torch.int64)}, r"target_ids must be \[S\] = \[2\] int64"),
        ({"student_head": torch.zeros(507, 23)}, "with one H"),
        ({"loss_weight": torch.ones(3)}, r"loss_weight must be \[S\] = \[2\]"),
        ({"head_grad": torch.zeros(507, 24)}, "head_grad belongs to loss_weight"),
        ({"loss_weight": torch.ones(2), "head_grad": torch.zeros(507, 23)}, "head_grad must be fp32"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_expected(changes: dict, message: str):
    operands = _operands(2, 507, 3)
    arguments = {
        "student_hidden": operands["hidden"],
        "student_head": operands["head"],
        "support_ids": operands["ids"],
        "teacher_logprobs": operands["logprobs"],
        "kind": "reverse_kl",
        "vocab_size": 507,
    }
    with pytest.raises(ValueError, match=message):
        linear_topk_divergence(**arguments | changes)


@pytest.mark.gpu
def test_unsound_row_is_nan_on_a_device_and_the_others_are_as_on_the_cpu():
    operands = _operands(2, 507, 3, dtype=torch.float32)
    expected, *_ = _chunked("reverse_kl", operands, vocab=507)
    operands["ids"][1, 0] = operands["ids"][1, 1]
    out, hidden_grad, _ = _chunked("reverse_kl", {name: x.cuda() for name, x in operands.items()}, vocab=507)
    assert out.loss.isnan().tolist() == [False, True] and hidden_grad[1].isnan().all()
    torch.testing.assert_close(out.loss[0].cpu(), expected.loss[0], rtol=1e-5, atol=1e-6)


SHARDED = {
    **{kind: {"kind": kind, "tau": 0.7, "padded": 512} for kind in KINDS},
    "padding-only": {"kind": "reverse_kl", "tau": 1.0, "padded": 1024},  # the second rank has no real token
}


class _Collectives(TorchDispatchMode):
    """Counts the collectives that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func._schema.name.removeprefix("c10d::"))
        return func(*args, **(kwargs or {}))


def _worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group, tensors = dist.group.WORLD, {}
    for name, case in SHARDED.items():
        operands = _operands(13, 507, 20, padded=case["padded"])
        operands["head"] = operands["head"].chunk(2)[rank].clone()
        with _Collectives() as collectives:
            out, hidden_grad, head_grad = _chunked(
                case["kind"], operands, vocab=507, tau=case["tau"], chunk_size=4, tp_group=group
            )
        assert collectives.names == ["_allgather_base_", "allreduce_"], collectives.names
        tensors |= {f"{name}/{key}": value.detach() for key, value in vars(out).items() if value is not None}
        main_grad = torch.zeros_like(operands["head"])
        _, weighted_grad, _ = _weighted(
            case["kind"], operands, vocab=507, tau=case["tau"], chunk_size=4, tp_group=group, main_grad=main_grad
        )
        torch.testing.assert_close(weighted_grad, hidden_grad, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(main_grad, head_grad, rtol=1e-11, atol=1e-13)
        ids = student_topk(operands["hidden"], operands["head"], k=20, vocab_size=507, tp_group=group, chunk_size=4)
        tensors |= {f"{name}/hidden_grad": hidden_grad, f"{name}/head_grad": head_grad, f"{name}/topk": ids}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each of two ranks got."""
    folder = tmp_path_factory.mktemp("gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(port, str(folder)), nprocs=2)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("name", SHARDED)
def test_two_shards_give_the_unsharded_value_and_gradient_by_one_gather_and_one_reduction(sharded, name: str):
    case = SHARDED[name]
    operands = _operands(13, 507, 20, padded=case["padded"])
    out, hidden_grad, head_grad = _chunked(case["kind"], operands, vocab=507, tau=case["tau"])
    expected = {key: value.detach() for key, value in vars(out).items() if value is not None} | {"hidden_grad": hidden_grad}
    for key, value in expected.items():
        assert torch.equal(sharded[0][f"{name}/{key}"], sharded[1][f"{name}/{key}"]), key
        torch.testing.assert_close(sharded[0][f"{name}/{key}"], value, rtol=1e-11, atol=1e-12)
    both = torch.cat([rank[f"{name}/head_grad"] for rank in sharded])
    torch.testing.assert_close(both, head_grad, rtol=1e-11, atol=1e-12)
    assert (both * head_grad).sum() / head_grad.square().sum() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", SHARDED)
def test_student_topk_over_shards_is_the_unsharded_one(sharded, name: str):
    operands = _operands(13, 507, 20, padded=SHARDED[name]["padded"])
    expected = student_topk(operands["hidden"], operands["head"], k=20, vocab_size=507)
    assert torch.equal(sharded[0][f"{name}/topk"], expected) and torch.equal(sharded[1][f"{name}/topk"], expected)
