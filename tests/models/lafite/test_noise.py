"""Normal numbers that follow from a picture's own noise."""

import pytest
import torch

from ratlip.models.lafite.noise import keys_of, noise_maps, normal


def test_numbers_are_normal_and_independent():
    torch.manual_seed(0)
    numbers = normal(keys_of(torch.randn(64, 32)), 8192).double()
    flat = numbers.flatten()
    assert abs(flat.mean()) < 5e-3 and abs(flat.std() - 1) < 5e-3
    assert abs((flat**3).mean()) < 0.02 and abs((flat**4).mean() - 3) < 0.05
    shares = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    for limit in shares:
        assert abs((flat < limit).double().mean() - torch.special.ndtr(limit)) < 3e-3
    for step in (1, 2, 64, 4096):  # between neighbours, rows of a map, and the two halves
        assert abs((numbers[:, step:] * numbers[:, :-step]).mean()) < 6e-3
        assert abs((numbers[:, step:].square() * numbers[:, :-step].square()).mean() - 1) < 0.02
    cosines = numbers @ numbers.T / 8192
    assert (cosines - torch.eye(64)).abs().max() < 0.07  # between pictures: 4.5 deviations of 1 / sqrt(8192), and more


def test_a_last_bit_of_the_noise_gives_other_numbers():
    noise = torch.randn(1, 16)
    other = noise.clone()
    other[0, 5] = torch.nextafter(other[0, 5], torch.tensor(9.0))
    one, changed, swapped = (normal(keys_of(x), 4096)[0] for x in (noise, other, noise.flip(1)))
    for numbers in (changed, swapped, normal(keys_of(noise), 4096, purpose=1)[0]):
        assert abs(float((one * numbers).mean())) < 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_are_a_pictures_own(dtype):
    noise = torch.randn(5, 16).to(dtype)
    together = noise_maps(noise, [4, 8, 8])
    assert [tuple(part.shape) for part in together] == [(5, 1, 4, 4), (5, 1, 8, 8), (5, 1, 8, 8)]
    for number in range(5):
        for part, alone in zip(together, noise_maps(noise[number : number + 1], [4, 8, 8]), strict=True):
            assert torch.equal(part[number], alone[0])
