"""The environment family over `faulty_world.py`: its tasks are named for faults."""

from __future__ import annotations

from pathlib import Path

from megatron_tcod.envs.base import Step
from megatron_tcod.envs.process import WorkerEpisode, WorkerKind
from megatron_tcod.trajectory import Task

KIND = WorkerKind(name="faulty", script=Path(__file__).with_name("faulty_world.py"), memory_bytes=2 << 30, episodes=20)


class FaultyEpisode(WorkerEpisode):
    def __init__(self, fault: str) -> None:
        super().__init__(KIND, reset_deadline_s=20.0, step_deadline_s=2.0)
        self._fault = fault

    def reset(self) -> str:
        return self._reset(fault=self._fault)["observation"]

    def step(self, action: str) -> Step:
        answer = self._step(command=action)
        return Step(answer["observation"], info={"accepted": True})


class Faulty:
    blocking = True

    @staticmethod
    def make(task: Task) -> FaultyEpisode:
        return FaultyEpisode(task.task_id)

    @staticmethod
    def normalise(observation: str) -> str:
        return observation


def task_of(fault: str) -> Task:
    return Task(env="faulty", task_id=fault, split="train")
