"""Published checkpoints: which system a file is of, its networks and its settings."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from torch import nn

from ratlip import checkpoint as checkpoint_file
from ratlip.errors import UserError
from ratlip.released import clip_gan, df_gan

# Each has SYSTEMS, is_released, load_networks, settings and describe. The first that knows a file has it; clip_gan knows
# any with a 'model' in it.
FAMILIES = (df_gan, clip_gan)


def is_released(content: object) -> bool:
    """Whether a loaded file is laid out like a released checkpoint of any family."""
    return any(family.is_released(content) for family in FAMILIES)


def reads_clip(content: Mapping) -> bool:
    """Whether the networks of a released checkpoint see through a CLIP."""
    return next(family for family in FAMILIES if family.is_released(content)) is clip_gan


def load_networks(
    checkpoint: str | Path | Mapping, clip_model: nn.Module | None, path: str | Path | None = None
) -> tuple[nn.Module | None, nn.Module | None, dict]:
    """Build the networks of a released checkpoint, in eval mode on the CPU.

    Args:
        checkpoint: a path, or what torch.load gives for one.
        clip_model: the CLIP that a GALIP or RATLIP was trained with, see `clip_gan.load_networks`; of no use elsewhere.
        path: where the content came from, for messages.

    Returns:
        generator: noise (B, Z), sentence (B, E) -> images (B, 3, S, S). None where the file holds none.
        discriminator: as the family's `load_networks` says. None where the file holds none, or a part of one.
        info: system, epoch (or None), and the settings that the file tells.

    Raises:
        UserError: not such a file, keys missing or unknown; names the first thing wrong.
    """
    if isinstance(checkpoint, str | Path):
        path, checkpoint = checkpoint, checkpoint_file.read(checkpoint)
    try:
        for family in FAMILIES:
            if family.is_released(checkpoint):
                return family.load_networks(checkpoint, clip_model)
        systems = ", ".join(system for family in FAMILIES for system in family.SYSTEMS)
        raise UserError(f"not a released checkpoint of {systems}")
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from None


def settings(info: Mapping) -> dict:
    """The settings of ours that the networks have, flat."""
    return _family(info).settings(info)


def describe(info: Mapping) -> str:
    """What `load_networks` read from a file, in words."""
    return _family(info).describe(info)


def _family(info: Mapping) -> ModuleType:
    return next((family for family in FAMILIES if info.get("system") in family.SYSTEMS), clip_gan)
