"""The losses, as pure functions of tensors: hinge, MA-GP, CLIP similarity (GALIP, arXiv 2301.12959), logistic, KL."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_real(logits: Tensor) -> Tensor:
    """E[relu(1 - D)] of logits (B, 1) at pictures with their own captions."""
    return F.relu(1 - logits).mean()


def hinge_fake(logits: Tensor) -> Tensor:
    """E[relu(1 + D)] of logits (B, 1) at generated pictures, or at pictures with another picture's caption."""
    return F.relu(1 + logits).mean()


def matching_aware_gradient_penalty(logits: Tensor, inputs: Sequence[Tensor], scale: float | Tensor = 1.0) -> Tensor:
    """MA-GP = 2 E[ ||grad D||_2 ^ 6 ] at real pairs (DF-GAN, arXiv 2008.05865).

    Args:
        logits: (B, 1), a function of `inputs`; sample i depends on row i of each input alone.
        inputs: tensors (B, ...) that require gradients: what the critic reads of the picture (RATLIP, GALIP: CLIP
            feature maps; DF-GAN, RAT-GAN: the picture itself) and the sentence vector. The norm is taken over all of
            them together.
        scale: the logits are multiplied by it before, the gradients divided by it after differentiating, so that
            gradients in float16 do not vanish; the penalty does not depend on it.
    """
    gradients = torch.autograd.grad((logits * scale).sum(), inputs, create_graph=True)
    squared_norm = sum((g.float() / scale).flatten(1).square().sum(dim=1) for g in gradients)  # (B,)
    return 2 * squared_norm.pow(3).mean()


def clip_similarity(images: Tensor, sentences: Tensor) -> Tensor:
    """E[cos] of image embeddings (B, E) and sentence embeddings (B, E), between -1 and 1."""
    return F.cosine_similarity(images, sentences, dim=1).mean()


def logistic_real(logits: Tensor) -> Tensor:
    """Binary cross entropy of logits (B,) at what is to be judged real: mean of -log sigmoid (GAN, arXiv 1406.2661)."""
    return F.softplus(-exact(logits)).mean()


def logistic_fake(logits: Tensor, samples: float | None = None) -> Tensor:
    """Binary cross entropy of logits (B,) at what is to be judged fake: sum of -log(1 - sigmoid) over `samples`,
    which are B where nothing is said."""
    return F.softplus(exact(logits)).sum() / (samples or len(logits))


def kl_to_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of mu, logvar (B, C), as a mean over samples and numbers both (AttnGAN)."""
    mu, logvar = exact(mu), exact(logvar)
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).mean()


def exact(values: Tensor) -> Tensor:
    """In float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
