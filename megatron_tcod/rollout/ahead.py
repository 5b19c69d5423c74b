"""Plays the episodes of coming steps while earlier ones train, at most so many weight versions behind.

    ahead = CollectAhead(play, max_staleness=2, stop=250)         # play(step) is a coroutine: the step's episodes
    for step in range(start, 250):
        episodes = ahead.take(step)                               # the weights of `step` steps are published by now
        ...                                                       # train; publish the next weights, playing goes on
    ahead.close()

Step s begins to play when `take(s - max_staleness)` is called, so with weights of at least version s - max_staleness,
and is trained on at version s: no token is older than that, by construction and not by rejection. Where playing is
slower than training, `take` waits; nothing is started beyond the bound, so nothing piles up.

The coroutines share one thread. It publishes no weights and knows no ranks: `play` must not be collective.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

Played = TypeVar("Played")
STOP_POLL_S = 0.2
"""How often one who waits for episodes looks whether the run is to stop."""


class CollectAhead(Generic[Played]):
    """See the module docstring."""

    def __init__(self, play: Callable[[int], Coroutine[Any, Any, Played]], *, max_staleness: int, stop: int) -> None:
        """Steps from `stop` on are not played."""
        if max_staleness < 0:
            raise ValueError(f"max_staleness must be at least 0, got {max_staleness}")
        self._play, self._max_staleness, self._stop = play, max_staleness, stop
        self._started: dict[int, Future[Played]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="collect_ahead", daemon=True)
        self._thread.start()

    def take(self, step: int, *, is_stopping: Callable[[], bool] = lambda: False) -> Played | None:
        """What `play(step)` returned or raised; steps up to `step + max_staleness` have been started. None once
        `is_stopping` says so while it waits."""
        for coming in range(step, max(min(step + self._max_staleness + 1, self._stop), step + 1)):
            if coming not in self._started:
                self._started[coming] = asyncio.run_coroutine_threadsafe(self._play(coming), self._loop)
        played = self._started.pop(step)
        while not wait([played], timeout=STOP_POLL_S).done:
            if is_stopping():
                return None
        return played.result()

    def close(self) -> None:
        """Cancel what is under way and wait until it has cleaned up. Harmless when called again."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def play_unless(play: Coroutine[Any, Any, Played], is_stopping: Callable[[], bool]) -> Played | None:
    """What `play` returns or raises; None, and `play` is cancelled, once `is_stopping` says so."""
    task = asyncio.ensure_future(play)
    while not (await asyncio.wait([task], timeout=STOP_POLL_S))[0]:
        if is_stopping():
            task.cancel()
            await asyncio.wait([task])
            return None
    return task.result()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
