"""The systems there are, by the names that `model.name` has for them."""

from ratlip.systems.clip_gan import ClipGan
from ratlip.systems.df_gan import DfGan
from ratlip.systems.system import System

SYSTEMS: dict[str, type[System]] = {"ratlip": ClipGan, "galip": ClipGan, "dfgan": DfGan, "ratgan": DfGan}
