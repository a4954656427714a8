"""Published checkpoints: which system a file is of, its networks and its settings."""

from ratlip.released.clip_gan import describe, is_released, load_networks

__all__ = ["describe", "is_released", "load_networks"]
