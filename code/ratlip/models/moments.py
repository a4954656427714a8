"""Mean and variance of each sample's channels, of which normalisations and attention are made."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Moments(torch.autograd.Function):
    """Mean and variance (B, C) over the positions of maps (B, C, H, W), in float32 or better.

    Written out because autograd's own way back is six passes over the maps where one is enough, and because
    torch.var_mean is several times slower on channels-last tensors on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, torch.float32)
        mean = x.mean((2, 3), dtype=exact)
        variance = (x - mean[:, :, None, None]).square_().mean((2, 3))
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        positions = x.shape[2] * x.shape[3]
        slope = of_variance * (2 / positions)
        offset = of_mean / positions - slope * mean
        return torch.addcmul(offset[:, :, None, None].to(x.dtype), slope[:, :, None, None].to(x.dtype), x)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B, C, H, W) -> mean and variance (B, C) of each sample's channels."""
    return Moments.apply(x)
