"""The one exception that a user is meant to read, and the entry points' way of showing it."""

import io
import sys
from collections.abc import Callable

# What PyTorch's RuntimeErrors say where the machine, not the program, is at fault, and what helps.
SMALLER = "lower train.batch_size or eval.batch_size, then model.imsize or model.nf; on GPUs try train.precision=bf16"
CPU = "can't allocate memory"
MACHINE = {
    "CUDA out of memory": f"the GPU's memory is full: {SMALLER}; nvidia-smi shows what else is on it",
    CPU: f"the memory is full: {SMALLER}",
    "shared memory": "no shared memory left for the processes that load images: lower data.num_workers (0 needs none), "
    "or give the container more (docker run --shm-size=8g)",
    "DataLoader worker": "a process that loads images was killed, mostly for want of memory: lower data.num_workers",
}


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do, in one line."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, shortened; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def run(main: Callable[[], None]) -> None:
    """Call an entry point; what a user can mend becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    That is a UserError, want of memory, and a file or folder that cannot be written or read.
    """
    for stream in (sys.stdout, sys.stderr):  # names and captions that a terminal cannot show are no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        # From a worker process of a DataLoader it comes with that process's traceback above it.
        line = str(error).splitlines()[-1].removeprefix(f"{__name__}.{UserError.__name__}: ")
        sys.exit(_fail(f"error: {line}", 2))
    except RuntimeError as error:
        advice = next((advice for sign, advice in MACHINE.items() if sign in str(error)), None)
        if advice is None:
            raise
        sys.exit(_fail(f"error: {advice} ({first_line(error)})", 2))
    except MemoryError:
        sys.exit(_fail(f"error: {MACHINE[CPU]}", 2))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(_fail(f"error: {error.filename}: {error.strerror}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
