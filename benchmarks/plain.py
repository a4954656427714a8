"""Released GALIP and RATLIP written plainly, eager and in float32: what benchmarks/speed.py measures ours against.

Every operation stands where the description of the released networks has it: NCHW, affine layers and activations after
the upsampling, a small network for each gamma and beta, statistics by PyTorch's own layers. Parameters have the
released names: a released netG, netD or netC loads, and `ratlip.released.load_networks` reads what these give.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (512, 512, 512, 512, 256, 128, 64)  # nf * min(2^i, 8), reversed, for nf 64
SIZES = (8, 16, 32, 64, 128, 224)
FEATURE_BLOCKS = (1, 4, 8)
PROMPT_BLOCKS = range(1, 9)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NOISE_DIM, SENTENCE_DIM, WIDTH = 100, 512, 768
CONDITION_DIM = NOISE_DIM + SENTENCE_DIM


class Linears(nn.Module):
    """Linear, ReLU, Linear."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(CONDITION_DIM, channels), nn.Linear(channels, channels)

    def forward(self, condition: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(condition)))


class Affine(nn.Module):
    """gamma(c) * x + beta(c), by channel; `recurrent`: of an LSTM's one step on c from zero state."""

    def __init__(self, channels: int, recurrent: bool):
        super().__init__()
        self.rnn = nn.LSTM(CONDITION_DIM, 64) if recurrent else None
        self.fc_gamma, self.fc_beta = (
            nn.Sequential(nn.Linear(64, channels), nn.ReLU(), nn.Linear(channels, channels))
            if recurrent
            else Linears(channels)
            for _ in range(2)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.rnn is not None:
            condition = self.rnn(condition[None])[0][0]
        return self.fc_gamma(condition)[:, :, None, None] * x + self.fc_beta(condition)[:, :, None, None]


class Fuse(nn.Module):
    """Affine layer, LeakyReLU 0.2, twice."""

    def __init__(self, channels: int, recurrent: bool):
        super().__init__()
        self.affine0, self.affine1 = Affine(channels, recurrent), Affine(channels, recurrent)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = F.leaky_relu(self.affine0(x, condition), 0.2, inplace=True)
        return F.leaky_relu(self.affine1(x, condition), 0.2, inplace=True)


class ShuffleAttention(nn.Module):
    """SA-Net's, with 8 groups."""

    def __init__(self, channels: int):
        super().__init__()
        self.cweight, self.sweight = (nn.Parameter(torch.zeros(1, channels // 16, 1, 1)) for _ in range(2))
        self.cbias, self.sbias = (nn.Parameter(torch.ones(1, channels // 16, 1, 1)) for _ in range(2))
        self.gn = nn.GroupNorm(channels // 16, channels // 16)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        first, second = x.reshape(b * 8, c // 8, h, w).chunk(2, dim=1)
        first = first * torch.sigmoid(self.cweight * first.mean((2, 3), keepdim=True) + self.cbias)
        second = second * torch.sigmoid(self.sweight * self.gn(second) + self.sbias)
        x = torch.cat([first, second], dim=1).reshape(b, 2, c // 2, h, w)
        return x.transpose(1, 2).reshape(b, c, h, w)


class Conv(nn.Module):
    """RATLIP's: 3x3 convolution, BatchNorm, LeakyReLU 0.01, shuffle attention."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.se = ShuffleAttention(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(F.leaky_relu(self.bn(self.conv(x)), 0.01, inplace=True))


def conv(in_channels: int, out_channels: int, ratlip: bool) -> nn.Module:
    """The 3x3 convolution of either network."""
    return Conv(in_channels, out_channels) if ratlip else nn.Conv2d(in_channels, out_channels, 3, padding=1)


class FBlock(nn.Module):
    """h + R(h) on 64 channels of the CLIP grid."""

    def __init__(self, ratlip: bool):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(64, 32, 3, padding=1), conv(32, 64, ratlip)
        self.fuse1, self.fuse2 = Fuse(32, ratlip), Fuse(64, ratlip)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.fuse2(self.conv2(self.fuse1(self.conv1(x), condition)), condition)


class GBlock(nn.Module):
    """Nearest resize, then sc(h) + R(h)."""

    def __init__(self, in_channels: int, out_channels: int, ratlip: bool):
        super().__init__()
        self.fuse1, self.fuse2 = Fuse(in_channels, False), Fuse(out_channels, False)
        self.c1, self.c2 = conv(in_channels, out_channels, ratlip), conv(out_channels, out_channels, ratlip)
        self.c_sc = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, size: int, condition: Tensor) -> Tensor:
        x = F.interpolate(x, (size, size), mode="nearest")
        residual = self.c2(self.fuse2(self.c1(self.fuse1(x, condition)), condition))
        return self.c_sc(x) + residual


class Mapping(nn.Module):
    """From the noise's map to visual features, through CLIP's vision transformer."""

    def __init__(self, ratlip: bool):
        super().__init__()
        self.FBlocks = nn.ModuleList(FBlock(ratlip) for _ in range(4))
        self.conv_fuse = nn.Conv2d(64, WIDTH, 5, padding=2)
        self.fc_prompt = nn.Linear(CONDITION_DIM, len(PROMPT_BLOCKS) * WIDTH)
        self.conv = nn.Conv2d(WIDTH, CHANNELS[0], 5, padding=2)

    def forward(self, x: Tensor, condition: Tensor, clip: nn.Module) -> Tensor:
        for block in self.FBlocks:
            x = block(x, condition)
        x = self.conv_fuse(x)  # (B, W, 7, 7)
        prompts = self.fc_prompt(condition).view(len(x), len(PROMPT_BLOCKS), WIDTH)
        return self.conv(x + 0.1 * mapper(clip, x, prompts))


class Generator(nn.Module):
    """netG: noise (B, 100), sentence embedding (B, 512) -> images (B, 3, 224, 224), not clamped.

    Args:
        clip: OpenAI's ViT-B/32, shared with the discriminator; no part of this module.
        ratlip: False: GALIP.
    """

    def __init__(self, clip: nn.Module, ratlip: bool = True):
        super().__init__()
        self._clip = (clip,)
        self.fc_code = nn.Linear(NOISE_DIM, 64 * 7 * 7)
        self.mapping = Mapping(ratlip)
        self.GBlocks = nn.ModuleList(GBlock(*pair, ratlip) for pair in zip(CHANNELS, CHANNELS[1:], strict=False))
        self.to_rgb = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(CHANNELS[-1], 3, 3, padding=1))

    def forward(self, noise: Tensor, sentence: Tensor) -> Tensor:
        condition = torch.cat([noise, sentence], dim=1)
        x = self.mapping(self.fc_code(noise).view(-1, 64, 7, 7), condition, self._clip[0])
        for block, size in zip(self.GBlocks, SIZES, strict=True):
            x = block(x, size, condition)
        return self.to_rgb(x)


class DBlock(nn.Module):
    """sc(x) + gamma * R(x); `conv_s` of blocks that keep their width is stored and not used."""

    def __init__(self, in_channels: int, out_channels: int, beta: bool):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        if beta:
            self.beta = nn.Parameter(torch.zeros(1))
        self.conv_r = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.conv_s = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_s(x) + self.gamma * self.conv_r(x)


class NetD(nn.Module):
    """CLIP feature maps (B, 3, 768, 7, 7) -> fused features (B, 512, 7, 7)."""

    def __init__(self):
        super().__init__()
        self.DBlocks = nn.ModuleList(DBlock(WIDTH, WIDTH, beta=True) for _ in range(2))
        self.main = DBlock(WIDTH, 512, beta=False)

    def forward(self, maps: Tensor) -> Tensor:
        x = maps[:, 0]
        for i, block in enumerate(self.DBlocks):
            x = block(x) + block.beta * maps[:, i + 1]
        return self.main(x)


class NetC(nn.Module):
    """Fused features (B, 512, 7, 7), sentence embedding (B, 512) -> logit (B, 1)."""

    def __init__(self):
        super().__init__()
        self.joint_conv = nn.Sequential(
            nn.Conv2d(512 + SENTENCE_DIM, 128, 4, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(128, 1, 4, bias=False),
        )

    def forward(self, features: Tensor, sentence: Tensor) -> Tensor:
        tiled = sentence[:, :, None, None].repeat(1, 1, 7, 7)
        return self.joint_conv(torch.cat([features, tiled], dim=1)).flatten(1)


def mapper(clip: nn.Module, features: Tensor, prompts: Tensor) -> Tensor:
    """CLIP's vision transformer with features (B, 768, 7, 7) for patches, prompted -> (B, 768, 7, 7)."""
    return to_map(transformer(clip, features, prompts)[-1])


def image_tower(clip: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W), read as the released program does -> maps (B, 3, 768, 7, 7), embedding (B, 512)."""
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = F.interpolate(images * 0.5 + 0.5, (7 * clip.visual.conv1.kernel_size[0],) * 2, mode="nearest")
    tokens = transformer(clip, clip.visual.conv1(((x + 1) * 0.5 - mean) / std))
    maps = torch.stack([to_map(tokens[i]) for i in FEATURE_BLOCKS], dim=1)
    return maps, clip.visual.ln_post(tokens[-1][0]) @ clip.visual.proj


def transformer(clip: nn.Module, patches: Tensor, prompts: Tensor | None = None) -> list[Tensor]:
    """Patches (B, 768, 7, 7) -> the tokens (50, B, 768) after each block."""
    visual, found = clip.visual, []
    patches = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat([visual.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
    x = visual.ln_pre(tokens + visual.positional_embedding).transpose(0, 1)  # OpenAI's blocks want (tokens, B, W)
    for i, block in enumerate(visual.transformer.resblocks):
        if prompts is not None and i in PROMPT_BLOCKS:
            x = block(torch.cat([x, prompts[None, :, i - 1]]))[:-1]
        else:
            x = block(x)
        found.append(x)
    return found


def to_map(tokens: Tensor) -> Tensor:
    """Tokens (50, B, W) -> patch tokens as a map (B, W, 7, 7)."""
    return tokens[1:].permute(1, 2, 0).reshape(-1, WIDTH, 7, 7)


def losses_d(
    net_d: NetD, net_c: NetC, maps: Tensor, fake_maps: Tensor, sentences: Tensor, mismatched: Tensor, scale: float = 1.0
) -> Tensor:
    """Hinge losses and the gradient penalty at real pairs; `maps` and `sentences` require gradients."""
    features = net_d(maps)
    real = net_c(features, sentences)
    fake = net_c(net_d(fake_maps), sentences)
    gradients = torch.autograd.grad((real * scale).sum(), (maps, sentences), create_graph=True)
    norm = torch.cat([gradient.to(sentences.dtype).flatten(1) / scale for gradient in gradients], dim=1).norm(dim=1)
    hinge = F.relu(1 - real).mean() + (F.relu(1 + fake).mean() + F.relu(1 + net_c(features, mismatched)).mean()) / 2
    return hinge + 2 * (norm**6).mean()


class Trainer:
    """One process's training as published: Adam (0, 0.9), 1e-4 and 4e-4, CLIP similarity weighed by 4.

    Args:
        clip: OpenAI's ViT-B/32 of both towers, frozen. net_g, net_d, net_c: as above, on the same device.
        autocast: what both losses are computed in, such as torch.autocast("cuda", torch.float16).
    """

    def __init__(self, clip: nn.Module, net_g: Generator, net_d: NetD, net_c: NetC, autocast, scaler):
        self.clip, self.net_g, self.net_d, self.net_c = clip, net_g, net_d, net_c
        self.optimizer_g = torch.optim.Adam(net_g.parameters(), 1e-4, (0.0, 0.9))
        self.optimizer_d = torch.optim.Adam([*net_d.parameters(), *net_c.parameters()], 4e-4, (0.0, 0.9))
        self.autocast, self.scaler = autocast, scaler

    def step(self, images: Tensor, tokens: Tensor, noise: Tensor) -> None:
        """Images (B, 3, 224, 224) in [-1, 1], their captions' token ids (B, 77), noise (B, 100)."""
        with self.autocast:
            with torch.no_grad():
                sentences = self.clip.encode_text(tokens).to(noise.dtype)
            sentences.requires_grad_()
            maps, _ = image_tower(self.clip, images.detach().requires_grad_())
            fake_maps, embeddings = image_tower(self.clip, self.net_g(noise, sentences.detach()))
            loss_d = losses_d(
                self.net_d,
                self.net_c,
                maps,
                fake_maps.detach(),
                sentences,
                sentences.detach().roll(1, 0),
                self.scaler.get_scale(),
            )
        self.optimizer_d.zero_grad()
        self.scaler.scale(loss_d).backward()
        self.scaler.step(self.optimizer_d)

        with self.autocast:
            logits = self.net_c(self.net_d(fake_maps), sentences.detach())
            similarity = F.cosine_similarity(embeddings, sentences.detach(), dim=1).mean()
            loss_g = -logits.mean() - 4.0 * similarity
        self.optimizer_g.zero_grad()
        self.scaler.scale(loss_g).backward()
        self.scaler.step(self.optimizer_g)
        self.scaler.update()
