"""What LAFITE makes of CLIP's features and of the pictures that CLIP sees, from draws that are handed in."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CONDITIONS = ("text", "image", "mixed")
TEXT_NOISE, IMAGE_NOISE = 0.1, 0.75  # share of the noise in a condition


def from_text(text: Tensor, noise: Tensor) -> Tensor:
    """Text features (B, E) and standard normal noise (B, E) -> conditions (B, E) of unit length."""
    return _perturbed(text, noise, TEXT_NOISE)


def from_image(image: Tensor, noise: Tensor) -> Tensor:
    """Image features (B, E) and standard normal noise (B, E) -> conditions (B, E) of unit length, as far from them as
    captions are: what stands for captions where there are none."""
    return _perturbed(image, noise, IMAGE_NOISE)


def _perturbed(feature: Tensor, noise: Tensor, share: float) -> Tensor:
    feature, noise = F.normalize(feature, dim=1), F.normalize(noise, dim=1)
    return F.normalize((1 - share) * feature + share * noise, dim=1)


def mixed(text: Tensor, image: Tensor, noise: Tensor, coin: Tensor, probability: float) -> Tensor:
    """`from_image` where the coin (B, 1), uniform in [0, 1), is below `probability`, else `from_text`, of the same
    noise. A probability below 0.01 is never, one above 0.99 always, as published."""
    if probability < 0.01:
        return from_text(text, noise)
    if probability > 0.99:
        return from_image(image, noise)
    return torch.where(coin < probability, from_image(image, noise), from_text(text, noise))


def lacks_caption(number: int, count: int, share: float) -> bool:
    """Whether item `number` of `count` is one whose captions are not read, where only a share of them is (0 to 1). Its
    `from_image` then stands for a caption's feature."""
    return number % count > share * count


class View(NamedTuple):
    """Where CLIP looks: a square of a picture that is larger than CLIP's input, or the place of a smaller one in it."""

    side: int
    left: int
    top: int


def draw_view(rng: np.random.Generator, size: int, resolution: int, whole: bool = False) -> View:
    """A view of pictures `size` pixels a side for a CLIP that reads `resolution`, one for a batch.

    Args:
        whole: nearly all of the picture, as features of a data set's pictures are made; else half of it or more.
    """
    if size <= resolution:
        room = max(1, resolution - size)
        return View(size, *rng.integers(room, size=2).tolist())
    side = int(rng.integers(size - 3 if whole else size // 2, size))
    return View(side, *rng.integers(size - side, size=2).tolist())


def seen(images: Tensor, resolution: int, view: View) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] -> what of them CLIP is shown (B, 3, R, R): the square of the view, resized
    (bicubic, not antialiased); a smaller picture in the midst of white; one of this size as it is."""
    size = images.shape[-1]
    if size == resolution:
        return images
    side, left, top = view
    if size < resolution:
        return F.pad(images, (left, resolution - size - left, top, resolution - size - top), value=1.0)
    square = images[:, :, top : top + side, left : left + side]
    if square.dtype in (torch.float16, torch.bfloat16):
        square = square.float()
    return F.interpolate(square, (resolution, resolution), mode="bicubic", align_corners=False)
