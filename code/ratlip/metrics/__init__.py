"""The metrics by name. A new one is a subclass of Metric (metric.py) in a file of its own, named in this list."""

from ratlip.metrics.all_features import InceptionScore, Kid, PrecisionRecall
from ratlip.metrics.caption_accuracy import CaptionAccuracy
from ratlip.metrics.clip_score import ClipScore
from ratlip.metrics.cmmd import Cmmd
from ratlip.metrics.diversity import Diversity
from ratlip.metrics.fid import Fid, FrechetClip, ReleasedFid
from ratlip.metrics.r_precision import DamsmRPrecision, RPrecision

KINDS = (
    Fid,
    ReleasedFid,
    FrechetClip,
    Cmmd,
    ClipScore,
    RPrecision,
    DamsmRPrecision,
    Diversity,
    Kid,
    PrecisionRecall,
    InceptionScore,
    CaptionAccuracy,
)
METRICS = {name: metric for metric in KINDS for name in metric.names}
