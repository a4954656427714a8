"""Leaving a run in good order: signals and the time limit become a question that the training loop asks each step."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ratlip import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # USR1: what SLURM is told to send before its limit


class Stopped(Exception):
    """Leave the loop and save: it was asked to, or a signal came in the midst of long work that it could drop."""


class Stop:
    """Whether the run has been asked to end, and by what.

    A first signal only leaves a note, so that the step under way is finished; a second Ctrl-C leaves at once.

    Args:
        max_hours: time limit; 0: none. since: when its time began (`time.time()`); None: now.
    """

    def __init__(self, max_hours: float = 0.0, since: float | None = None):
        self.until = (since or time.time()) + 3600 * max_hours if max_hours else float("inf")
        self.cause: str | None = None
        self._at_once = False
        self._former = {number: signal.signal(number, self._note) for number in SIGNALS}

    def asked(self) -> bool:
        """Whether to save and leave now."""
        if self.cause is None and time.time() > self.until:
            self.cause = "train.max_hours"
        return self.cause is not None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around long work that changes nothing in the training: a signal raises Stopped inside.

        Not with several processes, which could then wait for each other: there the work is finished first.
        """
        self._at_once = distributed.world_size() == 1
        try:
            if self._at_once and self.cause:
                raise Stopped(self.cause)
            yield
        finally:
            self._at_once = False

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.cause == "SIGINT":
            raise KeyboardInterrupt
        self.cause = signal.Signals(number).name
        if self._at_once:
            raise Stopped(self.cause)


def ignore_signals(_: int = 0) -> None:
    """For processes that decode images: they end with the training, not before it (a terminal's Ctrl-C reaches all)."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
