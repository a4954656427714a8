"""From a resolved configuration to CLIP and the generator."""

from easydict import EasyDict
from torch import nn

from ratlip.encoders.clip_towers import FrozenClip, load_clip
from ratlip.systems import SYSTEMS


def clip_of(config: EasyDict) -> FrozenClip:
    """The frozen CLIP that `config.clip` names."""
    settings = config.clip
    return load_clip(
        settings.weights,
        settings.source,
        settings.activation,
        feature_blocks=settings.feature_blocks,
        prompt_blocks=settings.prompt_blocks,
        preprocess=settings.preprocess,
    )


def generator_of(config: EasyDict, clip: FrozenClip) -> nn.Module:
    """The generator that `config.model` describes, freshly initialised."""
    return SYSTEMS[config.model.name].make_generator(config, clip)
