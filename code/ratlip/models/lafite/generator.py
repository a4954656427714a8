"""LAFITE's generator: StyleGAN2 whose every style reads a CLIP feature (arXiv 2111.13792, 1912.04958)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratlip import distributed
from ratlip.models.lafite.layers import (
    EPS,
    GAIN,
    STYLE,
    Filter,
    Linear,
    Style,
    activate,
    channels_at,
    clamped,
    modulated,
    sides_to,
    working_types,
)
from ratlip.models.lafite.noise import noise_maps

NOISE_MODES = ("random", "const", "none")
MEAN_KEPT = 0.995  # of the mean w, whenever it moves


class Layer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, LeakyReLU 0.2 times sqrt(2), clamp."""

    def __init__(self, inputs: int, outputs: int, side: int, up: bool, style: Style, clamp: float | None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(side, side))
        self.style = style
        self.filter = Filter() if up else None
        self.side, self.clamp = side, clamp

    def forward(self, x: Tensor, w: Tensor, condition: Tensor, noise: Tensor | None) -> Tensor:
        """x (B, in, h, h), w (B, 512), condition (B, E), noise (B, 1, side, side), (side, side) or None
        -> (B, out, side, side)."""
        x = modulated(x, self.weight, self.style(w, condition), self.filter)
        if noise is not None:
            x = x + (noise * (self.noise_strength * GAIN)).to(x.dtype)
        return activate(x + (self.bias * GAIN).to(x.dtype)[:, None, None], self.clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to the three colours, bias, clamp."""

    def __init__(self, inputs: int, style: Style, clamp: float | None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.style, self.clamp = style, clamp

    def forward(self, x: Tensor, w: Tensor, condition: Tensor) -> Tensor:
        """x (B, in, h, h), w (B, 512), condition (B, E) -> (B, 3, h, h), of the weights' type."""
        style = self.style(w, condition) / math.sqrt(x.shape[1])
        x = F.conv2d(x * style[:, :, None, None].to(x.dtype), self.weight.to(x.dtype), self.bias.to(x.dtype))
        return clamped(x, self.clamp).to(self.weight.dtype)


class Block(nn.Module):
    """The layers at one side: conv0 (not at side 4), which doubles, conv1 and torgb."""

    def __init__(self, inputs: int, outputs: int, side: int, condition: int, structure: int, clamp: float | None):
        super().__init__()
        if side == 4:
            self.const = nn.Parameter(torch.randn(outputs, 4, 4))
        else:
            self.conv0 = Layer(inputs, outputs, side, True, Style(inputs, condition, structure), clamp)
            self.filter = Filter()
        self.conv1 = Layer(outputs, outputs, side, False, Style(outputs, condition, structure), clamp)
        self.torgb = ToRGB(outputs, Style(outputs, condition, structure), clamp)

    @property
    def layers(self) -> list[Layer]:
        """Those that noise is added in."""
        return [self.conv1] if hasattr(self, "const") else [self.conv0, self.conv1]

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        rows: Sequence[Tensor],
        condition: Tensor,
        noise: Sequence[Tensor | None],
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, C, h, h) and image (B, 3, h, h) of the block before, of each layer a row of w (B, 512), of each with
        noise a map -> the same at this side; x of `dtype`."""
        if x is None:
            x = self.const.expand(len(condition), -1, -1, -1)
            x = x.contiguous(memory_format=torch.channels_last)
        x = x.to(dtype or self.conv1.weight.dtype)
        for layer, w, own in zip(self.layers, rows, noise, strict=False):
            x = layer(x, w, condition, own)
        colours = self.torgb(x, rows[-1], condition)
        return x, colours if image is None else self.filter.double(image) + colours


class Mapping(nn.Module):
    """Noise to w, through `depth` layers, and the mean of w."""

    def __init__(self, noise_dim: int, depth: int):
        super().__init__()
        widths = [noise_dim] + [STYLE] * depth
        pairs = zip(widths, widths[1:], strict=False)
        self.layers = nn.Sequential(*(Linear(*pair, 0.01, active=True) for pair in pairs))
        self.register_buffer("w_avg", torch.zeros(STYLE))

    def forward(self, noise: Tensor) -> Tensor:
        """(B, Z) -> w (B, 512)."""
        return self.layers(noise * (noise.square().mean(1, keepdim=True) + EPS).rsqrt())

    @torch.no_grad()
    def move_average(self, w: Tensor) -> None:
        """Move the kept mean a little towards that of w (B, 512), over all processes."""
        mean = distributed.sum_with_gradient(w.mean(0)) / distributed.world_size()
        self.w_avg.copy_(mean.lerp(self.w_avg, MEAN_KEPT))


class Generator(nn.Module):
    """Noise and a CLIP feature to a picture.

    Where autocast is on, the four largest sides run in its number type, all else in float32.

    Args:
        condition_dim: E, length of CLIP's embeddings.
        imsize: side of the pictures in pixels, a power of two from 8 up.
        noise_dim: length of the noise.
        base, most: a map of side r has min(base // r, most) channels.
        depth: layers from the noise to w.
        structure: of styles (see `Style`) up to side `change`; above it they are of structure 1, as published.
        clamp: of the maps, to +-clamp; None: not.
        noise_mode: noise is added in each 3x3 convolution: "random", maps of each picture's own that follow from its
            noise vector (published: new ones with every call); "const", the stored ones; "none".
    """

    def __init__(
        self,
        condition_dim: int,
        imsize: int,
        noise_dim: int = 512,
        base: int = 32768,
        most: int = 512,
        depth: int = 8,
        structure: int = 2,
        change: int = 256,
        clamp: float | None = 256.0,
        noise_mode: str = "random",
    ):
        super().__init__()
        self.noise_dim, self.condition_dim, self.noise_mode = noise_dim, condition_dim, noise_mode
        self.sizes = sides_to(imsize)
        self.mapping = Mapping(noise_dim, depth)
        channels = channels_at(self.sizes, base, most)
        self.blocks = nn.ModuleList(
            Block(inputs, outputs, side, condition_dim, 1 if side > change else structure, clamp)
            for inputs, outputs, side in zip([0, *channels], channels, self.sizes, strict=False)
        )
        self.to(memory_format=torch.channels_last)  # which convolutions on CPUs and GPUs are fastest with

    @property
    def rows(self) -> int:
        """Rows of w that layers read: two a side; a torgb shares its own with the conv0 that follows."""
        return 2 * len(self.sizes)

    def styles(
        self, noise: Tensor, second: Tensor | None = None, crossover: int | None = None, track: bool = False
    ) -> Tensor:
        """Rows of w (B, rows, 512) of noise (B, Z), those from `crossover` on of the noise `second` (style mixing).

        Args:
            track: move the kept mean of w, as every pass does in training.
        """
        with torch.autocast(noise.device.type, enabled=False):
            w = self.mapping(noise)
            if track:
                self.mapping.move_average(w)
            rows = w[:, None].expand(-1, self.rows, -1)
            if second is None or crossover is None:
                return rows
            others = self.mapping(second)[:, None].expand(-1, self.rows - crossover, -1)
            return torch.cat([rows[:, :crossover], others], dim=1)

    def truncated(self, rows: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
        """Rows of w (B, rows, 512), those before `cutoff` (all) moved towards the mean: w_avg + psi (w - w_avg)."""
        near = self.mapping.w_avg.lerp(rows[:, :cutoff], psi)
        return torch.cat([near, rows[:, near.shape[1] :]], dim=1)

    def maps(self, noise: Tensor) -> list[Tensor | None]:
        """The noise map of each layer that adds one, by the noise mode, for pictures of noise (B, Z)."""
        layers = [layer for block in self.blocks for layer in block.layers]
        if self.noise_mode == "random":
            return noise_maps(noise, [layer.side for layer in layers])
        return [layer.noise_const if self.noise_mode == "const" else None for layer in layers]

    def synthesis(self, rows: Tensor, condition: Tensor, maps: Sequence[Tensor | None]) -> Tensor:
        """Rows of w (B, rows, 512), condition (B, E) of unit length, `maps` as `maps()` gives them
        -> pictures (B, 3, S, S), towards [-1, 1], not clamped to it."""
        types = working_types(self.sizes[-1], rows.device)
        maps, x, image, first = list(maps), None, None, 0
        with torch.autocast(rows.device.type, enabled=False):
            for block, side in zip(self.blocks, self.sizes, strict=True):
                count = len(block.layers)
                own = rows[:, first : first + count + 1].unbind(1)
                x, image = block(x, image, own, condition, maps[:count], types[side])
                maps, first = maps[count:], first + count
        return image

    def forward(self, noise: Tensor, sentence: Tensor, psi: float = 1.0, cutoff: int | None = None) -> Tensor:
        """noise (B, Z) standard normal, CLIP feature (B, E) of any length -> pictures (B, 3, S, S).

        Args:
            psi: below 1: truncation (see `truncated`).
        """
        rows = self.styles(noise)
        if psi != 1:
            rows = self.truncated(rows, psi, cutoff)
        condition = F.normalize(sentence.to(rows.dtype), dim=1)
        return self.synthesis(rows, condition, self.maps(noise))
