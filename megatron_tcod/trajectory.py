"""What flows through the system: tasks, turns, episodes, demonstrations, microbatches and teacher targets.

Plain frozen carriers without behaviour beyond their own invariants. Those made of text and integers cross process
boundaries and files as msgpack or JSON (`encode`, `decode`), never as pickle; those made of tensors stay inside a rank.

Turn indices are half-open ranges counted from 0: turn `i` is one observation followed by one action.
Token positions: the hidden state at position `p` predicts token `p + 1`, so a sampled token at `p + 1` trains position `p`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import torch

ENV_FAULTS = (
    "env_crash_reset",
    "env_crash_step",
    "env_hang",
    "env_oversized",
    "env_invalid_text",
    "env_empty",
    "env_stuck",
    "env_fault",
)
"""How an environment breaks: it dies or reports an error, misses its deadline, says too much, says what is no UTF-8, says
nothing, or answers the same whatever is done; the last one is anything else."""

OUTCOMES = ("ok", "solved_in_replay", "diverged", "rejected_action", "no_demonstration", *ENV_FAULTS, "engine_fault")
"""How replayed prefix, environment and rollout engine behaved. Only `ok` episodes are trained on; all are counted."""

END_REASONS = ("done", "window", "max_turns", "context_length", "not_played")
"""Why an episode stopped: the environment said done, the curriculum window closed, the horizon or the context ran out."""


@dataclass(frozen=True)
class TurnWindow:
    """Half-open range of turns the student plays: the teacher's recorded turns fill `[0, start)`.

    Example: `TurnWindow(4, 30)` replays four recorded turns, then the student plays turns 4 to 29.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"turn window must satisfy 0 <= start <= stop, got [{self.start}, {self.stop})")

    def __contains__(self, turn: int) -> bool:
        return self.start <= turn < self.stop


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to solve: which environment, which instance of it, and what that environment needs to build it.

    Example: `Task(env="household", task_id="heat/17", split="train", family="heat", payload={"seed": 17})`
    """

    env: str
    task_id: str
    split: str
    family: str = ""
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One observation and the action that answered it.

    Example: `Turn(index=0, actor="teacher", observation="You are in ...", text="go to desk 1", action="go to desk 1",
    token_ids=[88, 12, 7, 2])`
    """

    index: int
    actor: str
    """`student` (sampled now) or `teacher` (replayed from a demonstration)."""
    observation: str
    """What the actor saw before it acted."""
    text: str
    """The actor's raw answer."""
    action: str
    """The command parsed from `text` that went to the environment."""
    token_ids: list[int] = field(default_factory=list)
    """The answer's ids as sampled, stop token included when one was sampled."""
    finish_reason: str = "stop"
    reward: float = 0.0
    done: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    is_accepted: bool | None = None
    """Whether the environment took the action as a command it knows; None where it does not say."""


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One training sequence. `full` history gives one row an episode, `compact` one row a student turn.

    Example: `TokenRow(token_ids=[5, 6, 7, 8], turn_ids=[-1, 0, 0, 0], loss_mask=[0, 0, 1, 1], logprobs=[-0.3, -1.2])`
    """

    token_ids: list[int]
    """[T]"""
    turn_ids: list[int]
    """[T] the turn a token belongs to; -1 before the first turn (system prompt)."""
    loss_mask: list[int]
    """[T] 1 exactly where the student sampled the token."""
    logprobs: list[float]
    """[sum(loss_mask)] log-probability of each sampled token when it was sampled; no filler for other tokens."""

    def __post_init__(self) -> None:
        lengths = len(self.token_ids), len(self.turn_ids), len(self.loss_mask)
        if len(set(lengths)) != 1:
            raise ValueError(f"token_ids, turn_ids and loss_mask must have one length, got {lengths}")
        if sum(self.loss_mask) != len(self.logprobs):
            raise ValueError(f"{len(self.logprobs)} logprobs for {sum(self.loss_mask)} sampled tokens; they must match")
        if self.loss_mask and self.loss_mask[0]:
            raise ValueError("the first token of a row cannot be trained: nothing predicts it")


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One attempt at a task, stamped with the schedule and the weights that produced it.

    Example: `Episode(task=task, sample=0, step=12, weight_version=12, curriculum_k=7, window=TurnWindow(3, 30),
    turns=[...], rows=[...], outcome="ok", end_reason="done", success=True, reward=1.0)`
    """

    task: Task
    sample: int
    """Which of the samples of this task in this step, from 0."""
    step: int
    """Optimizer steps done when this episode was started."""
    weight_version: int
    curriculum_k: int
    """Window depth in turns, as the schedule computed it before clamping to the task."""
    window: TurnWindow
    turns: list[Turn]
    rows: list[TokenRow]
    outcome: str
    end_reason: str
    success: bool = False
    reward: float = 0.0
    detail: str = ""
    """What happened where `outcome` is not `ok`: expected and seen observation, the environment's error."""

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome {self.outcome!r} is none of {OUTCOMES}")
        if self.end_reason not in END_REASONS:
            raise ValueError(f"end_reason {self.end_reason!r} is none of {END_REASONS}")


@dataclass(frozen=True, kw_only=True)
class DemonstrationTurn:
    """One recorded turn of a demonstration.

    Example: `DemonstrationTurn(observation="You see ...", action="go to desk 1", text="go to desk 1")`
    """

    observation: str
    action: str
    text: str
    """The teacher's raw text; equals `action` for an expert that does not talk."""
    token_ids: list[int] = field(default_factory=list)
    """The teacher's own ids where a model produced the text; empty for an expert."""
    is_trained: bool = True
    """False for a turn that SFT must not imitate, such as an injected mistake."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A recorded solution of a task.

    Example: `Demonstration(task=task, turns=[...], success=True, source="expert")`
    """

    task: Task
    turns: list[DemonstrationTurn]
    success: bool
    source: str
    """Who acted: `expert`, or the teacher's checkpoint."""
    final_observation: str = ""


@dataclass(frozen=True)
class RowPlace:
    """Where one row of a microbatch lies. Example: `RowPlace(tokens=tensor([0, 1, 5]), slots=tensor([2]))`"""

    tokens: torch.Tensor  # [N] int64, index of each of the row's tokens in the microbatch
    slots: torch.Tensor  # [s] int64, which of the microbatch's S trained positions are the row's


@dataclass(kw_only=True)
class Microbatch:
    """Rows packed back to back, with the positions that carry a loss. All tensors on one device.

    Example: two rows of 3 and 2 tokens, the last token of each sampled: `cu_seqlens=[0, 3, 5]`, `positions=[1, 3]`.

    Packed as a forest of prefixes, a segment is a part of one or more rows: segment i goes on where segment `parents[i]`
    ends, and a row is a path from a root to one of `ends`. A position may be trained for several rows, each with a target
    of its own. Example: rows [5, 6, 7] and [5, 6, 8, 9] with the last token of each sampled are `token_ids=[5, 6, 7, 8, 9]`,
    `cu_seqlens=[0, 2, 3, 5]`, `parents=[-1, 0, 0]`, `ends=[1, 2]`, `positions=[1, 3]`, `target_ids=[7, 9]`, `row_ids=[0, 1]`.
    """

    token_ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [B+1] int32, row (or segment) i is [cu_seqlens[i], cu_seqlens[i+1])
    positions: torch.Tensor  # [S] int64, ascending: where the hidden state predicts a trained token
    target_ids: torch.Tensor  # [S] int64, the token after each position in its row
    loss_weight: torch.Tensor  # [S] fp32, every normalisation included: loss = sum(loss_weight * per_token)
    old_logprobs: torch.Tensor  # [S] fp32, log-probability at sampling time
    turn_ids: torch.Tensor  # [S] int64
    episode_ids: torch.Tensor  # [S] int64, index into the step's list of episodes
    parents: torch.Tensor | None = None  # [<=B] int64, -1 for a root, as are segments beyond it; None: all are roots
    ends: torch.Tensor | None = None  # [R] int64, last segment of each row; None: every segment is a row
    row_ids: torch.Tensor | None = None  # [S] int64, row that each position is trained for; set with `ends`

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.token_ids.numel()

    @property
    def num_row_tokens(self) -> int:
        """Tokens of the rows, those that rows share counted once a row."""
        if self.ends is None:
            return self.num_tokens
        firsts, lengths = first_positions(self.cu_seqlens, self.parents), self.cu_seqlens.diff().tolist()
        return sum(firsts[end] + lengths[end] for end in self.ends.tolist())

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that it sees: the work of attention."""
        firsts, lengths = first_positions(self.cu_seqlens, self.parents), self.cu_seqlens.diff().tolist()
        return sum(length * first + length * (length + 1) // 2 for first, length in zip(firsts, lengths, strict=True))

    def rows(self) -> list[RowPlace]:
        """Every row, in the order of `ends`; tensors on the CPU."""
        bounds, positions = self.cu_seqlens.tolist(), self.positions.cpu()
        if self.ends is None:
            cuts = torch.searchsorted(positions, self.cu_seqlens.cpu().long()).tolist()
            return [
                RowPlace(torch.arange(*bounds[row : row + 2]), torch.arange(*cuts[row : row + 2]))
                for row in range(len(bounds) - 1)
            ]
        parents, owners, places = self.parents.tolist(), self.row_ids.cpu(), []
        for row, segment in enumerate(self.ends.tolist()):
            path = []
            while segment >= 0:
                path.append(torch.arange(*bounds[segment : segment + 2]))
                segment = parents[segment]
            places.append(RowPlace(torch.cat(path[::-1]), (owners == row).nonzero().flatten()))
        return places


def first_positions(cu_seqlens: torch.Tensor, parents: torch.Tensor | None) -> list[int]:
    """[B] Position in its row of each segment's first token."""
    bounds = cu_seqlens.tolist()
    firsts = [0] * (len(bounds) - 1)
    for segment, parent in enumerate([] if parents is None else parents.tolist()):
        assert parent < segment, "a segment stands behind the one that it continues"
        if parent >= 0:
            firsts[segment] = firsts[parent] + bounds[parent + 1] - bounds[parent]
    return firsts


@dataclass(kw_only=True)
class TeacherTarget:
    """What a teacher in the trainer's processes says at the trained positions of one microbatch.

    Example: `TeacherTarget(hidden=hidden, head=head)` with `hidden [S, H_t]` and this rank's `head [V/tp, H_t]`. Under
    context parallelism a rank has the positions whose hidden states it computes, [S/cp, H_t].
    """

    hidden: torch.Tensor  # [S, H_t] no gradient
    head: torch.Tensor  # [V/tp, H_t] no gradient, this rank's vocabulary shard


@dataclass(frozen=True, kw_only=True)
class ServerTarget:
    """What a teacher behind a server says at the trained positions of one microbatch, at temperature 1.

    Example: `ServerTarget(logprob=logprob, topk_ids=ids, topk_logprobs=logprobs)`, [S], [S, k] and [S, k].
    """

    logprob: torch.Tensor  # [S] fp32, of the sampled token
    topk_ids: torch.Tensor | None = None  # [S, k] int64, -1 where the student has no such token; None where none were asked
    topk_logprobs: torch.Tensor | None = None  # [S, k] fp32, likeliest first


Carrier = TypeVar("Carrier")


def encode(carrier: Any) -> bytes:
    """A carrier, or a list of carriers, made of text and numbers as msgpack bytes."""
    return msgspec.msgpack.encode(carrier)


def decode(data: bytes, kind: type[Carrier]) -> Carrier:
    """The inverse of `encode`; raises `msgspec.ValidationError` when the bytes are not a `kind`."""
    return msgspec.msgpack.decode(data, type=kind)
