"""From a resolved configuration to the encoders and the generator."""

from pathlib import Path

from easydict import EasyDict
from torch import nn

from ratlip.encoders import TextEncoder
from ratlip.encoders.clip_towers import FrozenClip, load_clip
from ratlip.encoders.damsm import load_damsm
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


def text_encoder_of(config: EasyDict, clip: FrozenClip) -> TextEncoder:
    """What reads the generator's captions, as `config.text` says: `clip` itself, or DAMSM's encoder beside it."""
    settings = config.text
    if settings.encoder == "clip":
        return clip
    folder = Path(config.data.dir)
    encoder = load_damsm(settings.weights, settings.vocabulary, folder, settings.words, config.train.seed)
    return encoder.to(clip.mean.device)


def generator_of(config: EasyDict, clip: FrozenClip, text: TextEncoder) -> nn.Module:
    """The generator that `config.model` describes, freshly initialised."""
    return SYSTEMS[config.model.name].make_generator(config, clip, text)
