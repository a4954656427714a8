"""The discriminators of DF-GAN and RAT-GAN: an image and a sentence vector to one logit."""

import torch
from torch import Tensor, nn

from ratlip.models.blocks import DiscriminatorBlock, widths
from ratlip.models.df_gan.generator import GRID, doublings


class Discriminator(nn.Module):
    """Halves the image down to 4x4 features and judges them together with the sentence (DF-GAN, arXiv 2008.05865).

    Args:
        imsize: side of the images in pixels, a power of two from 32 up.
        nf: channels at the highest resolution.
        sentence_dim: length of the sentence vector.
        name: "dfgan", channels up to 8 nf, or "ratgan", up to 16 nf.
        start: first value of the numbers that weigh the residual branches; published: 0.
        attention: the last block reads the sentence too, at each of its 8x8 positions as much of it as an attention
            over them says (RAT-GAN, arXiv 2204.10482; its authors switched it off as unstable).
    """

    def __init__(
        self,
        imsize: int,
        nf: int,
        sentence_dim: int = 256,
        name: str = "dfgan",
        start: float = 0.0,
        attention: bool = False,
    ):
        super().__init__()
        channels = widths(nf, doublings(imsize), 16 if name == "ratgan" else 8)
        *pairs, last = zip(channels, channels[1:], strict=False)
        self.conv_img = nn.Conv2d(3, nf, 3, padding=1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(*pair, start, halving=True) for pair in pairs)
        self.attention = self.joint = None
        if attention:
            seen = last[0] + sentence_dim
            self.attention = _to_one(seen, 2 * nf, 1)
            self.joint = DiscriminatorBlock(seen, last[1], start, halving=True)
        else:
            self.blocks.append(DiscriminatorBlock(*last, start, halving=True))
        self.judge = _to_one(last[1] + sentence_dim, 2 * nf, GRID)
        self.to(memory_format=torch.channels_last)  # which convolutions on CPUs and GPUs are fastest with

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> features (B, C, 4, 4), with attention (B, C, 8, 8)."""
        x = self.conv_img(images)
        for block in self.blocks:
            x = block(x)
        return x

    def attend(self, features: Tensor, sentence: Tensor) -> Tensor:
        """Features (B, C, 8, 8), sentence vector (B, E) -> the sentence's weight at each position, (B, 1, 8, 8)."""
        scores = self.attention(torch.cat([features, _tiled(sentence, features)], 1)).sigmoid()
        return scores.flatten(1).softmax(1).view_as(scores)

    def logits(self, features: Tensor, sentence: Tensor) -> Tensor:
        """Features (B, C, g, g), sentence vector (B, E) -> logit (B, 1)."""
        if self.attention is not None:
            placed = self.attend(features, sentence) * _tiled(sentence, features)
            features = self.joint(torch.cat([features, placed], 1))  # (B, C, 4, 4)
        return self.judge(torch.cat([features, _tiled(sentence, features)], 1)).flatten(1)

    def forward(self, images: Tensor, sentence: Tensor) -> Tensor:
        """Images (B, 3, S, S), sentence vector (B, E) -> logit (B, 1)."""
        return self.logits(self.features(images), sentence)


def _to_one(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """3x3 convolution, LeakyReLU, and one to a single channel."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 1, kernel, bias=False),
    )


def _tiled(sentence: Tensor, features: Tensor) -> Tensor:
    """A sentence vector (B, E) at every position of features (B, C, g, g) -> (B, E, g, g)."""
    return sentence[:, :, None, None].expand(-1, -1, *features.shape[2:])
