"""One step's episodes and per-token statistics as a flat dict of numbers, reduced over the ranks once.

    metrics = StepMetrics(max_turns=30)
    sums = metrics.local_sums(own_episodes, microbatches, per_token)    # [M] float64, this rank's share
    sums = reduce_sums(sums, group)                                     # the one collective of the step
    record = metrics.finish(sums, step=12, seconds={"rollout": 3.1, "step": 5.0}, loss=0.7, grad_norm=0.8, lr=1e-4)
    writer.write(record)                                                # JsonlWriter, TensorBoardWriter

Every figure is a ratio of two sums over the step, so it does not depend on how the step was split over ranks and
microbatches. For that each episode must be counted by exactly one rank, and so must each microbatch: tensor-parallel
copies and pipeline stages without statistics pass empty lists.

    step                      optimizer steps done, this one included
    rollout/episodes          episodes attempted
    rollout/ok                of those, how many could be trained on
    rollout/success           share of the ok episodes that reached the goal. The window cuts them short (F2B) or starts
                              them late (B2F): compare runs by their evaluations, not by this
    rollout/reward            mean over ok episodes
    rollout/outcome/NAME      episodes by `trajectory.OUTCOMES`
    rollout/end/NAME          episodes by `trajectory.END_REASONS`
    turns/total turns/student turns/teacher                 means over ok episodes
    tokens/generated          ids that the student sampled, all episodes
    tokens/trained            positions with a loss
    tokens/packed             ids that went through the student in training
    tokens/unshared           ids of the trained rows: packed would be as many if rows shared no prefixes
    packing/saving            unshared / packed
    packing/microbatches      of all replicas
    packing/imbalance         work of the busiest replica over the mean, minus 1: tokens, and pairs of a query and a key
    tokens/prompt tokens/cached                             prompt ids of all requests; of those, found in the KV cache
    tokens/per_second         generated / seconds/step; packed / seconds/step where nothing is sampled, as in SFT
    kl/token                  reverse KL, mean over trained tokens, nats
    kl/trajectory             reverse KL summed over an episode's trained tokens, mean over trained episodes
    kl/turn_07                the same for turn 7 alone, mean over the episodes that trained it
    kl_token/turn_07          mean over the trained tokens of turn 7
    kl/forward kl/sampled     token means of the forward KL and of log p_student - log p_teacher at the sampled token
    entropy/student entropy/teacher logprob/student logprob/teacher     token means
    logprob/rollout_gap       mean |log p at training - log p at sampling|: how far engine and trainer disagree
    prefix/reusable prefix/reused prefix/recomputed prefix/warmed       prompt ids of the rollouts that an unbounded cache
                              would serve, that the engine's served, the difference, and what was computed ahead;
                              `rollout/prefix.py` defines them
    teacher_prefix/...        the same of a teacher behind a server; teacher_prefix/computed of teacher_prefix/scored ids
    curriculum/k curriculum/window_start curriculum/window_stop         means over all / ok / ok episodes
    weights/version weights/lag     mean version that sampled, and how many steps it was behind when the episode began
    objective/NAME            token mean of a statistic named in `extra`
    train/NAME                keyword arguments of `finish`: train/loss, train/grad_norm, train/lr
    seconds/NAME              wall-clock of this rank
    seconds/cpu               CPU time of this rank's process and of those it started, over the step

Where a teacher's server tells the sampled token alone, kl/trajectory and kl/turn are sums of kl/sampled, an estimate of
the reverse KL, and kl/token is absent.

A key is absent when nothing contributed to it. Not here: console output (`console.py`), smoothing, resets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed

from megatron_tcod.journal import Journal
from megatron_tcod.trajectory import END_REASONS, OUTCOMES, Episode, Microbatch

TOKEN_MEANS = {
    "reverse_kl": "kl/token",
    "forward_kl": "kl/forward",
    "student_entropy": "entropy/student",
    "teacher_entropy": "entropy/teacher",
    "student_logprob": "logprob/student",
    "teacher_logprob": "logprob/teacher",
    "sampled_kl": "kl/sampled",
    "rollout_gap": "logprob/rollout_gap",
}
"""Per-token statistic -> the key of its token mean. The last two are derived here from the log-probabilities."""

KL_SOURCES = ("reverse_kl", "sampled_kl")
"""What the KL of turns and trajectories is summed from; the second where the first is not known."""

PREFIX_COUNTS = (
    *(f"{who}/{what}" for who in ("prefix", "teacher_prefix") for what in ("reusable", "reused", "recomputed", "warmed")),
    "teacher_prefix/scored",
    "teacher_prefix/computed",
)
"""What `local_sums` takes as `counts`."""

_OK_MEANS = {
    "reward": "rollout/reward",
    "turns": "turns/total",
    "student_turns": "turns/student",
    "teacher_turns": "turns/teacher",
    "window_start": "curriculum/window_start",
    "window_stop": "curriculum/window_stop",
}
_EPISODE_MEANS = {"curriculum_k": "curriculum/k", "weight_version": "weights/version", "weight_lag": "weights/lag"}
_COUNTS = {
    "episodes": "rollout/episodes",
    "ok": "rollout/ok",
    "generated": "tokens/generated",
    "trained": "tokens/trained",
    "packed": "tokens/packed",
    "unshared": "tokens/unshared",
    "microbatches": "packing/microbatches",
    "prompt": "tokens/prompt",
    "cached": "tokens/cached",
    **{name: name for name in PREFIX_COUNTS},
    **{f"outcome/{name}": f"rollout/outcome/{name}" for name in OUTCOMES},
    **{f"end/{name}": f"rollout/end/{name}" for name in END_REASONS},
}


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The layout of a step's sums for a horizon of `max_turns`.

    Example: `StepMetrics(max_turns=30).local_sums(episodes, microbatches, per_token, loss=0.7)`
    """

    max_turns: int
    extra: tuple[str, ...] = ()
    """Further per-token statistics of the objective in use, kept as `objective/NAME`."""
    num_replicas: int = 1
    """Data-parallel size."""
    pair_cost: float = 0.0
    """What a pair of a query and a key costs, in tokens; see packing.py."""

    @cached_property
    def token_means(self) -> dict[str, str]:
        """Per-token statistic -> the key of its mean."""
        return TOKEN_MEANS | {name: f"objective/{name}" for name in self.extra}

    @cached_property
    def slots(self) -> dict[str, int]:
        """Name of a sum -> its place in the vector."""
        names = [*_COUNTS, "success", "trained_episodes", *_OK_MEANS, *_EPISODE_MEANS]
        names += [f"work/{replica}" for replica in range(self.num_replicas)]
        names += [f"{kind}/{statistic}" for statistic in self.token_means for kind in ("sum", "num")]
        names += [f"{kind}/{turn}" for kind in ("episodes", "tokens", "kl") for turn in range(self.max_turns)]
        return {name: slot for slot, name in enumerate(names)}

    def local_sums(
        self,
        episodes: Sequence[Episode],
        microbatches: Sequence[Microbatch],
        per_token: Sequence[Mapping[str, torch.Tensor]],
        counts: Mapping[str, float] | None = None,
        replica: int = 0,
    ) -> torch.Tensor:
        """This rank's share of the step's sums, `[M]` float64 on the CPU.

        episodes: those that this rank answers for, each passed by one rank only. microbatches, per_token: what this
        rank trained, `per_token[i]` maps names to `[S]` tensors; names that are not in `token_means` are left alone.
        counts: of `PREFIX_COUNTS`. replica: data-parallel rank whose microbatches these are. Raises ValueError when turns
        exceed the horizon or statistics do not fit their microbatch.
        """
        sums = torch.zeros(len(self.slots), dtype=torch.float64)  # [M]
        for name, count in (counts or {}).items():
            sums[self.slots[name]] += count
        for episode in episodes:
            for name, value in _episode_counts(episode).items():
                sums[self.slots[name]] += value
            for turn in _trained_turns(episode):
                sums[self._turn_slot("episodes", turn)] += 1
        if len(per_token) != len(microbatches):
            raise ValueError(f"{len(per_token)} sets of statistics for {len(microbatches)} microbatches; pass one each")
        for microbatch, statistics in zip(microbatches, per_token, strict=True):
            self._add_tokens(sums, microbatch, statistics)
            sums[self.slots[f"work/{replica}"]] += microbatch.num_tokens + self.pair_cost * microbatch.num_pairs
        return sums

    def finish(
        self, sums: torch.Tensor, *, step: int, seconds: Mapping[str, float] | None = None, **train: float
    ) -> dict[str, float | int]:
        """The flat record of a step from its reduced sums; keywords beyond `seconds` become `train/NAME`."""
        if sums.shape != (len(self.slots),):
            raise ValueError(f"expected {len(self.slots)} sums for max_turns={self.max_turns}, got {tuple(sums.shape)}")
        value = dict(zip(self.slots, sums.tolist(), strict=True))
        record: dict[str, float | int] = {"step": step}
        record |= {key: round(value[name]) for name, key in _COUNTS.items() if value[name] or name not in PREFIX_COUNTS}
        if value["ok"]:
            record["rollout/success"] = value["success"] / value["ok"]
            record |= {key: value[name] / value["ok"] for name, key in _OK_MEANS.items()}
        if value["episodes"]:
            record |= {key: value[name] / value["episodes"] for name, key in _EPISODE_MEANS.items()}
        work = [value[f"work/{replica}"] for replica in range(self.num_replicas)]
        if any(work):
            record["packing/saving"] = value["unshared"] / value["packed"]
            record["packing/imbalance"] = max(work) * len(work) / sum(work) - 1
        record |= self._finish_tokens(value)
        record |= {f"train/{name}": float(number) for name, number in train.items()}
        record |= {f"seconds/{name}": float(number) for name, number in (seconds or {}).items()}
        if record.get("seconds/step"):
            num_tokens = record["tokens/generated"] or record["tokens/packed"]
            record["tokens/per_second"] = num_tokens / record["seconds/step"]
        return record

    def _finish_tokens(self, value: Mapping[str, float]) -> dict[str, float]:
        record = {
            key: value[f"sum/{statistic}"] / value[f"num/{statistic}"]
            for statistic, key in self.token_means.items()
            if value[f"num/{statistic}"]
        }
        source = next((name for name in KL_SOURCES if value[f"num/{name}"]), None)
        if source is None:
            return record
        if value["trained_episodes"]:
            record["kl/trajectory"] = value[f"sum/{source}"] / value["trained_episodes"]
        for turn in range(self.max_turns):
            kl, num_episodes, num_tokens = (value[f"{kind}/{turn}"] for kind in ("kl", "episodes", "tokens"))
            if num_episodes and num_tokens:
                record[f"kl/turn_{turn:02d}"] = kl / num_episodes
                record[f"kl_token/turn_{turn:02d}"] = kl / num_tokens
        return record

    def _add_tokens(
        self, sums: torch.Tensor, microbatch: Microbatch, statistics: Mapping[str, torch.Tensor]
    ) -> None:
        columns = _columns(microbatch, statistics, self.token_means)
        num_trained = microbatch.positions.numel()
        sums[self.slots["trained"]] += num_trained
        sums[self.slots["packed"]] += microbatch.num_tokens
        sums[self.slots["unshared"]] += microbatch.num_row_tokens
        sums[self.slots["microbatches"]] += 1
        for name, column in columns.items():
            sums[self.slots[f"sum/{name}"]] += column.sum()
            sums[self.slots[f"num/{name}"]] += num_trained
        kl = next((columns[name] for name in KL_SOURCES if name in columns), None)  # [S]
        if kl is not None and num_trained:
            turn_ids = microbatch.turn_ids.to("cpu", torch.int64)  # [S]
            first, last = int(turn_ids.min()), int(turn_ids.max())
            sums.index_add_(0, turn_ids + self._turn_slot("kl", last) - last, kl)
            sums.index_add_(0, turn_ids + self._turn_slot("tokens", first) - first, torch.ones_like(kl))

    def _turn_slot(self, kind: str, turn: int) -> int:
        if not 0 <= turn < self.max_turns:
            raise ValueError(f"turn {turn} is outside the horizon [0, {self.max_turns}); raise max_turns")
        return self.slots[f"{kind}/{turn}"]


def reduce_sums(
    sums: torch.Tensor, group: torch.distributed.ProcessGroup | Callable[[torch.Tensor], Any] | None = None
) -> torch.Tensor:
    """The sum over the ranks of `group`, `[M]` float64 on the CPU: a process group, or a function that adds in place.

    None is the default group where torch.distributed is initialised, otherwise this process alone.
    """
    if callable(group):
        group(sums)
        return sums
    if not torch.distributed.is_initialized():
        return sums
    device = "cuda" if "nccl" in torch.distributed.get_backend(group) else "cpu"
    shared = sums.to(device)
    torch.distributed.all_reduce(shared, group=group)
    return shared.cpu()


SCORES = ("reverse_kl", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
"""Statistics that are kept token by token."""

TurnScores = dict[str, list[float]]
"""Statistic -> one value per sampled token of a turn."""


def turn_kl(scores: TurnScores) -> float:
    """Reverse KL of a turn in nats, or its estimate from the sampled tokens where a teacher tells no more."""
    if "reverse_kl" in scores:
        return sum(scores["reverse_kl"])
    return sum(scores["student_logprob"]) - sum(scores["teacher_logprob"])


def scores_by_turn(
    microbatches: Sequence[Microbatch], per_token: Sequence[Mapping[str, torch.Tensor]]
) -> dict[int, dict[int, TurnScores]]:
    """Per-token statistics back where they came from: `[episode id][turn] -> {statistic: [a value per token]}`.

    Tokens of a turn are in sampling order. Holds numbers only, so that it may cross processes with `encode`.
    """
    scores: dict[int, dict[int, TurnScores]] = {}
    for microbatch, statistics in zip(microbatches, per_token, strict=True):
        columns = {name: column.tolist() for name, column in _columns(microbatch, statistics, SCORES).items()}
        owners = zip(microbatch.episode_ids.tolist(), microbatch.turn_ids.tolist(), strict=True)
        for index, (episode, turn) in enumerate(owners):
            of_turn = scores.setdefault(episode, {}).setdefault(turn, {name: [] for name in columns})
            for name, column in columns.items():
                of_turn[name].append(column[index])
    return scores


def trajectory_record(
    episode: Episode, scores: Mapping[int, TurnScores], decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """An episode as a record for `trajectories.jsonl`: its own fields, plus four lists with one list per turn.

    `tokens_kl`, `student_logprobs`, `teacher_logprobs` (nats, 5 digits) and `token_texts`, each aligned with the turn's
    `token_ids`; empty for teacher turns, the three figures also for turns without scores.
    scores: the episode's entry of `scores_by_turn`, `{}` when it was not trained.
    decode: ids -> text, special tokens kept. Raises ValueError when scores and sampled tokens differ in number.
    """
    record: dict[str, Any] = {field.name: getattr(episode, field.name) for field in fields(Episode)}
    columns = {"tokens_kl": "reverse_kl", "student_logprobs": "student_logprob", "teacher_logprobs": "teacher_logprob"}
    record |= {key: [] for key in (*columns, "token_texts")}
    for turn in episode.turns:
        is_student = turn.actor == "student"
        of_turn = scores.get(turn.index, {}) if is_student else {}
        for key, statistic in columns.items():
            values = of_turn.get(statistic, [])
            if values and len(values) != len(turn.token_ids):
                raise ValueError(
                    f"task {episode.task.task_id}, turn {turn.index}: {len(values)} values of {statistic} for "
                    f"{len(turn.token_ids)} sampled tokens; score every sampled token of a turn, or none"
                )
            record[key].append([float(f"{value:.5g}") for value in values])
        record["token_texts"].append(token_texts(turn.token_ids, decode) if is_student else [])
    return record


def token_texts(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each id adds to the decoded text. Joined they are the text; a character that spans several ids is at the
    last of them."""
    ids, texts = list(token_ids), []
    context, done = 0, 0  # ids[context:done] are shown again before new ids, since some decoders strip a leading space
    for end in range(1, len(ids) + 1):
        before, after = decode(ids[context:done]), decode(ids[context:end])
        is_unfinished = after.endswith("\ufffd") and end < len(ids)
        texts.append("" if is_unfinished else after[len(before) :])
        if not is_unfinished:
            context, done = done, end
    return texts


class Writer(Protocol):
    """Where a step's record goes."""

    def write(self, record: Mapping[str, float | int]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """The record that is always kept: one journal line a step.

    Example: `JsonlWriter("runs/a/metrics.jsonl").write({"step": 1})`; `.journal` has `offset` and `truncate_to`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.journal = Journal(path)

    def write(self, record: Mapping[str, float | int]) -> None:
        self.journal.append(dict(record))

    def close(self) -> None:
        self.journal.close()


class TensorBoardWriter:
    """Scalars for TensorBoard under the same keys. ValueError when the package is not installed.

    Example: `TensorBoardWriter("runs/a/tensorboard").write({"step": 1, "kl/token": 0.2})`
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "TensorBoard output was asked for but tensorboard is not installed; "
                "pip install 'megatron_tcod[tensorboard]', or leave the option out (metrics.jsonl is always written)"
            ) from error
        self._summary = SummaryWriter(os.fspath(directory))

    def write(self, record: Mapping[str, float | int]) -> None:
        for key, value in record.items():
            if key != "step":
                self._summary.add_scalar(key, value, int(record["step"]))
        self._summary.flush()

    def close(self) -> None:
        self._summary.close()


def _episode_counts(episode: Episode) -> dict[str, float]:
    """What one episode adds to the sums, its turns' KL aside."""
    student_turns = [turn for turn in episode.turns if turn.actor == "student"]
    counts: dict[str, float] = {
        "episodes": 1,
        f"outcome/{episode.outcome}": 1,
        f"end/{episode.end_reason}": 1,
        "curriculum_k": episode.curriculum_k,
        "weight_version": episode.weight_version,
        "weight_lag": episode.step - episode.weight_version,
        "generated": sum(len(turn.token_ids) for turn in student_turns),
        "prompt": sum(turn.prompt_tokens for turn in student_turns),
        "cached": sum(turn.cached_tokens for turn in student_turns),
    }
    if episode.outcome == "ok":
        counts |= {
            "ok": 1,
            "success": episode.success,
            "reward": episode.reward,
            "turns": len(episode.turns),
            "student_turns": len(student_turns),
            "teacher_turns": len(episode.turns) - len(student_turns),
            "window_start": episode.window.start,
            "window_stop": episode.window.stop,
            "trained_episodes": bool(_trained_turns(episode)),
        }
    return counts


def _trained_turns(episode: Episode) -> set[int]:
    """Turns with a sampled token in a training row; none unless the episode is trained on."""
    if episode.outcome != "ok":
        return set()
    return {
        turn for row in episode.rows for turn, is_sampled in zip(row.turn_ids, row.loss_mask, strict=True) if is_sampled
    }


def _columns(
    microbatch: Microbatch, statistics: Mapping[str, torch.Tensor], names: Collection[str]
) -> dict[str, torch.Tensor]:
    """Those of `names` that a microbatch has, or that follow from what it has, each `[S]` float64 on the CPU."""
    num_trained = microbatch.positions.numel()
    columns = {}
    for name, values in statistics.items():
        if name not in names:
            continue
        if values.shape != (num_trained,):
            raise ValueError(f"{name} has shape {tuple(values.shape)} for {num_trained} trained positions")
        columns[name] = values.detach().to("cpu", torch.float64)
    student, teacher = columns.get("student_logprob"), columns.get("teacher_logprob")
    old_logprobs = microbatch.old_logprobs.to("cpu", torch.float64)  # [S], NaN for recorded turns: nobody sampled them
    if student is not None and "rollout_gap" in names and not old_logprobs.isnan().all():
        columns["rollout_gap"] = (student - old_logprobs).abs()
    if student is not None and teacher is not None and "sampled_kl" in names:
        columns["sampled_kl"] = student - teacher
    return columns
