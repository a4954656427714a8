"""The one exception that a user is meant to read, and the entry points' way of showing it."""

import sys
from collections.abc import Callable

from ratlip import output

# What PyTorch's RuntimeErrors say where the machine, not the program, is at fault, and what helps.
BATCHES = "train.batch_size or eval.batch_size"
SMALLER = "lower {}, then model.imsize or model.nf; on GPUs try train.precision=bf16"
CPU = "can't allocate memory"
KILLED = "DataLoader worker (pid"
SHARED = (
    "no shared memory left for the processes that load images: lower data.num_workers (0 needs none), "
    "or give the container more (docker run --shm-size=8g)"
)
MACHINE = {
    "CUDA out of memory": f"the GPU's memory is full: {SMALLER}; nvidia-smi shows what else is on it",
    CPU: f"the memory is full: {SMALLER}",
    "shared memory": SHARED,
    "</torch_": SHARED,
    KILLED: "a process that loads images was killed, mostly for want of memory: lower data.num_workers",
}


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, shortened; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def line(error: BaseException, lower: str = BATCHES) -> str | None:
    """What a user can mend, in one line; None of anything else, which is a fault of the program.

    That is a UserError, want of memory, and a file or folder that cannot be written or read.

    Args:
        lower: settings that take less memory where there was not enough.
    """
    if isinstance(error, UserError):
        # From a worker process of a DataLoader it comes with that process's traceback above it.
        return (str(error).splitlines() or [""])[-1].removeprefix(f"{__name__}.{UserError.__name__}: ")
    if isinstance(error, MemoryError):
        return MACHINE[CPU].format(lower)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    advice = next((advice for sign, advice in MACHINE.items() if sign in str(error)), None)
    if isinstance(error, RuntimeError) and advice:
        # Likewise: the last line is what happened in the worker.
        said = first_line(RuntimeError(str(error).splitlines()[-1])) if "Original Traceback" in str(error) else None
        return f"{advice.format(lower)} ({said or first_line(error)})"
    return None


def run(main: Callable[[], None]) -> None:
    """Call an entry point; what a user can mend becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    Output that nobody reads, or that cannot be written, ends nothing.
    """
    with output.tolerant():
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(_fail("interrupted", 130))
        except Exception as error:
            if (said := line(error)) is None:
                raise
            sys.exit(_fail(f"error: {said}", 2))


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
