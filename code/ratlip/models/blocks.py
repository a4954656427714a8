"""The residual blocks of the generator and the discriminator, and the convolutions they are made of."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ratlip import distributed
from ratlip.models.attention import ShuffleAttention, shuffle, unshuffle
from ratlip.models.moments import moments
from ratlip.models.rat import Affines

AFFINES_PER_BLOCK = 4  # two fuses, two affine layers each
LARGE = 2**20  # elements of one sample's map (4 MiB in float32), from which on it is large


def fuse(x: Tensor, *affines: Tensor) -> Tensor:
    """Affine layer, LeakyReLU 0.2, for each gamma, beta of `affines` (B, C, 1, 1): x (B, C, H, W) -> (B, C, H, W)."""
    for gamma, beta in zip(affines[::2], affines[1::2], strict=True):
        x = F.leaky_relu(torch.addcmul(beta, gamma, x), 0.2, inplace=True)
    return x


def pieces(x: Sequence[Tensor], elements: int) -> Sequence[Tensor]:
    """A batch of maps, as the pieces (b, C, H, W) that it has been cut into -> as those for work on maps of `elements`
    a sample.

    On a CPU large maps are taken sample by sample: one just fits into the processor's cache, and a batch of them is so
    large that the system gives and takes back its memory for every single operation.
    """
    if elements < LARGE or x[0].device.type != "cpu":
        return x
    return [sample for piece in x for sample in piece.split(1)]


def recomputed(function: Callable[..., Tensor], tensors: Sequence[Tensor], elements: int) -> Tensor:
    """function(*tensors). Where maps of `elements` a sample are large, what it keeps for the backward pass is computed
    again there instead, but for the last convolution in it, whose result nothing needs."""
    if elements < LARGE or not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d as what it multiplies and adds to each channel. While training its statistics are those of the whole
    batch over all processes.

    torch.nn.SyncBatchNorm does this on GPUs only; this does it for any backend, with the gradient through the sums.
    """

    def forward(
        self, means: Tensor, variances: Tensor, positions: int, samples: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,), by the batch; moves the running statistics.

        Args:
            means, variances: (B, C), of the `positions` of each sample's map.
            samples: over all processes; None: B is the same on every process.
        """
        count = samples or len(means) * distributed.world_size()
        mean = distributed.sum_with_gradient(means.sum(0)) / count
        variance = distributed.sum_with_gradient((variances + (means - mean).square()).sum(0)) / count
        with torch.no_grad():
            count *= positions
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        return self._scale_and_shift(mean, variance)

    def running(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,), by the running statistics."""
        return self._scale_and_shift(self.running_mean, self.running_var)

    def _scale_and_shift(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.weight * (variance + self.eps).rsqrt()
        return scale, self.bias - mean * scale


class Conv(nn.Module):
    """3x3 convolution; GALIP's is plain with a bias, RATLIP's is followed by BatchNorm, LeakyReLU 0.01 and
    (with `attention`) shuffle attention.

    What follows is left to `finish`, so that it is computed with what comes next. The attention's channel shuffle and,
    in eval mode, BatchNorm are done to the filters, which are smaller than the maps.

    Args:
        style: "galip" or "ratlip".
        gain: first value of a number, one parameter, that GALIP's is multiplied by; None: of none.
    """

    def __init__(self, in_channels: int, out_channels: int, style: str, attention: bool, gain: float | None = None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=style == "galip")
        self.bn = BatchNorm(out_channels) if style == "ratlip" else None
        self.attention = ShuffleAttention(out_channels) if style == "ratlip" and attention else None
        self.gain = nn.Parameter(torch.tensor(gain)) if gain is not None else None
        self._kept = (None, None)  # what _filters gave, and for which weights

    def forward(
        self, before: Callable[..., Tensor], batch: Sequence[Sequence[Tensor]], size: int
    ) -> list[list[Tensor]]:
        """What `before` makes of the tensors of each piece of a batch, (b, C_in, h, w), resized to `size` by nearest
        neighbour and convolved -> for each piece (b, C_out, size, size) and what else `finish` needs."""
        kernel, bias = self._filters(size == 2 * batch[0][0].shape[-1])

        def work(*tensors: Tensor) -> Tensor:
            return resize_and_convolve(before(*tensors), kernel, bias, size)

        elements = self.conv.out_channels * size**2
        x = [recomputed(work, tensors, elements) for tensors in batch]
        if self.bn is None or not self.training:
            return [[piece] for piece in x]
        shuffled = self.attention is not None
        statistics = (torch.cat(v) for v in zip(*map(moments, x), strict=True))  # means, variances (B, C_out)
        norm = self.bn(*(unshuffle(v.T).T if shuffled else v for v in statistics), size**2)
        norm = [(shuffle(v) if shuffled else v).to(x[0].dtype)[:, None, None] for v in norm]
        return [[piece, *norm] for piece in x]

    def train(self, mode: bool = True) -> "Conv":
        """As nn.Module's. What is kept goes: fused optimisers change weights and leave no trace of it."""
        self._kept = (None, None)
        return super().train(mode)

    def _filters(self, doubling: bool) -> tuple[Tensor, Tensor | None]:
        """What `_prepare` gives. For sampling on a CPU it is kept until the weights change: making it takes a sixth of
        the time of a single image."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.conv.weight.is_cuda:
            return self._prepare(doubling)
        parts = [*self.conv.state_dict().values(), *(self.bn.state_dict().values() if self.bn is not None else ())]
        parts += [self.gain] if self.gain is not None else []
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else parts[0].dtype
        state = doubling, dtype, [(part.data_ptr(), part._version) for part in parts]
        if self._kept[0] != state:
            kernel, bias = self._prepare(doubling)
            self._kept = state, (kernel.to(dtype), bias)
        return self._kept[1]

    def _prepare(self, doubling: bool) -> tuple[Tensor, Tensor | None]:
        """Kernel for `resize_and_convolve` and bias, with all in them that can be."""
        weight, bias = self.conv.weight, self.conv.bias
        if self.bn is not None and not self.training:
            scale, bias = self.bn.running()
            weight = weight * scale[:, None, None, None]
        if self.gain is not None:
            weight, bias = self.gain * weight, self.gain * bias
        if self.attention is not None:
            weight, bias = shuffle(weight), bias if bias is None else shuffle(bias)
        return doubling_kernel(weight) if doubling else weight, bias

    def finish(self, x: Tensor, *norm: Tensor) -> Tensor:
        """BatchNorm's scale and shift, LeakyReLU and the attention's gates on what `forward` gave."""
        if self.bn is None:
            return x
        x = F.leaky_relu(torch.addcmul(norm[1], norm[0], x) if norm else x, 0.01)
        return x if self.attention is None else self.attention(x)


def doubling_kernel(weight: Tensor) -> Tensor:
    """The 4x4 kernel of the transposed convolution that nearest doubling and this 3x3 convolution together are.

    After an exact doubling the 3x3 window sees only 2x2 different values: 16 products a position in place of 36.

    Args:
        weight: (C_out, C_in, 3, 3). The result is (C_in, C_out, 4, 4), for stride 2 and padding 1.
    """
    # As a matrix (3, 4), nearest doubling followed by a kernel (w0, w1, w2): what a transposed convolution of stride 2
    # reads, (0, 0, 1, 1), (0, 1, 1, 0), (1, 1, 0, 0). Made where the weights are: a GPU would be waited for else.
    places = torch.arange(3, device=weight.device)[:, None] + torch.arange(4, device=weight.device)
    along = (places // 2 == 1).to(weight.dtype)
    taps = weight.permute(1, 2, 3, 0).flatten(1, 2)  # (C_in, 9, C_out)
    kernel = torch.kron(along, along).T @ taps  # (C_in, 16, C_out)
    # In channels-last order, with which transposed convolutions on CPUs take a third less time.
    return kernel.unflatten(1, (4, 4)).permute(0, 3, 1, 2)


def resize_and_convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """Nearest resize of x (B, C_in, h, w) to (size, size), then the padded 3x3 convolution -> (B, C_out, size, size).

    Args:
        kernel: (C_out, C_in, 3, 3); where size is 2 h its `doubling_kernel`.
    """
    if size == 2 * x.shape[-1]:
        return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    return F.conv2d(resize(x, size), kernel, bias, padding=1)


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
        first, second = flat(affines[:2]), flat(affines[2:])
        (residual,) = self.conv2(fuse, [[self.conv1(x), *first]], x.shape[-1])
        return x + fuse(self.conv2.finish(*residual), *second)


class GeneratorBlock(nn.Module):
    """Nearest resize of h, then shortcut(h) + R(h), R = fuse, convolution, fuse, convolution.

    The affine layers, the activations and the 1x1 shortcut commute with nearest resizing and run before it.

    Args:
        style, attention: see Conv.
        affines: of the block, half of them in each fuse.
        gain: first value of the one number that weighs R; None: R is not weighed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: str,
        attention: bool,
        affines: int = AFFINES_PER_BLOCK,
        gain: float | None = None,
    ):
        super().__init__()
        self.conv1 = Conv(in_channels, out_channels, style, attention)
        self.conv2 = Conv(out_channels, out_channels, style, attention, gain)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.affine_channels = [in_channels] * (affines // 2) + [out_channels] * (affines // 2)

    def forward(self, x: Sequence[Tensor], size: int, affines: Affines) -> list[Tensor]:
        """Pieces of a batch, (b, C_in, h, h) -> (b, C_out, size, size), in as many pieces or more."""
        elements = self.conv1.conv.out_channels * size**2
        x = pieces(x, elements)
        half = len(affines) // 2
        first, second = (  # of each piece: gamma, beta, gamma, beta, ...
            list(zip(*(tensor.chunk(len(x)) for tensor in flat(pairs)), strict=True))
            for pairs in (affines[:half], affines[half:])
        )

        def between(*tensors: Tensor) -> Tensor:
            return fuse(self.conv1.finish(*tensors[: -2 * half]), *tensors[-2 * half :])

        def add(shortcut: Tensor, *residual: Tensor) -> Tensor:
            return self.conv2.finish(*residual) + resize(shortcut, size)

        residual = self.conv1(fuse, [[piece, *own] for piece, own in zip(x, first, strict=True)], size)
        residual = self.conv2(between, [[*piece, *own] for piece, own in zip(residual, second, strict=True)], size)
        return [recomputed(add, [self.shortcut(piece), *own], elements) for piece, own in zip(x, residual, strict=True)]


def widths(nf: int, count: int, most: int = 8) -> list[int]:
    """Channels between `count` blocks, from the image inwards: nf * 1, 2, 4, ... up to nf * most."""
    return [nf * min(2**i, most) for i in range(count + 1)]


def to_images(
    x: Tensor,
    blocks: Sequence[GeneratorBlock],
    sizes: Sequence[int],
    affines: Sequence[Affines],
    to_rgb: Callable[[Tensor], Tensor],
) -> Tensor:
    """Maps x (B, C, g, g) through blocks of these output sides, LeakyReLU 0.2 and a convolution -> (B, 3, S, S)."""
    pieces_of_x = [x]
    for block, size, own in zip(blocks, sizes, affines, strict=True):
        pieces_of_x = block(pieces_of_x, size, own)
    return torch.cat(
        [recomputed(lambda x: to_rgb(F.leaky_relu(x, 0.2)), [piece], piece[0].numel()) for piece in pieces_of_x]
    )


def of_blocks(affines: Affines, count: int = AFFINES_PER_BLOCK) -> list[Affines]:
    """The affine layers of a network -> `count` of them for each block."""
    return [affines[i : i + count] for i in range(0, len(affines), count)]


def flat(affines: Affines) -> list[Tensor]:
    """[(gamma, beta), (gamma, beta)] -> [gamma, beta, gamma, beta]."""
    return [tensor for pair in affines for tensor in pair]


class DiscriminatorBlock(nn.Module):
    """shortcut(x) + gamma * R(x), R = 3x3, LeakyReLU 0.2, 3x3, LeakyReLU 0.2; gamma is one number.

    Args:
        gamma: its first value.
        halving: R begins with 4x4, stride 2, and the shortcut's map is averaged over 2x2 positions.
    """

    def __init__(self, in_channels: int, out_channels: int, gamma: float = 0.0, halving: bool = False):
        super().__init__()
        self.halving = halving
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3 + halving, 1 + halving, padding=1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2),
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.gamma = nn.Parameter(torch.tensor(gamma))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C_in, h, h) -> (B, C_out, h, h), or h / 2 in place of h."""
        shortcut = self.shortcut(F.avg_pool2d(x, 2) if self.halving else x)  # 1x1: the average may come first
        return shortcut + self.gamma * self.residual(x)
