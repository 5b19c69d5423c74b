"""Objectives against the float64 reference, a PPO loss worked out case by case, and each other."""

import dataclasses
import math

import pytest
import torch

from megatron_tcod.objective import OBJECTIVES, make_objective
from megatron_tcod.ops import reference
from megatron_tcod.trajectory import Microbatch, ServerTarget, TeacherTarget

VOCAB, PADDED = 61, 64
TEACHER_STATS = {
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logprob",
    "teacher_logprob",
    "top1_agreement",
}
STATS = {
    "reverse_kl": TEACHER_STATS,
    "forward_kl": TEACHER_STATS,
    "jsd": TEACHER_STATS,
    "sampled_token": TEACHER_STATS | {"ratio", "clip_fraction"},
    "sft": {"student_logprob", "student_entropy"},
}


def _microbatch(rows: int, old_logprobs: torch.Tensor | None = None) -> Microbatch:
    generator = torch.Generator().manual_seed(rows)
    token_ids = torch.randint(VOCAB, (rows + 1,), generator=generator)
    return Microbatch(
        token_ids=token_ids,
        cu_seqlens=torch.tensor([0, rows + 1], dtype=torch.int32),
        positions=torch.arange(rows),
        target_ids=token_ids[1:],
        loss_weight=torch.rand(rows, generator=generator),
        old_logprobs=torch.zeros(rows) if old_logprobs is None else old_logprobs,
        turn_ids=torch.zeros(rows, dtype=torch.int64),
        episode_ids=torch.zeros(rows, dtype=torch.int64),
    )


def _models(rows: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, TeacherTarget]:
    generator = torch.Generator().manual_seed(rows + 100)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, head = draw(rows, 12).requires_grad_(), draw(PADDED, 12).requires_grad_()
    return hidden, head, TeacherTarget(hidden=draw(rows, 20), head=draw(PADDED, 20))


def _expected(name: str, hidden: torch.Tensor, head: torch.Tensor, target: TeacherTarget, microbatch: Microbatch):
    student, teacher = hidden @ head.T, target.hidden @ target.head.T
    both = {"vocab_size": VOCAB, "student_temperature": 0.8, "teacher_temperature": 1.25}
    if name == "jsd":
        return reference.jsd(student, teacher, beta=0.3, **both)
    if name == "sft":
        return -reference.logprob(student, microbatch.target_ids, vocab_size=VOCAB, temperature=0.8)
    return {"reverse_kl": reference.reverse_kl, "forward_kl": reference.forward_kl}[name](student, teacher, **both)


def _make(name: str, **settings):
    if OBJECTIVES[name].needs_teacher:
        settings = {"teacher_temperature": 1.25} | settings
    return make_objective(name, vocab_size=VOCAB, student_temperature=0.8, **settings)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "sft"])
def test_loss_and_gradient_equal_the_reference_under_temperatures_and_padding(name: str):
    hidden, head, target = _models(9)
    microbatch = _microbatch(9)
    objective = _make(name, chunk_size=4, **({"beta": 0.3} if name == "jsd" else {}))
    losses = objective(hidden, head, target if objective.needs_teacher else None, microbatch, tp_group=None)
    expected = _expected(name, hidden, head, target, microbatch)
    torch.testing.assert_close(losses.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.total, (microbatch.loss_weight * expected).sum())
    grads = torch.autograd.grad(losses.total, (hidden, head))
    truth = torch.autograd.grad((microbatch.loss_weight * expected).sum(), (hidden, head))
    for grad, exact in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_statistics_are_detached_and_equal_the_reference(name: str):
    hidden, head, target = _models(9)
    microbatch = _microbatch(9)
    stats = _make(name)(hidden, head, target, microbatch, tp_group=None).stats
    assert set(stats) == STATS[name]
    assert not any(value.requires_grad for value in stats.values())
    student, teacher = hidden @ head.T, target.hidden @ target.head.T
    expected = {
        "student_entropy": reference.entropy(student, vocab_size=VOCAB, temperature=0.8),
        "teacher_entropy": reference.entropy(teacher, vocab_size=VOCAB, temperature=1.25),
        "student_logprob": -_expected("sft", hidden, head, target, microbatch),
        "teacher_logprob": reference.logprob(teacher, microbatch.target_ids, vocab_size=VOCAB, temperature=1.25),
        "reverse_kl": _expected("reverse_kl", hidden, head, target, microbatch),
        "forward_kl": _expected("forward_kl", hidden, head, target, microbatch),
    }
    for key in expected.keys() & stats.keys():
        torch.testing.assert_close(stats[key], expected[key].detach(), rtol=1e-12, atol=1e-12)


def _sampled(ratio: float, advantage: float, **settings) -> tuple[float, float, dict[str, float]]:
    """Loss, d loss / d log p_S(y), and statistics of one token with this ratio and log p_T - log p_old."""
    hidden, head, target = _models(1)
    microbatch = _microbatch(1)
    token = microbatch.target_ids[0]
    logprob = reference.logprob(hidden @ head.T, microbatch.target_ids, vocab_size=VOCAB)[0]
    microbatch = _microbatch(1, old_logprobs=(logprob - math.log(ratio)).detach()[None])
    microbatch.loss_weight = torch.ones(1)
    wanted = microbatch.old_logprobs[0] + advantage  # the teacher's log-probability of the token
    rest = torch.log((1 - wanted.exp()) / (VOCAB - 1))
    logits = torch.where(torch.arange(VOCAB) == token, wanted, rest)
    target = TeacherTarget(hidden=torch.ones(1, 1, dtype=torch.float64), head=logits[:, None])
    objective = make_objective("sampled_token", vocab_size=VOCAB, **settings)
    losses = objective(hidden, head, target, microbatch, tp_group=None)
    grad = torch.autograd.grad(losses.total, hidden, retain_graph=True)[0]
    unit = torch.autograd.grad(logprob, hidden)[0]
    stats = {key: value.item() for key, value in losses.stats.items()}
    return losses.loss.item(), ((grad * unit).sum() / unit.square().sum()).item(), stats


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope, clipped",
    [
        # loss = max(-A r, -A clip(r, 0.8, 1.2)), at most 3 |A| for A < 0; slope = d loss / d log p = -A r where free
        (1.0, -0.5, 0.5, 0.5, 0),  # fresh token: the plain policy gradient
        (1.1, -0.5, 0.55, 0.55, 0),
        (0.7, -0.5, 0.4, 0.0, 1),  # already pushed down past 1 - eps: no more
        (1.5, -0.5, 0.75, 0.75, 0),  # moved the wrong way: free to come back
        (4.0, -0.5, 1.5, 0.0, 1),  # dual clip at 3
        (1.0, 0.25, -0.25, -0.25, 0),
        (1.5, 0.25, -0.3, 0.0, 1),  # already pushed up past 1 + eps
        (0.5, 0.25, -0.125, -0.125, 0),
        (4.0, 0.25, -0.3, 0.0, 1),  # dual clip is for negative advantages only
    ],
)
def test_sampled_token_is_the_clipped_policy_gradient(ratio, advantage, loss, slope, clipped):
    value, gradient, stats = _sampled(ratio, advantage)
    assert value == pytest.approx(loss, rel=1e-9)
    assert gradient == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert stats["ratio"] == pytest.approx(ratio, rel=1e-9) and stats["clip_fraction"] == clipped


def test_sampled_token_settings_move_what_they_name():
    assert _sampled(1.0, -0.5, kl_coef=2.0)[:2] == pytest.approx((1.0, 1.0))
    assert _sampled(0.7, -0.5, eps_clip=0.4)[1] == pytest.approx(0.35)
    assert _sampled(1.5, 0.25, eps_clip_high=0.6)[1] == pytest.approx(-0.375)
    assert _sampled(4.0, -0.5, eps_clip_c=5.0)[:2] == pytest.approx((2.0, 2.0))


def test_sampled_token_survives_a_token_that_the_policy_has_left():
    for advantage, loss in ((-0.5, 1.5), (0.25, -0.3)):
        value, gradient, stats = _sampled(1e80, advantage, max_log_ratio=20.0)
        assert value == pytest.approx(loss) and gradient == 0.0
        assert stats["ratio"] == pytest.approx(math.exp(20.0))


def test_sampled_token_gradient_is_that_of_reverse_kl_in_expectation():
    """Summed over all tokens with their probability, on fresh samples: the two objectives have one gradient."""
    hidden, head, target = (x if isinstance(x, TeacherTarget) else x.detach() for x in _models(1))
    everything = {"vocab_size": VOCAB}
    row = hidden.clone().requires_grad_()
    one = _microbatch(1)
    one.loss_weight = torch.ones(1)
    exact = torch.autograd.grad(
        make_objective("reverse_kl", **everything)(row, head, target, one, tp_group=None).total, row
    )[0]
    rows = hidden.expand(VOCAB, -1).clone().requires_grad_()
    log_p = reference.log_softmax(hidden @ head.T, vocab_size=VOCAB)[0]  # [V]
    microbatch = _microbatch(VOCAB, old_logprobs=log_p)
    microbatch.target_ids = torch.arange(VOCAB)
    microbatch.loss_weight = log_p.exp()
    every = TeacherTarget(hidden=target.hidden.expand(VOCAB, -1), head=target.head)
    total = make_objective("sampled_token", **everything)(rows, head, every, microbatch, tp_group=None).total
    expected = torch.autograd.grad(total, rows)[0].sum(0, keepdim=True)
    torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_head_grad_takes_the_gradient_of_the_head(name: str):
    hidden, head, target = _models(9)
    logprob = -_expected("sft", hidden, head, target, _microbatch(9)).detach()  # fresh tokens are not clipped
    microbatch = _microbatch(9, old_logprobs=logprob)
    losses = _make(name)(hidden, head, target, microbatch, tp_group=None)
    hidden_grad, grad = torch.autograd.grad(losses.total, (hidden, head))
    head_grad = torch.zeros_like(head)
    losses = _make(name)(hidden, head, target, microbatch, tp_group=None, head_grad=head_grad)
    found = torch.autograd.grad(losses.total, (hidden, head), allow_unused=True)
    assert grad.norm() > 0 and found[1] is None
    torch.testing.assert_close(head_grad, grad)
    torch.testing.assert_close(found[0], hidden_grad)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_measuring_gives_the_values_of_training_without_a_gradient(name: str):
    hidden, head, target = _models(9)
    trained = _make(name)(hidden, head, target, _microbatch(9), tp_group=None)
    with torch.no_grad():
        measured = _make(name)(hidden, head, target, _microbatch(9), tp_group=None)
    assert not measured.total.requires_grad
    for found, expected in ((measured.loss, trained.loss), (measured.total, trained.total.detach())):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_trained_position_gives_an_empty_loss_that_still_backpropagates(name: str):
    hidden, head, target = _models(0)
    losses = _make(name)(hidden, head, target, _microbatch(0), tp_group=None)
    losses.total.backward()
    assert losses.loss.shape == (0,) and losses.total == 0 and torch.equal(head.grad, torch.zeros_like(head))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_checks_its_input(name: str):
    hidden, head, target = _models(5)
    objective = _make(name)
    with pytest.raises(ValueError, match="student_hidden has 5 rows for 4 trained positions"):
        objective(hidden, head, target, _microbatch(4), tp_group=None)
    if objective.needs_teacher:
        with pytest.raises(ValueError, match="compares with a teacher, but target is None"):
            objective(hidden, head, None, _microbatch(5), tp_group=None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_settings_cannot_change_during_a_run(name: str):
    with pytest.raises(dataclasses.FrozenInstanceError):
        _make(name).vocab_size = 3


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("reverse-kl", {}, "objective 'reverse-kl' is unknown, did you mean 'reverse_kl'"),
        ("ppo", {}, "known: reverse_kl, forward_kl, jsd, sampled_token, sft"),
        ("jsd", {"vocab_size": 5, "betta": 0.5}, "has no setting 'betta', did you mean 'beta'"),
        ("sft", {"vocab_size": 5, "teacher_temperature": 1.0}, "'sft' has no setting 'teacher_temperature'"),
        ("reverse_kl", {}, "needs a value for vocab_size"),
        ("jsd", {"vocab_size": 5, "beta": 1.0}, "beta must lie strictly between 0 and 1, got 1.0"),
        ("sampled_token", {"vocab_size": 5, "eps_clip": 1.5}, r"eps_clip must lie in \(0, 1\]"),
        ("sampled_token", {"vocab_size": 5, "eps_clip_c": 1.1}, "eps_clip_c 1.1 must exceed 1 \\+ eps_clip_high"),
    ],
)
def test_wrong_settings_are_refused_with_the_fix(name: str, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_objective(name, **settings)


def _server_target(target: TeacherTarget, microbatch: Microbatch, *, top_k: int) -> ServerTarget:
    """What a server with that teacher sends, at temperature 1."""
    logprobs = (target.hidden @ target.head.T)[:, :VOCAB].log_softmax(-1)
    top = logprobs.topk(top_k) if top_k else None
    return ServerTarget(
        logprob=logprobs.gather(-1, microbatch.target_ids[:, None])[:, 0],
        topk_ids=top.indices if top else None,
        topk_logprobs=top.values if top else None,
    )


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "sampled_token"])
def test_a_server_that_lists_all_tokens_is_worth_a_teacher_at_hand(name):
    hidden, head, target = _models(7)
    microbatch = _microbatch(7, old_logprobs=torch.full((7,), -3.0, dtype=torch.float64))
    objective = make_objective(name, vocab_size=VOCAB, student_temperature=0.8)
    found = {}
    for kind, one in {"hidden": target, "listed": _server_target(target, microbatch, top_k=VOCAB)}.items():
        own_hidden, own_head = hidden.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
        main_grad = torch.zeros_like(own_head)
        losses = objective(own_hidden, own_head, one, microbatch, tp_group=None, head_grad=main_grad)
        losses.total.backward()
        found[kind] = (losses, own_hidden.grad, main_grad)
    (at_hand, *grads), (behind, *server_grads) = found["hidden"], found["listed"]
    torch.testing.assert_close(behind.loss, at_hand.loss, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(server_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
    for key in ("reverse_kl", "forward_kl", "student_entropy", "student_logprob", "teacher_logprob"):
        torch.testing.assert_close(behind.stats[key], at_hand.stats[key], rtol=1e-10, atol=1e-12)
    assert behind.stats["teacher_tail"].tolist() == [0.0] * 7


def test_the_sampled_token_alone_is_enough_for_its_objective_and_for_no_other():
    hidden, head, target = _models(7)
    microbatch = _microbatch(7, old_logprobs=torch.full((7,), -3.0, dtype=torch.float64))
    sampled = make_objective("sampled_token", vocab_size=VOCAB)
    alone, at_hand = (
        sampled(hidden, head, one, microbatch, tp_group=None)
        for one in (_server_target(target, microbatch, top_k=0), target)
    )
    torch.testing.assert_close(alone.loss, at_hand.loss, rtol=1e-10, atol=1e-12)
    assert "reverse_kl" not in alone.stats
    for name in ("reverse_kl", "forward_kl", "jsd"):
        with pytest.raises(ValueError, match="set teacher_top_k, or use the objective sampled_token"):
            make_objective(name, vocab_size=VOCAB)(
                hidden, head, _server_target(target, microbatch, top_k=0), microbatch, tp_group=None
            )
    with pytest.raises(ValueError, match="teacher_temperature = 2.0"):
        make_objective("reverse_kl", vocab_size=VOCAB, teacher_temperature=2.0)(
            hidden, head, _server_target(target, microbatch, top_k=5), microbatch, tp_group=None
        )


def test_for_stale_tokens_the_advantage_is_that_of_the_current_policy():
    hidden, head, target = _models(5)
    microbatch = _microbatch(5, old_logprobs=torch.full((5,), -2.0, dtype=torch.float64))
    student = (hidden @ head.T)[:, :VOCAB].log_softmax(-1).gather(-1, microbatch.target_ids[:, None])[:, 0].detach()
    teacher = _server_target(target, microbatch, top_k=0).logprob
    settings = dict(vocab_size=VOCAB, eps_clip=1.0, eps_clip_high=1e9, eps_clip_c=2e9)  # nothing clips
    for is_current, behind in ((True, student), (False, microbatch.old_logprobs)):
        losses = make_objective("sampled_token", is_advantage_current=is_current, **settings)(
            hidden, head, target, microbatch, tp_group=None
        )
        expected = -(teacher - behind) * (student - microbatch.old_logprobs).exp()
        torch.testing.assert_close(losses.loss, expected, rtol=1e-10, atol=1e-12)
