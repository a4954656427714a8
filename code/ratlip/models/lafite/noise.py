"""Normal numbers that follow from a picture's own noise, on any device: LAFITE's noise maps, the same in any batch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
FACTOR = 0x45D9F3B  # of 27 bits: with a number of 32 it stays inside int64


def scrambled(x: Tensor) -> Tensor:
    """A permutation of the 32-bit numbers in x, int64, after which neighbours have nothing in common."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * FACTOR) & MASK
    return x ^ (x >> 16)


def keys_of(noise: Tensor) -> Tensor:
    """Two keys of 32 bits (B, 2), int64, that follow from all of the bits of noise (B, Z), float32."""
    bits = noise.detach().float().contiguous().view(torch.int32).long() & MASK
    place = torch.arange(bits.shape[1], device=bits.device)
    return torch.stack([scrambled(scrambled(bits + FACTOR * place + salt) + place).sum(1) & MASK for salt in (1, 2)], 1)


def normal(keys: Tensor, count: int, purpose: int = 0) -> Tensor:
    """Standard normal numbers (B, count), float32; each row follows from its keys (B, 2) and `purpose` alone (by Box
    and Muller).

    Made by counting and scrambling where the keys are, since generators of random numbers differ between devices, and
    one for each picture would be asked a picture at a time.
    """
    number = torch.arange((count + 1) // 2, device=keys.device)
    one, other = (
        scrambled(scrambled(number + first) ^ second)  # (B, count / 2)
        for first, second in (scrambled(keys + 2 * purpose + salt)[:, :, None].unbind(1) for salt in (0, 1))
    )
    length = ((one >> 8).float() + 0.5).mul(2**-24).log().mul(-2).sqrt()  # 24 bits: what float32 holds exactly
    angle = (other >> 8).float() * (2 * math.pi / 2**24)
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=1)[:, :count]


def noise_maps(noise: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """Maps (B, 1, s, s) of standard normal numbers, one for each of `sides`, that follow from noise (B, Z)."""
    numbers = normal(keys_of(noise), sum(side**2 for side in sides)).split([side**2 for side in sides], dim=1)
    return [part.unflatten(1, (1, side, side)) for part, side in zip(numbers, sides, strict=True)]
