"""AttnGAN's critic of one stage: whether a picture is real, and whether it is real and shows the sentence
(Xu et al. 2018, arXiv 1711.10485)."""

import torch
from torch import Tensor, nn

from ratlip.models.attn_gan.blocks import Leaky, start_as_published

DEEPEST = 4  # halvings, each doubling the channels, to the features' channels; larger pictures go beyond and come back


class Discriminator(nn.Module):
    """Pictures of one side to features, and from these logits, with the sentence and without.

    From larger sides than 64 the halvings go on doubling the channels, and convolutions that keep the side then bring
    them back; smaller sides have fewer.

    Args:
        side: of the pictures, 4 * 2^k and at least 8. channels: after the first halving ("DF": 64 for birds, 96 for
            COCO).
    """

    def __init__(self, side: int, channels: int, sentence_dim: int):
        super().__init__()
        self.side = side
        halvings = (side // 4).bit_length() - 1
        widths = [channels * 2**i for i in range(halvings)]
        back = widths[: DEEPEST - 2 : -1]  # from the widest down to 8 DF
        self.first = nn.Conv2d(3, channels, 4, 2, padding=1, bias=False)
        self.halving = nn.Sequential(*(Leaky(a, b, halving=True) for a, b in zip(widths, widths[1:], strict=False)))
        self.narrowing = nn.Sequential(*(Leaky(a, b, halving=False) for a, b in zip(back, back[1:], strict=False)))
        out = widths[min(halvings, DEEPEST) - 1]
        self.joint = Leaky(out + sentence_dim, out, halving=False)
        self.conditional, self.unconditional = (nn.Conv2d(out, 1, 4, stride=4) for _ in range(2))
        start_as_published(self)
        self.to(memory_format=torch.channels_last)  # which convolutions on CPUs and GPUs are fastest with

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> (B, 8 DF, 4, 4), fewer channels for sides below 64."""
        x = nn.functional.leaky_relu(self.first(images), 0.2)
        return self.narrowing(self.halving(x))

    def real(self, features: Tensor) -> Tensor:
        """Features (B, 8 DF, 4, 4) -> logits (B,) of a real picture."""
        return self.unconditional(features).flatten()

    def matching(self, features: Tensor, sentence: Tensor, samples: int | None = None) -> Tensor:
        """Features (B, 8 DF, 4, 4), sentence (B, E) -> logits (B,) of a real picture that shows it.

        Args:
            samples: of the batch over all processes, where B is not the same on each.
        """
        tiled = sentence[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return self.conditional(self.joint(torch.cat([features, tiled], dim=1), samples)).flatten()

    def forward(self, images: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S), sentence (B, E) -> logits (B,) of `matching` and of `real`."""
        features = self.features(images)
        return self.matching(features, sentence), self.real(features)
