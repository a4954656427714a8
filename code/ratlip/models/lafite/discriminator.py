"""LAFITE's discriminator: a picture to a logit and a feature that is trained to resemble CLIP's (arXiv 2111.13792)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratlip import distributed
from ratlip.errors import UserError
from ratlip.models.lafite.layers import EPS, Conv, Linear, channels_at, sides_to, working_types

GROUP = 4  # samples that the minibatch's standard deviation is of
LOGITS = ("released", "per_sample")


class Block(nn.Module):
    """Residual block that halves the map: two 3x3 convolutions beside a 1x1, each times sqrt(0.5)."""

    def __init__(self, inputs: int, outputs: int, clamp: float | None):
        super().__init__()
        half = math.sqrt(0.5)
        self.conv0 = Conv(inputs, inputs, 3, clamp=clamp)
        self.conv1 = Conv(inputs, outputs, 3, down=True, gain=half, clamp=clamp)
        self.skip = Conv(inputs, outputs, 1, down=True, active=False, gain=half)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, h) -> (B, out, h / 2, h / 2)."""
        return self.skip(x) + self.conv1(self.conv0(x))


class Discriminator(nn.Module):
    """Judges a picture, and says what CLIP would see in it.

    Where autocast is on, the four largest sides run in its number type, all else in float32.

    Args:
        condition_dim: E, length of CLIP's embeddings.
        imsize: side of the pictures in pixels, a power of two from 8 up.
        base, most, clamp: as the generator's.
        logits: how the condition counts in the logit. "released": o_n + sum over all samples k of the batch, those of
            other processes too, of d_k . t_k; "per_sample", the paper's: o_n + d_n . t_n.
        normalize: features d of unit length.
    """

    def __init__(
        self,
        condition_dim: int,
        imsize: int,
        base: int = 32768,
        most: int = 512,
        clamp: float | None = 256.0,
        logits: str = "released",
        normalize: bool = False,
    ):
        super().__init__()
        self.sizes, self.condition_dim, self.logits, self.normalize = sides_to(imsize), condition_dim, logits, normalize
        channels = channels_at(self.sizes, base, most)[::-1]
        self.fromrgb = Conv(3, channels[0], 1, clamp=clamp)
        self.blocks = nn.ModuleList(Block(*pair, clamp) for pair in zip(channels, channels[1:], strict=False))
        self.conv = Conv(channels[-1] + 1, channels[-1], 3, clamp=clamp)
        self.fc = Linear(channels[-1] * 16, channels[-1], active=True)
        self.feature = Linear(channels[-1], condition_dim)
        self.out = Linear(channels[-1], 1)
        self.to(memory_format=torch.channels_last)  # which convolutions on CPUs and GPUs are fastest with

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, S, S) in [-1, 1] -> o (B, 1), the picture's own part of the logit, and features d (B, E).

        Raises:
            UserError: a batch, over all processes, of more than GROUP samples that does not divide by GROUP.
        """
        types = working_types(self.sizes[-1], images.device)
        with torch.autocast(images.device.type, enabled=False):
            x = images.to(types[self.sizes[-1]] or images.dtype, memory_format=torch.channels_last)
            x = self.fromrgb(x)
            for block, side in zip(self.blocks, reversed(self.sizes), strict=False):
                x = block(x.to(types[side] or self.out.weight.dtype))
            x = with_deviation(x.to(self.out.weight.dtype))
            x = self.fc(self.conv(x).contiguous().flatten(1))  # by channel, row, column
            features = self.feature(x)
            return self.out(x), F.normalize(features, dim=1) if self.normalize else features

    def forward(self, images: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, S, S) in [-1, 1], condition (B, E) of unit length -> logits (B, 1), features (B, E)."""
        alone, features = self.judge(images)
        match = (features * condition).sum(1, keepdim=True)  # (B, 1)
        if self.logits == "released":
            match = distributed.sum_with_gradient(match.sum())
        return alone + match, features


def with_deviation(x: Tensor) -> Tensor:
    """Maps (B, C, h, h) and one more channel (B, C + 1, h, h): the standard deviation within a group of samples of the
    batch over all processes, mean of channels and positions (minibatch standard deviation, arXiv 1710.10196)."""
    count = len(x) * distributed.world_size()
    size = min(GROUP, count)
    if count % size:
        raise UserError(f"train.batch_size: LAFITE's discriminator reads batches of multiples of {GROUP}, not {count}")
    groups = distributed.whole_batch(x).unflatten(0, (size, -1))  # samples n, n + N / size, ... together
    deviation = (groups.var(0, unbiased=False) + EPS).sqrt().mean((1, 2, 3)).repeat(size)  # (N,)
    own = deviation[distributed.rank() :: distributed.world_size()]
    return torch.cat([x, own[:, None, None, None].expand(-1, 1, *x.shape[2:])], dim=1)
