"""A little game served by openenv-core itself: `python openenv_server.py sessions|stateless`, in a Python that has it.

A target is drawn from the seed; `add N` adds to a sum, which must come to the target. `sessions` is an environment as OpenEnv
means it, one object a WebSocket. `stateless` keeps its episodes by `episode_id`, so that it can be played over HTTP.
Prints its port. It imports nothing of this project.
"""

import socket
import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Say(Action):
    message: str


class Page(Observation):
    prompt: str
    understood: bool = True
    total: int = 0


class Sums(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._total = self._target = 0

    def reset(self, seed=None, episode_id=None, **more):
        self._total, self._target = 0, 5 + seed % 7
        return Page(prompt=f"Come to {self._target}.")

    def step(self, action, timeout_s=None, **more):
        words = action.message.split()
        if action.message == "raise":
            raise RuntimeError("the game is broken")
        understood = len(words) == 2 and words[0] == "add" and words[1].isdigit()
        self._total += int(words[1]) if understood else 0
        done = self._total >= self._target
        reward = float(self._total == self._target) if done else None
        return Page(prompt=f"Sum {self._total}.", understood=understood, total=self._total, done=done, reward=reward)

    @property
    def state(self):
        return State(step_count=0)


class KeptSums(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True
    games = {}

    def reset(self, seed=None, episode_id=None, **more):
        self.games[episode_id] = Sums()
        return self.games[episode_id].reset(seed=seed)

    def step(self, action, timeout_s=None, episode_id=None, **more):
        return self.games[episode_id].step(action)

    @property
    def state(self):
        return State(step_count=0)


if __name__ == "__main__":
    app = create_fastapi_app({"sessions": Sums, "stateless": KeptSums}[sys.argv[1]], Say, Page, max_concurrent_envs=4)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_level="warning", ws_ping_interval=4.0, ws_ping_timeout=4.0)
    uvicorn.Server(config).run(sockets=[listener])
