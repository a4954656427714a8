"""Paths as people write them: `~`, $VARIABLES, and relative to the folder that they were written for."""

import os
import re
import shlex
from pathlib import Path

from ratlip.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # of the repository; what is relative in a YAML file is meant from here
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")  # not the braces of shards: {00000..00331}


def expand(text: str, where: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` replaced; none of them ever becomes a folder's name.

    Args:
        where: the setting or option, for messages.

    Raises:
        UserError: a variable that is not set, nobody's home folder, or what an earlier version, which expanded
            nothing, has left below a folder of that very name.
    """

    def value(found: re.Match) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):  # an empty one would make /saved of $SCRATCH/saved
            raise UserError(f"{where}: {text}: the environment variable {name} is not set; export it, or give the path")
        return os.environ[name]

    expanded = os.path.expanduser(VARIABLE.sub(value, text))
    if expanded.startswith("~"):
        name = expanded.split("/")[0]
        raise UserError(f"{where}: {text}: no home folder {name}; a file of that name is ./{name}")
    literal = ROOT / text
    if text != expanded and literal.exists() and not Path(expanded).exists():
        raise UserError(
            f"{where}: {text} is {expanded}, where nothing is; earlier versions took the name as it stands: "
            f"move {literal} there, or away"
        )
    return expanded


def typed(text: str) -> Path:
    """What stands for a path on the command line; it is relative to the folder that the command was called from."""
    return Path(expand(text, "command line"))


def usable(path: str | Path, base: Path = ROOT) -> str:
    """A path that was written for the folder `base`, as it is used and shown where the program was called: relative
    to that folder where it lies below it, else in full."""
    path, here = base / path, Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def full(path: str | Path) -> Path:
    """The path from the root of the file system, for messages and for keeping."""
    path = Path.cwd() / path
    tidy = Path(os.path.normpath(path))
    return tidy if tidy.resolve() == path.resolve() else path  # ".." behind a link leads elsewhere


def portable(path: str | Path) -> str:
    """The path as it means the same from any folder: relative to the repository inside it, else in full."""
    path = full(path)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def command(script: str) -> str:
    """How to call one of the scripts from where the program was called: "bash scripts/train.sh"."""
    return f"bash {shlex.quote(usable(f'scripts/{script}'))}"
