"""Pictures: tensors as 8-bit images, captioned grids, and the filmstrip and curves of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TEXT_HEIGHT = 14  # pixels of a line of caption
MIN_CELL = 128  # pixels; smaller pictures are enlarged by whole factors so that captions fit below them
TITLE_WIDTH = 76  # pixels left of a grid whose rows have titles
SMOOTHED = 50  # a curve is shown averaged over about one part in so many of its length


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1], clamped -> B pictures of 8 bits."""
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels]


def save_pictures(images: Tensor, folder: Path, name: str) -> list[Path]:
    """Images (B, 3, H, W) in [-1, 1] as `<folder>/<name>_<number>.png`; the folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{number}.png" for number in range(len(images))]
    for picture, path in zip(to_pictures(images), paths, strict=True):
        picture.save(path)
    return paths


def captioned_grid(images: Tensor, captions: Sequence[str], columns: int, titles: Sequence[str] = ()) -> Image.Image:
    """Images in rows, each with its caption below, wrapped and never cut.

    Args:
        images: (B, 3, H, W) in [-1, 1]. captions: B texts; a row is as tall as its longest caption needs.
        columns: pictures in a row. titles: a text left of each row, or none at all.
    """
    pictures = to_pictures(images)
    width, height = (side * _enlargement(pictures[0].width) for side in pictures[0].size)
    font = _font()
    wrapped = [_wrap(caption, font, width) if caption else [] for caption in captions]
    rows = [wrapped[first : first + columns] for first in range(0, len(wrapped), columns)]
    heights = [_row_height(height) + TEXT_HEIGHT * max(map(len, row)) for row in rows]
    left = TITLE_WIDTH if titles else 0
    grid = Image.new("RGB", (left + columns * (width + 8), sum(heights)), "white")
    draw = ImageDraw.Draw(grid)
    for number, row in enumerate(rows):
        top = sum(heights[:number]) + 4
        if titles:
            _write(draw, _wrap(titles[number], font, left - 8), 4, top + height // 2 - TEXT_HEIGHT, font)
        for column, lines in enumerate(row):
            x, picture = left + column * (width + 8) + 4, pictures[number * columns + column]
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, top))
            _write(draw, lines, x, top + height + 2, font)
    return grid


def filmstrip(grids: Mapping[str, Image.Image], side: int, rows: int, row: int) -> Image.Image:
    """One row of a grid as it was at different times, a row each, with the captions below.

    Args:
        grids: captioned grids of one size by what to call them, the earliest first; captions below the last row only.
        side: of the grids' pictures, in pixels. rows: of each grid. row: which to show, from 0.
    """
    height = _row_height(side * _enlargement(side))
    newest = list(grids.values())[-1]
    captions = newest.crop((0, rows * height - 4, newest.width, newest.height))  # where their text begins
    strip = Image.new("RGB", (newest.width, len(grids) * height - 4 + captions.height), "white")
    draw, font = ImageDraw.Draw(strip), _font()
    for number, (title, grid) in enumerate(grids.items()):
        _write(draw, _wrap(title, font, TITLE_WIDTH - 8), 4, number * height + height // 2 - TEXT_HEIGHT, font)
        pictures = grid.crop((TITLE_WIDTH, row * height, grid.width, (row + 1) * height - 4))
        strip.paste(pictures, (TITLE_WIDTH, number * height))
    strip.paste(captions, (0, len(grids) * height - 4))
    return strip


def curves(scalars: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Losses and scores over the steps of a run.

    Args:
        scalars: (step, value) pairs by TensorBoard tag. The tags of loss_d/ share a panel, those of loss_g/ another;
            each of scores/ has its own, uncertainties and times left out.
    """
    panels = {
        "discriminator": [tag for tag in scalars if tag.startswith("loss_d/")],
        "generator": [tag for tag in scalars if tag.startswith("loss_g/")],
        **{tag.removeprefix("scores/"): [tag] for tag in scalars if is_headline(tag)},
    }
    panels = {title: tags for title, tags in panels.items() if tags}
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(5 * columns, 3.4 * rows), layout="constrained")
    for axes, (title, tags) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
        for tag in tags:
            steps, values = np.array(scalars[tag], dtype=float).T
            window = 1 if tag.startswith("scores/") else max(1, len(values) // SMOOTHED)
            (line,) = axes.plot(steps, values, linewidth=0.5, alpha=0.3 if window > 1 else 1, marker="." * (window < 2))
            if window > 1:
                smooth = np.convolve(values, np.ones(window) / window, "valid")
                axes.plot(steps[window // 2 :][: len(smooth)], smooth, color=line.get_color())
            line.set_label(tag.split("/", 1)[1].replace("_", " "))
        axes.set(title=title.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
        if len(tags) > 1:
            for handle in axes.legend().legend_handles:
                handle.set(alpha=1, linewidth=1.5)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    return figure


def is_headline(tag: str) -> bool:
    """Whether a tag is a score itself: not its uncertainty, its half, a count or a time."""
    group, _, name = tag.partition("/")
    return group == "scores" and "/" not in name and name not in ("images", "seconds")


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: legible when small, with the letters of most alphabets."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 10)


def _enlargement(side: int) -> int:
    return max(1, -(-MIN_CELL // side))


def _row_height(height: int) -> int:
    """Of a row of pictures without captions, in pixels: 4 above, 6 below."""
    return height + 10


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, font: ImageFont.FreeTypeFont) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * TEXT_HEIGHT), line, "black", font=font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is wider than that is broken."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
