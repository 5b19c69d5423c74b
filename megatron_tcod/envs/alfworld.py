"""The family `alfworld`: real ALFWorld games, played by ALFWorld's own engine in a process of its own.

    tasks = ALFWorld.tasks("valid_seen", root="games")      # or root from $ALFWORLD_DATA, as ALFWorld itself
    episode = ALFWorld.make(tasks[0], root="games")
    print(episode.reset(), episode.admissible_commands)

`root` is a folder as `alfworld-download` or `tools/make_alfworld_games.py` leave it: `train`, `valid_seen` and
`valid_unseen`, in each `TASK-OBJECT-.../trial_.../game.tw-pddl` beside `traj_data.json`, possibly all below
`json_2.1.1`. A task holds the game's path below the root only, so that tasks and demonstrations move between machines.

Games without a game file, games marked unsolvable, and the movable-receptacle and sliced kinds, which ALFWorld does not
play, are not listed. Observations and commands are the game's own, unshortened. Prompts, history and horizons belong to
the caller.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import msgspec

from megatron_tcod.envs.alfworld_engine import ENGINES, Engine, require_packages
from megatron_tcod.envs.alfworld_expert import Explorer
from megatron_tcod.envs.base import Step
from megatron_tcod.envs.mistakes import Mistakes
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Task

SPLITS = ("train", "valid_seen", "valid_unseen")

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


class ALFWorld:
    """ALFWorld's text games (Shridhar et al., arXiv 2010.03768)."""

    @classmethod
    def require(cls) -> None:
        """ValueError with the install line where ALFWorld is not installed."""
        require_packages()

    @classmethod
    def tasks(
        cls,
        split: str,
        *,
        count: int | None = None,
        first: int = 0,
        root: str | None = None,
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> list[Task]:
        """The playable games of a split in the order of their paths; `[first, first + count)` of them. The deadlines
        are for playing them. ValueError: an unknown split, no root, or a root without such games.
        """
        if split not in SPLITS:
            raise ValueError(f"alfworld has no split {split!r}; use one of {', '.join(SPLITS)}")
        folder = resolve_root(root)
        games = sorted(path.relative_to(folder).as_posix() for path in (folder / split).glob(f"*/*/{GAME_FILE}"))
        tasks = [task_of(game) for game in games if _is_playable(folder / game)]
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
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> ALFWorldEpisode:
        """A fresh episode. ValueError where the game file or the packages are missing."""
        game = game_path(task, root)
        return ALFWorldEpisode(game, reset_deadline_s=reset_deadline_s, step_deadline_s=step_deadline_s)

    @staticmethod
    def normalise(observation: str) -> str:
        """White space collapsed. Replayed games repeat their observations to the letter, lists in one order."""
        return " ".join(observation.split())

    @classmethod
    def expert(
        cls,
        task: Task,
        *,
        seed: int,
        mistake_rate: float = 0.0,
        root: str | None = None,
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
            reset_deadline_s=reset_deadline_s,
            step_deadline_s=step_deadline_s,
        )
        turns: list[DemonstrationTurn] = []
        try:
            step = Step(episode.reset())
            explorer = Explorer(step.observation) if kind == "explorer" else None
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
                    explorer.observe(action, step.observation)
        finally:
            episode.close()
        return Demonstration(
            task=task,
            turns=turns,
            success=bool(step.info.get("success")),
            source="expert",
            final_observation=step.observation,
        )


class ALFWorldEpisode:
    """One play of one game. Between `reset` and `close` it holds an engine process.

    `admissible_commands` are those of the current state, sorted; `plan` is the planner's, if asked for.
    """

    def __init__(
        self,
        game: Path,
        *,
        has_planner: bool = False,
        reset_deadline_s: float = RESET_DEADLINE_S,
        step_deadline_s: float = STEP_DEADLINE_S,
    ) -> None:
        self.game = game
        self.admissible_commands: list[str] = []
        self.plan: list[str] = []
        self._has_planner = has_planner
        self._reset_deadline_s, self._step_deadline_s = reset_deadline_s, step_deadline_s
        self._engine: Engine | None = None
        self._has_started = self._is_done = False

    def reset(self) -> str:
        assert not self._has_started, "an episode is used once: make a new one"
        self._has_started = True
        self._engine = ENGINES.borrow()
        request = {"op": "reset", "game": str(self.game), "has_planner": self._has_planner}
        return self._call(request, self._reset_deadline_s)["observation"]

    def step(self, action: str) -> Step:
        assert self._engine is not None and not self._is_done, "step needs reset() first and ends with done or close()"
        if len(action) > MAX_ACTION_CHARS:
            return Step("Nothing happens.", info=self._info(accepted=False))
        answer = self._call({"op": "step", "command": action}, self._step_deadline_s)
        self._is_done = answer["won"]
        info = self._info(accepted=answer["accepted"])
        return Step(answer["observation"], reward=float(self._is_done), done=self._is_done, info=info)

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            ENGINES.give_back(engine)

    def _call(self, request: dict[str, object], deadline_s: float) -> dict:
        answer = self._engine.call(request, deadline_s=deadline_s)
        self.admissible_commands, self.plan = answer["admissible"], answer["plan"]
        return answer

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


def task_of(game: str) -> Task:
    """The task of a game, given by its path below the root.

    Example: `train/pick_heat_then_place_in_recep-Apple-None-Shelf-12/trial_T1/game.tw-pddl`
    """
    parts = PurePosixPath(game).parts
    return Task(
        env="alfworld",
        task_id="/".join(parts[:-1]),
        split=parts[0],
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
