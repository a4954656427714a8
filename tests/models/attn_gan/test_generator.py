"""AttnGAN's generator: its stages, what a word and a mask do, its start."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ratlip.errors import UserError
from ratlip.models.attn_gan.generator import Condition, Generator, stage_sizes


def condition_of(lengths: list[int], dim: int = 12) -> Condition:
    torch.manual_seed(3)
    words = torch.randn(len(lengths), dim, max(lengths))
    for row, length in zip(words, lengths, strict=True):
        row[:, length:] = 0
    return Condition(
        torch.randn(len(lengths), dim), words, torch.arange(words.shape[2]) < torch.tensor(lengths)[:, None]
    )


@pytest.mark.parametrize(("imsize", "stages", "sizes"), [
    (256, 3, [64, 128, 256]), (64, 3, [16, 32, 64]), (64, 1, [64]), (32, 3, [8, 16, 32]), (128, 2, [64, 128]),
])  # fmt: skip
def test_pictures_and_attention_of_every_stage(imsize, stages, sizes):
    generator = Generator(stage_sizes(imsize, stages), 2, 12, 12, z_dim=5, condition_dim=4, residuals=1)
    drawn = generator(torch.randn(3, generator.noise_dim), condition_of([4, 1, 2]))
    assert generator.noise_dim == 9 and generator.sizes == sizes
    assert [tuple(image.shape) for image in drawn.images] == [(3, 3, size, size) for size in sizes]
    assert all(image.abs().max() <= 1 for image in drawn.images)
    assert [tuple(a.shape) for a in drawn.attention] == [(3, 4, size, size) for size in sizes[:-1]]
    for shares in drawn.attention:
        assert torch.allclose(shares.sum(1), torch.ones(()), atol=1e-5)
        assert not shares[1, 1:].any() and not shares[2, 2:].any() and shares[0].all()


@pytest.mark.parametrize(("imsize", "stages", "part"), [
    (224, 3, "model.imsize: .* not 224"), (64, 5, "attngan.stages: 5 .* 4 at most"), (8, 2, "1 at most"),
])  # fmt: skip
def test_sides_that_doubling_does_not_lead_to(imsize, stages, part):
    with pytest.raises(UserError, match=part):
        stage_sizes(imsize, stages)


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_neighbours():
    """With its own mask; with the published program's it does, in batches of unequal lengths."""
    generator = Generator(stage_sizes(32, 2), 4, 12, 12, z_dim=5, condition_dim=4).eval()
    noise = torch.randn(3, generator.noise_dim)
    three = condition_of([6, 2, 3])
    longer = three._replace(words=F.pad(three.words, (0, 2)), real=F.pad(three.real, (0, 2)))
    for mask, same in (("own", True), ("released", False)):
        for stage in generator.stages:
            stage.attention.mask = mask
        together = generator(noise, three).images[-1]
        for number in range(3):
            single = generator(noise[[number]], Condition(*(part[[number]] for part in longer))).images[-1]
            assert torch.allclose(together[[number]], single, atol=1e-5) == same, (mask, number)


@torch.no_grad()
def test_every_part_of_noise_and_condition_counts():
    generator = Generator(stage_sizes(32, 2), 4, 12, 12, z_dim=5, condition_dim=4).eval()
    noise, condition = torch.randn(1, 9), condition_of([3])
    before = generator(noise, condition).images
    for place in range(9):
        changed = noise.clone()
        changed[0, place] += 1
        assert not torch.allclose(generator(changed, condition).images[0], before[0], atol=1e-5), place
    other = condition._replace(words=condition.words + 1)
    after = generator(noise, other).images
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1], atol=1e-5)


def test_the_published_start():
    generator = Generator(stage_sizes(16, 2), 4, 12, 12, z_dim=5, condition_dim=4)
    layers = [m for m in generator.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) > 9
    for layer in layers:
        flat = layer.weight.detach().flatten(1)
        gram = flat @ flat.T if len(flat) <= flat.shape[1] else flat.T @ flat
        assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-5)
    assert not generator.augmentation.fc.bias.any()
    norm = generator.first.bn
    assert abs(norm.weight.mean() - 1) < 0.01 and abs(norm.weight.std() - 0.02) < 0.005 and not norm.bias.any()


def test_bfloat16_attention_chooses_the_same_words():
    generator = Generator(stage_sizes(32, 2), 4, 12, 12, z_dim=5, condition_dim=4)
    noise, condition = torch.randn(2, 9), condition_of([3, 5])
    exact = generator(noise, condition)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = generator(noise, condition)
    assert drawn.attention[0].dtype == torch.float32
    assert (drawn.attention[0] - exact.attention[0]).abs().max() < 0.1
    assert (drawn.images[-1] - exact.images[-1]).abs().mean() < 0.1
