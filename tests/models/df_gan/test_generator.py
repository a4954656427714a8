"""DF-GAN's and RAT-GAN's generators: sizes, start, independence of batch neighbours and of earlier calls."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn

from ratlip.errors import UserError
from ratlip.models import blocks
from ratlip.models.df_gan.generator import Generator

VARIANTS = [{"name": "dfgan"}, {"name": "ratgan", "affines": 4}, {"name": "ratgan", "affines": 6}]


def names(settings: dict) -> str:
    return "-".join(map(str, settings.values()))


def generator(**settings) -> Generator:
    """Random weights everywhere, also where training starts from zeros, so that every path shows."""
    torch.manual_seed(0)
    made = Generator(**{"imsize": 32, "nf": 4, "noise_dim": 10, "sentence_dim": 6, "start": 0.5, **settings})
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "conditioner" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("settings", VARIANTS, ids=names)
@torch.no_grad()
def test_an_image_depends_on_its_own_noise_and_caption_alone(settings):
    """Not on its batch, and not on what was drawn before."""
    made = generator(**settings).eval()
    noise, sentence = torch.randn(8, 10), torch.randn(8, 6)
    together = made(noise, sentence)
    alone = torch.cat([made(noise[i : i + 1], sentence[i : i + 1]) for i in range(8)])
    assert (together - alone).abs().max() < 1e-5
    for other in (made(noise.roll(1, 0), sentence), made(noise, sentence.roll(1, 0))):
        assert (together - other).flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("name", ["dfgan", "ratgan"])
@torch.no_grad()
def test_a_fresh_generator_does_not_know_the_caption(name):
    """Every affine layer starts as the identity. RAT-GAN's blocks start as their shortcuts."""
    torch.manual_seed(1)
    made = Generator(32, 4, noise_dim=10, sentence_dim=6, name=name)
    noise = torch.randn(2, 10)
    images = made(noise, torch.randn(2, 6))
    assert torch.equal(images, made(noise, torch.randn(2, 6)))
    assert (images[0] - images[1]).abs().max() > 1e-3
    gains = [block.conv2.gain for block in made.blocks]
    assert gains == ([None] * 3 if name == "dfgan" else [0.0] * 4)


@pytest.mark.parametrize(
    ("imsize", "expected"),
    [(32, [8, 8, 4, 2, 1]), (64, [8, 8, 8, 4, 2, 1]), (256, [8, 8, 8, 8, 8, 4, 2, 1])],
)
@pytest.mark.parametrize("name", ["dfgan", "ratgan"])
@torch.no_grad()
def test_sizes_and_widths(name, imsize, expected):
    """A block for each doubling; nf times 1, 2, 4, 8 from the image inwards. RAT-GAN has one more, at 4x4."""
    made = generator(name=name, imsize=imsize, nf=2)
    assert made.sizes == [size for size in (4, 8, 16, 32, 64, 128, 256) if size <= imsize][name == "dfgan" :]
    found = [block.conv1.conv.in_channels // 2 for block in made.blocks] + [1]
    assert found == expected[name == "dfgan" :]
    assert made.noise_dim == 10
    images = made(torch.randn(1, 10), torch.randn(1, 6))
    assert images.shape == (1, 3, imsize, imsize) and images.abs().max() < 1


@pytest.mark.parametrize("imsize", [0, 16, 48, 224, -64])
def test_sizes_that_are_none(imsize):
    with pytest.raises(UserError, match=f"32, 64, 128, 256, ... pixels, not {imsize}"):
        Generator(imsize, 4)


def test_parameter_counts():
    """As published, without what RAT-GAN stores and does not use."""

    def count(**settings) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Generator(**settings).parameters())

    assert count(imsize=256, nf=32) == 9_744_131
    assert count(imsize=64, nf=32) == 4_868_867
    assert count(imsize=256, nf=32, name="ratgan") == 12_817_034
    assert count(imsize=256, nf=64, name="ratgan") == 32_057_098


def plain(made: Generator, noise: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
    """The order in which the description has it: resize, affine layers and activations, convolution, one at a time."""

    def fused(x: torch.Tensor) -> torch.Tensor:
        for _ in range(made.affines // 2):
            gamma, beta = next(layers)
            x = F.leaky_relu(gamma * x + beta, 0.2)
        return x

    layers = iter(made.conditioner(noise, sentence))
    x = made.fc(noise).unflatten(1, (-1, 4, 4))
    for block, size in zip(made.blocks, made.sizes, strict=True):
        x = F.interpolate(x, (size, size), mode="nearest")
        residual = block.conv2.conv(fused(block.conv1.conv(fused(x))))
        x = block.shortcut(x) + (1 if block.conv2.gain is None else block.conv2.gain) * residual
    return made.to_rgb(F.leaky_relu(x, 0.2)).tanh()


@pytest.mark.parametrize("large", [1, 10**9])  # everything by samples and computed again, or nothing
@pytest.mark.parametrize("settings", VARIANTS, ids=names)
def test_equals_the_plain_order(settings, large, monkeypatch):
    monkeypatch.setattr(blocks, "LARGE", large)
    made = generator(**settings).double()
    noise, sentence = torch.randn(2, 10).double(), torch.randn(2, 6).double()
    weights = torch.randn(2, 3, 32, 32).double()
    found, expected = (draw(noise, sentence) for draw in (made, lambda *inputs: plain(made, *inputs)))
    assert relative_error(found, expected) < 1e-10
    parameters = list(made.parameters())
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), parameters) for y in (found, expected)), strict=True):
        assert (a - b).abs().max() <= 1e-8 * b.abs().max() + 1e-12


@torch.no_grad()
def test_kept_filters_follow_the_weight_of_the_residual():
    made = generator(name="ratgan").eval()
    noise, sentence = torch.randn(2, 10), torch.randn(2, 6)
    for _ in range(2):
        assert relative_error(made(noise, sentence), plain(made, noise, sentence)) < 1e-5
        for block in made.blocks:
            block.conv2.gain.add_(0.7)


def test_lstm_has_one_bias():
    """The second, of PyTorch's cell, stays zero and is in no checkpoint and no optimiser."""
    made = generator(name="ratgan")
    (cell,) = made.conditioner.lstms
    assert isinstance(cell, nn.LSTMCell)
    assert not cell.bias_hh.any() and not cell.bias_hh.requires_grad
    assert not any("bias_hh" in key for key in [*made.state_dict(), *dict(made.named_parameters())])
