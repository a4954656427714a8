"""AttnGAN's generator: a small picture from noise and sentence, then larger ones that look at the words
(Xu et al. 2018, arXiv 1711.10485)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratlip.errors import UserError
from ratlip.models.attn_gan.blocks import Gated, Residual, start_as_published
from ratlip.models.blocks import BatchNorm

SMALLEST = 8  # side of the first stage's pictures at least, in pixels


class Condition(NamedTuple):
    """What the networks read of B captions."""

    sentence: Tensor  # (B, E)
    words: Tensor  # (B, D, T), zeros where a caption has ended
    real: Tensor  # (B, T) bool: whether the caption has a word there; each has one at least


class Drawn(NamedTuple):
    """What the generator gives."""

    images: list[Tensor]  # of each stage, (B, 3, S, S) in [-1, 1], the largest last
    attention: list[Tensor]  # of each stage but the first, (B, T, S, S) of the side before: shares of the words, sum 1
    mu: Tensor  # (B, C) mean of the conditioning's distribution
    logvar: Tensor  # (B, C) logarithm of its variance


class Generator(nn.Module):
    """Noise and the words of a caption to pictures of several sizes.

    Args:
        sizes: sides of the pictures, each twice the one before, as `stage_sizes` gives them.
        channels: at every picture's own resolution ("GF": 32 for birds, 48 for COCO).
        sentence_dim, word_dim: of the encoder.
        z_dim: length of the noise. condition_dim: of mu, and of the noise that conditioning augmentation takes.
        residuals: blocks in each stage after the first ("R_NUM": 2 for birds, 3 for COCO).
        mask: "own": a sample's words alone are looked at; "released": as the published program mixes them up.
    """

    def __init__(
        self,
        sizes: list[int],
        channels: int,
        sentence_dim: int,
        word_dim: int,
        z_dim: int = 100,
        condition_dim: int = 100,
        residuals: int = 2,
        mask: str = "own",
    ):
        super().__init__()
        self.sizes, self.noise_dim, self.sentence_dim = sizes, z_dim + condition_dim, sentence_dim
        self.augmentation = ConditioningAugmentation(sentence_dim, condition_dim)
        self.first = FirstStage(self.noise_dim, channels, sizes[0])
        self.stages = nn.ModuleList(NextStage(channels, word_dim, residuals, mask) for _ in sizes[1:])
        self.to_rgb = nn.ModuleList(nn.Conv2d(channels, 3, 3, padding=1, bias=False) for _ in sizes)
        start_as_published(self)
        self.to(memory_format=torch.channels_last)  # which convolutions on CPUs and GPUs are fastest with

    def forward(self, noise: Tensor, condition: Condition) -> Drawn:
        """noise (B, Z + C) standard normal: the pictures', then that of conditioning augmentation."""
        z, eps = noise.split([self.noise_dim - self.augmentation.dim, self.augmentation.dim], dim=1)
        code, mu, logvar = self.augmentation(condition.sentence, eps)
        maps = [self.first(torch.cat([code, z], dim=1))]
        attention = []
        for stage in self.stages:
            h, looked_at = stage(maps[-1], condition.words, condition.real)
            maps.append(h)
            attention.append(looked_at)
        images = [to_rgb(h).tanh() for to_rgb, h in zip(self.to_rgb, maps, strict=True)]
        return Drawn(images, attention, mu, logvar)


class ConditioningAugmentation(nn.Module):
    """c = mu(s) + sigma(s) eps: nearby captions share conditions (StackGAN, arXiv 1612.03242)."""

    def __init__(self, sentence_dim: int, dim: int):
        super().__init__()
        self.dim = dim
        self.fc = nn.Linear(sentence_dim, 4 * dim)
        nn.init.zeros_(self.fc.bias)

    def forward(self, sentence: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sentence (B, E), eps (B, C) standard normal -> c, mu, logvar (B, C)."""
        mu, logvar = F.glu(self.fc(sentence), dim=1).chunk(2, dim=1)
        return mu + (logvar / 2).exp() * eps, mu, logvar


class FirstStage(nn.Module):
    """[c; z] (B, C + Z) -> h (B, GF, S, S): a 4x4 map, doubled until it has the side."""

    def __init__(self, in_dim: int, channels: int, side: int):
        super().__init__()
        doublings = (side // 4).bit_length() - 1
        widths = [channels * 2**i for i in range(doublings, -1, -1)]
        self.fc = nn.Linear(in_dim, 2 * widths[0] * 4 * 4, bias=False)
        self.bn = BatchNorm(2 * widths[0] * 4 * 4)
        self.ups = nn.Sequential(*(Gated(a, b, doubling=True) for a, b in zip(widths, widths[1:], strict=False)))

    def forward(self, code: Tensor) -> Tensor:
        x = self.fc(code)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scale, shift = self.bn(x, torch.zeros_like(x), 1) if self.training else self.bn.running()
        x = F.glu(torch.addcmul(shift, scale, x), dim=1)
        return self.ups(x.unflatten(1, (-1, 4, 4)))


class NextStage(nn.Module):
    """h (B, GF, S, S) and the words -> (B, GF, 2 S, 2 S)."""

    def __init__(self, channels: int, word_dim: int, residuals: int, mask: str):
        super().__init__()
        self.attention = WordAttention(word_dim, channels, mask)
        self.residual = nn.Sequential(*(Residual(2 * channels) for _ in range(residuals)))
        self.up = Gated(2 * channels, channels, doubling=True)

    def forward(self, h: Tensor, words: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Also the attention (B, T, S, S). `real` (B, T): where a caption has words."""
        context, attention = self.attention(h, words, real)
        return self.up(self.residual(torch.cat([h, context], dim=1))), attention


class WordAttention(nn.Module):
    """Each position's mean of the words, weighted by a softmax of their products with the position's features."""

    def __init__(self, word_dim: int, channels: int, mask: str):
        super().__init__()
        self.mask = mask
        self.project = nn.Linear(word_dim, channels, bias=False)

    def forward(self, h: Tensor, words: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, C, S, S), words (B, D, T), real (B, T) -> context (B, C, S, S), attention (B, T, S, S)."""
        keys = self.project(words.transpose(1, 2))  # (B, T, C)
        if self.mask == "released":
            # Of the rows of scores, sample by sample, row k takes the mask of sample k mod B.
            count, positions = len(h), h.shape[2] * h.shape[3]
            rows = torch.arange(count * positions, device=h.device).remainder(count)
            shown = real[rows.unflatten(0, (count, positions))]  # (B, S * S, T)
        else:
            shown = real[:, None]  # (B, 1, T)
        with torch.autocast(h.device.type, enabled=False):  # the products are large: rounded ones choose other words
            exact = torch.promote_types(h.dtype, torch.float32)
            keys = keys.to(exact)
            scores = h.to(exact).flatten(2).transpose(1, 2) @ keys.transpose(1, 2)  # (B, S * S, T)
            shares = scores.masked_fill(~shown, float("-inf")).softmax(dim=2)
            context = (shares @ keys).transpose(1, 2).unflatten(2, h.shape[2:])
        return context.to(h.dtype), shares.transpose(1, 2).unflatten(2, h.shape[2:])


def stage_sizes(imsize: int, stages: int) -> list[int]:
    """Sides of the pictures of each stage, the last `imsize`: (256, 3) -> [64, 128, 256].

    Raises:
        UserError: a side that doubling does not lead to, or too many stages for it.
    """
    if imsize & (imsize - 1):
        raise UserError(f"model.imsize: attngan doubles the side from stage to stage: 4 * 2^k, not {imsize}")
    if imsize >> (stages - 1) < SMALLEST:
        most = (imsize // SMALLEST).bit_length()
        raise UserError(f"attngan.stages: {stages} are too many for pictures of {imsize} pixels: {most} at most")
    return [imsize >> later for later in range(stages - 1, -1, -1)]
