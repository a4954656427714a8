"""The one exception that a user is meant to read, and the entry points' way of showing it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do, in one line."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, shortened; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def run(main: Callable[[], None]) -> None:
    """Call an entry point; a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        # From a worker process of a DataLoader it comes with that process's traceback above it.
        line = str(error).splitlines()[-1].removeprefix(f"{__name__}.{UserError.__name__}: ")
        sys.exit(_fail(f"error: {line}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
