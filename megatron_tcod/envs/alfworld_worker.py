"""The process behind `alfworld.py`: ALFWorld's engine, one game at a time. Run by `worker.py`.

Requests: `reset(game, has_planner)` with the path of a game file, `step(command)`. An answer holds `observation`,
`accepted`, `won`, `admissible` (sorted) and `plan` (the planner's next commands).
"""

from __future__ import annotations

from typing import Any


def open_world() -> Games:
    return Games()


class Games:
    """The engine behind ALFWorld's own wrappers. Playing the game that was played last again skips loading it."""

    def __init__(self) -> None:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
        from textworld.envs import PddlEnv

        self._infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
        self._engine = AlfredInfos(AlfredDemangler(PddlEnv(self._infos), shuffle=False))
        self._loaded = ""
        self._has_planner = False
        self._admissible: list[str] = []
        self._plan: list[str] = []

    def reset(self, *, game: str, has_planner: bool) -> dict[str, Any]:
        if self._loaded != game:
            self._loaded = ""
            self._engine.load(game)
            self._loaded = game
        self._has_planner = self._infos.policy_commands = has_planner
        return self._answer(self._engine.reset(), accepted=True)

    def step(self, *, command: str) -> dict[str, Any]:
        """A plan is followed, not made anew, while its commands are played: planning can take seconds."""
        self._infos.policy_commands = self._has_planner and self._plan[:1] != [command]
        accepted = command.strip() in self._admissible
        state, _, _ = self._engine.step(command)
        return self._answer(state, accepted=accepted)

    def _answer(self, state: Any, *, accepted: bool) -> dict[str, Any]:
        self._admissible = list(state["admissible_commands"])
        self._plan = list(state["policy_commands"]) if self._infos.policy_commands else self._plan[1:]
        return {
            "observation": state["feedback"],
            "accepted": accepted,
            "won": bool(state["won"]),
            "admissible": self._admissible,
            "plan": self._plan if self._has_planner else [],
        }
