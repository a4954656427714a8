"""The generators of DF-GAN and RAT-GAN: noise and a sentence vector to an image, drawn by convolutions alone."""

import math

import torch
from torch import Tensor, nn

from ratlip.errors import UserError
from ratlip.models.blocks import GeneratorBlock, of_blocks, to_images, widths
from ratlip.models.rat import Conditioner

GRID = 4  # side of the map that the noise becomes
HIDDEN_DIM = 256  # of RAT-GAN's LSTM


class Generator(nn.Module):
    """DF-GAN (arXiv 2008.05865) or RAT-GAN (arXiv 2204.10482), from GALIP's blocks.

    In DF-GAN every affine layer reads noise and sentence. In RAT-GAN they read the states of one LSTM, which starts
    from the noise and reads the sentence at each layer; a block at 4x4 comes first, and one number for each block, 0 at
    first, weighs its residual branch.

    Args:
        imsize: side of the images in pixels, a power of two from 32 up. RAT-GAN was published for 256 alone; other
            sizes follow by DF-GAN's rule, a block for each doubling.
        nf: channels at the highest resolution.
        noise_dim, sentence_dim: lengths of the noise and of the sentence vector.
        name: "dfgan" or "ratgan". The next two are RAT-GAN's.
        affines: affine layers of a block, 4 or 6.
        start: first value of the numbers that weigh the residual branches; published: 0.
        noise_scale: what trained networks draw from is this times normal noise cut at 2; 0: normal noise.
    """

    def __init__(
        self,
        imsize: int,
        nf: int,
        noise_dim: int = 100,
        sentence_dim: int = 256,
        name: str = "dfgan",
        affines: int = 4,
        start: float = 0.0,
        noise_scale: float = 0.0,
    ):
        super().__init__()
        ratgan = name == "ratgan"
        self.noise_dim, self.noise_scale = noise_dim, noise_scale
        self.sizes = [GRID * 2**i for i in range(not ratgan, doublings(imsize) + 1)]
        self.affines = affines  # of a block
        channels = widths(nf, len(self.sizes))[::-1]
        self.fc = nn.Linear(noise_dim, channels[0] * GRID**2)
        self.blocks = nn.ModuleList(
            GeneratorBlock(*pair, "galip", False, affines, start if ratgan else None)
            for pair in zip(channels, channels[1:], strict=False)
        )
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)
        affine_channels = [c for block in self.blocks for c in block.affine_channels]
        recurrent = [ratgan] * len(affine_channels)
        self.conditioner = Conditioner(affine_channels, recurrent, noise_dim, sentence_dim, "ratgan", HIDDEN_DIM)
        self.to(memory_format=torch.channels_last)  # which convolutions on CPUs and GPUs are fastest with

    def forward(self, noise: Tensor, sentence: Tensor) -> Tensor:
        """noise (B, Z) standard normal, sentence vector (B, E) -> images (B, 3, S, S) in (-1, 1)."""
        affines = of_blocks(self.conditioner(noise, sentence), self.affines)
        x = self.fc(noise).view(len(noise), -1, GRID, GRID)
        return to_images(x, self.blocks, self.sizes, affines, self.to_rgb).tanh()


def doublings(imsize: int) -> int:
    """From the 4x4 map to an image of that side; UserError for one that is no power of two from 32 up."""
    if imsize < 32 or imsize & (imsize - 1):
        raise UserError(f"DF-GAN and RAT-GAN draw images of 32, 64, 128, 256, ... pixels, not {imsize} (model.imsize)")
    return int(math.log2(imsize // GRID))
