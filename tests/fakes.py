"""Hand-written stand-ins for what the package talks to: environments that follow a script, an engine that invents ids.

    family = scripted_family({"t": Script(observations=["start", "next", "end"], goal=2)})
    engine = DiceEngine(tokenizer.vocab_size, seed=3)

They keep the contracts of `envs/base.py` and `rollout/engine.py` and check nothing by themselves.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_tcod.envs.base import EnvironmentFault, Step
from megatron_tcod.rollout.engine import Completion, Sampling
from megatron_tcod.rollout.prefix import PrefixReuse
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Task


@dataclass(frozen=True, kw_only=True)
class Script:
    """What an environment says: observation i before turn i, the last one for ever. Done after `done_after` actions."""

    observations: list[str]
    done_after: int = 10**9
    is_success: bool = True
    refused: frozenset[str] = frozenset()
    """Actions answered with `accepted` False; they use up a turn like others."""
    fault_at: str | None = None
    """`make`, `reset`, `close`, or the action that breaks the environment."""


class ScriptedEnvironment:
    """One episode of a script; notes what it was given in `actions`."""

    def __init__(self, script: Script) -> None:
        self.script, self.actions, self.num_closed = script, [], 0
        if script.fault_at == "make":
            raise EnvironmentFault("could not start")

    def reset(self) -> str:
        if self.script.fault_at == "reset":
            raise EnvironmentFault("could not reset")
        return self.script.observations[0]

    def step(self, action: str) -> Step:
        if self.script.fault_at == action:
            raise EnvironmentFault(f"broke at {action}")
        self.actions.append(action)
        done = len(self.actions) >= self.script.done_after
        observation = self.script.observations[min(len(self.actions), len(self.script.observations) - 1)]
        info = {"accepted": action not in self.script.refused, "success": done and self.script.is_success}
        return Step(observation, reward=float(info["success"]), done=done, info=info)

    def close(self) -> None:
        self.num_closed += 1
        if self.script.fault_at == "close":
            raise EnvironmentFault("could not close")


def scripted_family(scripts: dict[str, Script], *, blocking: bool = False) -> type:
    """An environment family whose tasks are the keys of `scripts`; `made` lists the environments it built."""

    class Scripted:
        made: list[ScriptedEnvironment] = []

        @classmethod
        def tasks(cls, split: str) -> list[Task]:
            return [Task(env="scripted", task_id=name, split=split) for name in scripts]

        @classmethod
        def make(cls, task: Task) -> ScriptedEnvironment:
            environment = ScriptedEnvironment(scripts[task.task_id])
            cls.made.append(environment)
            return environment

        @staticmethod
        def normalise(observation: str) -> str:
            return " ".join(observation.lower().split())

    Scripted.blocking = blocking
    return Scripted


def demonstration_of(task: Task, script: Script, actions: list[str]) -> Demonstration:
    """What a recorder would have written while `actions` were played in `script`."""
    environment = ScriptedEnvironment(script)
    observation, turns = environment.reset(), []
    for action in actions:
        turns.append(DemonstrationTurn(observation=observation, action=action, text=action))
        observation = environment.step(action).observation
    return Demonstration(task=task, turns=turns, success=True, source="script", final_observation=observation)


class DiceEngine:
    """Answers with random ids, a stop id in one answer of two, and remembers each prompt and completion."""

    def __init__(self, vocab_size: int, *, seed: int = 0, avoid: Iterable[int] = ()) -> None:
        self.version, self.cache_tokens = 0, None
        self.prompts: list[list[int]] = []
        self.completions: list[Completion] = []
        self.prewarmed: list[list[int]] = []
        self._random = random.Random(seed)
        self._ids = sorted(set(range(vocab_size)) - set(avoid))

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        stops = set(sampling.stop_token_ids)
        ids = [token for token in self._random.choices(self._ids, k=sampling.max_new_tokens) if token not in stops]
        ids = ids or [next(token for token in self._ids if token not in stops)]
        reason = "length"
        if self._random.random() < 0.5:
            at = self._random.randrange(len(ids))
            ids, reason = [*ids[:at], self._random.choice(sorted(stops))], "stop"
        completion = Completion(
            token_ids=ids,
            logprobs=[-self._random.random() for _ in ids],
            finish_reason=reason,
            cached_tokens=0,
            prompt_tokens=len(prompt_ids),
            weight_version=self.version,
        )
        self.prompts.append(list(prompt_ids))
        self.completions.append(completion)
        return completion

    async def prewarm(self, prefixes: Iterable[list[int]]) -> None:
        self.prewarmed += [list(prefix) for prefix in prefixes]

    @contextmanager
    def released(self) -> Iterator[None]:
        yield

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.version = version

    def take_prefix_reuse(self) -> PrefixReuse:
        return PrefixReuse()

    def close(self) -> None:
        pass


class SayingEngine(DiceEngine):
    """Says the given answers in turn, each encoded with the tokenizer and ended with its end-of-turn id."""

    def __init__(self, tokenizer, answers: list[str]) -> None:
        super().__init__(tokenizer.vocab_size)
        self._queue = [tokenizer.answer(answer) for answer in answers]

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        ids = self._queue[len(self.completions) % len(self._queue)]
        completion = Completion(
            token_ids=list(ids),
            logprobs=[-0.5] * len(ids),
            finish_reason="stop",
            cached_tokens=len(prompt_ids) // 2,
            prompt_tokens=len(prompt_ids),
            weight_version=self.version,
        )
        self.prompts.append(list(prompt_ids))
        self.completions.append(completion)
        return completion
