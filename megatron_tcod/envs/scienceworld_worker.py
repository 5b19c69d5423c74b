"""The process behind `scienceworld.py`: the simulator's Java server, one task at a time. Run by `worker.py`.

Requests: `reset(task, variation, simplification, has_gold, shown)`, `step(command, shown)`. An answer
holds `observation`, `score` (0 to 1, negative once the task is lost), `completed`, `moves`, after a reset the
`task_description` and, when asked for, the `gold` path; `commands` are those that are `shown` (`none`, `templates` or
`admissible`), `objects` those that go into templates. `splits()` lists the variations of all task types.

The simulator draws from one global generator and lists objects in the order of Java's identity hashes, so that two plays
of the same commands part: other bees, other pea plants. Here the generator is seeded at each reset and the hash is
constant (`-XX:hashCode=2`): one command list, one text.
"""

from __future__ import annotations

import os
from typing import Any

JAVA_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:+UnlockExperimentalVMOptions",
    "-XX:hashCode=2",
)
"""One small heap and one collector: many of these run at once."""

SEED = 20220314
"""Of the simulator's generator; any will do as long as it stays."""


def open_world() -> World:
    return World()


class World:
    """The server, started once, and the task it plays."""

    def __init__(self) -> None:
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from scienceworld.constants import BASEPATH, JAR_PATH

        port, token, self._java = launch_gateway(
            classpath=JAR_PATH,
            javaopts=list(JAVA_OPTIONS),
            java_path=os.environ["SCIENCEWORLD_JAVA"],
            die_on_exit=True,
            enable_auth=True,
            cwd=BASEPATH,
            return_proc=True,
        )
        parameters = GatewayParameters(port=port, auth_token=token)
        jvm = JavaGateway(gateway_parameters=parameters, java_process=self._java).jvm
        self._server = jvm.scienceworld.runtime.pythonapi.PythonInterface()
        self._random = getattr(getattr(jvm.scala.util, "Random$"), "MODULE$")

    def reset(
        self, *, task: str, variation: int, simplification: str, has_gold: bool, shown: str
    ) -> dict[str, Any]:
        server, gold = self._server, []
        if has_gold:
            self._random.setSeed(SEED)
            server.load(task, variation, simplification, True)
            gold = list(server.getGoldActionSequence())
        self._random.setSeed(SEED)
        server.load(task, variation, simplification, False)
        self._random.setSeed(SEED)
        server.reset()
        answer = self._answer(server.step("look around"), shown)
        return {**answer, "task_description": server.getTaskDescription(), "gold": gold}

    def step(self, *, command: str, shown: str) -> dict[str, Any]:
        return self._answer(self._server.step(command), shown)

    def splits(self) -> dict[str, Any]:
        """Variations of each split of each task type, in the simulator's order."""
        splits = {}
        for task in self._server.getTaskNames():
            self._server.load(task, 0, "", False)
            splits[task] = {
                "train": list(self._server.getVariationsTrain()),
                "dev": list(self._server.getVariationsDev()),
                "test": list(self._server.getVariationsTest()),
            }
        return {"splits": splits}

    def _answer(self, observation: str, shown: str) -> dict[str, Any]:
        server = self._server
        commands = {
            "none": list,
            "templates": server.getPossibleActions,
            "admissible": server.getValidActionObjectCombinations,
        }
        return {
            "observation": observation,
            "score": server.getScore(),
            "completed": server.getCompleted(),
            "moves": server.getNumMoves(),
            "commands": sorted(commands[shown]()),
            "objects": sorted(server.getPossibleObjects()) if shown == "templates" else [],
        }
