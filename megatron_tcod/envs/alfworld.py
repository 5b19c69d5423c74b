"""The family `alfworld`: real ALFWorld games, played by ALFWorld's own engine in a process of its own.

    tasks = ALFWorld.tasks("valid_seen", root="games")      # or root from $ALFWORLD_DATA, as ALFWorld itself
    episode = ALFWorld.make(tasks[0], root="games")
    print(episode.reset(), episode.admissible_commands)

`root` is a folder as `alfworld-download` or `tools/make_alfworld_games.py` leave it: `train`, `valid_seen` and
`valid_unseen`, in each `TASK-OBJECT-.../trial_.../game.tw-pddl` beside `traj_data.json`, possibly all below
`json_2.1.1`. A task holds the game's path below the root only, so that tasks and demonstrations move between machines.

The fourth split, `hard`, is no held-out set: it is the training games that the demonstration file `hard_from` lists without
commands, those that the teacher failed (in the released `train_expert.jsonl` 121 games).

Games without a game file, games marked unsolvable, and the movable-receptacle and sliced kinds, which ALFWorld does not
play, are not listed. Observations and commands are the game's own, unshortened; with `show_commands` the admissible
commands stand below each observation, as in the paper's prompt. History and horizons belong to the caller.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import msgspec

from megatron_tcod.envs.alfworld_expert import Explorer
from megatron_tcod.envs.base import Step, with_commands, without_commands
from megatron_tcod.envs.mistakes import Mistakes
from megatron_tcod.envs.process import WorkerEpisode, WorkerKind
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Task

KIND = WorkerKind(
    name="alfworld",
    script=Path(__file__).with_name("alfworld_worker.py"),
    packages=("alfworld", "textworld", "fast_downward"),
)

SPLITS = ("train", "valid_seen", "valid_unseen")
"""The folders of games."""

HARD = "hard"

FAMILIES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

EXPERTS = ("explorer", "planner")

GAME_FILE = "game.tw-pddl"

MAX_ACTION_CHARS = 1000
"""Longer actions are refused unread, as any command that the game does not know."""

MAX_EXPERT_TURNS = 100

RESET_DEADLINE_S = 120.0
"""Seconds: a start of the engine, loading the game and grounding its problem."""

STEP_DEADLINE_S = 30.0


class GameHeader(msgspec.Struct):
    """The one field of a game file that listing it needs."""

    solvable: bool | None = None


class PublishedGame(msgspec.Struct):
    """What the split `hard` needs of a line of a published demonstration file."""

    game_file: str
    actions: list[str] = []


class ALFWorld:
    """ALFWorld's text games (Shridhar et al., arXiv 2010.03768)."""

    blocking = True

    @classmethod
    def require(cls) -> None:
        """ValueError with the install line where ALFWorld is not installed."""
        KIND.require()

    @classmethod
    def tasks(
        cls,
        split: str,
        *,
        count: int | None = None,
        first: int = 0,
        root: str | None = None,
        hard_from: str | None = None,
        show_commands: bool = False,
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> list[Task]:
        """The playable games of a split in the order of their paths; `[first, first + count)` of them. `show_commands`
        and the deadlines are for playing them. ValueError: an unknown split, no root, or a root without such games.
        """
        if split not in (*SPLITS, HARD):
            raise ValueError(f"alfworld has no split {split!r}; use one of {', '.join((*SPLITS, HARD))}")
        folder = resolve_root(root)
        if split == HARD:
            games = hard_games(hard_from, folder)
        else:
            games = sorted(path.relative_to(folder).as_posix() for path in (folder / split).glob(f"*/*/{GAME_FILE}"))
        tasks = [task_of(game, split) for game in games if _is_playable(folder / game)]
        if not tasks:
            raise ValueError(
                f"no playable game below {folder / split}; expected TASK-OBJECT-.../trial_.../{GAME_FILE}: "
                "run alfworld-download, or tools/make_alfworld_games.py where there is no network"
            )
        if count is not None and first + count > len(tasks):
            raise ValueError(
                f"alfworld {split} has {len(tasks)} playable games, {first + count} were asked for; ask for fewer, or make "
                "more with tools/make_alfworld_games.py"
            )
        return tasks[first : None if count is None else first + count]

    @classmethod
    def make(
        cls,
        task: Task,
        *,
        root: str | None = None,
        hard_from: str | None = None,
        show_commands: bool = False,
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> ALFWorldEpisode:
        """A fresh episode. ValueError where the game file or the packages are missing."""
        return ALFWorldEpisode(
            game_path(task, root),
            show_commands=show_commands,
            reset_deadline_s=reset_deadline_s,
            step_deadline_s=step_deadline_s,
        )

    @staticmethod
    def normalise(observation: str) -> str:
        """White space collapsed, commands that are shown left out. Replayed games repeat their observations to the
        letter, lists in one order."""
        return " ".join(without_commands(observation).split())

    @classmethod
    def expert(
        cls,
        task: Task,
        *,
        seed: int,
        mistake_rate: float = 0.0,
        root: str | None = None,
        hard_from: str | None = None,
        show_commands: bool = False,
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
        kind: str = "explorer",
        max_turns: int = MAX_EXPERT_TURNS,
    ) -> Demonstration:
        """A demonstration, recorded as it was played; `success` says how it ended after `max_turns` at most.

        `explorer` searches the room as a player must (`alfworld_expert.py`). `planner` is ALFWorld's own: it plans from
        the true state, goes straight to things that it never saw, and can need a minute for two objects in a large
        room. Both recover from mistakes: random admissible commands, or repetitions of the last one.
        """
        if kind not in EXPERTS:
            raise ValueError(f"alfworld has no expert {kind!r}; use one of {', '.join(EXPERTS)}")
        mistakes = Mistakes(seed=seed, rate=mistake_rate)
        episode = ALFWorldEpisode(
            game_path(task, root),
            has_planner=kind == "planner",
            show_commands=show_commands,
            reset_deadline_s=reset_deadline_s,
            step_deadline_s=step_deadline_s,
        )
        turns: list[DemonstrationTurn] = []
        try:
            step = Step(episode.reset())
            explorer = Explorer(without_commands(step.observation)) if kind == "explorer" else None
            while not step.done and len(turns) < max_turns:
                is_mistake = mistakes.strikes()
                if is_mistake:
                    action = _wrong_action(episode, mistakes, turns)
                else:
                    action = explorer.act() if explorer else episode.plan[0]
                turns.append(
                    DemonstrationTurn(
                        observation=step.observation, action=action, text=action, is_trained=not is_mistake
                    )
                )
                step = episode.step(action)
                if explorer:
                    explorer.observe(action, without_commands(step.observation))
        finally:
            episode.close()
        return Demonstration(
            task=task,
            turns=turns,
            success=bool(step.info.get("success")),
            source="expert",
            final_observation=step.observation,
        )


class ALFWorldEpisode(WorkerEpisode):
    """One play of one game. Between `reset` and `close` it holds an engine process.

    `admissible_commands` are those of the current state, sorted; `plan` is the planner's, if asked for.
    """

    def __init__(
        self,
        game: Path,
        *,
        has_planner: bool = False,
        show_commands: bool = False,
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> None:
        super().__init__(KIND, reset_deadline_s=reset_deadline_s, step_deadline_s=step_deadline_s)
        self.game = game
        self.admissible_commands: list[str] = []
        self.plan: list[str] = []
        self._has_planner, self._show_commands = has_planner, show_commands
        self._is_done = False

    def reset(self) -> str:
        return self._observe(self._reset(game=str(self.game), has_planner=self._has_planner))

    def step(self, action: str) -> Step:
        assert not self._is_done, "the episode is over"
        if len(action) > MAX_ACTION_CHARS:
            return Step(self._shown("Nothing happens."), info=self._info(accepted=False))
        answer = self._step(command=action)
        self._is_done = answer["won"]
        observation = self._observe(answer)
        return Step(
            observation, reward=float(self._is_done), done=self._is_done, info=self._info(accepted=answer["accepted"])
        )

    def _observe(self, answer: dict[str, Any]) -> str:
        self.admissible_commands, self.plan = answer["admissible"], answer["plan"]
        return self._shown(answer["observation"])

    def _shown(self, observation: str) -> str:
        return with_commands(observation, self.admissible_commands) if self._show_commands else observation

    def _info(self, *, accepted: bool) -> dict[str, object]:
        return {"accepted": accepted, "success": self._is_done, "admissible_commands": self.admissible_commands}


def _wrong_action(episode: ALFWorldEpisode, mistakes: Mistakes, turns: list[DemonstrationTurn]) -> str:
    """The last command again three times of ten, else any admissible one."""
    if turns and mistakes.rng.random() < 0.3:
        return turns[-1].action
    return mistakes.choose(episode.admissible_commands)


def resolve_root(root: str | None) -> Path:
    """The folder that holds the splits; ValueError says how to name one."""
    named = root or os.environ.get("ALFWORLD_DATA")
    if not named:
        raise ValueError("alfworld needs the folder of its games: give root=..., or set ALFWORLD_DATA")
    for folder in (Path(named), Path(named) / "json_2.1.1"):
        if any((folder / split).is_dir() for split in SPLITS):
            return folder
    raise ValueError(f"{named} has none of the folders {', '.join(SPLITS)}; expected ALFWorld's games there")


def hard_games(hard_from: str | None, folder: Path) -> list[str]:
    """The training games that a published demonstration file lists without commands, sorted, as paths below `folder`."""
    if not hard_from:
        raise ValueError(
            "alfworld's split hard is the training games without a demonstration: name the demonstration file that lists "
            "them, with env option hard_from (the released train_expert.jsonl does)"
        )
    lines = msgspec.json.Decoder(PublishedGame)
    try:
        listed = lines.decode_lines(Path(hard_from).read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"hard_from {hard_from}: {error}; expected lines with game_file and actions") from error
    games = {locate_game(line.game_file, folder, where=hard_from) for line in listed if not line.actions}
    return sorted(game for game in games if game.startswith("train/"))


def locate_game(game_file: str, root: Path, *, where: str) -> str:
    """A published path as one below `root`: its longest tail that exists there; ValueError if there is none."""
    parts = (PureWindowsPath if "\\" in game_file else PurePosixPath)(game_file).parts
    if ".." not in parts:
        for start in range(len(parts)):
            tail = PurePosixPath(*parts[start:])
            if len(tail.parts) == 4 and not tail.is_absolute() and (root / tail).is_file():
                return str(tail)
    raise ValueError(
        f"{where}: no tail of game_file {game_file!r} exists below {root}; expected .../SPLIT/TASK/TRIAL/game.tw-pddl: "
        "name the folder of these games as root"
    )


def task_of(game: str, split: str | None = None) -> Task:
    """The task of a game, given by its path below the root; its split is the path's unless it is named.

    Example: `train/pick_heat_then_place_in_recep-Apple-None-Shelf-12/trial_T1/game.tw-pddl`
    """
    parts = PurePosixPath(game).parts
    return Task(
        env="alfworld",
        task_id="/".join(parts[:-1]),
        split=split or parts[0],
        family=parts[1].partition("-")[0],
        payload={"game": game},
    )


def game_path(task: Task, root: str | None) -> Path:
    """The game file of a task; ValueError when the task is not one of these or the file is not there."""
    game = task.payload.get("game")
    if task.env != "alfworld" or not isinstance(game, str) or ".." in PurePosixPath(game).parts:
        raise ValueError(
            f"not an alfworld task: env {task.env!r}, payload {task.payload!r}; expected a 'game' below the root"
        )
    path = resolve_root(root) / game
    if not path.is_file():
        raise ValueError(f"alfworld game {path} does not exist; is root the folder that the task was listed from?")
    return path


def _is_playable(game: Path) -> bool:
    name = game.parent.parent.name
    if name.partition("-")[0] not in FAMILIES or "Sliced" in name or not game.with_name("traj_data.json").is_file():
        return False
    return msgspec.json.decode(game.read_bytes(), type=GameHeader).solvable is True
