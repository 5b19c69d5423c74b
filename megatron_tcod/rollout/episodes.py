"""Plays episodes: the teacher's recorded turns up to the window, the student's sampled turns inside it.

    settings = PlaySettings(max_turns=30, max_new_tokens=64, max_context=4096, seed=0)
    assignments = [Assignment(task=task, window=TurnWindow(4, 30), sample=s, demonstration=demo) for s in range(8)]
    episodes = await collect_episodes(Household, assignments, engine=engine, tokenizer=tokenizer, settings=settings, step=12)

Replay is verified: at each recorded turn, and where the student takes over, the observation must equal the recorded one
after the environment's own `normalise`. Whatever happens ends in an `Episode` with one of `trajectory.OUTCOMES`:

    ok                 the student played its window (it may still have failed the task)
    solved_in_replay   the environment said done before the window opened
    diverged           an observation differed from the recorded one
    rejected_action    the environment refused a recorded action, and the recording does not show the same refusal
    no_demonstration   the window starts behind what is recorded
    env_...            the environment broke, by its own account (`EnvironmentFault`) or seen from here: an answer that is
                       oversized, no UTF-8 or empty, or the same one whatever the student does (`trajectory.ENV_FAULTS`)
    engine_fault       the engine raised `EngineFault` for one of the episode's requests

A recorded observation that is empty was never recorded (action-only files) and is not compared.
Rows to train on (`transcript.py`) exist for `ok` only: no turn of an episode that broke is trained. Seeds derive from
(run seed, step, task, sample, turn), so that an episode does not depend on which rank plays it or on what else is played.

It knows no tokens but through the tokenizer and no curricula: windows come in, episodes go out. Exceptions other than the
two faults cancel the collection and propagate, and so does an engine's fault that no episode was spared.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_tcod.envs.base import Environment, EnvironmentFamily, EnvironmentFault, Step, check_observation
from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.rollout.engine import EngineFault, RolloutEngine, Sampling
from megatron_tcod.rollout.prefix import plan_prefixes
from megatron_tcod.rollout.transcript import HISTORY_MODES, Transcript
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Episode, Task, Turn, TurnWindow

ACTION_FORMATS = ("plain", "tags")
OPEN_PROCESSES = 128
"""Environments in processes of their own that are open at a time where nothing else is asked for: an evaluation over all
tasks of a split is no reason to start thousands."""
SHORTEST_PREWARM = 32
"""A prefix of first prompts is warmed where that saves at least so many tokens."""

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlaySettings:
    """How all episodes of a collection are played. Temperature 0 plays greedily."""

    max_turns: int
    """Turns an episode may have, replayed ones included."""
    max_new_tokens: int
    """Tokens of one answer."""
    max_context: int
    """Tokens of a conversation, the coming answer included; an episode that would exceed it ends."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int = 0
    """Of the run."""
    history_mode: str = "full"
    compact_turns: int = 2
    """Past turns shown in `compact` history."""
    action_format: str = "plain"
    max_observation_bytes: int = 1 << 18
    """A longer observation is a fault of the environment."""
    stuck_after: int = 10
    """So many different accepted commands of a student in a row, all answered with one text, are a fault of the
    environment; 0: never. Refused and repeated commands do not count: those are the student's."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("history_mode", self.history_mode, HISTORY_MODES),
            ("action_format", self.action_format, ACTION_FORMATS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is none of {known}")
        for name in ("max_turns", "max_new_tokens", "max_context", "max_observation_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("compact_turns", "stuck_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One episode to play. Example: `Assignment(task=task, window=TurnWindow(0, 30), sample=3)`"""

    task: Task
    window: TurnWindow
    sample: int = 0
    demonstration: Demonstration | None = None
    curriculum_k: int = 0


async def collect_episodes(
    family: type[EnvironmentFamily],
    assignments: Sequence[Assignment],
    *,
    engine: RolloutEngine,
    tokenizer: TurnTokenizer,
    settings: PlaySettings,
    step: int,
    env_options: dict[str, Any] | None = None,
    max_open: int | None = None,
    prefix_budget: int | None = None,
) -> list[Episode]:
    """Play `assignments` concurrently and return their episodes in the same order.

    All environments are opened and replayed first, then what first prompts share is computed once, then all students
    play; with `prefix_budget`, the tokens that the engine's cache can hold, in groups that fit it (`prefix.py`). At most
    `max_open` environments are open at a time (default: all; of processes `OPEN_PROCESSES`). Environments with a true
    attribute `blocking` run in threads of their own.
    """
    episodes: list[Episode] = []
    is_blocking = bool(getattr(family, "blocking", False))
    at_once = max_open or (OPEN_PROCESSES if is_blocking else max(len(assignments), 1))
    with ThreadPoolExecutor(at_once) if is_blocking else nullcontext() as threads:
        table = _Table(family, env_options or {}, engine, tokenizer, settings, step, threads)
        for start in range(0, len(assignments), at_once):
            plays = [_Play(table, assignment) for assignment in assignments[start : start + at_once]]
            try:
                await _all(play.open() for play in plays)
                episodes += await _fan_out(plays, engine, budget=prefix_budget, room=settings.max_new_tokens)
            finally:
                await _all(play.close() for play in plays)
    return episodes


async def play_episode(
    family: type[EnvironmentFamily],
    assignment: Assignment,
    *,
    engine: RolloutEngine,
    tokenizer: TurnTokenizer,
    settings: PlaySettings,
    step: int,
    env_options: dict[str, Any] | None = None,
) -> Episode:
    """One episode of `collect_episodes`."""
    collected = await collect_episodes(
        family, [assignment], engine=engine, tokenizer=tokenizer, settings=settings, step=step, env_options=env_options
    )
    return collected[0]


def parse_action(text: str, action_format: str) -> str:
    """The command in an answer; the empty string where there is none, which the environment then refuses.

    `plain`: the stripped text. `tags`: what stands between `<action>` and `</action>`, exactly one pair of which must
    follow the thinking, if there is any (the paper's `<think>..</think><action>..</action>`).
    """
    if action_format == "plain":
        return text.strip()
    if action_format != "tags":
        raise ValueError(f"action_format {action_format!r} is none of {ACTION_FORMATS}")
    answer = text.rpartition("</think>")[2]
    found = re.fullmatch(r"(?s)(?:(?!</?action>).)*<action>((?:(?!</?action>).)*)</action>(?:(?!</?action>).)*", answer)
    return found.group(1).strip() if found else ""


def turn_seed(run_seed: int, step: int, task: Task, sample: int, turn: int) -> int:
    """A 63-bit seed that depends on nothing but its arguments."""
    name = "\0".join((str(run_seed), str(step), task.env, task.split, task.task_id, str(sample), str(turn)))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


async def _all(coroutines: Any) -> list[Any]:
    """Results in order. On the first failure the others are cancelled and awaited, then it propagates."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _fan_out(plays: list[_Play], engine: RolloutEngine, *, budget: int | None, room: int) -> list[Episode]:
    """Let opened plays run, group by group, after what the prompts of a group share is computed once."""
    answering = [play for play in plays if play.can_answer]
    episodes = {play: await play.run() for play in plays if not play.can_answer}
    faults: list[EngineFault] = []
    for group in plan_prefixes([play.prompt for play in answering], budget=budget, room=room, worth=SHORTEST_PREWARM):
        try:
            if group.prefixes:
                await engine.prewarm(group.prefixes)
        except EngineFault as fault:  # who asks for the prefix next computes it, or hears the same
            logger.warning("computing shared prefixes failed: %s", fault)
        members = [answering[index] for index in group.members]
        episodes |= zip(members, await _all(play.run() for play in members), strict=True)
        faults += [play.engine_fault for play in members if play.engine_fault]
    if faults and len(faults) == len(answering):
        raise faults[0]
    return [episodes[play] for play in plays]


@dataclass(frozen=True)
class _Table:
    """What all plays of a collection share."""

    family: type[EnvironmentFamily]
    env_options: dict[str, Any]
    engine: RolloutEngine
    tokenizer: TurnTokenizer
    settings: PlaySettings
    step: int
    threads: ThreadPoolExecutor | None
    """Where environments run; None: here."""

    async def call(self, function: Callable[[], Result]) -> Result:
        if self.threads is None:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self.threads, function)


class _Play:
    """One episode: `open` resets and replays, `run` lets the student play and sums up, `close` may come at any time."""

    def __init__(self, table: _Table, assignment: Assignment) -> None:
        self._table, self._assignment = table, assignment
        settings = table.settings
        self._transcript = Transcript(
            table.tokenizer, history_mode=settings.history_mode, compact_turns=settings.compact_turns
        )
        self._environment: Environment | None = None
        self._observation = ""
        self._unmoved: set[str] = set()
        """The student's accepted commands that the present observation answered."""
        self._turns: list[Turn] = []
        self._outcome, self._end_reason, self._detail = "ok", "", ""
        self._success = False
        self._version: int | None = None
        self.engine_fault: EngineFault | None = None

    @property
    def prompt(self) -> list[int]:
        """What the student is asked next."""
        return self._transcript.ids

    @property
    def can_answer(self) -> bool:
        """The student is at turn, and its answer fits the context."""
        if self._end_reason:
            return False
        return len(self.prompt) + self._table.settings.max_new_tokens <= self._table.settings.max_context

    async def open(self) -> None:
        """Build and reset the environment, replay the recorded turns before the window, and ask the student."""
        start, demonstration = self._assignment.window.start, self._assignment.demonstration
        num_recorded = len(demonstration.turns) if demonstration else 0
        if start > num_recorded:
            self._end("not_played", "no_demonstration", f"window starts at turn {start}, {num_recorded} are recorded")
            return
        try:
            self._environment = await self._table.call(
                lambda: self._table.family.make(self._assignment.task, **self._table.env_options)
            )
            self._observation = await self._table.call(self._environment.reset)
            check_observation(self._observation, max_bytes=self._table.settings.max_observation_bytes)
            for turn in range(start):
                await self._replay(turn, demonstration)
                if self._end_reason:
                    return
            if start:
                self._compare(start, _recorded_observation(demonstration, start))
        except EnvironmentFault as fault:
            self._end("not_played", fault.outcome, str(fault))
        self._ask_unless_over(start)

    async def run(self) -> Episode:
        """Let the student play what is left of its window."""
        try:
            while self.can_answer:
                await self._student_turn(len(self._turns))
        except EnvironmentFault as fault:
            self._end("not_played", fault.outcome, str(fault))
        except EngineFault as fault:
            logger.warning("%s, sample %d: %s", self._assignment.task.task_id, self._assignment.sample, fault)
            self._end("not_played", "engine_fault", f"{type(fault).__name__}: {fault}")
            self.engine_fault = fault
        if not self._end_reason:
            self._end("context_length")
        await self.close()
        assignment, is_ok = self._assignment, self._outcome == "ok"
        return Episode(
            task=assignment.task,
            sample=assignment.sample,
            step=self._table.step,
            weight_version=self._table.engine.version if self._version is None else self._version,
            curriculum_k=assignment.curriculum_k,
            window=assignment.window,
            turns=self._turns,
            rows=self._transcript.rows() if is_ok else [],
            outcome=self._outcome,
            end_reason=self._end_reason,
            success=self._success,
            reward=sum(turn.reward for turn in self._turns),
            detail=self._detail,
        )

    async def close(self) -> None:
        """Free the environment. A fault while closing changes nothing that was played and is only logged."""
        environment, self._environment = self._environment, None
        if environment is None:
            return
        try:
            await self._table.call(environment.close)
        except EnvironmentFault as fault:
            logger.warning("environment of %s failed to close: %s", self._assignment.task.task_id, fault)

    async def _replay(self, turn: int, demonstration: Demonstration) -> None:
        """Verify the observation of `turn` and play the recorded action."""
        recorded = demonstration.turns[turn]
        self._compare(turn, recorded.observation)
        if self._end_reason:
            return
        self._transcript.observe(turn, self._observation)
        ids = self._transcript.answer_recorded(turn, recorded.text, recorded.action, recorded.token_ids)
        answer = await self._step(recorded.action)
        self._note_turn(turn, "teacher", recorded, answer, token_ids=ids)
        following = _recorded_observation(demonstration, turn + 1)
        was_refused_then = bool(following) and self._is_same(answer.observation, following)
        self._observation = answer.observation
        if not answer.info.get("accepted", True) and not was_refused_then:
            self._end("not_played", "rejected_action", f"turn {turn}: {recorded.action!r} -> {answer.observation!r}")
        elif answer.done:
            self._success = bool(answer.info.get("success", False))
            self._end("done", "solved_in_replay", f"done at recorded turn {turn} of {len(demonstration.turns)}")

    async def _student_turn(self, turn: int) -> None:
        table, settings = self._table, self._table.settings
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=turn_seed(settings.seed, table.step, self._assignment.task, self._assignment.sample, turn),
            stop_token_ids=table.tokenizer.stop_token_ids,
        )
        completion = await table.engine.generate(list(self.prompt), sampling)
        versions = [completion.weight_version, *([] if self._version is None else [self._version])]
        self._version = min(versions)  # its oldest tokens bound what the episode is worth
        text = table.tokenizer.answer_text(completion.token_ids)
        recorded = DemonstrationTurn(observation="", action=parse_action(text, settings.action_format), text=text)
        self._transcript.answer_sampled(turn, completion, recorded.action)
        sampled = dict(
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.prompt_tokens,
            cached_tokens=completion.cached_tokens,
        )
        try:
            answer = await self._step(recorded.action)
            self._check_that_it_moves(recorded.action, answer)
        except EnvironmentFault:
            self._note_turn(turn, "student", recorded, Step(""), **sampled)
            raise
        self._note_turn(turn, "student", recorded, answer, **sampled)
        self._observation = answer.observation
        if answer.done:
            self._success = bool(answer.info.get("success", False))
            self._end("done")
        self._ask_unless_over(turn + 1)

    async def _step(self, action: str) -> Step:
        answer = await self._table.call(lambda: self._environment.step(action))
        max_bytes = self._table.settings.max_observation_bytes
        check_observation(answer.observation, max_bytes=max_bytes, is_last=answer.done)
        return answer

    def _check_that_it_moves(self, action: str, answer: Step) -> None:
        if answer.observation != self._observation:
            self._unmoved.clear()
        if answer.info.get("accepted", True):
            self._unmoved.add(action)
        if 0 < self._table.settings.stuck_after <= len(self._unmoved) and not answer.done:
            said = f"{len(self._unmoved)} different commands, one answer: {answer.observation[:200]!r}"
            raise EnvironmentFault(said, outcome="env_stuck")

    def _ask_unless_over(self, turn: int) -> None:
        """Put the newest observation before the student, unless the episode ended or `turn` is not the student's."""
        max_turns = self._table.settings.max_turns
        if not self._end_reason and turn >= min(self._assignment.window.stop, max_turns):
            self._end("max_turns" if turn >= max_turns else "window")
        if not self._end_reason:
            self._transcript.observe(turn, self._observation)

    def _compare(self, turn: int, recorded: str) -> None:
        if recorded and not self._is_same(self._observation, recorded):
            self._end("not_played", "diverged", f"turn {turn}: recorded {recorded!r}, seen {self._observation!r}")

    def _is_same(self, left: str, right: str) -> bool:
        return self._table.family.normalise(left) == self._table.family.normalise(right)

    def _note_turn(self, turn: int, actor: str, answer: DemonstrationTurn, step: Step, **sampled: Any) -> None:
        self._turns.append(
            Turn(
                index=turn,
                actor=actor,
                observation=self._observation,
                text=answer.text,
                action=answer.action,
                reward=step.reward,
                done=step.done,
                is_accepted=step.info.get("accepted"),
                **sampled,
            )
        )

    def _end(self, end_reason: str, outcome: str = "ok", detail: str = "") -> None:
        self._end_reason, self._outcome, self._detail = end_reason, outcome, detail


def _recorded_observation(demonstration: Demonstration, turn: int) -> str:
    """What was recorded before `turn`, or at the very end; empty where nothing was."""
    turns = demonstration.turns
    return turns[turn].observation if turn < len(turns) else demonstration.final_observation
