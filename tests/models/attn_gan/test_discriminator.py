"""AttnGAN's critics of any side."""

import pytest
import torch

from ratlip.models.attn_gan.discriminator import Discriminator


@pytest.mark.parametrize(("side", "out"), [(8, 2), (16, 4), (32, 8), (64, 16), (128, 16), (256, 16)])
def test_any_side(side, out):
    critic = Discriminator(side, 2, 12)
    images, sentence = torch.rand(2, 3, side, side, requires_grad=True), torch.randn(2, 12, requires_grad=True)
    assert critic.features(images).shape == (2, out, 4, 4)
    matching, real = critic(images, sentence)
    assert matching.shape == real.shape == (2,)
    of_images, of_sentence = torch.autograd.grad((matching * torch.tensor([1.0, -2])).sum(), (images, sentence))
    assert (of_images.abs().sum((0, 1)) > 0).all() and (of_sentence != 0).all()
    assert torch.autograd.grad(real.sum(), sentence, allow_unused=True)[0] is None
