"""Pictures: tensors as 8-bit images, captioned grids, and the filmstrip and curves of a run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from ratlip import lettering
from ratlip.errors import UserError, first_line

MIN_CELL = 128  # pixels; smaller pictures are enlarged by whole factors so that captions fit below them
TITLE_WIDTH = 76  # pixels left of a grid whose rows have titles
DIMMED = 0.2  # of its light a picture keeps where nothing reads a word
SMOOTHED = 50  # a curve is shown averaged over about one part in so many of its length


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1], clamped -> B pictures of 8 bits."""
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels]


def save_pictures(images: Tensor, folder: Path, name: str, caption: str) -> list[Path]:
    """Images (B, 3, H, W) in [-1, 1] as `<folder>/<name>_<number>.png` with their caption in .txt beside each; the
    folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{number}.png" for number in range(len(images))]
    for picture, path in zip(to_pictures(images), paths, strict=True):
        save_picture(picture, path, caption)
    return paths


def save_picture(picture: Image.Image, path: Path, caption: str | None = None) -> None:
    """A PNG, whole or not at all; its caption, of one line, is in the text file of its name from before it is there.

    Raises:
        UserError: they cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if caption is not None:
            path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
        picture.save(partial, "PNG")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or first_line(error)})") from None
    finally:
        partial.unlink(missing_ok=True)


def captioned_grid(
    images: Tensor | Sequence[Image.Image], captions: Sequence[str], columns: int, titles: Sequence[str] = ()
) -> Image.Image:
    """Images in rows, each with its caption below, wrapped and never cut.

    Args:
        images: (B, 3, H, W) in [-1, 1], or B pictures of one size. captions: B texts; a row is as tall as its longest
            caption needs.
        columns: pictures in a row. titles: a text left of each row, or none at all.
    """
    pictures = to_pictures(images) if isinstance(images, Tensor) else images
    width, height = (side * _enlargement(pictures[0].width) for side in pictures[0].size)
    wrapped = [lettering.wrap(caption, width) if caption else [] for caption in captions]
    rows = [wrapped[first : first + columns] for first in range(0, len(wrapped), columns)]
    heights = [_row_height(height) + max(map(lettering.height_of, row)) for row in rows]
    left = TITLE_WIDTH if titles else 0
    grid = Image.new("RGB", (left + columns * (width + 8), sum(heights)), "white")
    draw = ImageDraw.Draw(grid)
    for number, row in enumerate(rows):
        top = sum(heights[:number]) + 4
        if titles:
            _write_title(draw, titles[number], top + height // 2)
        for column, lines in enumerate(row):
            x, picture = left + column * (width + 8) + 4, pictures[number * columns + column]
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, top))
            lettering.write(draw, lines, x, top + height + 2)
    return grid


def attention_grid(image: Tensor, attention: Sequence[Tensor], words: Sequence[str], caption: str) -> Image.Image:
    """Which words each region of a picture was drawn from: the picture, then for each word the picture lit where it was
    read, with the word and the share of all reading that was of it; a row for each stage that reads.

    Args:
        image: (3, S, S) in [-1, 1]. words: of its caption, T.
        attention: of each stage, (T or more, s, s): the words' shares at each position; what comes after T is padding.
    """
    pictures, texts = [], []
    for shares in attention:
        shares = shares[: len(words)].float().cpu()  # (T, s, s)
        light = F.interpolate((shares / shares.max())[:, None], (MIN_CELL, MIN_CELL), mode="bilinear")  # (T, 1, ...)
        shown = F.interpolate(image[None].float().cpu(), (MIN_CELL, MIN_CELL), mode="bilinear", antialias=True)
        lit = (shown + 1) * (DIMMED + (1 - DIMMED) * light) - 1  # -1 is black
        pictures += to_pictures(torch.cat([shown, lit]))
        texts += [caption, *(f"{word} {share:.0%}" for word, share in zip(words, shares.mean((1, 2)), strict=True))]
    titles = [f"reading at {shares.shape[-1]} px" for shares in attention]
    return captioned_grid(pictures, texts, len(words) + 1, titles)


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
    draw = ImageDraw.Draw(strip)
    for number, (title, grid) in enumerate(grids.items()):
        _write_title(draw, title, number * height + height // 2)
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


def _enlargement(side: int) -> int:
    return max(1, -(-MIN_CELL // side))


def _row_height(height: int) -> int:
    """Of a row of pictures without captions, in pixels: 4 above, 6 below."""
    return height + 10


def _write_title(draw: ImageDraw.ImageDraw, title: str, y: int) -> None:
    lettering.write(draw, lettering.wrap(title, TITLE_WIDTH - 8), 4, y - lettering.LINE_HEIGHT)
