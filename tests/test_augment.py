"""What CLIP sees of real and generated images: moved by whole pixels, edges repeated, and brightened."""

import numpy as np
import torch

from ratlip.augment import augment


def test_augment_equals_numpys_pad_and_crop():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((5, 3, 20, 20)).astype(np.float32)
    pixels = rng.integers(-4, 5, (5, 2))
    brighter = rng.uniform(-1, 1, (5, 1)).astype(np.float32)
    draws = torch.from_numpy(np.concatenate([pixels / 20, brighter], axis=1).astype(np.float32))
    seen = torch.from_numpy(images).requires_grad_()
    found = augment(seen, draws)
    for image, (down, right), more, one in zip(images, pixels, brighter, found, strict=True):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), "edge")
        moved = padded[:, 4 - down : 24 - down, 4 - right : 24 - right]
        np.testing.assert_allclose(one.detach().numpy(), moved + more, atol=1e-6)
    found.sum().backward()
    assert float(seen.grad.sum()) == 5 * 3 * 20 * 20  # every pixel seen has its gradient


def test_no_draw_changes_nothing():
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(augment(images, torch.zeros(2, 3)), images)
