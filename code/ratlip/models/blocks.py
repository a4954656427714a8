"""The residual blocks of the generator and the discriminator, and the convolutions they are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from ratlip import distributed
from ratlip.models.attention import ShuffleAttention
from ratlip.models.rat import Affines

AFFINES_PER_BLOCK = 4  # two fuses, two affine layers each


def fuse(x: Tensor, affines: Affines) -> Tensor:
    """Affine layer, LeakyReLU 0.2, for each of `affines`: x (B, C, H, W) -> (B, C, H, W)."""
    for gamma, beta in affines:
        x = F.leaky_relu(torch.addcmul(beta, gamma, x), 0.2, inplace=True)
    return x


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics, while training, are those of the whole batch over all processes.

    torch.nn.SyncBatchNorm does this on GPUs only; this does it for any backend, with the gradient through the sums.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), of the same B on every process -> the same shape."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1] * distributed.world_size()
        mean = all_reduce(exact.sum((0, 2, 3))) / count
        centred = exact - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class Conv(nn.Module):
    """3x3 convolution; GALIP's is plain with a bias, RATLIP's is followed by BatchNorm, LeakyReLU 0.01 and
    (with `attention`) shuffle attention.

    Args:
        style: "galip" or "ratlip".
    """

    def __init__(self, in_channels: int, out_channels: int, style: str, attention: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=style == "galip")
        self.bn = BatchNorm(out_channels) if style == "ratlip" else None
        self.attention = ShuffleAttention(out_channels) if style == "ratlip" and attention else None

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """x (B, C_in, h, w), first resized to `size` by nearest neighbour -> (B, C_out, size, size)."""
        x = resize_and_convolve(x, self.conv, size or x.shape[-1])
        if self.bn is not None:
            x = F.leaky_relu(self.bn(x), 0.01, inplace=True)
        return x if self.attention is None else self.attention(x)


def resize_and_convolve(x: Tensor, conv: nn.Conv2d, size: int) -> Tensor:
    """Nearest resize of x to (size, size), then the padded 3x3 convolution.

    After an exact doubling the 3x3 window sees only 2x2 different values, so that both together are one 4x4
    transposed convolution of stride 2, with 16 products a position in place of 36. Its kernel is the 3x3 kernel
    correlated with the 2x2 block of ones that nearest doubling is.
    """
    if size == 2 * x.shape[-1]:
        kernel = conv.weight.flip(2, 3).transpose(0, 1)  # (C_in, C_out, 3, 3), as a transposed convolution reads it
        kernel = F.pad(kernel, (0, 1, 0, 0)) + F.pad(kernel, (1, 0, 0, 0))
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))  # (C_in, C_out, 4, 4)
        return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)
    return conv(resize(x, size))


def resize(x: Tensor, size: int) -> Tensor:
    """Nearest resize (PyTorch's "nearest", not "nearest-exact") to (size, size)."""
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="nearest")


class MapperBlock(nn.Module):
    """h + R(h) on the CLIP grid, with R = convolution to half the channels, fuse, convolution back, fuse."""

    def __init__(self, channels: int, style: str, attention: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.conv2 = Conv(channels // 2, channels, style, attention)
        self.affine_channels = [channels // 2] * 2 + [channels] * 2

    def forward(self, x: Tensor, affines: Affines) -> Tensor:
        """x (B, C, g, g) -> (B, C, g, g)."""
        return x + fuse(self.conv2(fuse(self.conv1(x), affines[:2])), affines[2:])


class GeneratorBlock(nn.Module):
    """Nearest resize of h, then shortcut(h) + R(h), R = fuse, convolution, fuse, convolution.

    The affine layers, the activations and the 1x1 shortcut commute with nearest resizing and run before it.
    """

    def __init__(self, in_channels: int, out_channels: int, style: str, attention: bool):
        super().__init__()
        self.conv1 = Conv(in_channels, out_channels, style, attention)
        self.conv2 = Conv(out_channels, out_channels, style, attention)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.affine_channels = [in_channels] * 2 + [out_channels] * 2

    def forward(self, x: Tensor, size: int, affines: Affines) -> Tensor:
        """x (B, C_in, h, h) -> (B, C_out, size, size)."""
        residual = self.conv1(fuse(x, affines[:2]), size)
        return resize(self.shortcut(x), size) + self.conv2(fuse(residual, affines[2:]))


class DiscriminatorBlock(nn.Module):
    """shortcut(x) + gamma * R(x), R = 3x3, LeakyReLU 0.2, 3x3, LeakyReLU 0.2; gamma is one number."""

    def __init__(self, in_channels: int, out_channels: int, gamma: float = 0.0):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2),
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.gamma = nn.Parameter(torch.tensor(gamma))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.gamma * self.residual(x)
