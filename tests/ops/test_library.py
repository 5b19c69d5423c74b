"""The operators of torch.library: opcheck, torch.compile, and who owns which gradient."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_tcod.ops import reference
from megatron_tcod.ops.chunk_loop import Plan
from megatron_tcod.ops.divergence import KINDS, linear_divergence, linear_logprob, logits_divergence

VOCAB, PADDED = 53, 64


def _models(rows: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "student_hidden": draw(rows, 8),
        "student_head": draw(PADDED, 8),
        "teacher_hidden": draw(rows, 12),
        "teacher_head": draw(PADDED, 12),
        "target_ids": torch.randint(VOCAB, (rows,), generator=generator),
    }


def _trained(models: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone().requires_grad_(name.startswith("student")) if tensor.is_floating_point() else tensor
        for name, tensor in models.items()
    }


def _plan(kind: str) -> Plan:
    return Plan(kind, VOCAB, 0.3, 0.7, 1.1, 4, False, "auto", "")


@pytest.mark.parametrize("kind", KINDS)
def test_operators_pass_opcheck(kind: str):
    models, weight = tuple(_trained(_models()).values()), torch.linspace(0.1, 1, 6)
    torch.library.opcheck(torch.ops.megatron_tcod.linear_divergence_rows, (*models, *_plan(kind)))
    torch.library.opcheck(torch.ops.megatron_tcod.linear_divergence_total, (*models, weight, True, *_plan(kind)))
    models = tuple(_models().values())
    table = torch.ops.megatron_tcod.linear_divergence_rows(*models, *_plan(kind))[2]
    for needs_head in (True, False):
        arguments = (*models, table, weight, needs_head, *_plan(kind))
        torch.library.opcheck(torch.ops.megatron_tcod.linear_divergence_rows_backward, arguments)
    arguments = (*models, weight, torch.tensor(2.0), torch.ones(PADDED, 8), *_plan(kind))
    torch.library.opcheck(torch.ops.megatron_tcod.linear_divergence_total_, arguments)


@pytest.mark.parametrize("with_weight", [True, False], ids=["total", "rows"])
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_compiles_into_one_graph_with_equal_values_and_gradients(kind: str, with_weight: bool):
    weight = torch.linspace(0.1, 1, 6)

    def loss_of(student_hidden, student_head, teacher_hidden, teacher_head, target_ids):
        out = linear_divergence(
            student_hidden * 2, student_head, teacher_hidden, teacher_head, kind=kind, vocab_size=VOCAB,
            target_ids=target_ids, loss_weight=weight if with_weight else None,
        )  # fmt: skip
        return (out.total if with_weight else (weight * out.loss).sum()) + out.student_entropy.sum()

    eager, compiled = _trained(_models()), _trained(_models())
    expected = loss_of(**eager)
    found = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(**compiled)
    assert torch.equal(found, expected)
    expected.backward()
    found.backward()
    for name in ("student_hidden", "student_head"):
        assert compiled[name].grad.norm() > 0
        assert torch.equal(compiled[name].grad, eager[name].grad)


def _gradients(models, *, kind="reverse_kl", head_grad=None, upstream=1.0, **settings):
    models = _trained(models)
    out = linear_divergence(**models, kind=kind, vocab_size=VOCAB, head_grad=head_grad, **settings)
    (upstream * out.total).backward()
    return out, models["student_hidden"].grad, models["student_head"].grad


@pytest.mark.parametrize("kind", KINDS)
def test_head_grad_takes_up_the_gradient_times_its_scale_and_keeps_what_it_had(kind: str):
    models, weight = _models(dtype=torch.float64), torch.linspace(0.1, 1, 6, dtype=torch.float64)
    _, hidden, head = _gradients(models, kind=kind, loss_weight=weight)
    before = torch.randn(PADDED, 8, dtype=torch.float64)
    main_grad, scale = before.clone(), torch.tensor(16.0)
    for _ in range(2):
        out, scaled_hidden, head_param_grad = _gradients(
            models, kind=kind, loss_weight=weight, head_grad=main_grad, grad_scale=scale, upstream=16.0
        )
    assert head_param_grad is None
    torch.testing.assert_close(scaled_hidden, 16 * hidden)
    torch.testing.assert_close(main_grad, before + 32 * head)
    assert torch.equal(main_grad[VOCAB:], before[VOCAB:])


def test_bf16_head_gradient_is_added_up_in_fp32():
    models, weight = _models(rows=40, dtype=torch.bfloat16), torch.full((40,), 1 / 40)
    truth = _gradients({k: v.double() if v.is_floating_point() else v for k, v in models.items()}, loss_weight=weight)[2]
    main_grad = torch.zeros(PADDED, 8)
    for part in range(0, 40, 4):  # microbatches: a bf16 sum of ten would lose two digits
        rows = slice(part, part + 4)
        share = {k: v[rows] if k in ("student_hidden", "teacher_hidden", "target_ids") else v for k, v in models.items()}
        _gradients(share, loss_weight=weight[rows], head_grad=main_grad)
    assert (main_grad.double() - truth).norm() < 1e-5 * truth.norm()


def test_second_backward_over_head_grad_is_refused():
    models = _trained(_models())
    out = linear_divergence(
        **models, kind="reverse_kl", vocab_size=VOCAB, loss_weight=torch.ones(6), head_grad=torch.zeros(PADDED, 8)
    )
    out.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.total.backward()


def _rows_multiplied(run) -> set[int]:
    """First dimensions of the matrix products in run()."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    return {event.input_shapes[0][0] for event in recorded.events() if event.name == "aten::mm"}


def test_rows_without_weight_never_reach_a_product_and_are_zero():
    models, weight = _models(rows=7), torch.tensor([0.0, 1, 0, 2, 0, 0, 3])
    assert _rows_multiplied(lambda: _gradients(models, loss_weight=torch.ones(7))) == {7}
    assert _rows_multiplied(lambda: _gradients(models, loss_weight=weight)) == {3}
    out, hidden, head = _gradients(models, loss_weight=weight)
    kept = [1, 3, 6]
    share = {k: v[kept] if k in ("student_hidden", "teacher_hidden", "target_ids") else v for k, v in models.items()}
    expected, expected_hidden, expected_head = _gradients(share, loss_weight=weight[kept])
    for name in ("loss", "reverse_kl", "student_entropy", "teacher_logprob"):
        assert torch.equal(getattr(out, name)[kept], getattr(expected, name))
        assert not getattr(out, name)[[0, 2, 4, 5]].any()
    assert torch.equal(hidden[kept], expected_hidden) and not hidden[[0, 2, 4, 5]].any()
    assert torch.equal(head, expected_head)
    torch.testing.assert_close(out.total, expected.total)


def test_without_gradients_the_total_is_only_a_value():
    models, weight = _models(), torch.linspace(0, 1, 6)
    trained, *_ = _gradients(models, loss_weight=weight)
    with torch.no_grad():
        measured = linear_divergence(**models, kind="reverse_kl", vocab_size=VOCAB, loss_weight=weight)
    torch.testing.assert_close(measured.total, trained.total)
    assert not measured.total.requires_grad and measured.loss[0] > 0


def test_linear_logprob_total_is_the_weighted_nll():
    models, weight = _models(dtype=torch.float64), torch.linspace(0.1, 1, 6, dtype=torch.float64)
    hidden, head = (models[f"student_{name}"].requires_grad_() for name in ("hidden", "head"))
    log_p = torch.log_softmax((hidden @ head.T)[:, :VOCAB] / 0.7, -1)
    expected = -(weight * log_p.gather(-1, models["target_ids"][:, None])[:, 0]).sum()
    out = linear_logprob(hidden, head, models["target_ids"], vocab_size=VOCAB, temperature=0.7, loss_weight=weight)
    torch.testing.assert_close(out.total, expected)
    for found, wanted in zip(
        torch.autograd.grad(out.total, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_packed_chunks_keep_values_and_nearly_keep_gradients(kind: str):
    models, weight = _models(rows=32), torch.ones(32)
    models["teacher_hidden"] = models["student_hidden"] + 0.03 * models["teacher_hidden"][:, :8]
    models["teacher_head"] = models["student_head"]
    plain, *grads = _gradients(models, kind=kind, loss_weight=weight)
    packed, *packed_grads = _gradients(models, kind=kind, loss_weight=weight, is_packed=True)
    torch.testing.assert_close(packed.reverse_kl, plain.reverse_kl, rtol=1e-6, atol=0)
    rounded = {k: v.bfloat16() if v.is_floating_point() else v for k, v in models.items()}
    _, *bf16_grads = _gradients(rounded, kind=kind, loss_weight=weight)
    for found, wanted, rough in zip(packed_grads, grads, bf16_grads, strict=True):
        error, yardstick = (found - wanted).norm(), (rough.float() - wanted).norm()
        assert 0 < error < 0.01 * wanted.norm() and error < 0.2 * yardstick


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss_weight": torch.ones(5)}, r"loss_weight must be \[S\] = \[6\] of a float type, got \[5\]"),
        ({"head_grad": torch.zeros(PADDED, 8)}, "belong to loss_weight"),
        ({"loss_weight": torch.ones(6), "head_grad": torch.zeros(VOCAB, 8)}, "head_grad must be fp32"),
        ({"loss_weight": torch.ones(6), "head_grad": torch.zeros(PADDED, 8).bfloat16()}, "head_grad must be fp32"),
        ({"loss_weight": torch.ones(6), "grad_scale": torch.tensor(1.0)}, "head_grad, which was not given"),
        ({"loss_weight": torch.ones(6, dtype=torch.int64)}, "of a float type, got .* torch.int64"),
        ({"loss_weight": torch.ones(6), "head_grad": torch.zeros(PADDED, 8), "grad_scale": 2.0}, "grad_scale must"),
        ({"target_ids": torch.zeros(6)}, "target_ids must be .* int64"),
        ({"student_hidden": torch.zeros(6, 8, dtype=torch.int64)}, "student_hidden must be of a float type"),
        ({"teacher_head": torch.zeros(PADDED, 12, device="meta")}, "teacher_head must be of a float type on cpu"),
        ({"teacher_temperature": float("inf")}, "teacher_temperature must be positive and finite"),
        ({"vocab_size": 53.0}, "vocab_size must be an int"),
        ({"backend": "cuda-graphs"}, "divergence_backend 'cuda-graphs' is unknown"),
        ({"backend": "triton"}, "divergence_backend 'triton' cannot be used"),
    ],
)
def test_errors_say_what_was_expected(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        linear_divergence(**(_trained(_models()) | {"kind": "reverse_kl", "vocab_size": VOCAB} | change))


def _logits(rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (2 * torch.randn(rows, PADDED, generator=generator) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(VOCAB, (rows,), generator=generator)


def _reference(kind, student, teacher, target_ids):
    temperatures = {"student_temperature": 0.7, "teacher_temperature": 1.1}
    if kind == "jsd":
        return reference.jsd(student, teacher, beta=0.3, vocab_size=VOCAB, **temperatures)
    if kind == "nll":
        return -reference.logprob(student, target_ids, vocab_size=VOCAB, temperature=0.7)
    return getattr(reference, kind)(student, teacher, vocab_size=VOCAB, **temperatures)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend, dtype", [("torch", torch.float64), ("auto", torch.float32), ("auto", torch.bfloat16)])
def test_logits_divergence_equals_the_reference_and_overwrites_only_when_asked(kind, in_place, backend, dtype):
    student, teacher, target_ids = _logits(dtype=dtype)
    weight = torch.linspace(0, 1, 6, dtype=torch.float64)
    exact = student.double().clone().requires_grad_()
    expected = _reference(kind, exact, teacher.double(), target_ids)
    (expected * weight).sum().backward()
    leaf = student.clone().requires_grad_()
    logits = leaf * 1  # a head's product, as in a model: autograd does not write into leaves
    out = logits_divergence(
        logits, teacher, kind=kind, vocab_size=VOCAB, beta=0.3, student_temperature=0.7, teacher_temperature=1.1,
        target_ids=target_ids, in_place=in_place, backend=backend,
    )  # fmt: skip
    (out.loss * weight.to(out.loss.dtype)).sum().backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert out.loss.dtype is wide and leaf.grad.dtype is dtype
    tolerance = 1e-12 if dtype is torch.float64 else 3e-6
    torch.testing.assert_close(out.loss.double(), expected, rtol=tolerance, atol=tolerance)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=rounding, atol=max(rounding * 1e-2, tolerance))
    assert not leaf.grad[:, VOCAB:].any() and not leaf.grad[0].any()
    assert torch.equal(logits.detach(), leaf.grad if in_place else student)


def test_in_place_gradient_is_refused_a_second_time():
    student, teacher, _ = _logits()
    logits = student.requires_grad_() * 1
    out = logits_divergence(logits, teacher, kind="reverse_kl", vocab_size=VOCAB, in_place=True)
    out.loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()


def test_in_place_gradient_is_refused_where_another_loss_needs_the_logits():
    student, teacher, target_ids = _logits()
    logits = student.requires_grad_() * 1
    out = logits_divergence(logits, teacher, kind="reverse_kl", vocab_size=VOCAB, in_place=True)
    other = (logits**2).sum()
    out.loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_operators_pass_opcheck(kind: str):
    student, teacher, target_ids = _logits()
    plan = _plan(kind)
    arguments = (student.clone().requires_grad_(), teacher, target_ids, False, *plan)
    torch.library.opcheck(torch.ops.megatron_tcod.logits_divergence, arguments)
    table = torch.ops.megatron_tcod.logits_divergence(student, teacher, target_ids, False, *plan)[2]
    for operator in ("logits_divergence_backward", "logits_divergence_backward_"):
        arguments = (student.clone(), teacher, target_ids, table, torch.linspace(0, 1, 6), *plan)
        torch.library.opcheck(getattr(torch.ops.megatron_tcod, operator), arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"teacher_logits": torch.zeros(6, VOCAB)}, "must be one shape"),
        ({"teacher_logits": torch.zeros(6, PADDED).bfloat16()}, "both must have one float type"),
        ({"target_ids": torch.zeros(5, dtype=torch.int64)}, "target_ids must be"),
        ({"vocab_size": PADDED + 1}, "vocab_size 65 is outside"),
        ({"kind": "tvd"}, "kind 'tvd' is unknown"),
        ({"student_temperature": 0.0}, "student_temperature must be positive and finite"),
    ],
)
def test_logits_errors_say_what_was_expected(change: dict, message: str):
    student, teacher, _ = _logits()
    settings = {"kind": "reverse_kl", "vocab_size": VOCAB, "student_logits": student, "teacher_logits": teacher}
    with pytest.raises(ValueError, match=message):
        logits_divergence(**(settings | change))
