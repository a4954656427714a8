"""LAFITE's layers: weights scaled at run time, filtered resizing, convolutions modulated by a style."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratlip.errors import UserError

GAIN = math.sqrt(2)  # after LeakyReLU, which then keeps the variance of normal numbers
EPS = 1e-8
STYLE = 512  # width of w, and of what styles make of the condition


def working_types(resolution: int, device: torch.device) -> dict[int, torch.dtype | None]:
    """The number type of the maps at each side 4, 8, ..., resolution: autocast's at the four largest from 8 on where
    autocast is on, as published; elsewhere None, the weights' own."""
    on = torch.is_autocast_enabled(device.type)
    low = torch.get_autocast_dtype(device.type) if on else None
    return {side: low if side >= max(resolution // 8, 8) else None for side in sides_to(resolution)}


def sides_to(resolution: int) -> list[int]:
    """4, 8, ..., resolution."""
    if resolution < 8 or resolution & (resolution - 1):
        raise UserError(f"model.imsize: LAFITE draws pictures of a power of two pixels a side, not {resolution}")
    return [2**k for k in range(2, resolution.bit_length())]


def channels_at(sides: list[int], base: int, most: int) -> list[int]:
    """Channels of the maps at each side: base // side, no more than `most`."""
    if base < max(sides):
        raise UserError(f"model.imsize: {max(sides)} pixels leave no channels where there are {base} // side of them")
    return [min(base // side, most) for side in sides]


def activate(x: Tensor, clamp: float | None = None) -> Tensor:
    """LeakyReLU 0.2, in place, then clamped to +-clamp. The gain after it is in x already: it is larger than 0."""
    x = F.leaky_relu(x, 0.2, inplace=True)
    return clamped(x, clamp)


def clamped(x: Tensor, limit: float | None) -> Tensor:
    """x within +-limit. Not by torch.clamp, whose way back is four passes over the maps where one is enough."""
    return x if limit is None else F.hardtanh(x, -limit, limit)


class Linear(nn.Module):
    """y = x (W m / sqrt(in))^T + m b, with W ~ N(0, 1) / m at first: a layer that learns m times as fast as Adam moves
    its weights. With `active`, LeakyReLU 0.2 and the factor sqrt(2) follow.

    Args:
        multiplier: m. bias: of which all of b is at first.
    """

    def __init__(self, inputs: int, outputs: int, multiplier: float = 1.0, bias: float = 0.0, active: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.active = active
        gain = GAIN if active else 1.0
        self.of_bias, self.of_weight = gain * multiplier, gain * multiplier / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) -> (B, out)."""
        y = torch.addmm(self.bias, x, self.weight.t(), beta=self.of_bias, alpha=self.of_weight)
        return activate(y) if self.active else y


class Filtered(torch.autograd.Function):
    """Maps (B, C, h, h), each channel filtered by the same kernel (1, 1, k, k): a convolution or a transposed one.

    Written out because either is the other's way back, as often as one differentiates. PyTorch's second derivative of a
    convolution in groups takes them one by one, and here every channel is a group.
    """

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.how = stride, padding, transposed
        convolve, each = F.conv_transpose2d if transposed else F.conv2d, kernel.expand(x.shape[1], -1, -1, -1)
        with torch.autocast(x.device.type, enabled=False):  # on the way back it may be on
            return convolve(x, each, stride=stride, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx, of_result: Tensor) -> tuple[Tensor | None, ...]:
        (kernel,), (stride, padding, transposed) = ctx.saved_tensors, ctx.how
        return Filtered.apply(of_result, kernel, stride, padding, not transposed), None, None, None, None


class Filter(nn.Module):
    """The binomial filter (1, 3, 3, 1) x (1, 3, 3, 1) / 64 of each channel, with which maps are resized by two."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", (taps[:, None] * taps / 64)[None, None], persistent=False)

    def double(self, x: Tensor) -> Tensor:
        """(B, C, h, h) -> (B, C, 2 h, 2 h): a zero after every pixel, filtered, times 4."""
        return self._filtered(x, 4, 2, 1, True)

    def after_doubling(self, x: Tensor) -> Tensor:
        """What a transposed convolution left, (B, C, 2 h + 1, 2 h + 1) -> (B, C, 2 h, 2 h), times 4."""
        return self._filtered(x, 4, 1, 1)

    def before_halving(self, x: Tensor) -> Tensor:
        """(B, C, h, h) -> (B, C, h + 1, h + 1), for a 3x3 convolution of stride 2."""
        return self._filtered(x, 1, 1, 2)

    def halve(self, x: Tensor) -> Tensor:
        """(B, C, h, h) -> (B, C, h / 2, h / 2)."""
        return self._filtered(x, 1, 2, 1)

    def _filtered(self, x: Tensor, gain: int, stride: int, padding: int, transposed: bool = False) -> Tensor:
        return Filtered.apply(x, (self.kernel * gain).to(x.dtype), stride, padding, transposed)


class Conv(nn.Module):
    """k x k convolution with W / sqrt(in k k), W ~ N(0, 1) at first; then bias, LeakyReLU 0.2 times sqrt(2), clamp.

    Args:
        down: halve the map, filtered. active: without it there is no bias either.
        gain: a factor after the activation. clamp: to +-clamp gain; None: not.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        side: int,
        down: bool = False,
        active: bool = True,
        gain: float = 1.0,
        clamp: float | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side))
        self.bias = nn.Parameter(torch.zeros(outputs)) if active else None
        self.filter = Filter() if down else None
        self.gain = gain * GAIN if active else gain
        self.clamp = None if clamp is None else clamp * gain

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, h) -> (B, out, h, h), or half of h."""
        side = self.weight.shape[-1]
        weight = (self.weight * (self.gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        if self.filter is None:
            stride, padding = 1, side // 2
        elif side == 1:
            x, stride, padding = self.filter.halve(x), 1, 0
        else:
            x, stride, padding = self.filter.before_halving(x), 2, 0
        if self.bias is None:
            return F.conv2d(x, weight, None, stride, padding)
        return activate(F.conv2d(x, weight, (self.bias * self.gain).to(x.dtype), stride, padding), self.clamp)


def modulated(x: Tensor, weight: Tensor, style: Tensor, filter: Filter | None = None) -> Tensor:
    """Convolution with V / |V|, V = weight * style, of each sample, times sqrt(2) (StyleGAN2, arXiv 1912.04958, eq. 1
    to 3) -> (B, out, h, h), or twice h with `filter`.

    The style multiplies the maps before the convolution and 1 / |V| after it: with one kernel for all samples this is
    faster than a convolution in groups, one a sample, with kernels of their own.

    Args:
        x: (B, in, h, h). weight: (out, in, 3, 3). style: (B, in).
    """
    if x.dtype != weight.dtype:  # 1 / |V| cancels both; without them numbers leave float16's range
        weight = weight / (math.sqrt(weight[0].numel()) * weight.abs().amax((1, 2, 3), keepdim=True))
        style = style / style.abs().amax(1, keepdim=True)
    norm = (style.square() @ weight.square().sum((2, 3)).t() + EPS).rsqrt() * GAIN  # (B, out)
    x = x * style[:, :, None, None].to(x.dtype)
    weight = weight.to(x.dtype)
    if filter is None:
        x = F.conv2d(x, weight, padding=1)
    else:
        x = filter.after_doubling(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
    return x * norm[:, :, None, None].to(x.dtype)


class Style(nn.Module):
    """What a layer reads of w and the condition, in one of the released structures.

    With u = two layers of the condition, 512 wide: structure 2, affine(u, w); 1, affine(w) * g + h with g and h of the
    condition; 3, affine(w) alone; 0, affine(w) + affine(u).
    """

    def __init__(self, channels: int, condition: int, structure: int):
        super().__init__()

        def slow() -> list[Linear]:
            middle = (condition + STYLE) // 2
            return [Linear(condition, middle, 0.01, active=True), Linear(middle, STYLE, 0.01, active=True)]

        self.structure = structure
        if structure in (0, 2):
            self.pre = nn.Sequential(*slow())
            self.joint = Linear(STYLE if structure == 0 else 2 * STYLE, channels, bias=1.0)
        if structure in (0, 1, 3):
            self.affine = Linear(STYLE, channels, bias=1.0)
        if structure == 1:
            self.scale, self.shift = (nn.Sequential(*slow(), Linear(STYLE, channels)) for _ in range(2))

    def forward(self, w: Tensor, condition: Tensor) -> Tensor:
        """w (B, 512), condition (B, E) of unit length -> style (B, channels)."""
        if self.structure == 2:
            return self.joint(torch.cat([self.pre(condition), w], dim=1))
        style = self.affine(w)
        if self.structure == 1:
            return torch.addcmul(self.shift(condition), style, self.scale(condition))
        return style if self.structure == 3 else style + self.joint(self.pre(condition))
