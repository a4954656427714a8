"""LAFITE's generator: released numbers of other structures, independence of the batch, noise, truncation, precision."""

import clip.model
import pytest
import torch
import torch.nn.functional as F
from helpers import fixture_input, relative_error
from released_lafite import answers, inputs, networks

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.errors import UserError
from ratlip.models.lafite.generator import Generator

TINY = {"condition_dim": 24, "noise_dim": 16, "base": 256, "most": 16, "depth": 2}


def generator(imsize: int = 32, **settings) -> Generator:
    """Weights as at first, but for noise, which is strong, and the mean of w."""
    torch.manual_seed(0)
    made = Generator(**{**TINY, "imsize": imsize, **settings})
    with torch.no_grad():
        made.mapping.w_avg.normal_()
        for block in made.blocks:
            for layer in block.layers:
                layer.noise_strength.fill_(0.5)
    return made


def wide_clip(embedding: int) -> FrozenClip:
    """A CLIP of which only the embedding's length counts."""
    return FrozenClip(clip.model.CLIP(embedding, 32, 1, 64, 16, 16, 49408, 64, 1, 1))


@torch.no_grad()
def test_released_images_of_the_other_structure():
    """Structure 1 above side 32, features 640 wide and of unit length, maps clamped at 0.5."""
    n = networks("lafite64x", wide_clip(640), clamp=0.5, normalize=True)
    noise = fixture_input("lafite64x.z", 2, 512)
    condition = F.normalize(fixture_input("lafite64x.txt", 2, 640), dim=1)
    real = fixture_input("lafite64x.real", 2, 3, 16, 16).tanh().repeat_interleave(4, 2).repeat_interleave(4, 3)
    styles = []
    for block in n.generator.blocks:
        for part in (*block.layers, block.torgb):
            divided = part.weight.shape[1] ** 0.5 if part is block.torgb else 1

            def note(module, inputs, output, divided=divided):
                styles.append(output[:, :8] / divided)

            part.style.register_forward_hook(note)
    images = n.generator(noise, condition)
    logits, features = n.discriminator(real, condition)
    for name, found in {
        "image.slice": images[:, :, ::7, ::7],
        "image.mean": images.mean((2, 3)),
        "styles": torch.stack(styles, 1),
        "D.logit": logits,
        "D.fts": features[:, :32],
    }.items():
        assert relative_error(found, answers()[f"64x.{name}"]) < 1e-5, name


@torch.no_grad()
def test_the_mean_of_w_moves_only_when_asked_to(vitb32):
    g = networks("lafite64", FrozenClip(vitb32.clip)).generator
    _, draws = inputs("lafite64", 8, 64)
    before = g.mapping.w_avg.clone()
    g(draws.noise, torch.randn(8, 512))
    assert torch.equal(g.mapping.w_avg, before)
    g.styles(draws.noise, draws.noise.flip(0), 3, track=True)
    assert relative_error(g.mapping.w_avg[:64], answers()["64.w_avg"]) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"structure": 0}, {"structure": 3}, {"change": 8}, {"clamp": None}], ids=str)
@pytest.mark.parametrize("noise_mode", ["random", "const", "none"])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(settings, noise_mode):
    made = generator(noise_mode=noise_mode, **settings).eval()
    noise, sentence = torch.randn(6, 16), torch.randn(6, 24)
    together = made(noise, sentence)
    alone = torch.cat([made(noise[i : i + 1], 3 * sentence[i : i + 1]) for i in range(6)])  # of any length
    assert together.shape == (6, 3, 32, 32) and together.std() > 0.1
    assert relative_error(alone, together) < 1e-5
    assert (together[0] - together[1]).abs().max() > 1e-2


@torch.no_grad()
def test_noise_modes_differ_by_the_noise_alone():
    made, noise, sentence = generator(), torch.randn(2, 16), torch.randn(2, 24)
    found = {}
    for made.noise_mode in ("random", "const", "none"):
        found[made.noise_mode] = made(noise, sentence)
    assert (found["random"] - found["none"]).abs().max() > 0.01 < (found["const"] - found["none"]).abs().max()
    rows = made.styles(noise)
    zero = [torch.zeros(2, 1, layer.side, layer.side) for block in made.blocks for layer in block.layers]
    assert torch.equal(made.synthesis(rows, F.normalize(sentence, dim=1), zero), found["none"])


@torch.no_grad()
def test_truncation_and_mixed_styles():
    made, noise, second = generator(), torch.randn(3, 16), torch.randn(3, 16)
    rows, others = made.styles(noise), made.styles(second)
    assert rows.shape == (3, made.rows, 512) and made.rows == 8
    mixed = made.styles(noise, second, 5)
    assert torch.equal(mixed[:, :5], rows[:, :5]) and torch.equal(mixed[:, 5:], others[:, 5:])
    assert torch.allclose(made.truncated(rows, 0.0), made.mapping.w_avg.expand_as(rows))
    part = made.truncated(rows, 0.5, 3)
    assert torch.allclose(part[:, :3], (rows[:, :3] + made.mapping.w_avg) / 2, atol=1e-6) and torch.equal(
        part[:, 3:], rows[:, 3:]
    )
    sentence, made.noise_mode = torch.randn(3, 24), "const"
    near, far = ((made(noise, sentence, psi) - made(second, sentence, psi)).abs().mean() for psi in (0.05, 1.0))
    assert near < far / 2


@pytest.mark.parametrize("imsize", [8, 32, 64, 128])
@torch.no_grad()
def test_sizes(imsize):
    made = generator(imsize)
    assert made(torch.randn(1, 16), torch.randn(1, 24)).shape == (1, 3, imsize, imsize)
    assert made.sizes[-1] == imsize


@pytest.mark.parametrize("imsize", [4, 48, 224])
def test_sizes_that_are_refused(imsize):
    with pytest.raises(UserError, match=f"power of two pixels a side, not {imsize}"):
        generator(imsize)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_the_four_largest_sides(low):
    """Of 64 pixels: sides 8 and more; the picture, and gradients of the lowest sides, stay near float32's."""
    made = generator(64)
    noise, sentence = torch.randn(2, 16), torch.randn(2, 24)
    types = []
    for block in made.blocks:
        block.register_forward_hook(lambda module, inputs, outputs: types.append([x.dtype for x in outputs]))
    exact = made(noise, sentence)
    with torch.autocast("cpu", low):
        image = made(noise, sentence)
    assert types[5:] == [[torch.float32] * 2] + [[low, torch.float32]] * 4
    assert (image - exact).abs().max() < 0.05 * exact.abs().max()
    gradients = [torch.autograd.grad(x.square().mean(), made.blocks[0].const)[0] for x in (exact, image)]
    assert relative_error(gradients[1], gradients[0]) < 0.1


def test_large_weights_do_not_leave_the_range_of_float16():
    made, noise, sentence = generator(32), torch.randn(2, 16), torch.randn(2, 24)
    with torch.no_grad():
        for block in made.blocks:
            for layer in block.layers:
                layer.weight.mul_(1e4)  # 1 / |V| takes it out again
    exact = made(noise, sentence)
    with torch.autocast("cpu", torch.float16):
        image = made(noise, sentence)
    assert (image - exact).abs().max() < 0.05 * exact.abs().max()


def test_second_derivatives():
    """What the path length is made of: by finite differences, through every kind of layer."""
    made = generator(8, most=4, depth=1, condition_dim=4, noise_dim=4).double()
    rows, condition = made.styles(torch.randn(1, 4).double()).detach(), F.normalize(torch.randn(1, 4).double(), dim=1)
    maps = [torch.randn(1, 1, layer.side, layer.side).double() for block in made.blocks for layer in block.layers]
    direction = torch.randn(1, 3, 8, 8).double()

    def length(weight):
        def slope(rows):
            values = {"blocks.1.conv0.weight": weight}
            return torch.func.functional_call(made, values, (rows, condition, maps), strict=False)

        given = rows.clone().requires_grad_()
        (jacobian,) = torch.autograd.grad((slope(given) * direction).sum(), given, create_graph=True)
        return jacobian.square().sum()

    made.forward = made.synthesis
    weight = made.blocks[1].conv0.weight.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(length(weight), weight)
    towards = torch.randn_like(weight)
    step = 1e-5
    numeric = (length(weight + step * towards) - length(weight - step * towards)) / (2 * step)
    assert float((gradient * towards).sum()) == pytest.approx(float(numeric.detach()), rel=1e-4)
