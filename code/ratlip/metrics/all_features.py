"""Metrics that need features of all pictures at once; by torch-fidelity: KID, precision and recall, Inception score."""

import torch

from ratlip import device as devices
from ratlip.errors import UserError
from ratlip.metrics.metric import Metric, Scored
from ratlip.metrics.reference import Reference

KID_SUBSET = 1000  # pictures; torch-fidelity's own, as are 100 subsets and their seed
NEIGHBOURS = 3
LOGITS = 1008  # of torch-fidelity's Inception
SPLITS = 10  # of the Inception score; torch-fidelity's own
BLOCK = 10_000  # pictures whose distances are held at once; torch-fidelity's own


class AllFeatures(Metric):
    """Keeps every feature in a row of its own; rows that other processes fill are zero here, so that sums join them."""

    space = "inception"
    against_real = True

    def __init__(self, reference: Reference, count: int):
        self.real = reference.features
        self.generated = torch.zeros(count, self.real.shape[1], device=reference.gaussian.mean.device)
        self.totals = [self.generated]

    def update(self, scored: Scored) -> None:
        self.generated[devices.send(scored.numbers, self.generated.device)] = scored.features[self.space]


class Kid(AllFeatures):
    """`kid`: kernel distance, mean over random subsets (Bińkowski et al. 2018, arXiv 1801.01401)."""

    names = ("kid",)
    higher_is_better = False

    def compute(self) -> dict[str, float]:
        """{"kid": mean, "kid/std": spread over the subsets, where they are not simply everything}."""
        from torch_fidelity.metric_kid import kid_features_to_metric

        size = min(KID_SUBSET, len(self.generated), len(self.real))
        found = kid_features_to_metric(self.generated.cpu(), self.real, kid_subset_size=size, verbose=False)
        scores = {"kid": found["kernel_inception_distance_mean"]}
        if size == KID_SUBSET:
            scores["kid/std"] = found["kernel_inception_distance_std"]
        return scores

    @classmethod
    def caveat(cls, reference: Reference, count: int) -> str:
        size = min(KID_SUBSET, count, reference.count)
        return "" if size == KID_SUBSET else f"subsets of {size:,} pictures, not {KID_SUBSET:,}: there are no more"


class PrecisionRecall(AllFeatures):
    """`precision`, `recall`: share of generated pictures near a real one, and the reverse, by the distance to the
    third neighbour (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

    names = ("precision", "recall")
    higher_is_better = True

    def __init__(self, reference: Reference, count: int):
        super().__init__(reference, count)
        if min(count, reference.count) <= NEIGHBOURS:
            raise UserError(
                f"precision and recall look at {NEIGHBOURS} neighbours: they need more than {NEIGHBOURS} pictures, "
                f"not {count:,} against {reference.count:,}"
            )

    def compute(self) -> dict[str, float]:
        """Shares in [0, 1]."""
        from torch_fidelity.metric_prc import prc_features_to_metric

        in_parts = max(len(self.generated), len(self.real)) > BLOCK  # else all distances, gigabytes, at once
        found = prc_features_to_metric(
            self.generated.cpu(), self.real, prc_neighborhood=NEIGHBOURS, save_cpu_ram=in_parts, verbose=False
        )
        return {name: found[name] for name in self.names}


class InceptionScore(Metric):
    """`is`: how sure Inception is of each picture, and how various they are: exp(mean KL(p(y|x), p(y))), mean over ten
    splits (Salimans et al. 2016, arXiv 1606.03498)."""

    names = ("is",)
    higher_is_better = True
    space = "inception"

    def __init__(self, reference: Reference | None, count: int):
        if count < SPLITS:
            raise UserError(f"is: the Inception score is of {SPLITS} splits: it needs as many pictures, not {count}")
        self.totals = [torch.zeros(count, LOGITS)]

    def update(self, scored: Scored) -> None:
        logits = scored.features["inception_logits"]
        self.totals[0] = devices.send(self.totals[0], logits.device)
        self.totals[0][devices.send(scored.numbers, logits.device)] = logits

    def compute(self) -> dict[str, float]:
        """{"is": mean, "is/std": spread over the splits}."""
        from torch_fidelity.metric_isc import isc_features_to_metric

        found = isc_features_to_metric(self.totals[0].cpu(), SPLITS)
        return {"is": found["inception_score_mean"], "is/std": found["inception_score_std"]}

    @classmethod
    def caveat(cls, reference: Reference | None, count: int) -> str:
        return f"{SPLITS} splits, as torch-fidelity makes them; the papers' for birds had an Inception trained on birds"
