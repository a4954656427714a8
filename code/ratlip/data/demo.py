"""The procedural demo data set: 64x64 pictures of one coloured shape, their captions, and parsing those."""

import os
import re
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

SIDE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")
COLOURS = ("red", "orange", "green", "blue", "purple", "pink", "brown", "cyan")
SIZES = ("small", "large")
POSITIONS = (
    "top left", "top centre", "top right",
    "centre left", "centre", "centre right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
BACKGROUNDS = ("white", "black", "grey", "yellow")

# RGB levels of 255. Any two differ by 100 or more (Euclidean): jitter and a little noise never confuse them.
COLOUR_RGB = np.array(
    [(215, 25, 35), (255, 125, 0), (15, 145, 50), (25, 65, 235),
     (145, 35, 200), (255, 125, 205), (120, 60, 15), (0, 205, 225)], np.float32,
)  # fmt: skip
BACKGROUND_RGB = np.array([(245, 245, 245), (15, 15, 15), (140, 140, 140), (250, 230, 80)], np.float32)
RADII = np.array([8.0, 12.5], np.float32)  # pixels, one per size
CELLS = np.array([16.0, 32.0, 48.0], np.float32)  # pixels, centres of the columns and of the rows

CAPTIONS_PER_PICTURE = 5
TEST_COMBINATIONS, TRAIN_COMBINATIONS = 500, 4000


class Attributes(NamedTuple):
    """What one picture shows: indices into SHAPES, COLOURS, SIZES, POSITIONS and BACKGROUNDS."""

    shape: int
    colour: int
    size: int
    position: int
    background: int


VALUES = Attributes(SHAPES, COLOURS, SIZES, POSITIONS, BACKGROUNDS)  # the canonical words, field by field

# What captions may say instead; the first word of each is the canonical one.
SYNONYMS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "diamond": ("diamond", "rhombus"),
    "ring": ("ring", "donut"),
    "cross": ("cross", "plus"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "grey": ("grey", "gray"),
    "small": ("small", "tiny", "little"),
    "large": ("large", "big", "huge"),
}
PLACES = {
    "top left": ("at the top left", "in the upper left", "in the top-left corner"),
    "top centre": ("at the top centre", "at the top", "in the upper middle", "at the top center"),
    "top right": ("at the top right", "in the upper right", "in the top-right corner"),
    "centre left": ("at the centre left", "on the left", "at the middle left", "at the center left"),
    "centre": ("in the centre", "in the middle", "at the centre", "in the center"),
    "centre right": ("at the centre right", "on the right", "at the middle right", "at the center right"),
    "bottom left": ("at the bottom left", "in the lower left", "in the bottom-left corner"),
    "bottom centre": ("at the bottom centre", "at the bottom", "in the lower middle", "at the bottom center"),
    "bottom right": ("at the bottom right", "in the lower right", "in the bottom-right corner"),
}
TEMPLATES = (
    "a {size} {colour} {shape} {position} on a {background} background",
    "a {background} background with a {size} {colour} {shape} {position}",
    "on a {background} background, a {size} {colour} {shape} {position}",
    "{position} there is a {size} {colour} {shape} on a {background} background",
    "a {colour} {shape}, {size}, {position} of a {background} picture",
    "a {shape} that is {colour} and {size}, {position}, on {background}",
    "{position} of a {background} background, one {size} {shape} in {colour}",
    "the {shape} is {size} and {colour}, {position}, and the background is {background}",
)


def shape_mask(shape: np.ndarray, cx: np.ndarray, cy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Draw anti-aliased shapes.

    shape: integers indexing SHAPES; cx, cy: centre of the shape's bounding box in pixels, x to the right, y
    down, the picture's corners at 0 and 64; radius: pixels, about half the shape's extent (at most 1.05 times
    that). The four broadcast to (N,). Returns (N, 64, 64) float32 coverage in [0, 1], rows first.
    Raises ValueError if a shape index is out of range.
    """
    shape, cx, cy, radius = np.broadcast_arrays(np.atleast_1d(shape), cx, cy, radius)
    if shape.size and not (0 <= shape.min() and shape.max() < len(SHAPES)):
        raise ValueError(f"shape index outside 0..{len(SHAPES) - 1}: {shape.min()}..{shape.max()}")
    mask = np.empty((len(shape), SIDE, SIDE), np.float32)
    pixel = np.arange(SIDE, dtype=np.float32) + 0.5
    for index in np.unique(shape):
        rows = np.flatnonzero(shape == index)
        r = radius[rows].astype(np.float32)[:, None, None]
        x = (pixel - cx[rows, None].astype(np.float32))[:, None, :] / r
        y = (pixel - cy[rows, None].astype(np.float32))[:, :, None] / r
        mask[rows] = np.clip(0.5 - shape_distance(SHAPES[index], x, y) * r, 0, 1)
    return mask


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) from (x, y), y down, to the shape of radius 1 centred at the origin.

    The sizes are chosen so that all shapes look equally large and fit a box of half-width 1.05.
    """
    if shape == "circle":
        return np.hypot(x, y) - 0.93
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.83
    if shape == "triangle":  # equilateral, circumradius 1.2
        return np.maximum(0.866 * np.abs(x) - 0.5 * (y - 0.3), y - 0.3) - 0.6
    if shape == "star":  # five points; folding leaves half of one point, bounded by one straight edge
        outer, inner = 1.1, 0.5
        angle = np.arctan2(x, -(y - 0.105))
        angle = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        length = np.hypot(x, y - 0.105)
        edge_x, edge_y = inner * np.sin(np.pi / 5), inner * np.cos(np.pi / 5) - outer
        norm = np.hypot(edge_x, edge_y)
        return (-edge_y * length * np.sin(angle) + edge_x * (length * np.cos(angle) - outer)) / norm
    if shape == "heart":  # two discs on the upper sides of a square that stands on its corner
        x, y = np.abs(x) / 1.7, 0.552 - y / 1.7
        lobe = np.hypot(x - 0.25, y - 0.75) - 0.3536
        inside = np.maximum(x + y - 1, x - y) * 0.7071
        return np.minimum(lobe, inside) * 1.7
    if shape == "diamond":
        width, height = 0.8, 1.05
        return (np.abs(x) * height + np.abs(y) * width - width * height) / np.hypot(width, height)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.25
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - 0.34), np.maximum(x - 0.34, y - 1))  # cross


def render(attributes: Sequence[Attributes], rng: np.random.Generator) -> np.ndarray:
    """Draw one picture for each of N attribute tuples.

    Position varies by up to 1.5 pixels, radius by 4 %, the two colours by 4 levels of 255 a channel.
    Returns (N, 64, 64, 3) uint8 RGB, rows first.
    """
    shape, colour, size, position, background = np.asarray(attributes, np.int64).reshape(-1, 5).T
    count = len(shape)
    cx = CELLS[position % 3] + rng.uniform(-1.5, 1.5, count)
    cy = CELLS[position // 3] + rng.uniform(-1.5, 1.5, count)
    radius = RADII[size] * rng.uniform(0.96, 1.04, count)
    front = COLOUR_RGB[colour] + rng.integers(-4, 5, (count, 3))
    back = BACKGROUND_RGB[background] + rng.integers(-4, 5, (count, 3))
    front, back = (np.clip(c, 0, 255).astype(np.float32)[:, None, None] for c in (front, back))
    mask = shape_mask(shape, cx, cy, radius)[..., None]
    return (back + mask * (front - back) + 0.5).astype(np.uint8)


def captions(attributes: Attributes, rng: np.random.Generator, count: int) -> list[str]:
    """Describe one picture `count` times; every caption states all five attributes.

    Templates repeat only after each was used once; words are drawn from the synonyms.
    """
    values = [words[i] for words, i in zip(VALUES, attributes, strict=True)]
    choices = {field: _words(value) for field, value in zip(Attributes._fields, values, strict=True)}
    order = rng.permutation(len(TEMPLATES))
    lines = []
    for i in range(count):
        chosen = {field: words[rng.integers(len(words))] for field, words in choices.items()}
        line = TEMPLATES[order[i % len(order)]].format(**chosen)
        lines.append(re.sub(r"\ba (?=[aeiou])", "an ", line))
    return lines


def _words(value: str) -> tuple[str, ...]:
    return PLACES.get(value) or SYNONYMS.get(value, (value,))


def parse_caption(caption: str) -> Attributes:
    """Read the five attributes back from a caption in free word order, upper or lower case.

    A background colour counts only beside words that make it one ("on a yellow background").
    Raises ValueError, naming the attribute, if one is missing or named twice with different values.
    """
    text = " ".join(re.findall(r"[a-z]+", caption.lower()))
    back = _any_of(BACKGROUNDS)
    ground = r"(?:background|backdrop|picture|canvas)"
    phrases = (rf"{back} {ground}", rf"{ground} (?:is |of |in )?{back}", rf"(?:on|against) (?:an? )?{back}")
    phrase = rf"\b(?:{'|'.join(phrases)})\b"
    backgrounds = " ".join(match.group() for match in re.finditer(phrase, text))
    rest = re.sub(phrase, " ", text)  # so that what is left names colours of the object only
    return Attributes(
        shape=_one(caption, "shape", SHAPES, rest),
        colour=_one(caption, "colour", COLOURS, rest),
        size=_one(caption, "size", SIZES, rest),
        position=_place(caption, rest),
        background=_one(caption, "background", BACKGROUNDS, backgrounds),
    )


def _any_of(values: Sequence[str]) -> str:
    return "(?:" + "|".join(word for value in values for word in _words(value)) + ")"


def _one(caption: str, field: str, values: Sequence[str], text: str) -> int:
    found = [i for i, value in enumerate(values) if re.search(rf"\b{_any_of((value,))}\b", text)]
    if len(found) != 1:
        several = ", ".join(values[i] for i in found)
        problem = f"more than one {field} ({several})" if found else f"no {field} found"
        raise ValueError(f"{problem} in caption {caption!r}; a {field} is one of: {', '.join(values)}")
    return found[0]


def _place(caption: str, text: str) -> int:
    named = set(re.findall(r"\b(?:top|upper|bottom|lower|left|right|middle|centre|center)\b", text))
    rows = {0: named & {"top", "upper"}, 2: named & {"bottom", "lower"}}
    columns = {0: named & {"left"}, 2: named & {"right"}}
    if not named or all(rows.values()) or all(columns.values()):
        problem = "more than one position" if named else "no position found"
        raise ValueError(f"{problem} in caption {caption!r}; a position is one of: {', '.join(POSITIONS)}")
    row, column = (next((i for i, words in axis.items() if words), 1) for axis in (rows, columns))
    return 3 * row + column


def splits() -> tuple[list[Attributes], list[Attributes]]:
    """Return the 4,000 training and 500 test combinations: always the same, all distinct, disjoint."""
    combinations = [Attributes(*c) for c in product(*(range(len(values)) for values in VALUES))]
    order = np.random.default_rng(2405).permutation(len(combinations))
    shuffled = [combinations[i] for i in order]
    return shuffled[TEST_COMBINATIONS:][:TRAIN_COMBINATIONS], shuffled[:TEST_COMBINATIONS]


def write(root: Path) -> None:
    """Write the data set to `root` in the "folder" layout; do nothing if `root` is there.

    Makes root/images/{train,test}/NNNNN.png, root/text/{train,test}/NNNNN.txt (five captions, one a line) and
    root/{train,test}.txt (keys such as "train/00017"), the same each time. All is written beside `root` and
    renamed last, so that an interruption leaves no half-made data set.
    """
    root = Path(root)
    if root.exists():
        return
    partial = root.with_name(f".{root.name}-{os.getpid()}")
    rng = np.random.default_rng(8114)
    train, test = splits()
    try:
        with tqdm(total=len(train) + len(test), desc=f"drawing {root}", unit="picture", disable=None) as bar:
            for split, combinations in (("train", train), ("test", test)):
                images, text = partial / "images" / split, partial / "text" / split
                images.mkdir(parents=True)
                text.mkdir(parents=True)
                for i, attributes in enumerate(combinations):
                    Image.fromarray(render([attributes], rng)[0]).save(images / f"{i:05}.png")
                    lines = captions(attributes, rng, CAPTIONS_PER_PICTURE)
                    (text / f"{i:05}.txt").write_text("\n".join(lines) + "\n")
                    bar.update()
                keys = [f"{split}/{i:05}" for i in range(len(combinations))]
                (partial / f"{split}.txt").write_text("\n".join(keys) + "\n")
        try:
            partial.rename(root)
        except OSError:
            if not root.is_dir():  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
