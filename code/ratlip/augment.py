"""Differentiable augmentation of what CLIP, and with it the discriminator, sees (DiffAugment, arXiv 2006.10738)."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ratlip import device as devices


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Images (B, 3, H, W), shifted by the first two of draws (B, 3), as `shift` says, and brighter by the third.

    Draws are numbers on the CPU, wherever the images are, so that no GPU is waited for.
    """
    brighter = devices.send(draws, images.device)[:, 2, None, None, None]
    return shift(images, draws.numpy()[:, :2]) + brighter


def shift(images: Tensor, shares: np.ndarray) -> Tensor:
    """Move images (B, 3, H, W) by whole pixels, `shares` (B, 2) of the side down and to the right; edges repeat.

    CLIP cuts pictures into patches; moving what it sees keeps the generator from drawing the patch grid.
    """
    if not shares.any():
        return images
    side = images.shape[-1]
    margin = math.ceil(float(np.abs(shares).max()) * side)
    padded = F.pad(images, [margin] * 4, mode="replicate")
    corners = (margin - (shares * side).round()).astype(int).tolist()
    return torch.stack(
        [image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded.unbind(), corners, strict=True)]
    )
