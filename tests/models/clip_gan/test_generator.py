"""The generator: sizes, independence of batch neighbours, and what it keeps out of its state."""

import itertools

import pytest
import torch

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models.clip_gan.generator import Generator, block_sizes

VARIANTS = [
    {"name": "galip"},
    *(
        {"name": "ratlip", "rat_state": state, "rat_scope": scope, "shuffle_attention": attention}
        for state, scope, attention in itertools.product(("shared", "independent"), ("mapper", "all"), (True, False))
    ),
]


def generator(clip: FrozenClip, **settings) -> Generator:
    """Random weights everywhere, also where training starts from zeros, so that every path shows."""
    torch.manual_seed(0)
    made = Generator(clip, **{"imsize": 32, "nf": 16, "noise_dim": 10, **settings})
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "conditioner" in name or "attention" in name:
                parameter.add_(0.03 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(map(str, s.values())))
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(small_clip, settings):
    made = generator(small_clip, **settings).eval()
    noise, sentence = torch.randn(8, 10), torch.randn(8, 64)
    together = made(noise, sentence)
    alone = torch.cat([made(noise[i : i + 1], sentence[i : i + 1]) for i in range(8)])
    assert together.std() > 0.01
    assert (together - alone).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("imsize", [8, 16, 64, 128, 224, 256])
@torch.no_grad()
def test_images_have_the_size_asked_for(small_clip, imsize):
    images = generator(small_clip, imsize=imsize)(torch.randn(2, 10), torch.randn(2, 64))
    assert images.shape == (2, 3, imsize, imsize)


def test_block_sizes():
    assert block_sizes(224) == [8, 16, 32, 64, 128, 224]  # as released
    assert block_sizes(256) == [8, 16, 32, 64, 128, 256]


def test_scope_all_makes_every_layer_recurrent(small_clip):
    for scope, expected in (("mapper", 16), ("all", 16 + 4 * 3)):
        assert sum(generator(small_clip, rat_scope=scope).conditioner.recurrent) == expected
    assert sum(generator(small_clip, name="galip").conditioner.recurrent) == 0


def test_clip_is_no_part_of_the_generator(small_clip):
    made = generator(small_clip)
    own = {id(p) for p in made.parameters()}
    assert not own & {id(p) for p in small_clip.parameters()}
    assert not any("clip" in name for name in made.state_dict())
