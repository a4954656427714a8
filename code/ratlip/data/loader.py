"""Batches of captioned images, the same whatever the number of workers and processes."""

import math
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, get_worker_info

from ratlip import device as devices
from ratlip import distributed
from ratlip.augment import shift
from ratlip.data.captions import CaptionTable
from ratlip.data.layouts import Item, open_image, open_plain
from ratlip.errors import UserError
from ratlip.stopping import begin_worker

BATCH_SIZE = 64  # published; where `train.batch_size` is null
OPEN_SHARDS = 16  # that an epoch draws from at any time
PAUSES = (0.5, 1, 2, 4)  # seconds, before an image that could be read before is tried again
SHARED = Path("/dev/shm")  # where Linux keeps what processes share
PAGE = 4096  # bytes, of which shared memory takes whole ones

# More workers than cores do no harm: they wait for the disk, and the default is meant for larger machines.
warnings.filterwarnings("ignore", "This DataLoader will create")


class Draw(NamedTuple):
    """One place in a training batch: which image, seen in which epoch, with which caption rows."""

    epoch: int
    image: int
    row: int  # of a caption of this image
    mismatched_row: int  # of a caption of another image


class Batch(NamedTuple):
    """What the training step reads; the rows point into the table of sentence embeddings."""

    images: Tensor  # (B, 3, S, S): bytes as they are loaded, or float32 in [-1, 1]
    rows: Tensor  # (B,) int64
    mismatched_rows: Tensor  # (B,) int64


class EpochBatches(Sampler[list[Draw]]):
    """The batches of one epoch: each image once, in an order and with captions that (seed, epoch) decide.

    Every process computes the global batches and takes its own share of each, so that the number of processes
    does not change them. Images that do not fill the last batch are left to another epoch.

    Args:
        batch_size: over all processes together.
        mismatch_pool: the mismatched caption is the most similar of this many random ones, by the cosine of
            `sentences`, the captions' embeddings (R, E) on the CPU; 1: the next one of the batch, as published.
        shards: for each image the number of the shard it lies in. Shards then come in random order, and images mix
            over OPEN_SHARDS of them at a time: the disk is read in sweeps, not here and there.
    """

    def __init__(
        self,
        table: CaptionTable,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        mismatch_pool: int = 1,
        sentences: Tensor | None = None,
        shards: np.ndarray | None = None,
    ):
        self.table = table
        self.shards = shards
        self.batch_size = batch_size
        self.seed = seed
        self.mismatch_pool = mismatch_pool
        self.directions = F.normalize(sentences, dim=1) if mismatch_pool > 1 else None
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0  # batches of the epoch to leave out: a run that was stopped in its midst has seen them

    def __len__(self) -> int:
        return (len(self.table.starts) - 1) // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.table.starts) - 1)
        if self.shards is not None:
            turns = rng.permutation(self.shards.max() + 1)[self.shards]
            order = np.argsort(turns + OPEN_SHARDS * rng.random(len(turns)))
        rows = self.table.draw(order, rng)
        for number in range(len(self)):
            share = slice(number * self.batch_size, (number + 1) * self.batch_size)
            images, own = order[share], rows[share]
            similar = self._similar(own, rng) if self.mismatch_pool > 1 else None  # for each batch: it draws
            if number < self.start:
                continue
            mismatched = self.table.mismatched(images, own, similar)
            draws = list(zip(images.tolist(), own.tolist(), mismatched.tolist(), strict=True))
            yield [Draw(self.epoch, *draw) for draw in draws[self.rank :: self.world_size]]

    def _similar(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each of the caption rows (B,) a random pool of rows (B, mismatch_pool), the most similar first."""
        pool = rng.integers(len(self.directions), size=(len(rows), self.mismatch_pool))
        cosines = torch.einsum("be,bpe->bp", self.directions[rows], self.directions[pool])
        return np.take_along_axis(pool, cosines.argsort(dim=1, descending=True, stable=True).numpy(), axis=1)


def batch_size_for(images: int, asked: int | None = None, processes: int = 1) -> int:
    """Images in a batch, over all processes together: as asked, else BATCH_SIZE or what a smaller set allows.

    Raises:
        UserError: more than there are images, or a number that does not divide over the processes.
    """
    size = asked or min(BATCH_SIZE, images) // processes * processes
    if size < 2:
        each = f", one for each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"train.batch_size: a step needs {max(2, processes)} training images or more{each}, not {images}"
        )
    if size > images:
        raise UserError(
            f"train.batch_size: {size} is larger than the {images} training images; where it is null it follows them"
        )
    if size % processes:
        raise UserError(f"train.batch_size: {size} does not divide over {processes} processes")
    return size


class TrainingImages(Dataset):
    """Decodes and augments the image of a Draw; crop and mirroring depend on (seed, epoch, image) alone. `fit` is that
    of `fitted`."""

    def __init__(self, items: Sequence[Item], imsize: int, enlarge: float, flip: bool, seed: int, fit: str = "crop"):
        self.items, self.fit = items, fit
        self.imsize, self.enlarge, self.flip, self.seed = imsize, enlarge, flip, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, int]:
        rng = np.random.default_rng((self.seed, draw.epoch, draw.image))
        image = fitted(open_again(self.items[draw.image]), int(self.imsize * self.enlarge), self.fit)
        image = crop(image, self.imsize, *rng.random(2))
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_bytes(image), draw.row, draw.mismatched_row


class TestImages(Dataset):
    """Images as evaluation sees them: shorter side to `imsize`, cut in the centre; or padded. Gives (image, number)."""

    def __init__(self, items: Sequence[Item], imsize: int, fit: str = "crop"):
        self.items, self.imsize, self.fit = items, imsize, fit

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = fitted(open_again(self.items[index]), self.imsize, self.fit)
        return to_bytes(crop(image, self.imsize, 0.5, 0.5)), index


class EnlargedTestImages(Dataset):
    """TestImages again and again, mirrored every other time and moved a little: many views of few pictures.

    Args:
        copies: views of each picture, each of them the same in every run. The first two are not moved.
        most: largest shift, as a share of the side.
    """

    def __init__(self, images: TestImages, copies: int, most: float = 1 / 32):
        self.images, self.copies, self.most = images, copies, most

    def __len__(self) -> int:
        return len(self.images) * self.copies

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        copy, number = divmod(index, len(self.images))
        image = self.images[number][0]
        if copy % 2:
            image = image.flip(-1)
        if copy > 1:
            shares = np.random.default_rng((number, copy)).uniform(-self.most, self.most, (1, 2))
            moved = shift(image[None].float(), shares)
            image = moved[0].byte()  # it moves by whole pixels: nothing is rounded
        return image, index


class Pictures(Dataset):
    """Picture files as torch-fidelity reads them, each in its own size. Gives (image, number)."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_bytes(open_plain(self.paths[index])), index


def picture_batches(
    pictures: Dataset, batch_size: int, num_workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of a data set of (image, number): images (B, 3, H, W) in [-1, 1] on the device, and numbers
    (B,); B <= `batch_size` of one size."""
    loader = DataLoader(
        Subset(pictures, range(distributed.rank(), len(pictures), distributed.world_size())),
        batch_size,
        num_workers=num_workers,
        collate_fn=same_size_batches,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # of its own: it would otherwise take a number from the training's
    )
    for groups in loader:
        for images, numbers in groups:
            yield to_floats(devices.send(torch.from_numpy(images), device)), torch.tensor(numbers)


def same_size_batches(samples: Sequence[tuple[Tensor, int]]) -> list[tuple[np.ndarray, list[int]]]:
    """(image, number) pairs -> for each size among them, images (B, 3, H, W) and their B numbers.

    Arrays, which cross processes through a pipe: nobody knows how much shared memory pictures of any size take.
    """

    def size(sample: tuple[Tensor, int]) -> tuple[int, ...]:
        return tuple(sample[0].shape)

    groups = (list(group) for _, group in groupby(sorted(samples, key=size), key=size))
    return [(torch.stack([i for i, _ in group]).numpy(), [n for _, n in group]) for group in groups]


def open_again(item: Item) -> Image.Image:
    """`open_image` of an item that could be read before: what fails now is tried again after each of PAUSES."""
    for pause in PAUSES:
        try:
            return open_image(item)
        except UserError:
            time.sleep(pause)
    return open_image(item)


def fitted(image: Image.Image, size: int, fit: str) -> Image.Image:
    """A picture from which squares of side `size` are cut: "crop", its shorter side is that; "pad", its longer one, and
    it lies in the middle of such a square, whose other pixels have the colour of its border (the median)."""
    if fit == "crop" or image.width == image.height:
        return resize_shorter(image, size)
    scale = size / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    levels = np.asarray(image)  # (H, W, 3)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    square = Image.new("RGB", (size, size), tuple(np.median(border, axis=0).astype(int).tolist()))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` pixels, bilinear, proportions kept."""
    scale = size / min(image.size)
    width, height = (max(size, int(side * scale)) for side in image.size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BILINEAR)


def crop(image: Image.Image, size: int, x: float, y: float) -> Image.Image:
    """The square of side `size` at the shares x, y (0 to 1) of the room there is."""
    left, top = int(x * (image.width - size + 1)), int(y * (image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def to_bytes(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_floats(images: Tensor) -> Tensor:
    """Bytes of any shape -> float32 in [-1, 1], the same on every device; floats stay."""
    if images.is_floating_point():
        return images
    # A GPU would multiply by the rounded inverse of a plain number.
    return images.float().div_(torch.full((), 127.5, device=images.device)).sub_(1)


def reduced(images: Tensor, size: int) -> Tensor:
    """Square pictures (B, 3, S, S) of bytes -> (B, 3, size, size), size <= S, bit for bit as Pillow resizes them
    (bilinear, which averages over what a pixel covers), on any device."""
    weights = devices.send(pillow_weights(images.shape[-1], size), images.device)
    x = images.double()  # in which the integers are exact
    for product in (lambda x: x @ weights.T, lambda x: weights @ x):  # along rows first, rounded in between
        x = product(x).add_(0.5).floor_().clamp_(0, 255)
    return x.to(torch.uint8)


@cache
def pillow_weights(side: int, size: int) -> Tensor:
    """Pillow's bilinear weights for a reduction from `side` to `size` pixels (size, side), float64: triangles as wide
    as two pixels of the result, rounded to multiples of 2^-22."""
    scale = side / size
    centres = (np.arange(size)[:, None] + 0.5) * scale
    places = np.arange(side)
    weights = np.maximum(0, 1 - np.abs(places + 0.5 - centres) / scale)
    within = (places >= np.trunc(centres - scale + 0.5)) & (places < np.trunc(centres + scale + 0.5))
    weights = np.where(within, weights, 0)
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(np.floor(weights * 2**22 + 0.5) / 2**22)


def shard_numbers(items: Sequence[Item]) -> np.ndarray | None:
    """For each item the number of the shard its image lies in (N,); None where images are files of their own."""
    if any(item.span is None for item in items):
        return None
    numbers: dict[Path, int] = {}
    return np.array([numbers.setdefault(item.image, len(numbers)) for item in items])


def training_loader(dataset: TrainingImages, batches: EpochBatches, num_workers: int, pin: bool) -> DataLoader:
    """Yields Batch; call `batches.epoch = n` before each pass. As many processes load as shared memory has room for."""
    share = batches.batch_size // batches.world_size
    size = (share * 3 * dataset.imsize**2 // PAGE + 3) * PAGE  # the images, and a page for each of the others
    loading, ready = affordable(num_workers, size, room())
    if (loading, ready) != affordable(num_workers, size, math.inf):
        distributed.say(less_than_asked(num_workers, loading, ready, size))
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=loading,
        prefetch_factor=ready,
        persistent_workers=loading > 0,
        pin_memory=pin,
        collate_fn=collate,
        worker_init_fn=begin_worker,
    )


def room() -> float:
    """Bytes of shared memory that this process may fill: its part of what is free, less an eighth."""
    if sys.platform != "linux":
        return math.inf
    try:
        total, _, free = shutil.disk_usage(SHARED)
    except OSError:  # there is none
        return 0
    return free * 7 / 8 / distributed.local_world_size() if total else math.inf  # none in all: without a limit


def affordable(num_workers: int, size: int, room: float) -> tuple[int, int | None]:
    """How many processes load, and how many batches of `size` bytes each holds ready: two, or as there is room.

    Beside them there is the batch that the training has, and the one that it is getting.
    """
    batches = max(0, min(2 * num_workers, room // size - 2))
    loading = int(min(num_workers, batches))
    return loading, int(batches // loading) if loading else None


def less_than_asked(num_workers: int, loading: int, ready: int | None, size: int) -> str:
    """The line that says so, and what would do."""
    needed = math.ceil((2 * num_workers + 2) * size * distributed.local_world_size() * 8 / 7 / 2**20)
    who = "the training process loads images by itself"
    if loading:
        who = f"{loading} of {num_workers} processes load images, {ready} batch{'es' * (ready == 2)} each"
    free = shutil.disk_usage(SHARED).free / 2**20 if SHARED.is_dir() else 0
    return (
        f"{who}: {SHARED} has {free:.1f} MiB free, a batch takes {size / 2**20:.1f}, and "
        f"data.num_workers={num_workers} needs {needed} (docker run --shm-size={needed}m); "
        f"data.num_workers={loading} asks for no more"
    )


def collate(samples: Sequence[tuple[Tensor, int, int]]) -> Batch:
    """Samples of TrainingImages -> Batch.

    A process that loads puts it into shared memory here, where want of it is an error that reaches the training.
    """
    images, rows, mismatched = zip(*samples, strict=True)
    batch = Batch(torch.empty(len(images), *images[0].shape, dtype=torch.uint8), *map(torch.tensor, (rows, mismatched)))
    if get_worker_info() is not None:
        for tensor in batch:
            tensor.share_memory_()
    torch.stack(images, out=batch.images)
    return batch
