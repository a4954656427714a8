"""Leaving a run in good order: signals and the time limit become a question that the training loop asks each step."""

import multiprocessing
import multiprocessing.queues
import os
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ratlip import distributed
from ratlip.errors import KILLED, MACHINE, UserError, first_line

# USR1: what SLURM is told to send before its limit; HUP: a terminal that closes, a connection that breaks.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LONGEST = 1800  # seconds to wait for a batch; less than the processes wait for each other

Thing = TypeVar("Thing")


class Stopped(BaseException):
    """Leave the loop and save: it was asked to, or a signal came in the midst of long work that it could drop.

    No Exception: it may come up anywhere in that work, also where a library looks after exceptions of its own.
    """


class Stop:
    """Whether the run has been asked to end, and by what.

    A first signal only leaves a note, so that the step under way is finished; a second Ctrl-C leaves at once.
    SIGHUP stays ignored where it is, which is what nohup does.

    Args:
        max_hours: time limit; 0: none. since: when its time began (`time.time()`); None: now.
    """

    def __init__(self, max_hours: float = 0.0, since: float | None = None):
        self.until = (since or time.time()) + 3600 * max_hours if max_hours else float("inf")
        self.cause: str | None = None
        self._at_once = False
        noted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._former = {number: signal.signal(number, self._note) for number in noted}
        self._former[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._late)

    def asked(self) -> bool:
        """Whether to save and leave now."""
        if self.cause is None and time.time() > self.until:
            self.cause = "train.max_hours"
        return self.cause is not None

    @contextmanager
    def at_once(self, together: bool = False) -> Iterator[None]:
        """Around long work that changes nothing in the training: a signal raises Stopped inside.

        together: in which processes wait for each other; where there are several it is finished first.
        """
        self._at_once = not together or distributed.world_size() == 1
        try:
            if self._at_once and self.cause:
                raise Stopped(self.cause)
            yield
        finally:
            self._at_once = False

    def arriving(self, batches: Iterable[Thing]) -> Iterator[Thing]:
        """What a loader yields. The wait for it ends with a signal (Stopped), or after LONGEST (UserError)."""
        with self._waiting():
            left = iter(batches)
        # PyTorch's handler raises wherever the program is, in the midst of a step too. While it waits, it looks
        # after the processes that load by itself.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            with self._waiting():
                batch = next(left, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            with self.at_once():
                signal.alarm(LONGEST)
                yield
        except Stopped:
            if self.cause is None:
                minutes = LONGEST // 60
                raise UserError(f"no picture came for {minutes} minutes: does the disk of data.dir answer?") from None
            raise
        except (ConnectionError, EOFError) as error:  # in the midst of handing over
            raise UserError(f"{MACHINE[KILLED]} ({first_line(error)})") from None
        finally:
            signal.alarm(0)

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

    def _late(self, number: int, frame: object) -> None:
        if self._at_once:
            raise Stopped


def begin_worker(_: int = 0) -> None:
    """How a process that loads pictures begins (`worker_init_fn`).

    It ends with the training, not before it (a terminal's Ctrl-C and hangup reach all), and when it cannot send
    what it has loaded, for which the training would wait for ever.
    """
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_give_up)


def _give_up(error: Exception, _: object) -> None:
    traceback.print_exception(error)
    os._exit(1)


def end_workers() -> None:
    """End processes that load pictures and may be waiting for a disk, which nobody waits for any more."""
    for worker in multiprocessing.active_children():
        worker.kill()


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
