"""What a trained token costs: the table OBJECTIVES, from hidden states and a teacher's word to one loss a token.

    objective = make_objective("reverse_kl", vocab_size=tokenizer_size, student_temperature=1.0)
    losses = objective(student_hidden, student_head, target, microbatch, tp_group=tp_group)
    losses.total.backward()                                   # total = sum(microbatch.loss_weight * losses.loss)

`reverse_kl`, `forward_kl` and `jsd` compare whole vocabularies (Eq. 2 of arXiv 2604.24005 is a sum of these);
`sampled_token` is what the released TCOD code does, a policy gradient whose advantage is the teacher's log-ratio at the
sampled token; `sft` imitates the tokens and asks no teacher. The student's distribution is always the one it was
sampled from, so `student_temperature` is the rollout's and `Microbatch.old_logprobs` are of the scaled distribution.

A teacher behind a server sends the sampled token's log-probability and those of its k likeliest tokens. The divergences
are then those of k + 1 buckets, the k tokens and the rest (`ops/topk.py`), a lower bound of the whole vocabulary's, and
without the k `sampled_token` is all there is.

The rows' weights are known before the loss, so the gradient is made together with it (`ops/divergence.py`); a caller that
keeps the head's gradient in a tensor of its own, as Megatron does, passes that as `head_grad`.

Not here: normalisation (`loss_weight` carries it), reductions of the statistics, Megatron.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist

from megatron_tcod.ops.divergence import TokenDivergence, linear_divergence, linear_logprob
from megatron_tcod.ops.topk import TopKDivergence, linear_topk_divergence
from megatron_tcod.trajectory import Microbatch, ServerTarget, TeacherTarget


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """One loss and some statistics a trained token, all [S], and what is differentiated.

    Example: `TokenLosses(loss=loss, total=total, stats={"reverse_kl": kl, "student_entropy": entropy})`
    """

    loss: torch.Tensor  # [S] nats, detached
    total: torch.Tensor  # [] sum(loss_weight * loss), differentiable in the student's hidden states and head
    stats: dict[str, torch.Tensor]  # [S] each, detached


class Objective(Protocol):
    """What stands in the table OBJECTIVES."""

    needs_teacher: ClassVar[bool]

    def __call__(
        self,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        target: TeacherTarget | ServerTarget | None,
        microbatch: Microbatch,
        *,
        tp_group: dist.ProcessGroup | None,
        head_grad: torch.Tensor | None = None,
    ) -> TokenLosses:
        """student_hidden [S, H_s], equal on the ranks of `tp_group`; student_head [V/tp, H_s]. Collective over it.

        With `head_grad` [V/tp, H_s] fp32 the head's gradient is added there, during this call, instead of to its `.grad`.

        Raises ValueError when the teacher's target is missing or lacks what the objective needs, and when rows do not
        match the microbatch's positions.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _Settings:
    vocab_size: int
    """Real tokens, those of the tokenizer; columns from there on are padding."""
    student_temperature: float = 1.0
    """Divides the student's logits; the temperature that the rollouts were sampled at."""
    chunk_size: int | None = None
    """Trained positions projected to the vocabulary at a time; None chooses by memory."""
    backend: str = "auto"
    """Who computes on logits: `auto` or one of `ops/backends.BACKENDS`."""


@dataclass(frozen=True, kw_only=True)
class _TeacherSettings(_Settings):
    needs_teacher: ClassVar[bool] = True

    teacher_temperature: float = 1.0
    """Divides the teacher's logits."""
    is_packed: bool = False
    """Keep a chunk's logits between their two reads as fp16 (s, s - t): half the memory, statistics still from fp32."""

    def _compare(
        self,
        kind: str,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        target: TeacherTarget | ServerTarget | None,
        microbatch: Microbatch,
        *,
        tp_group: dist.ProcessGroup | None,
        head_grad: torch.Tensor | None = None,
        beta: float = 0.5,
    ) -> TokenDivergence | TopKDivergence:
        if target is None:
            raise ValueError(
                f"objective {type(self).__name__} compares with a teacher, but target is None; score first"
            )
        _check_positions(student_hidden, microbatch)
        shared = {
            "kind": kind,
            "beta": beta,
            "vocab_size": self.vocab_size,
            "student_temperature": self.student_temperature,
            "target_ids": microbatch.target_ids,
            "loss_weight": microbatch.loss_weight,
            "head_grad": head_grad,
            "tp_group": tp_group,
            "chunk_size": self.chunk_size,
            "backend": self.backend,
        }
        if isinstance(target, ServerTarget):
            self._check_listed(target)
            return linear_topk_divergence(student_hidden, student_head, target.topk_ids, target.topk_logprobs, **shared)
        shared |= {"teacher_temperature": self.teacher_temperature, "is_packed": self.is_packed}
        return linear_divergence(student_hidden, student_head, target.hidden, target.head, **shared)

    def _check_listed(self, target: ServerTarget) -> None:
        if target.topk_ids is None:
            raise ValueError(
                f"objective {type(self).__name__} compares distributions, but the teacher's server was asked for the "
                f"sampled token alone; set teacher_top_k, or use the objective sampled_token"
            )
        if self.teacher_temperature != 1.0:
            raise ValueError(
                f"teacher_temperature = {self.teacher_temperature}, but a server's numbers are of temperature 1; set it to 1"
            )


@dataclass(frozen=True, kw_only=True)
class ReverseKL(_TeacherSettings):
    """KL(student || teacher) over the whole vocabulary."""

    def __call__(self, student_hidden, student_head, target, microbatch, *, tp_group, head_grad=None) -> TokenLosses:
        read = self._compare(
            "reverse_kl", student_hidden, student_head, target, microbatch, tp_group=tp_group, head_grad=head_grad
        )
        return TokenLosses(loss=read.loss, total=read.total, stats=_statistics(read, target))


@dataclass(frozen=True, kw_only=True)
class ForwardKL(_TeacherSettings):
    """KL(teacher || student) over the whole vocabulary, the direction in which Eq. 2 is written."""

    def __call__(self, student_hidden, student_head, target, microbatch, *, tp_group, head_grad=None) -> TokenLosses:
        read = self._compare(
            "forward_kl", student_hidden, student_head, target, microbatch, tp_group=tp_group, head_grad=head_grad
        )
        return TokenLosses(loss=read.loss, total=read.total, stats=_statistics(read, target))


@dataclass(frozen=True, kw_only=True)
class JSD(_TeacherSettings):
    """Generalised Jensen-Shannon divergence over the whole vocabulary, as `ops/reference.py` defines it."""

    beta: float = 0.5
    """The teacher's share of the mixture, strictly between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie strictly between 0 and 1, got {self.beta}; use forward_kl or reverse_kl")

    def __call__(self, student_hidden, student_head, target, microbatch, *, tp_group, head_grad=None) -> TokenLosses:
        read = self._compare(
            "jsd", student_hidden, student_head, target, microbatch, tp_group=tp_group, head_grad=head_grad, beta=self.beta
        )
        return TokenLosses(loss=read.loss, total=read.total, stats=_statistics(read, target))


@dataclass(frozen=True, kw_only=True)
class SampledToken(_TeacherSettings):
    """The released code's objective: PPO on the sampled token, with the teacher's log-ratio as its advantage.

        A = kl_coef * (log p_T(y) - log p_old(y))            r = p_S(y) / p_old(y)       (see is_advantage_current)
        loss = max(-A r, -A clip(r, 1 - eps_clip, 1 + eps_clip_high)), where A < 0 at most -A eps_clip_c

    `p_old` is the policy that sampled. In expectation on fresh samples the gradient is that of kl_coef * reverse KL.
    """

    kl_coef: float = 1.0
    """Multiplies the advantage."""
    eps_clip: float = 0.2
    """How far below 1 the ratio may push."""
    eps_clip_high: float = 0.2
    """How far above 1 the ratio may push."""
    eps_clip_c: float = 3.0
    """Dual clip: for a negative advantage the ratio counts as at most this."""
    max_log_ratio: float = 20.0
    """Bounds |log r| before the exponential, so that a stale token gives a large ratio and not an infinite one."""
    is_advantage_current: bool = False
    """Take A against the current policy, detached, instead of p_old: for tokens of older weights (arXiv 2606.24143)."""

    def __post_init__(self) -> None:
        if not (0 < self.eps_clip <= 1 and self.eps_clip_high > 0):
            raise ValueError(
                f"eps_clip must lie in (0, 1] and eps_clip_high above 0, got {self.eps_clip} and {self.eps_clip_high}"
            )
        if self.eps_clip_c <= 1 + self.eps_clip_high:
            raise ValueError(
                f"eps_clip_c {self.eps_clip_c} must exceed 1 + eps_clip_high = {1 + self.eps_clip_high}; 3.0 is usual"
            )

    def __call__(self, student_hidden, student_head, target, microbatch, *, tp_group, head_grad=None) -> TokenLosses:
        with torch.no_grad():
            read_stats = self._read(student_hidden, student_head, target, microbatch, tp_group=tp_group)
        with torch.enable_grad():
            logprob = read_stats["student_logprob"].detach().requires_grad_()  # [S]
            loss, stats = self._clipped(logprob, read_stats["teacher_logprob"], microbatch.old_logprobs.to(logprob.dtype))
        stats = read_stats | stats
        loss_weight = microbatch.loss_weight.to(loss.device, loss.dtype)  # [S]
        total = torch.dot(loss_weight, loss.detach())
        if torch.is_grad_enabled():
            # The loss depends on the log-probability alone, so its slope is the weight of a negative log-likelihood.
            (slope,) = torch.autograd.grad(loss.sum(), logprob)  # [S]
            nll = linear_logprob(
                student_hidden,
                student_head,
                microbatch.target_ids,
                vocab_size=self.vocab_size,
                temperature=self.student_temperature,
                loss_weight=-slope * loss_weight,
                head_grad=head_grad,
                tp_group=tp_group,
                chunk_size=self.chunk_size,
                backend=self.backend,
            ).total
            total = nll + (total - nll).detach()
        return TokenLosses(loss=loss.detach(), total=total, stats=stats)

    def _read(
        self,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        target: TeacherTarget | ServerTarget | None,
        microbatch: Microbatch,
        *,
        tp_group: dist.ProcessGroup | None,
    ) -> dict[str, torch.Tensor]:
        """Both log-probabilities of the sampled token, [S], and what the same read of the logits tells besides."""
        if isinstance(target, ServerTarget) and target.topk_ids is None:
            _check_positions(student_hidden, microbatch)
            read = linear_logprob(
                student_hidden,
                student_head,
                microbatch.target_ids,
                vocab_size=self.vocab_size,
                temperature=self.student_temperature,
                tp_group=tp_group,
                chunk_size=self.chunk_size,
                backend=self.backend,
            )
            own = {"student_logprob": read.logprob, "student_entropy": read.entropy}
            return own | {"teacher_logprob": target.logprob.to(read.logprob.dtype)}
        kind = "reverse_kl" if isinstance(target, ServerTarget) else "nll"  # buckets have no likelihood
        read = self._compare(kind, student_hidden, student_head, target, microbatch, tp_group=tp_group)
        return _statistics(read, target)

    def _clipped(
        self, logprob: torch.Tensor, teacher_logprob: torch.Tensor, old_logprobs: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss [S], differentiable in the student's logprob [S], and its own statistics."""
        behind = logprob.detach() if self.is_advantage_current else old_logprobs  # [S]
        advantage = self.kl_coef * (teacher_logprob - behind)  # [S]
        log_ratio = (logprob - old_logprobs).clamp(-self.max_log_ratio, self.max_log_ratio)  # [S]
        ratio = log_ratio.exp()  # [S]
        pushed = -advantage * ratio  # [S]
        limited = -advantage * ratio.clamp(1 - self.eps_clip, 1 + self.eps_clip_high)  # [S]
        ceiling = torch.where(advantage < 0, -advantage * self.eps_clip_c, torch.inf)  # [S]
        loss = torch.minimum(torch.maximum(pushed, limited), ceiling)  # [S]
        is_clipped = (limited > pushed) | (pushed > ceiling)  # [S] no gradient reaches the student
        return loss, {"ratio": ratio.detach(), "clip_fraction": is_clipped.to(ratio.dtype)}


@dataclass(frozen=True, kw_only=True)
class SFT(_Settings):
    """Negative log-likelihood of the microbatch's own tokens; `target` is ignored and may be None."""

    needs_teacher: ClassVar[bool] = False

    def __call__(self, student_hidden, student_head, target, microbatch, *, tp_group, head_grad=None) -> TokenLosses:
        _check_positions(student_hidden, microbatch)
        read = linear_logprob(
            student_hidden,
            student_head,
            microbatch.target_ids,
            vocab_size=self.vocab_size,
            temperature=self.student_temperature,
            loss_weight=microbatch.loss_weight,
            head_grad=head_grad,
            tp_group=tp_group,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        logprob = read.logprob.detach()  # [S]
        return TokenLosses(
            loss=-logprob, total=read.total, stats={"student_logprob": logprob, "student_entropy": read.entropy}
        )


OBJECTIVES: dict[str, type[Objective]] = {
    "reverse_kl": ReverseKL,
    "forward_kl": ForwardKL,
    "jsd": JSD,
    "sampled_token": SampledToken,
    "sft": SFT,
}


def make_objective(name: str, **settings: Any) -> Objective:
    """An entry of OBJECTIVES with its settings, which are the fields of its class.

    Raises ValueError with the nearest name for an unknown objective or setting.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is unknown{_nearest(name, OBJECTIVES)}; known: {', '.join(OBJECTIVES)}")
    fields = {field.name: field for field in dataclasses.fields(OBJECTIVES[name])}
    for setting in settings:
        if setting not in fields:
            raise ValueError(
                f"objective {name!r} has no setting {setting!r}{_nearest(setting, fields)}; known: {', '.join(fields)}"
            )
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in settings]
    if missing:
        raise ValueError(f"objective {name!r} needs a value for {', '.join(missing)}")
    return OBJECTIVES[name](**settings)


def _nearest(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _statistics(read: TokenDivergence | TopKDivergence, target: Any) -> dict[str, torch.Tensor]:
    names = ("reverse_kl", "forward_kl", "student_entropy", "student_logprob")
    if isinstance(target, ServerTarget):
        own = {name: getattr(read, name) for name in (*names, "student_tail", "teacher_tail")}
        return own | {"teacher_logprob": target.logprob.to(read.loss.dtype)}
    return {name: getattr(read, name) for name in (*names, "teacher_entropy", "teacher_logprob", "top1_agreement")}


def _check_positions(student_hidden: torch.Tensor, microbatch: Microbatch) -> None:
    if student_hidden.shape[0] != microbatch.target_ids.numel():
        raise ValueError(
            f"student_hidden has {student_hidden.shape[0]} rows for {microbatch.target_ids.numel()} trained "
            f"positions; select hidden[microbatch.positions] before the objective"
        )
