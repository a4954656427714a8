"""LAFITE's networks with the fixtures' weights, read as a published file is, and the inputs of its fixtures."""

from collections import OrderedDict
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from helpers import ROOT, fixture_input, released_weights
from torch import Tensor

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models.lafite.condition import View
from ratlip.released.lafite import Module, load_networks
from ratlip.systems.lafite import Draws, Networks, Real, Settings, State

SETTINGS = Settings(itd=5, itc=10, gamma=10)
GENERATOR_GRADIENTS = (  # the parameters whose gradients' norms are in the fixtures
    "mapping.layers.0.weight",
    "mapping.layers.7.bias",
    "blocks.0.const",
    "blocks.0.conv1.weight",
    "blocks.1.conv0.style.joint.weight",
    "blocks.2.conv1.style.pre.0.weight",
    "blocks.3.torgb.style.pre.1.bias",
    "blocks.{last}.conv0.noise_strength",
    "blocks.{before}.torgb.weight",
    "blocks.{last}.conv1.bias",
    "blocks.{last}.torgb.bias",
)
DISCRIMINATOR_GRADIENTS = (
    "fromrgb.weight",
    "blocks.0.conv1.weight",
    "blocks.{of16}.skip.weight",
    "blocks.{of8}.conv0.bias",
    "conv.weight",
    "fc.weight",
    "feature.weight",
    "feature.bias",
    "out.weight",
    "out.bias",
)


@lru_cache(1)
def answers() -> dict[str, np.ndarray]:
    """What the released system answers."""
    return dict(np.load(ROOT / "tests" / "data" / "lafite" / "fixtures.npz"))


def as_module(weights: dict[str, Tensor], **settings: object) -> Module:
    """A flat state dict as the tree of modules that a published file holds, each with the same settings."""
    own = {key: value for key, value in weights.items() if "." not in key}
    inner: dict[str, dict[str, Tensor]] = OrderedDict()
    for key, value in weights.items():
        if "." in key:
            name, _, rest = key.partition(".")
            inner.setdefault(name, {})[rest] = value
    modules = {name: as_module(part, **settings) for name, part in inner.items()}
    return Module("Any", {"_parameters": own, "_buffers": {}, "_modules": modules, **settings})


def networks(name: str, clip: FrozenClip, clamp: float = 256.0, normalize: bool = False) -> Networks:
    """The networks of `lafite.G` and so on, noise of mode const."""
    content = {
        "G_ema": as_module(released_weights(f"{name}.G"), conv_clamp=clamp),
        "D": as_module(released_weights(f"{name}.D"), conv_clamp=clamp, d_use_norm=normalize),
    }
    generator, discriminator, info = load_networks(content, clip)
    assert info["system"] == "LAFITE"
    generator.noise_mode = "const"
    return Networks(generator.train(), discriminator.train(), clip, State())


def inputs(name: str, count: int, size: int) -> tuple[Real, Draws]:
    """The batch and the draws of a phase's fixtures, but for the numbers of the path length's direction."""
    features = F.normalize(fixture_input(f"{name}.img", count, 512), dim=1)
    text = F.normalize(features + 1.5 * F.normalize(fixture_input(f"{name}.txt", count, 512), dim=1), dim=1)
    small = fixture_input(f"{name}.real", count, 3, 16, 16).tanh()
    images = small.repeat_interleave(size // 16, 2).repeat_interleave(size // 16, 3)
    draws = Draws(
        fixture_input(f"{name}.z", count, 512),
        None,
        None,
        fixture_input(f"{name}.noise", count, 512),
        torch.zeros(count, 1),
        View(171, 60, 33) if size == 256 else View(size, 17, 101),
        fixture_input(f"{name}.pl", max(1, count // 2), 3, size, size),
    )
    return Real(images, text, features), draws


def gradient_names(n: Networks) -> tuple[list[str], list[str]]:
    """The parameters of both networks that the fixtures have gradient norms of, in their order."""
    last, count = len(n.generator.sizes) - 1, len(n.discriminator.blocks)
    numbers = {"last": last, "before": last - 1, "of8": count - 1, "of16": count - 2}
    return tuple([name.format(**numbers) for name in names] for names in (GENERATOR_GRADIENTS, DISCRIMINATOR_GRADIENTS))
