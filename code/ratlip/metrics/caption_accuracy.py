"""How often a demo picture shows what its caption says, read from the pixels by fitting shapes."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ratlip.data.demo import (
    BACKGROUND_RGB,
    CELLS,
    COLOUR_RGB,
    RADII,
    SHAPES,
    SIDE,
    Attributes,
    parse_caption,
    shape_mask,
)
from ratlip.errors import UserError
from ratlip.metrics.metric import Metric, Scored
from ratlip.metrics.reference import Reference

CHUNK = 64  # pictures at a time; bounds memory and keeps the masks in cache
OBJECT_PIXELS = 40  # fewer than any shape covers fully


class CaptionAccuracy(Metric):
    """The share of generated pictures in which each attribute, and all five, are those of the caption."""

    names = ("caption_accuracy",)
    higher_is_better = True
    needs_captions = True

    def __init__(self, reference: Reference | None, count: int):
        # Pictures; those with all five attributes right; those with each attribute right.
        self.totals = [torch.zeros(2 + len(Attributes._fields), dtype=torch.float64)]

    def update(self, scored: Scored) -> None:
        """Count pictures against their captions, each of which must state all five attributes (else UserError)."""
        images = scored.images
        if images.shape[-2:] != (SIDE, SIDE):
            images = interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        try:
            wanted = torch.tensor([parse_caption(caption) for caption in scored.captions])
        except ValueError as error:
            raise UserError(f"caption_accuracy: {error}; it scores captions of the demo data set only") from None
        right = read_attributes(images) == wanted  # (B, 5)
        counts = [len(right), right.all(1).sum(), *right.sum(0)]
        self.totals[0] += torch.tensor(counts, dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """Shares in [0, 1]: "caption_accuracy" (all five right), its "/standard_error", and "/<attribute>"."""
        count, *right = self.totals[0].tolist()
        share, *shares = (number / count for number in right)
        parts = {f"caption_accuracy/{field}": each for field, each in zip(Attributes._fields, shares, strict=True)}
        error = (share * (1 - share) / count) ** 0.5  # of a binomial share
        return {"caption_accuracy": share, "caption_accuracy/standard_error": error, **parts}


def read_attributes(images: Tensor) -> Tensor:
    """Read what pictures (N, 3, 64, 64) in [-1, 1] show: (N, 5) int64 on the CPU, the fields of Attributes.

    Pictures that show nothing recognisable get some attributes all the same.
    """
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    chunks = [_read(levels[start : start + CHUNK]) for start in range(0, len(levels), CHUNK)]
    return torch.from_numpy(np.concatenate([np.empty((0, 5), np.int64), *chunks]))


def _read(levels: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) levels in [0, 255] -> (N, 5)."""
    border = np.concatenate([levels[:, 0], levels[:, -1], levels[:, :, 0], levels[:, :, -1]], axis=1)
    back = np.median(border, axis=1)
    background = _nearest(back, BACKGROUND_RGB)

    # The object's colour from the pixels that differ most from the background, then from all that resemble those.
    deviation = (levels - back[:, None, None]).reshape(len(levels), -1, 3)
    strongest = np.argpartition(-np.square(deviation).sum(2), OBJECT_PIXELS, axis=1)[:, :OBJECT_PIXELS]
    front = np.median(np.take_along_axis(deviation, strongest[..., None], axis=1), axis=1)
    inside = _coverage(deviation, front) > 0.75
    front = (deviation * inside[..., None]).sum(1) / np.maximum(inside.sum(1), 1)[:, None]
    colour = _nearest(back + front, COLOUR_RGB)

    # Each shape in turn, of the size and in the place that give it the object's area and centroid.
    alpha = _coverage(deviation, front).reshape(-1, SIDE, SIDE)
    solid = alpha > 0.5
    area = np.maximum(solid.sum((1, 2)), 1)
    pixel = np.arange(SIDE) + 0.5
    x, y = solid.sum(1) @ pixel / area, solid.sum(2) @ pixel / area
    radius = np.sqrt(area[:, None] / UNIT_AREA)  # (N, shapes), like all below
    cx = np.broadcast_to(x[:, None], radius.shape)
    cy = y[:, None] - UNIT_OFFSET * radius
    alpha = np.clip(alpha * 1.5 - 0.25, 0, 1)[:, None]  # drops faint noise
    guess = np.broadcast_to(np.arange(len(SHAPES)), radius.shape)
    drawn = shape_mask(guess.ravel(), cx.ravel(), cy.ravel(), radius.ravel())
    drawn = drawn.reshape(*radius.shape, SIDE, SIDE)
    overlap = np.minimum(alpha, drawn).sum((2, 3)) / np.maximum(np.maximum(alpha, drawn).sum((2, 3)), 1)
    shape = overlap.argmax(1)

    row = np.arange(len(levels))
    size = (radius[row, shape] > np.sqrt(RADII.prod())).astype(np.int64)
    column, line = (np.abs(c[row, shape][:, None] - CELLS).argmin(1) for c in (cx, cy))
    return np.stack([shape, colour, size, 3 * line + column, background], axis=1)


def _nearest(rgb: np.ndarray, palette: np.ndarray) -> np.ndarray:
    return np.square(rgb[:, None] - palette).sum(2).argmin(1)


def _coverage(deviation: np.ndarray, front: np.ndarray) -> np.ndarray:
    """Deviations from the background (N, P, 3) along the object's (N, 3): 0 background, 1 object; (N, P)."""
    return (deviation @ front[..., None])[..., 0] / np.maximum(np.square(front).sum(1), 1)[:, None]


def _unit_geometry() -> tuple[np.ndarray, np.ndarray]:
    """Of each shape at radius 1: its area, and how far below its box's centre its centroid lies."""
    radius = 12.0
    masks = shape_mask(np.arange(len(SHAPES)), 32.0, 32.0, radius)
    area = masks.sum((1, 2))
    offset = masks.sum(2) @ (np.arange(SIDE) + 0.5) / area - 32
    return area / radius**2, offset / radius


UNIT_AREA, UNIT_OFFSET = _unit_geometry()
