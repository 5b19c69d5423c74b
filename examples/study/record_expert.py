"""Record an environment's own expert, with mistakes for it to recover from: one episode a training task, to a JSONL file.

    python examples/study/record_expert.py --env household --tasks 300 --mistake-rate 0.1 --output expert.jsonl

For environments in which playing is slow: SFT then reads the same episodes in every epoch instead of playing new ones.
Episodes that the expert did not finish are left out and counted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_tcod.config import run_entry_point
from megatron_tcod.envs import load_env
from megatron_tcod.envs.demonstrations import write_demonstrations


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", required=True)
    parser.add_argument("--env-options", type=json.loads, default={}, help="JSON object")
    parser.add_argument("--split", default="train")
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--mistake-rate", type=float, default=0.0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(argv)
    family = load_env(given.env)
    family.require()
    tasks = family.tasks(given.split, count=given.tasks, **given.env_options)
    played = [
        family.expert(task, seed=index, mistake_rate=given.mistake_rate, **given.env_options)
        for index, task in enumerate(tasks)
    ]
    solved = [one for one in played if one.success]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_demonstrations(given.output, solved)
    turns = sum(len(one.turns) for one in solved) / max(len(solved), 1)
    print(f"{given.output}: {len(solved)} of {len(played)} episodes solved, {turns:.1f} turns on average")


if __name__ == "__main__":
    run_entry_point(main)
