"""The discriminator: CLIP feature maps and a sentence embedding to one logit (GALIP, arXiv 2301.12959)."""

import torch
from torch import Tensor, nn

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models.blocks import DiscriminatorBlock

FLOOR = 0.01  # share of the mean variance added to that of each direction before whitening divides by its root


class Discriminator(nn.Module):
    """Fuses the feature maps from the shallowest up, then judges them together with the sentence.

    Args:
        clip: read for the width, grid, number of feature maps and embedding size; not kept.
        channels: of the fused features; the released networks have 512.
        start: first value of the numbers that weigh the residual branches and the deeper maps, 0 as released.
            They are single numbers that Adam moves by about the learning rate a step, up and down: in a run of a
            thousand steps they stay near 0, and with them most of the network out of use.
        whiten: read centred and whitened feature maps, by statistics that `fit_whitening` takes. In CLIP's own, faults
            of a picture that everybody sees are faint beside a few directions with nearly all of the variance.
    """

    def __init__(self, clip: FrozenClip, channels: int = 512, start: float = 0.0, whiten: bool = False):
        super().__init__()
        maps = len(clip.feature_blocks)
        deeper_maps = maps - 1
        self.whiten = whiten
        if whiten:
            self.register_buffer("mean", torch.zeros(maps, clip.width, clip.grid, clip.grid))
            self.register_buffer("whitening", torch.eye(clip.width).repeat(maps, 1, 1))
        self.blocks = nn.ModuleList(DiscriminatorBlock(clip.width, clip.width, start) for _ in range(deeper_maps))
        self.betas = nn.Parameter(torch.full((deeper_maps,), start))  # how much of each deeper map is added
        self.main = DiscriminatorBlock(clip.width, channels, start)
        # Two convolutions without padding that together see the whole grid: 4x4 and 4x4 on the released 7x7.
        first = min(4, (clip.grid + 1) // 2)
        self.judge = nn.Sequential(
            nn.Conv2d(channels + clip.embedding_dim, channels // 4, first, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels // 4, 1, clip.grid + 1 - first, bias=False),
        )
        self.to(memory_format=torch.channels_last)  # which convolutions on CPUs and GPUs are fastest with

    @torch.no_grad()
    def fit_whitening(self, feature_maps: Tensor) -> None:
        """Take mean, by position, and covariance, over all positions, of real images' feature maps (B, N, W, g, g)."""
        for number, own in enumerate(feature_maps.unbind(1)):
            mean = own.double().mean(0)  # (W, g, g)
            tokens = (own.double() - mean).movedim(1, 3).flatten(0, 2)  # (B g g, W)
            self.mean[number] = mean
            variances, directions = torch.linalg.eigh(tokens.T @ tokens / len(tokens))
            scales = (variances + FLOOR * variances.mean()).rsqrt()
            self.whitening[number] = directions * scales @ directions.T

    def prepare(self, feature_maps: Tensor) -> Tensor:
        """CLIP feature maps (B, N, W, g, g) -> the same shape, as `features` reads them."""
        if not self.whiten:
            return feature_maps
        with torch.autocast(feature_maps.device.type, enabled=False):  # what is faint would drown in rounding
            return torch.einsum("bnwhv,nwx->bnxhv", feature_maps.to(self.mean.dtype) - self.mean, self.whitening)

    def features(self, prepared: Tensor) -> Tensor:
        """Prepared feature maps (B, N, W, g, g) -> fused features (B, channels, g, g)."""
        x, *deeper = prepared.unbind(1)
        for block, beta, deeper_map in zip(self.blocks, self.betas, deeper, strict=True):
            x = block(x) + beta * deeper_map
        return self.main(x)

    def logits(self, features: Tensor, sentence: Tensor) -> Tensor:
        """Fused features (B, channels, g, g), sentence embedding (B, E) -> logit (B, 1)."""
        tiled = sentence[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return self.judge(torch.cat([features, tiled], dim=1)).flatten(1)

    def forward(self, feature_maps: Tensor, sentence: Tensor) -> Tensor:
        """CLIP feature maps (B, N, W, g, g), sentence embedding (B, E) -> logit (B, 1)."""
        return self.logits(self.features(self.prepare(feature_maps)), sentence)
