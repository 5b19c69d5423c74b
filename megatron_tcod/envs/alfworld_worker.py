"""The process that holds ALFWorld's engine: one game at a time, requests on stdin, answers on stdout.

    python -P megatron_tcod/envs/alfworld_worker.py        # started by `alfworld_engine.py`, not by hand

A message is four bytes of length, big-endian, and that much UTF-8 JSON. Requests: `{"op": "reset", "game": PATH,
"has_planner": BOOL}` and `{"op": "step", "command": TEXT}`. Answers: `observation`, `accepted`, `won`, `admissible`
(sorted) and `plan` (the planner's next commands); or `error`.

Run by path and with `-P`: its own folder holds an `alfworld.py` that would hide the package of that name. It imports
nothing of this project, so a worker does not pay for torch. It ends when stdin closes, even in the middle of a call,
so a parent that is killed leaves nothing behind. The engine's C library prints to descriptor 1, hence the
answers go through a copy of it and descriptor 1 itself is turned to stderr.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import struct
import sys
import threading
import traceback
from typing import Any, BinaryIO

MEMORY_BYTES = 4 << 30
"""Address space of a worker; a game needs about 0.3 GB."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    games = Games()
    while True:
        request = requests.get()
        try:
            if request["op"] == "reset":
                answer = games.reset(request["game"], has_planner=request["has_planner"])
            else:
                answer = games.step(request["command"])
        except (Exception, SystemExit) as error:  # the planner's translator calls sys.exit on a game it cannot read
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        body = json.dumps(answer).encode()
        answers.write(struct.pack(">I", len(body)) + body)
        answers.flush()


def _listen(stdin: BinaryIO, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    while len(head := stdin.read(4)) == 4:
        requests.put(json.loads(stdin.read(struct.unpack(">I", head)[0])))
    os._exit(0)


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

    def reset(self, game: str, *, has_planner: bool) -> dict[str, Any]:
        if self._loaded != game:
            self._loaded = ""
            self._engine.load(game)
            self._loaded = game
        self._has_planner = self._infos.policy_commands = has_planner
        return self._answer(self._engine.reset(), accepted=True)

    def step(self, command: str) -> dict[str, Any]:
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


if __name__ == "__main__":
    main()
