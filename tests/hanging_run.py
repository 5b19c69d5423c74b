"""Training over an environment that hangs: `hanging_run.py RANK SWITCH [flags]`.

On that rank the first command after the file SWITCH appears never returns, while the process's other threads live on.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megatron_tcod.envs import ENVS
from megatron_tcod.envs.base import Step
from megatron_tcod.envs.household import Household, HouseholdEpisode
from megatron_tcod.train import main
from megatron_tcod.trajectory import Task


class HangingEpisode(HouseholdEpisode):
    def step(self, action: str) -> Step:
        while os.environ["RANK"] == sys.argv[1] and Path(sys.argv[2]).exists():
            time.sleep(0.1)
        return super().step(action)


class Hanging(Household):
    @classmethod
    def make(cls, task: Task, **sizes: int) -> HangingEpisode:
        return HangingEpisode(super().make(task, **sizes).world)


if __name__ == "__main__":
    sys.modules["hanging_run"] = sys.modules["__main__"]
    ENVS["household"] = "hanging_run:Hanging"
    raise SystemExit(main(sys.argv[3:]))
