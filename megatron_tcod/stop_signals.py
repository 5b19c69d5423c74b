"""Signals that end a run in good order: a checkpoint is written and a code returned.

    with StopSignals(store) as stop:
        for step in ...:
            stop.check()                                      # collective: raises Stopped on all ranks, or on none
            ...
            if received := stop.agreed_signal():              # collective too
                save, and leave with EXIT_CODES[received]

Episodes that are being played when a signal comes are given up, and the step with them: no weight was changed, and a
resumed run plays them again. A step that trains already is finished. Ranks that play hear through the store of a signal
that another one got: where one node is drained, the others need not play to the end first.

    SIGTERM   143   stopped; the same command goes on where it was
    SIGUSR1    75   stopped to be started again: what a batch script requeues on (BSD's EX_TEMPFAIL)
    SIGINT    130   stopped by Ctrl-C

The same signal often comes twice, from the batch system or the terminal and from the launcher that passes it on: only
Ctrl-C some seconds after the first signal ends the process at once. A launcher may replace the
code with its own (torchrun returns 1 whenever a worker returns anything but 0), so the run also leaves `stopped.json`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}
IMPATIENT_SECONDS = 2.0
LOOK_SECONDS = 2.0
"""How often a rank that plays looks for other ranks' signals."""
STORE_KEY = "signal"

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal ends the run; what was being played is given up."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received


class StopSignals:
    """Records the first of the signals while the block lasts; only in the main thread, elsewhere it does nothing.

    `store` is shared with the other ranks, None in a world of one.
    """

    def __init__(self, store: dist.Store | None = None) -> None:
        self._received, self._at = 0, 0.0
        self._store, self._is_told, self._looked = store, False, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            if number == signal.SIGINT and time.monotonic() - self._at > IMPATIENT_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._received, self._at = number, time.monotonic()
        logger.warning("%s: giving up what is played, finishing what trains, then saving", signal.Signals(number).name)

    @property
    def is_received(self) -> bool:
        """Whether this rank has received a signal, or has heard that another one has."""
        if self._store is not None and not self._is_told:
            self._exchange(self._store)
        return bool(self._received)

    def _exchange(self, store: dist.Store) -> None:
        """Tell the others of a signal, or look whether there is one to hear of."""
        now = time.monotonic()
        if self._received:
            store.set(STORE_KEY, str(int(self._received)))
            self._is_told = True
        elif now - self._looked > LOOK_SECONDS:
            self._looked = now
            if store.check([STORE_KEY]):
                self._received, self._at, self._is_told = int(store.get(STORE_KEY)), now, True

    def check(self) -> None:
        """Raise Stopped on all ranks where one has received a signal. Collective."""
        if (received := self.agreed_signal()) is not None:
            raise Stopped(received)

    def agreed_signal(self) -> signal.Signals | None:
        """A signal that any rank has received, the same on all; None to go on. Collective."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        most = torch.tensor([self._received], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return signal.Signals(int(most)) if int(most) else None
