"""From a resolved configuration to CLIP and the networks."""

from easydict import EasyDict

from ratlip.encoders.clip_towers import FrozenClip, load_clip
from ratlip.models.clip_gan.discriminator import Discriminator
from ratlip.models.clip_gan.generator import Generator


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


def generator_of(config: EasyDict, clip: FrozenClip) -> Generator:
    """The generator that `config.model` describes, freshly initialised."""
    model = config.model
    return Generator(
        clip,
        model.imsize,
        model.nf,
        model.z_dim,
        model.name,
        rat_state=model.rat.state,
        rat_scope=model.rat.scope,
        shuffle_attention=model.shuffle_attention,
    )


def discriminator_of(config: EasyDict, clip: FrozenClip) -> Discriminator:
    """The discriminator that `config.model` describes, freshly initialised."""
    return Discriminator(clip, config.model.d_channels, config.model.d_start, config.model.d_whiten)
