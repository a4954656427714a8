"""Command lines: an option that is not there is an error with the nearest, never a caption or a checkpoint."""

import argparse
import difflib
import re
import sys

from ratlip.errors import UserError


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The options and words of this process's command line; and those after `--`, which are neither options nor
    settings whatever they look like.

    Raises:
        UserError: a word before `--` that begins with a dash and is no option.
    """
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    arguments, unknown = parser.parse_known_intermixed_args(given[:end])
    words = [word for value in vars(arguments).values() if isinstance(value, list) for word in value]
    unknown += [word for word in words if word.startswith("-")]  # argparse takes what has a space in it for a word
    if unknown:
        known = [f"--{name}" for name in options(parser)]
        name = re.match(r"-*([A-Za-z-]*)", unknown[0])[1].lower()
        near = name and difflib.get_close_matches(f"--{name}", known, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"unknown option {unknown[0]!r}; {hint} (what is no option stands after --)")
    return arguments, given[end + 1 :]


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The two words of a program that a configuration drives: its file and what is stronger than that."""
    parser.add_argument(
        "config", help="a YAML file such as cfg/demo.yml, or a run's folder; cfg/default.yml explains every key"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings stronger than the file's"
    )


def options(parser: argparse.ArgumentParser) -> list[str]:
    """The names of a parser's options, without their dashes."""
    return [action.dest for action in parser._actions if action.option_strings]
