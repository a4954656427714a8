"""LAFITE's losses, each a number a sample: contrasts, logistic losses and their penalties (arXiv 2111.13792)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ratlip import distributed

CONTRASTS = ("released", "plain")
PATH_DECAY = 0.01  # by which the mean path length moves


def contrast(a: Tensor, b: Tensor, temperature: float = 0.5, share: float = 0.0, form: str = "released") -> Tensor:
    """How well each row of a (B, E) finds its own row of b among all of the batch, and of other processes.

    With S_ij = cos(a_i, b_j), and E = exp(S / temperature): c_i = log(temperature * softmax over the rows of E)_ii, r_i
    the same over the columns; share * r + (1 - share) * c. "released" is this, a softmax of exponentials, which the
    published weights of the losses belong to; "plain" is the paper's: temperature times the logarithm of the softmax of
    S / temperature. A temperature of 0: S_ii.

    Returns:
        (B,), to be maximised; of this process's rows.
    """
    a, b = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in (a, b))
    if temperature <= 0:
        return (a * b).sum(1)

    @torch.autocast(a.device.type, enabled=False)
    def of_own(own: Tensor, others: Tensor) -> Tensor:
        similarities = own @ distributed.whole_batch(others).t() / temperature  # (B, N)
        if form == "released":
            similarities = similarities.exp()
        place = torch.arange(len(own), device=own.device) * distributed.world_size() + distributed.rank()
        logarithm = similarities.log_softmax(1).gather(1, place[:, None])[:, 0]
        return logarithm + math.log(temperature) if form == "released" else temperature * logarithm

    terms = []
    if share < 1:
        terms.append((1 - share) * of_own(b, a))
    if share > 0:
        terms.append(share * of_own(a, b))
    return sum(terms)


def logistic_real(logits: Tensor) -> Tensor:
    """softplus(-logit) (B,) of logits (B, 1) that should say: real."""
    return F.softplus(-logits).squeeze(1)


def logistic_fake(logits: Tensor) -> Tensor:
    """softplus(logit) (B,) of logits (B, 1) that should say: generated."""
    return F.softplus(logits).squeeze(1)


def gradient_penalty(logits: Tensor, images: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """R1 without its factor gamma / 2 (arXiv 1801.04406): squared norms (B,) of the gradients of all logits' sum, those
    of other processes too, by each of the images (B, 3, S, S), which require gradients.

    Args:
        scale: a loss scale for float16; the result does not depend on it.
    """
    return _gradient((logits * scale).sum(), images, scale).square().sum((1, 2, 3))


def path_lengths(images: Tensor, rows: Tensor, direction: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Lengths (B,) of the gradients of sum(images * y) by rows of w (arXiv 1912.04958, section 3.2).

    Args:
        images: (B, 3, S, S), a function of rows (B, R, 512), which require gradients. direction: standard normal
            numbers, shaped like the images; y is them divided by the root of the number of pixels.
        scale: as in `gradient_penalty`.
    """
    y = direction / math.sqrt(images.shape[2] * images.shape[3])
    return _gradient((images * y).sum() * scale, rows, scale).square().sum(2).mean(1).sqrt()


def _gradient(total: Tensor, inputs: Tensor, scale: float | Tensor) -> Tensor:
    """The gradient of a number by `inputs`, to be differentiated again, without `scale`, which the number has in it."""
    with torch.autocast(total.device.type, enabled=False):  # each product as it was on the way there
        (gradient,) = torch.autograd.grad(total, inputs, create_graph=True)
    return gradient / scale


def path_penalty(lengths: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """(length - a)^2 (B,) and a: the stored `mean`, moved a little towards that of `lengths` over all processes. The
    gradient goes through a too."""
    present = distributed.sum_with_gradient(lengths.mean()) / distributed.world_size()
    moved = mean + PATH_DECAY * (present - mean)
    return (lengths - moved).square(), moved
