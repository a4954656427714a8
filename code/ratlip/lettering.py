"""Text in pictures, in any script that a font of this machine has: which font, where lines break, and drawing them."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont, features

from ratlip import distributed

SIZE = 10  # pixels of DejaVu Sans, which comes with matplotlib: legible when small, with the letters of most alphabets
OTHER_SIZE = 12  # of other fonts: their scripts have more strokes in a letter
LINE_HEIGHT = 14  # pixels from line to line, at least
ASCENT = 10  # pixels from the top of a line of DejaVu Sans to its baseline
PLAIN = ("Sans", "Regular")  # in the name of a font that is to be preferred
STYLED = ("Bold", "Black", "Light", "Thin", "Medium", "Italic", "Oblique", "Condensed", "Mono", "Serif", "UI")
RIGHT_TO_LEFT = ("R", "AL")  # Unicode's directions of Hebrew and Arabic letters
told: set[str] = set()  # what has been said of fonts in this process


class Line(NamedTuple):
    """A line of text as it is drawn: its runs of one font each, from left to right, and its height in pixels."""

    runs: list[tuple[str, ImageFont.FreeTypeFont]]
    ascent: int
    height: int


def width_of(text: str) -> float:
    """Pixels that a line takes."""
    return sum(font.getlength(run) for run, font in _runs(text))


def wrap(text: str, width: int) -> list[Line]:
    """Lines of at most `width` pixels. A word that is wider than that is broken; between characters of Chinese,
    Japanese and the like a line may end anywhere. What no font here can show is said once."""
    _say_missing(text)
    lines = [""]
    for word in text.split():
        for number, piece in enumerate(_pieces(word)):
            joint = " " if lines[-1] and number == 0 else ""
            if width_of(lines[-1] + joint + piece) <= width:
                lines[-1] += joint + piece
                continue
            if lines[-1]:
                lines.append("")
            for cluster in _clusters(piece):
                if lines[-1] and width_of(lines[-1] + cluster) > width:
                    lines.append("")
                lines[-1] += cluster
    return [_line(line) for line in lines]


def write(draw: ImageDraw.ImageDraw, lines: Sequence[Line], x: float, y: float) -> None:
    """Draw lines in black, the upper left corner of the first at (x, y)."""
    for line in lines:
        left = x
        for run, font in line.runs:
            draw.text((left, y + line.ascent), run, "black", font=font, anchor="ls")
            left += font.getlength(run)
        y += line.height


def height_of(lines: Iterable[Line]) -> int:
    """Pixels that lines take below each other."""
    return sum(line.height for line in lines)


def _line(text: str) -> Line:
    runs = _runs(text)
    others = [font.getmetrics() for _, font in runs if font is not _plain()]  # (ascent, descent) in pixels
    ascent = max([ASCENT, *(above for above, _ in others)])
    below = max([LINE_HEIGHT - ASCENT, *(descent for _, descent in others)])
    if next((kind for kind in map(unicodedata.bidirectional, text) if kind in ("L", *RIGHT_TO_LEFT)), "L") != "L":
        runs = runs[::-1]  # within a run Pillow orders the letters
    return Line(runs, ascent, ascent + below)


def _pieces(word: str) -> list[str]:
    """A word cut where a line may end: around each wide character, but not before its closing punctuation."""
    pieces: list[str] = []
    for cluster in _clusters(word):
        wide = unicodedata.east_asian_width(cluster[0]) in "WF"
        closing = unicodedata.category(cluster[0]) in ("Pe", "Pf", "Po")
        apart = wide or pieces and unicodedata.east_asian_width(pieces[-1][-1]) in "WF"
        if pieces and (closing or not apart):
            pieces[-1] += cluster
        else:
            pieces.append(cluster)
    return pieces


def _clusters(text: str) -> list[str]:
    """Letters with the marks that belong to them, between which a line is never broken."""
    clusters: list[str] = []
    for letter in text:
        joined = unicodedata.category(letter)[0] == "M" or _leaves_no_ink(letter)
        if clusters and (joined or clusters[-1][-1] == "\u200d"):
            clusters[-1] += letter
        else:
            clusters.append(letter)
    return clusters


def _runs(text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """Pieces of a text that one font shows, in order: words whole where one font has all of their letters."""
    runs: list[tuple[str, ImageFont.FreeTypeFont]] = []
    for word in re.findall(r"\s+|\S+", text):
        font = _font_of(word)
        pieces = [(word, font)] if font else [(letter, _font_of(letter) or _plain()) for letter in _clusters(word)]
        for piece, own in pieces:
            if runs and (piece.isspace() or runs[-1][1] is own):
                runs[-1] = runs[-1][0] + piece, runs[-1][1]
            else:
                runs.append((piece, own))
    return runs


def _leaves_no_ink(letter: str) -> bool:
    """Spaces, joiners, variation selectors: fonts need not have them."""
    return letter.isspace() or unicodedata.category(letter) in ("Cf", "Cc") or "\ufe00" <= letter <= "\ufe0f"


@cache
def _plain() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), SIZE)


@cache
def _plain_letters() -> frozenset[int]:
    return _letters_of(_plain().path)


@lru_cache(10_000)
def _font_of(text: str) -> ImageFont.FreeTypeFont | None:
    """The font that has every letter of a text: DejaVu Sans, else the first of this machine's; None where none has."""
    letters = {ord(letter) for letter in text if not _leaves_no_ink(letter)}
    if letters <= _plain_letters():
        return _plain()
    return next((font for path, own in _coverage() if letters <= own and (font := _opened(path))), None)


@cache
def _coverage() -> list[tuple[str, frozenset[int]]]:
    """The fonts of this machine that have letters which DejaVu Sans has not, and all of their letters."""
    found = [(path, _letters_of(path)) for path in _system_fonts()]
    return [(path, letters) for path, letters in found if letters - _plain_letters()]


def _letters_of(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a damaged font, or one of a kind that FreeType does not read
        return frozenset()


@cache
def _opened(path: str) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(path, OTHER_SIZE)
    except OSError:  # a font of pictures in one large size, such as those of coloured emoji
        return None


def _system_fonts() -> list[str]:
    """The fonts of this machine, plain ones first."""

    def order(path: str) -> tuple[int, str]:
        name = Path(path).stem
        return sum(word in name for word in STYLED) - sum(word in name for word in PLAIN), path

    return sorted(font_manager.findSystemFonts(), key=order)


def _say_missing(text: str) -> None:
    """Say once of each script that no font here shows it, or that its letters cannot be joined as they should be."""
    missing: dict[str, list[str]] = {}
    for letter in dict.fromkeys(text):
        if _font_of(letter) is None:
            missing.setdefault(unicodedata.name(letter, "UNKNOWN").split()[0], []).append(letter)  # mostly its script
    for script, letters in missing.items():
        if script not in told:
            package = "fonts-noto-cjk" if script in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL") else "fonts-noto-core"
            distributed.say(
                f"no font here has {script} characters such as {''.join(letters[:5])!r}: grids show boxes in their "
                f"place; install a font (on Debian: apt-get install {package})"
            )
    told.update(missing)
    joined = any(
        unicodedata.bidirectional(each) in RIGHT_TO_LEFT or unicodedata.category(each) == "Mc" for each in text
    )
    if joined and "raqm" not in told and not features.check("raqm"):
        told.add("raqm")
        distributed.say(
            "Pillow finds no FriBiDi here: in grids, scripts that run from right to left or join their letters "
            "are drawn letter by letter (on Debian: apt-get install libfribidi0)"
        )
