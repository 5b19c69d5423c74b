"""Signals that end a run in good order: the step in progress is finished, a checkpoint written, and a code returned.

    with StopSignals() as stop:
        for step in ...:
            ...
            if received := stop.agreed_signal():              # collective: all ranks stop after the same step
                save, and leave with EXIT_CODES[received]

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

logger = logging.getLogger(__name__)


class StopSignals:
    """Records the first of the signals while the block lasts; only in the main thread, elsewhere it does nothing."""

    def __init__(self) -> None:
        self._received, self._at = 0, 0.0
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
        logger.warning("%s: finishing this step, then saving", signal.Signals(number).name)

    def agreed_signal(self) -> signal.Signals | None:
        """A signal that any rank has received, the same on all; None to go on. Collective."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        most = torch.tensor([self._received], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return signal.Signals(int(most)) if int(most) else None
