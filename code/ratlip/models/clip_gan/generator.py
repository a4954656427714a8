"""The generator: noise and a sentence embedding to an image, through a frozen CLIP vision transformer."""

import math

import torch
from torch import Tensor, nn

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models.blocks import AFFINES_PER_BLOCK, GeneratorBlock, MapperBlock, of_blocks, to_images, widths
from ratlip.models.rat import Conditioner

MAPPER_CHANNELS = 64
MAPPER_BLOCKS = 4


class Generator(nn.Module):
    """RATLIP (arXiv 2405.08114) or GALIP (arXiv 2301.12959), from the same blocks.

    Noise becomes a small map, fused with the caption (mapper blocks); CLIP's vision transformer, prompted with
    the caption, turns it into visual features (mapper); generator blocks draw the image from them.

    Args:
        clip: frozen CLIP, shared with the rest of the program. It is not part of this module's parameters.
        imsize: side of the images in pixels, 4 * 2^k or 224.
        nf: channels at the highest resolution.
        noise_dim: length of the noise vector.
        name: "ratlip" or "galip". The next three are RATLIP's.
        rat_state: "shared" or "independent" LSTM state, see Conditioner.
        rat_scope: the layers that are recurrent: "mapper" (the mapper blocks) or "all" (generator blocks too).
        shuffle_attention: whether each convolution ends in shuffle attention.
    """

    def __init__(
        self,
        clip: FrozenClip,
        imsize: int,
        nf: int,
        noise_dim: int = 100,
        name: str = "ratlip",
        rat_state: str = "shared",
        rat_scope: str = "mapper",
        shuffle_attention: bool = True,
    ):
        super().__init__()
        # In a tuple, CLIP is no submodule: no second copy in checkpoints, optimisers or the parameter count.
        self._clip = (clip,)
        self.noise_dim = noise_dim
        self.sizes = block_sizes(imsize)
        channels = widths(nf, len(self.sizes))[::-1]
        style = (name, shuffle_attention)
        self.fc_code = nn.Linear(noise_dim, MAPPER_CHANNELS * clip.grid**2)
        self.mapper_blocks = nn.ModuleList(MapperBlock(MAPPER_CHANNELS, *style) for _ in range(MAPPER_BLOCKS))
        self.conv_fuse = nn.Conv2d(MAPPER_CHANNELS, clip.width, 5, padding=2)
        self.fc_prompt = nn.Linear(noise_dim + clip.embedding_dim, len(clip.prompt_blocks) * clip.width)
        self.conv = nn.Conv2d(clip.width, channels[0], 5, padding=2)
        self.blocks = nn.ModuleList(GeneratorBlock(*pair, *style) for pair in zip(channels, channels[1:], strict=False))
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)

        affine_channels = [c for block in [*self.mapper_blocks, *self.blocks] for c in block.affine_channels]
        in_mapper = [i < AFFINES_PER_BLOCK * MAPPER_BLOCKS for i in range(len(affine_channels))]
        recurrent = [name == "ratlip" and (rat_scope == "all" or inside) for inside in in_mapper]
        self.conditioner = Conditioner(affine_channels, recurrent, noise_dim, clip.embedding_dim, rat_state)
        self.to(memory_format=torch.channels_last)  # which convolutions on CPUs and GPUs are fastest with

    @property
    def clip(self) -> FrozenClip:
        """The frozen CLIP that this generator draws through."""
        return self._clip[0]

    def forward(self, noise: Tensor, sentence: Tensor) -> Tensor:
        """noise (B, Z) standard normal, sentence embedding (B, E), not normalised -> images (B, 3, S, S).

        There is no final squashing: images are trained towards [-1, 1] and clamped when shown or scored.
        """
        affines = of_blocks(self.conditioner(noise, sentence))

        x = self.fc_code(noise).view(len(noise), MAPPER_CHANNELS, self.clip.grid, self.clip.grid)
        for block, own in zip(self.mapper_blocks, affines[:MAPPER_BLOCKS], strict=True):
            x = block(x, own)
        features = self.conv_fuse(x)  # (B, W, g, g)
        prompts = self.fc_prompt(torch.cat([noise, sentence], dim=1)).unflatten(1, (-1, self.clip.width))
        x = self.conv(features + 0.1 * self.clip.mapper(features, prompts))  # (B, 8 nf, g, g)
        return to_images(x, self.blocks, self.sizes, affines[MAPPER_BLOCKS:], self.to_rgb)


def block_sizes(imsize: int) -> list[int]:
    """Output side of each generator block: 8, 16, ... up to imsize; the released 224 follows 128."""
    count = math.ceil(math.log2(imsize / 4))
    return [min(4 * 2**i, imsize) for i in range(1, count + 1)]
