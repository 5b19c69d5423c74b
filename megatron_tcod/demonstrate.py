"""Record the teacher's solutions: `torchrun ... -m megatron_tcod.demonstrate --config run.toml --demonstrations FILE`.

The teacher attempts each training task `demonstration_samples` times over the full horizon; the shortest success is
kept with observations, commands, raw text and token ids. Prints pass@1 and pass@n. The file must not exist yet; it
appears complete or not at all. b2f replays it, sft imitates it.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from megatron_tcod.assembly import Player, assemble, assemble_served_teacher
from megatron_tcod.config import Config, ConfigError, load_config, log_to_console, run_entry_point
from megatron_tcod.envs.demonstrations import write_demonstrations
from megatron_tcod.model import parallel
from megatron_tcod.preflight import preflight, read_model
from megatron_tcod.serving import is_teacher_served
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Episode


def teacher_as_player(config: Config) -> Config:
    """The same run with the teacher in the student's seat, and nobody to score it."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, student=config.model.teacher, init="load"),
        objective=dataclasses.replace(config.objective, objective="sft"),
        curriculum=dataclasses.replace(config.curriculum, curriculum="full", demonstrations="expert"),
    )


def seat_teacher(config: Config) -> Player:
    """The teacher ready to play, in these processes or behind its server. Collective."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if is_teacher_served(config):
        unread = dataclasses.replace(config.curriculum, curriculum="full", demonstrations="")
        config = dataclasses.replace(config, curriculum=unread)
        preflight(config, world_size=world_size)
        return assemble_served_teacher(config)
    read_model("teacher", config.model.teacher)
    player = teacher_as_player(config)
    preflight(player, world_size=world_size)
    run = assemble(player)
    run.publish_weights(0)
    return run


def attempt(run: Player) -> list[Episode]:
    """All attempts at all tasks, in task order. Collective."""
    config, environment = run.config.demonstration, run.config.environment
    count = config.demonstration_tasks or environment.train_tasks
    tasks = run.family.tasks(environment.train_split, count=count, **environment.env_options)
    return run.play_in_full(
        tasks,
        temperature=config.demonstration_temperature,
        seed=run.config.training.seed,
        num_samples=config.demonstration_samples,
    )


def to_demonstration(episode: Episode, source: str) -> Demonstration:
    return Demonstration(
        task=episode.task,
        turns=[
            DemonstrationTurn(
                observation=turn.observation, action=turn.action, text=turn.text, token_ids=turn.token_ids
            )
            for turn in episode.turns
        ],
        success=episode.success,
        source=source,
    )


def shortest_successes(episodes: Sequence[Episode]) -> list[Episode]:
    """One per solved task, in task order; the first of those with the fewest turns."""
    solved: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        if episode.success and episode.outcome == "ok":
            solved[episode.task.task_id].append(episode)
    return [min(found, key=lambda episode: len(episode.turns)) for found in solved.values()]


def report_lines(episodes: Sequence[Episode], kept: Sequence[Episode], num_samples: int) -> list[str]:
    num_tasks = len({episode.task.task_id for episode in episodes})
    first = [episode for episode in episodes if episode.sample == 0]
    pass_at_1 = sum(episode.success for episode in first) / max(len(first), 1)
    length = sum(len(episode.turns) for episode in kept) / max(len(kept), 1)
    faults = sum(episode.outcome != "ok" for episode in episodes)
    return [
        f"teacher pass@1 {pass_at_1:.1%}, pass@{num_samples} {len(kept) / max(num_tasks, 1):.1%} of {num_tasks} tasks",
        f"{len(kept)} demonstrations, {length:.1f} turns on average; {faults} episodes with another outcome than ok",
    ]


def main(argv: list[str]) -> int:
    config = load_config(argv, prog="python -m megatron_tcod.demonstrate")
    log_to_console()
    output = Path(config.curriculum.demonstrations)
    if config.curriculum.demonstrations in ("", "expert"):
        raise ConfigError("demonstrations is empty; give --demonstrations the JSONL file to write")
    if output.exists():
        raise ConfigError(f"demonstrations = {output} exists; remove it or give --demonstrations another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    with closing(seat_teacher(config)) as run:
        episodes = attempt(run)
    kept = shortest_successes(episodes)
    if not kept:
        raise ValueError(
            f"the teacher solved none of {len(episodes)} attempts, so there is nothing to write to {output}; check the "
            f"teacher with megatron_tcod.evaluate, or raise --demonstration-samples"
        )
    if parallel.rank() == 0:
        served = config.sglang.teacher_model or config.sglang.teacher_url
        source = served if is_teacher_served(config) else config.model.teacher
        write_demonstrations(output, [to_demonstration(episode, source) for episode in kept])
        print("\n".join(report_lines(episodes, kept, config.demonstration.demonstration_samples)))
    parallel.shutdown()
    return 0


if __name__ == "__main__":
    run_entry_point(main)
