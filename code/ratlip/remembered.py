"""Pictures beside the training pictures that are most like them: whether a generator draws, or remembers."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from easydict import EasyDict
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ratlip import device as devices
from ratlip import distributed
from ratlip.data.files import find_pictures
from ratlip.data.inventory import usable_items
from ratlip.data.items import Item
from ratlip.data.layouts import open_plain
from ratlip.data.loader import TestImages, fitted, picture_batches, to_bytes, to_floats
from ratlip.evaluation import Evaluator, Scorer
from ratlip.metrics.features import ClipSpace
from ratlip.pictures import captioned_grid

SHOWN = 64  # pictures
SIDE = 64  # pixels along a side, of what is compared pixel by pixel
ACROSS = 4  # in a row of the sheet, each with its two


class Shown(NamedTuple):
    """Pictures to look for."""

    images: Tensor  # (N, 3, S, S) in [-1, 1] on the CPU, S `model.imsize`
    captions: list[str]


class Nearest(NamedTuple):
    """Of each picture the training picture most like it, by one measure."""

    values: (
        Tensor  # (N,) float32 on the CPU: cosine of embeddings; root mean square of what pixels in [-1, 1] differ by
    )
    numbers: Tensor  # (N,) int64 on the CPU


def look(config: EasyDict, scorer: Scorer, shown: Shown, test_items: Sequence[Item]) -> tuple[Image.Image, str]:
    """The sheet of `shown`, and a line that says how near they are, beside as many test pictures."""
    with distributed.first_process_first():
        items = usable_items(config, "train")
    real = of_items(config, test_items)
    space = ClipSpace(config, scorer.judge)
    both = find(config, space, torch.cat([shown.images, real.images]), items)
    ours, theirs = ([Nearest(*(part[where] for part in found)) for found in both]
                    for where in (slice(len(shown.images)), slice(len(shown.images), None)))  # fmt: skip
    medians = [
        f"cosine {by_clip.values.median():.3f}, pixels {by_pixels.values.median():.3f}"
        for by_clip, by_pixels in (ours, theirs)
    ]
    words = (
        f"nearest of {len(items):,} training pictures, in the median of {len(shown.images)}: {medians[0]}; "
        f"of {len(real.images)} test pictures: {medians[1]} ({scorer.judge.name}; pixels: root mean square, 0 to 2)"
    )
    return sheet(config, shown, *ours, items), words


def of_generator(evaluator: Evaluator, generator: nn.Module) -> Shown:
    """The evaluation's samples of test images spread over the split, at the size of the training's."""
    numbers, size = spread(min(len(evaluator.items), evaluator.samples)), 2 * [evaluator.scorer.config.model.imsize]
    scored = evaluator.samples_of(generator.eval(), numbers)
    return Shown(F.interpolate(scored.images, size, mode="bilinear", antialias=True).cpu(), list(scored.captions))


def of_folder(config: EasyDict, folder: Path) -> Shown:
    """Pictures of a folder, by name."""
    paths = find_pictures(folder)
    paths = [paths[number] for number in spread(len(paths))]
    pictures = [fitted(open_plain(path), config.model.imsize, "pad") for path in paths]
    return Shown(to_floats(torch.stack(list(map(to_bytes, pictures)))), [path.name for path in paths])


def of_items(config: EasyDict, items: Sequence[Item]) -> Shown:
    """Real pictures of a split."""
    items = [items[number] for number in spread(len(items))]
    images = TestImages(items, config.model.imsize, config.data.fit)
    stacked = torch.stack([images[number][0] for number in range(len(items))])
    return Shown(to_floats(stacked), [item.captions[0] for item in items])


def spread(count: int) -> list[int]:
    """At most SHOWN numbers below `count`, spread evenly."""
    return [number * count // min(count, SHOWN) for number in range(min(count, SHOWN))]


@torch.no_grad()
def find(config: EasyDict, space: ClipSpace, images: Tensor, items: Sequence[Item]) -> tuple[Nearest, Nearest]:
    """The nearest of all training pictures, by the cosine in a CLIP's space and by their pixels.

    The training pictures go by in batches, spread over the processes, and nothing of them is kept. Where training
    mirrors them (`data.flip`), they are compared both ways.

    Args:
        images: (N, 3, S, S) in [-1, 1]. items: the training split.
    """
    place = space.clip.mean.device
    looked_for = devices.send(images, place)
    embedded, pixels = F.normalize(space(looked_for), dim=1), _pixels(looked_for)
    best = [torch.full((len(images),), -torch.inf, device=place) for _ in range(2)]  # a larger one is nearer
    where = [torch.zeros(len(images), dtype=torch.int64, device=place) for _ in range(2)]
    pictures = TestImages(items, config.model.imsize, config.data.fit)
    quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
    own = len(range(distributed.rank(), len(items), distributed.world_size()))
    loading = (config.eval.batch_size, config.data.num_workers, place)
    with tqdm(total=own, desc="nearest training images", unit="image", leave=False, disable=quiet) as bar:
        for batch, numbers in picture_batches(pictures, *loading):
            numbers = devices.send(numbers, place)
            for seen in (batch, batch.flip(-1)) if config.data.flip else (batch,):
                likeness = (embedded @ F.normalize(space(seen), dim=1).T, -torch.cdist(pixels, _pixels(seen)))
                for measure, values in enumerate(likeness):  # (N, B)
                    nearest, column = values.max(dim=1)
                    nearer = nearest > best[measure]
                    best[measure] = torch.where(nearer, nearest, best[measure])
                    where[measure] = torch.where(nearer, numbers[column], where[measure])
            bar.update(len(batch))
    found = [_best_of_all(*pair) for pair in zip(best, where, strict=True)]
    rms = found[1]._replace(values=-found[1].values / pixels.shape[1] ** 0.5)
    return found[0], rms


def sheet(config: EasyDict, shown: Shown, by_clip: Nearest, by_pixels: Nearest, items: Sequence[Item]) -> Image.Image:
    """Each picture with the two training pictures, ACROSS in a row; below them their captions and how near they are."""
    training = TestImages(items, config.model.imsize, config.data.fit)
    images, labels = [], []
    for number, (image, caption) in enumerate(zip(shown.images, shown.captions, strict=True)):
        images.append(image)
        labels.append(caption)
        for measure, nearest in (("CLIP", by_clip), ("pixels", by_pixels)):
            where = int(nearest.numbers[number])
            images.append(to_floats(training[where][0]))
            labels.append(f"{measure} {nearest.values[number]:.3f}: {items[where].captions[0]}")
    blank = -len(images) % (3 * ACROSS)
    images += [torch.ones_like(images[0])] * blank
    return captioned_grid(torch.stack(images), labels + [""] * blank, 3 * ACROSS)


def _pixels(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) -> (B, 3 * SIDE * SIDE)."""
    return F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True).flatten(1)


def _best_of_all(values: Tensor, numbers: Tensor) -> Nearest:
    """The best of what the processes found."""
    found = distributed.gather((values.cpu(), numbers.cpu()))
    every, where = (torch.stack(parts) for parts in zip(*found, strict=True))  # (processes, N)
    best = every.max(dim=0)
    return Nearest(best.values, where.gather(0, best.indices[None])[0])
