"""Evaluation: generate images for the test captions and feed every metric in one pass over them."""

import time
from collections.abc import Sequence

import torch
from easydict import EasyDict
from torch.utils.data import DataLoader
from tqdm import tqdm

from ratlip import distributed
from ratlip.clip_towers import FrozenClip
from ratlip.data import captions
from ratlip.data.inventory import cache_folder
from ratlip.data.layouts import Item
from ratlip.data.loader import TestImages
from ratlip.errors import UserError
from ratlip.metrics import METRICS
from ratlip.metrics.frechet import Moments
from ratlip.metrics.scored import Scored
from ratlip.models.generator import Generator
from ratlip.sampling import generate, seeded_noise

NOISE_SEED = 0  # sample i is the same image in every evaluation of the same weights


class Evaluator:
    """Scores generators on the test split; what does not depend on the generator is computed once.

    Sample i shows test image i mod n, with its next caption on every further pass, and noise that depends on i
    alone: neither the batch size nor the number of processes changes it.

    Args:
        config: resolved; its `eval`, `data` and `model.imsize` are read.
        clip: on the device that evaluates.
        items: the test split.
    """

    def __init__(self, config: EasyDict, clip: FrozenClip, items: Sequence[Item], precision: str = "fp32"):
        self.names = config.eval.metrics
        unknown = [name for name in self.names if name not in METRICS]
        if unknown or not self.names:
            raise UserError(f"eval.metrics: {unknown or 'empty'}; there are {', '.join(METRICS)}")
        if "caption_accuracy" in self.names and config.data.layout != "demo":
            raise UserError("eval.metrics: caption_accuracy reads the demo's shapes; it needs data.layout demo")
        self.clip, self.precision = clip, precision
        self.batch_size = config.eval.batch_size
        self.samples = config.eval.samples or config.eval.sample_times * len(items)
        if min(len(items), self.samples) < 2:
            raise UserError(f"evaluation needs at least 2 test images and 2 samples, not {len(items)}, {self.samples}")
        self.table = captions.CaptionTable([item.captions for item in items])
        self.sentences = captions.embed(self.table, clip, cache_folder(config.data)).to(clip.mean.device)
        self.reference = self._reference(TestImages(items, config.model.imsize), config.data.num_workers)

    def __call__(self, generator: Generator) -> dict[str, float]:
        """Scores of a generator, by name: those of every metric, "images" (how many) and "seconds"."""
        started, training = time.time(), generator.training
        generator.eval()
        metrics = [METRICS[name](self.reference) for name in self.names]
        numbers = range(distributed.rank(), self.samples, distributed.world_size())
        batches = [numbers[i : i + self.batch_size] for i in range(0, len(numbers), self.batch_size)]
        quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
        for batch in tqdm(batches, desc="evaluation", unit="batch", leave=False, disable=quiet):
            rows = [self._row(number) for number in batch]
            noise = seeded_noise(NOISE_SEED, batch, generator.noise_dim).to(self.sentences.device)
            images = generate(generator, noise, self.sentences[rows], self.precision)
            scored = Scored(images, [self.table.texts[row] for row in rows], self.sentences[rows], self.clip)
            for metric in metrics:
                metric.update(scored)
        generator.train(training)
        scores = {}
        for metric in metrics:
            distributed.sum_over_processes(metric.totals, self.sentences.device)
            scores.update(metric.compute())
        return {**scores, "images": self.samples, "seconds": time.time() - started}

    def better(self, scores: dict[str, float], than: dict[str, float] | None) -> bool:
        """Whether `scores` beat `than` in the first metric."""
        first = METRICS[self.names[0]]
        if than is None:
            return True
        difference = scores[first.name] - than[first.name]
        return difference > 0 if first.higher_is_better else difference < 0

    def _row(self, number: int) -> int:
        """Caption row of sample `number`."""
        turn, image = divmod(number, len(self.table.starts) - 1)
        start, end = self.table.starts[image : image + 2]
        return int(start + turn % (end - start))

    def _reference(self, images: TestImages, num_workers: int) -> Moments:
        """Moments of the CLIP embeddings of the real test images."""
        moments = Moments(self.clip.embedding_dim)
        loader = DataLoader(images, self.batch_size, num_workers=num_workers)
        quiet = distributed.rank() > 0 or None
        with torch.no_grad():
            for batch, _ in tqdm(loader, desc="features of real images", unit="batch", leave=False, disable=quiet):
                moments.update(self.clip.image(batch.to(self.clip.mean.device))[1])
        return moments


def scores_table(columns: dict[str, dict[str, float]]) -> str:
    """Scores side by side: {"start": {...}, "end": {...}} -> lines of text, a metric each."""
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{title:>12}" for title in columns)]
    for name in names:
        lines.append(
            name.ljust(width) + "".join(f"{scores.get(name, float('nan')):12.4g}" for scores in columns.values())
        )
    return "\n".join(lines)
