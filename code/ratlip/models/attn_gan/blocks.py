"""What AttnGAN's generator and critics are made of: convolutions with BatchNorm, gated ones, and their start."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratlip.models.blocks import BatchNorm, doubling_kernel, resize_and_convolve
from ratlip.models.moments import moments


class ConvNorm(nn.Module):
    """Convolution without bias, padding 1, then BatchNorm, which in eval mode is done to the filters.

    Args:
        kernel, stride: of the convolution. doubling: nearest resize to twice the side before it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, doubling: bool = False):
        super().__init__()
        self.doubling = doubling
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=1, bias=False)
        self.bn = BatchNorm(out_channels)

    def forward(self, x: Tensor, samples: int | None = None) -> Tensor:
        """x (B, C_in, H, W) -> (B, C_out, H', W'). `samples`: of the batch over all processes, see BatchNorm."""
        weight, shift = self.conv.weight, None
        if not self.training:
            scale, shift = self.bn.running()
            weight = weight * scale[:, None, None, None]
        if self.doubling:
            x = resize_and_convolve(x, doubling_kernel(weight), shift, 2 * x.shape[-1])
        else:
            x = F.conv2d(x, weight, shift, self.conv.stride, self.conv.padding)
        if not self.training:
            return x
        norm = self.bn(*moments(x), x.shape[2] * x.shape[3], samples)
        scale, shift = (v.to(x.dtype)[:, None, None] for v in norm)
        return torch.addcmul(shift, scale, x)


class Gated(ConvNorm):
    """ConvNorm to twice the channels, the first half of which is multiplied by the sigmoid of the second (GLU)."""

    def __init__(self, in_channels: int, out_channels: int, doubling: bool = False):
        super().__init__(in_channels, 2 * out_channels, doubling=doubling)

    def forward(self, x: Tensor, samples: int | None = None) -> Tensor:
        return F.glu(super().forward(x, samples), dim=1)


class Residual(nn.Module):
    """x + ConvNorm(Gated(x))."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = Gated(channels, channels), ConvNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class Leaky(ConvNorm):
    """ConvNorm, LeakyReLU 0.2: halving the side with a 4x4 convolution of stride 2, or keeping it with a 3x3 one."""

    def __init__(self, in_channels: int, out_channels: int, halving: bool):
        super().__init__(in_channels, out_channels, *((4, 2) if halving else (3, 1)))

    def forward(self, x: Tensor, samples: int | None = None) -> Tensor:
        return F.leaky_relu(super().forward(x, samples), 0.2, inplace=True)


def start_as_published(network: nn.Module) -> None:
    """Every convolution and linear layer orthogonal, BatchNorm's weight N(1, 0.02), its bias 0; other biases stay."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(layer.weight)
        elif isinstance(layer, BatchNorm):
            nn.init.normal_(layer.weight, 1, 0.02)
