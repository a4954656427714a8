"""The metrics by name. Each is made with the moments of the real test images, takes `update(Scored)`, adds up in
`totals` (float64 tensors that sum over processes), and answers `compute()` -> {score name: value}."""

from ratlip.metrics.caption_accuracy import CaptionAccuracy
from ratlip.metrics.clip_score import ClipScore
from ratlip.metrics.frechet import FrechetClip

METRICS = {metric.name: metric for metric in (FrechetClip, ClipScore, CaptionAccuracy)}
