"""CMMD: how far two sets of pictures lie apart in CLIP's space, whatever shape their clouds have."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ratlip.metrics.all_features import AllFeatures

SIGMA = 10.0  # width of the kernel
SCALE = 1000
BLOCK = 2048  # pictures whose kernel with as many others is held at once: 32 MiB


class Cmmd(AllFeatures):
    """`cmmd`: squared maximum mean discrepancy of unit CLIP embeddings, Gaussian kernel of width 10, times 1,000, by
    the unbiased estimate, which may fall a little below 0 (Jayasumana et al. 2024, arXiv 2401.09603)."""

    names = ("cmmd",)
    higher_is_better = False
    space = "clip"

    def compute(self) -> dict[str, float]:
        """{"cmmd": the discrepancy}."""
        real = self.real.to(self.generated.device)
        return {"cmmd": SCALE * squared_mmd(F.normalize(real, dim=1), F.normalize(self.generated, dim=1), SIGMA)}


def squared_mmd(one: Tensor, other: Tensor, sigma: float) -> float:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) of unit vectors x (N, D) and y (M, D), x' another x and y' another y, with
    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), in float64 (Gretton et al. 2012, equation 3)."""
    between = sum(
        _kernel(rows, columns, sigma).sum() for rows in one.split(BLOCK) for columns in other.split(BLOCK)
    ) / (len(one) * len(other))
    return float(_within(one, sigma) + _within(other, sigma) - 2 * between)


def _within(vectors: Tensor, sigma: float) -> Tensor:
    """The kernel's mean over all pairs of two different rows, each pair of blocks computed once."""
    blocks, total = vectors.split(BLOCK), torch.zeros((), dtype=torch.float64, device=vectors.device)
    for number, rows in enumerate(blocks):
        own = _kernel(rows, rows, sigma)
        total += own.sum() - own.trace()
        total += 2 * sum(_kernel(rows, columns, sigma).sum() for columns in blocks[number + 1 :])
    return total / (len(vectors) * (len(vectors) - 1))


def _kernel(rows: Tensor, columns: Tensor, sigma: float) -> Tensor:
    """Of unit vectors (R, D) and (C, D), whose squared distance is 2 - 2 cos: (R, C) float64."""
    return ((rows.double() @ columns.double().T - 1) / sigma**2).exp_()
