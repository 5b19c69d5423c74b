"""Record solutions of training tasks: `torchrun ... -m megatron_tcod.demonstrate --config run.toml --demonstrations FILE`.

    ... --demonstrations FILE                                   # the teacher plays
    ... --demonstrations FILE --endpoint-url URL                # or a model at an endpoint
    ... --demonstrations FILE --expert                          # or the environment's own expert
    ... --demonstrations FILE --import train_expert.jsonl       # or somebody else did

A player attempts each task `demonstration_samples` times over the full horizon; the shortest success is kept with
observations, commands, raw text and token ids. An expert is asked until it succeeds. `--import` takes published files, lists
of an oracle's actions and older files of ours. Whatever the source, each demonstration is then replayed in a fresh
environment, and one that shows other observations is named and not written; `--no-verify` skips that.

The file must not exist yet; it appears complete or not at all. b2f replays it, sft imitates it. Models are needed by the
first two only. docs/demonstrations.md has the format.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from megatron_tcod.assembly import Player, assemble, assemble_served_teacher
from megatron_tcod.config import (
    Config,
    ConfigError,
    load_config,
    log_to_console,
    run_entry_point,
    take_flag,
    take_switch,
)
from megatron_tcod.endpoint import EndpointPlayer, seat_endpoint
from megatron_tcod.envs import check_env_options, load_env
from megatron_tcod.envs.base import EnvironmentFamily, EnvironmentFault
from megatron_tcod.envs.demonstrations import read_demonstrations, replay_difference, write_demonstrations
from megatron_tcod.model import parallel
from megatron_tcod.preflight import check_writable, preflight
from megatron_tcod.serving import is_teacher_served
from megatron_tcod.significance import pass_at
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Episode, Task

Given = TypeVar("Given")
Result = TypeVar("Result")
logger = logging.getLogger(__name__)

ENVIRONMENTS_AT_ONCE = 8
"""Out-of-process environments that experts and replays use together, at most."""


def teacher_as_player(config: Config) -> Config:
    """The same run with the teacher in the student's seat and layout, and nobody to score it."""
    scorer = [name for name in vars(config.parallel) if name.startswith("teacher_")]
    defaults = type(config.parallel)()
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, **{name: getattr(defaults, name) for name in scorer}),
        model=dataclasses.replace(config.model, student=config.model.teacher, init="load"),
        objective=dataclasses.replace(config.objective, objective="sft"),
        rollout=dataclasses.replace(config.rollout, max_staleness=0),
        curriculum=dataclasses.replace(config.curriculum, curriculum="full", demonstrations="expert"),
    )


def seat_teacher(config: Config) -> Player:
    """The teacher ready to play, in these processes, behind its server or at an endpoint. Collective."""
    if config.endpoint.endpoint_url:
        return seat_endpoint(config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if is_teacher_served(config):
        unread = dataclasses.replace(config.curriculum, curriculum="full", demonstrations="")
        config = dataclasses.replace(config, curriculum=unread)
        preflight(config, world_size=world_size)
        return assemble_served_teacher(config)
    player = teacher_as_player(config)
    preflight(player, world_size=world_size, player="teacher")
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
    solved: dict[str, int] = defaultdict(int)
    for episode in episodes:
        solved[episode.task.task_id] += episode.success and episode.outcome == "ok"
    num_tasks = max(len(solved), 1)
    pass_at_1 = sum(pass_at(1, successes=count, trials=num_samples) for count in solved.values()) / num_tasks
    length = sum(len(episode.turns) for episode in kept) / max(len(kept), 1)
    faults = sum(episode.outcome != "ok" for episode in episodes)
    return [
        f"teacher pass@1 {pass_at_1:.1%}, pass@{num_samples} {len(kept) / num_tasks:.1%} of {len(solved)} tasks",
        f"{len(kept)} demonstrations, {length:.1f} turns on average; {faults} episodes with another outcome than ok",
    ]


def source_of(config: Config, run: Player) -> str:
    """Who played, as the file names it."""
    if isinstance(run, EndpointPlayer):
        return run.name
    if is_teacher_served(config):
        return config.sglang.teacher_model or config.sglang.teacher_url
    return config.model.teacher


def record_teacher(config: Config) -> tuple[list[Demonstration], list[str]]:
    """The shortest success of each task and what to say about all attempts. Collective."""
    with closing(seat_teacher(config)) as run:
        episodes = attempt(run)
        source = source_of(config, run)
    kept = shortest_successes(episodes)
    if not kept:
        raise ValueError(
            f"the teacher solved none of {len(episodes)} attempts, so there is nothing to write; check the "
            f"teacher with megatron_tcod.evaluate, or raise --demonstration-samples"
        )
    lines = report_lines(episodes, kept, config.demonstration.demonstration_samples)
    return [to_demonstration(episode, source) for episode in kept], lines


def record_expert(config: Config) -> tuple[list[Demonstration], list[str]]:
    """The expert's solution of each task, and what to say. ValueError where the environment has no expert."""
    family, environment = prepared_family(config), config.environment
    count = config.demonstration.demonstration_tasks or environment.train_tasks
    tasks = family.tasks(environment.train_split, count=count, **environment.env_options)
    seed, tries = config.training.seed, config.demonstration.demonstration_samples

    def solve(numbered: tuple[int, Task]) -> Demonstration | str:
        return solve_by_expert(family, numbered[1], first_seed=(seed << 40) + numbered[0] * tries, tries=tries,
                               options=environment.env_options)  # fmt: skip

    found = map_environments(family, solve, list(enumerate(tasks)))
    kept = [one for one in found if isinstance(one, Demonstration)]
    for task, reason in zip(tasks, found, strict=True):
        if isinstance(reason, str):
            logger.warning("%s: not solved by the expert: %s", task.task_id, reason)
    if not kept:
        raise ValueError(f"the expert of env {environment.env} solved none of {len(tasks)} tasks; the last: {found[-1]}")
    return kept, [f"the expert solved {len(kept)} of {len(tasks)} tasks, {mean_turns(kept):.1f} turns on average"]


def solve_by_expert(
    family: type[EnvironmentFamily], task: Task, *, first_seed: int, tries: int, options: dict[str, Any]
) -> Demonstration | str:
    """A solution, or why there is none. ValueError of the first try propagates: there is no expert."""
    reason = ""
    for number in range(tries):
        try:
            demonstration = family.expert(task, seed=first_seed + number, **options)
        except EnvironmentFault as fault:
            reason = f"the environment broke: {fault}"
            continue
        if demonstration.success:
            return demonstration
        reason = f"it gave up after {len(demonstration.turns)} turns"
    return reason


def import_file(config: Config, path: str) -> tuple[list[Demonstration], list[str]]:
    """The successes of a file of any kind, and what to say."""
    prepared_family(config)
    limit = config.demonstration.demonstration_tasks
    found = read_demonstrations(
        path, config.environment.env, limit=limit, env_options=config.environment.env_options
    )
    kept = [one for one in found if one.success]
    if not kept:
        raise ValueError(f"{path} holds {len(found)} demonstrations and no successful one; nothing to write")
    return kept, [f"{len(kept)} of {len(found)} demonstrations solve their task, {mean_turns(kept):.1f} turns on average"]


def prepared_family(config: Config) -> type[EnvironmentFamily]:
    """The environment, its package and options checked."""
    family = load_env(config.environment.env)
    family.require()
    check_env_options(config.environment.env, config.environment.env_options)
    return family


def mean_turns(demonstrations: Sequence[Demonstration]) -> float:
    return sum(len(one.turns) for one in demonstrations) / max(len(demonstrations), 1)


def map_environments(
    family: type[EnvironmentFamily], function: Callable[[Given], Result], items: Sequence[Given]
) -> list[Result]:
    """Results in order; side by side where environments are processes of their own."""
    if not getattr(family, "blocking", False):
        return list(map(function, items))
    with ThreadPoolExecutor(min(ENVIRONMENTS_AT_ONCE, os.cpu_count() or 1)) as threads:
        return list(threads.map(function, items))


def replayable(config: Config, demonstrations: Sequence[Demonstration]) -> tuple[list[Demonstration], list[str]]:
    """Those that a fresh environment repeats, and what to say; the others are named."""
    family, options = load_env(config.environment.env), config.environment.env_options
    differences = map_environments(family, lambda one: replay_difference(family, one, **options), demonstrations)
    for one, difference in zip(demonstrations, differences, strict=True):
        if difference:
            logger.warning("%s is not written: its replay differs at %s", one.task.task_id, difference[:600])
    kept = [one for one, difference in zip(demonstrations, differences, strict=True) if not difference]
    if not kept:
        raise ValueError(f"none of {len(differences)} demonstrations repeats itself; the last differs at {differences[-1]}")
    return kept, [f"{len(kept)} of {len(demonstrations)} replayed with equal observations"]


def output_of(config: Config) -> Path:
    """The file to write. ConfigError where it is not named or exists."""
    output = Path(config.curriculum.demonstrations)
    if config.curriculum.demonstrations in ("", "expert"):
        raise ConfigError("demonstrations is empty; give --demonstrations the JSONL file to write")
    if output.exists():
        raise ConfigError(f"demonstrations = {output} exists; remove it or give --demonstrations another name")
    check_writable("demonstrations", str(output.parent))
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def main(argv: list[str]) -> int:
    is_expert, argv = take_switch(argv, "--expert")
    is_unverified, argv = take_switch(argv, "--no-verify")
    imported, argv = take_flag(argv, "--import")
    config = load_config(argv, prog="python -m megatron_tcod.demonstrate")
    log_to_console()
    output = output_of(config)
    if is_expert and imported is not None:
        raise ConfigError("--expert and --import are two sources; give one")
    is_first = os.environ.get("RANK", "0") == "0"
    if is_expert or imported is not None:  # nobody else has anything to do
        if not is_first:
            return 0
        found, lines = record_expert(config) if is_expert else import_file(config, imported)
    else:
        found, lines = record_teacher(config)
    if is_first:
        print("\n".join(lines))
        if not is_unverified:
            found, lines = replayable(config, found)
            print("\n".join(lines))
        write_demonstrations(output, found)
    parallel.shutdown()
    return 0


if __name__ == "__main__":
    run_entry_point(main)
