"""Evaluation: generate images for the test captions, or read pictures, and feed every metric in one pass over them."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from tqdm import tqdm

from ratlip import device as devices
from ratlip import distributed
from ratlip.clip_towers import FrozenClip
from ratlip.data import captions
from ratlip.data.demo import parse_caption
from ratlip.data.files import find_pictures
from ratlip.data.inventory import cache_folder
from ratlip.data.items import Item
from ratlip.data.loader import EnlargedTestImages, Pictures, TestImages, picture_batches
from ratlip.errors import UserError
from ratlip.metrics import METRICS, reference
from ratlip.metrics.features import SPACES, MissingWeights, Space, padded
from ratlip.metrics.metric import Scored
from ratlip.metrics.reference import Reference
from ratlip.models.generator import Generator
from ratlip.paths import full
from ratlip.sampling import generate, seeded_noise
from ratlip.text import existing, read_captions

MISSING = "missing"  # of a file of statistics
NOISE_SEED = 0  # sample i is the same image in every evaluation of the same weights


class Scorer:
    """Scores pictures, whoever made them, by the metrics of `eval.metrics`; all that does not depend on them is
    made once. Statistics of the test split are kept in `<data.dir>/stats/`; this is what makes them.

    Args:
        config: resolved; its `eval`, `data`, `clip` and `model.imsize` are read.
        clip: on the device that computes.
        items: the test split, for the real pictures. None where `against` is given.
        against: a folder of pictures that takes the test split's place.

    Raises:
        UserError: an unknown metric, or a file of statistics that was made otherwise.
    """

    def __init__(
        self, config: EasyDict, clip: FrozenClip, items: Sequence[Item] | None = None, against: Path | None = None
    ):
        asked = list(dict.fromkeys(config.eval.metrics))
        unknown = [name for name in asked if name not in METRICS]
        if unknown or not asked:
            raise UserError(f"eval.metrics: {unknown or 'empty'}; there are {', '.join(METRICS)}")
        if "caption_accuracy" in asked and config.data.layout != "demo":
            raise UserError("eval.metrics: caption_accuracy reads the demo's shapes; it needs data.layout demo")
        self.config, self.clip, self.device = config, clip, clip.mean.device
        self.spaces: dict[str, Space] = {}
        self.references: dict[str, Reference] = {}
        self.missing: list[str] = []  # metrics whose weights are not there
        for name in dict.fromkeys(METRICS[name].space for name in asked if METRICS[name].space):
            users = [metric for metric in asked if METRICS[metric].space == name]
            try:
                self.spaces[name] = SPACES[name](config, clip)
            except MissingWeights as error:
                self.missing += users
                if distributed.rank() == 0:
                    print(f"without {', '.join(users)}: {error}", file=sys.stderr, flush=True)
                continue
            if any(METRICS[metric].against_real for metric in users):
                self.references[name] = self._reference(self.spaces[name], items, against)
        self.names = [name for name in asked if name not in self.missing]

    def __call__(self, batches: Iterable[Scored], count: int, captioned: bool = True) -> dict[str, float]:
        """Scores by name, with "images" and "seconds", and "seconds/<stage>" of each stage.

        Args:
            batches: this process's share, features still to be computed.
            count: pictures over all processes.
        """
        stages = Stages(self.device)
        names = self._applicable(captioned)
        metrics = [kind(self.references.get(kind.space), count) for kind in _kinds(names)]
        spaces = [self.spaces[name] for name in dict.fromkeys(metric.space for metric in metrics) if name]
        quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
        left = iter(batches if metrics else ())
        with tqdm(total=count, desc="evaluation", unit="image", leave=False, disable=quiet) as bar:
            while True:
                with stages("generate"):  # or read
                    scored = next(left, None)
                if scored is None:
                    break
                with stages("features"):
                    scored.features.update((space.name, space(scored.images)) for space in spaces)
                with stages("statistics"):
                    for metric in metrics:
                        metric.update(scored)
                bar.update(len(scored.images) * distributed.world_size())

        distributed.meet()
        scores = {}
        with stages("statistics"):
            for metric in metrics:
                distributed.sum_over_processes(metric.totals, self.device)
        with stages("distance"):
            for metric in metrics:
                scores.update(metric.compute())
        scores = {name: value for name, value in scores.items() if name.split("/")[0] in names}
        return {**scores, "images": count if metrics else 0, **stages.seconds()}

    def protocols(self, count: int, captioned: bool = True) -> dict[str, str]:
        """How each score of `count` pictures comes about, in words: what must be the same for two to compare."""
        found = {}
        for name in self._applicable(captioned):
            kind = METRICS[name]
            if kind.space is None:
                continue
            space, real = self.spaces[kind.space], self.references.get(kind.space)
            parts = [f"{space.protocol}, weights {space.checksum}"]
            if kind.against_real:
                parts += [f"against {real.source}", kind.caveat(real, count)]
            found[name] = "; ".join(part for part in parts if part)
        return found

    def better(self, scores: dict[str, float], than: dict[str, float] | None) -> bool:
        """Whether `scores` beat `than` in the first metric there is."""
        if not self.names:
            return False
        first = self.names[0]
        if than is None or first not in than:
            return True
        difference = scores[first] - than[first]
        return difference > 0 if METRICS[first].higher_is_better else difference < 0

    def _applicable(self, captioned: bool) -> list[str]:
        return [name for name in self.names if captioned or not METRICS[name].needs_captions]

    def _reference(self, space: Space, items: Sequence[Item] | None, against: Path | None) -> Reference:
        """Read where there is a file, else measured and, for the test split, kept."""
        settings, imsize = self.config.eval, self.config.model.imsize
        released = space.name == "inception_released"
        loading = (space, self.device, settings.batch_size, self.config.data.num_workers)
        if against is not None:
            pictures = Pictures(find_pictures(against))
            _need_two(len(pictures), f"{against} as the reference")
            return reference.measure(pictures, *loading, f"{len(pictures):,} pictures of {against}")
        if released and settings.released_npz:
            path = Path(settings.released_npz)
            if not path.is_file():
                raise UserError(f"eval.released_npz: no file {full(path)}; null makes statistics of the test split")
            expected = {"protocol": space.protocol, "weights": space.checksum}
            return reference.load(path, space, self.device, expected, bare=True)

        _need_two(len(items), "the test split")
        pictures, protocol = TestImages(items, imsize), f"{space.protocol}; {imsize} px, centre"
        if released:
            pictures = EnlargedTestImages(pictures, max(1, round(settings.released_images / len(items))))
            protocol += f"; {pictures.copies} views of each"
        folder = cache_folder(self.config.data).with_name("stats")
        path = folder / f"{space.statistics}_test_{imsize}_{len(pictures)}.npz"
        facts = {"protocol": protocol, "weights": space.checksum, "count": len(pictures)}
        facts["pictures"] = reference.fingerprint(items)
        reason = distributed.same(reference.outdated(path, facts) if path.is_file() else MISSING)
        if reason:  # the first process's answer for all: it may be writing already
            if reason != MISSING:
                distributed.say(f"{path}: {reason}; measured anew")
            measured = reference.measure(pictures, *loading, "")
            reference.save(path, measured, space, protocol, facts["pictures"])
            distributed.same("")  # the file is there for everybody
        return reference.load(path, space, self.device, facts, bare=released)


class Evaluator:
    """Scores generators on the test split.

    Sample i shows test image i mod n, with its next caption on every further pass, and noise that depends on i
    alone: neither the batch size nor the number of processes changes it.

    Args:
        scorer: of pictures. Its configuration says how many samples there are, its CLIP encodes the captions.
        items: the test split.
        precision: "fp32" or "bf16", of generating; features are always computed in float32.
    """

    def __init__(self, scorer: Scorer, items: Sequence[Item], precision: str = "fp32"):
        self.scorer, self.items, self.precision = scorer, items, precision
        settings = scorer.config.eval
        self.batch_size = settings.batch_size
        self.samples = check_counts(settings, len(items))
        self.table = captions.CaptionTable([item.captions for item in items])
        with distributed.first_process_first():
            sentences = captions.embed(self.table, scorer.clip, cache_folder(scorer.config.data))
        captions.say_cut(self.table, scorer.clip, "test captions")
        self.sentences = sentences.to(scorer.device)
        self.better = scorer.better
        self.protocols = scorer.protocols(self.samples)

    def __call__(self, generator: Generator) -> dict[str, float]:
        """Scores of a generator, by name. Its mode, its statistics and all random states are left as they were."""
        training = generator.training
        scores = self.scorer(self._generated(generator.eval()), self.samples)
        generator.train(training)
        return scores

    def _generated(self, generator: Generator) -> Iterator[Scored]:
        """This process's share of the samples."""
        numbers = range(distributed.rank(), self.samples, distributed.world_size())
        for batch in (numbers[i : i + self.batch_size] for i in range(0, len(numbers), self.batch_size)):
            rows = [self._row(number) for number in batch]
            noise = devices.send(seeded_noise(NOISE_SEED, batch, generator.noise_dim), self.sentences.device)
            sentences = self.sentences[devices.send(torch.from_numpy(np.array(rows)), self.sentences.device)]
            images = generate(generator, padded(noise), padded(sentences), self.precision)[: len(batch)]
            yield Scored(torch.from_numpy(np.array(batch)), images, [self.table.texts[row] for row in rows], sentences)

    def _row(self, number: int) -> int:
        """Caption row of sample `number`."""
        turn, image = divmod(number, len(self.table.starts) - 1)
        start, end = self.table.starts[image : image + 2]
        return int(start + turn % (end - start))


def _caption_of(picture: Path) -> str:
    """The first caption in the text file beside a picture."""
    path = existing(picture.with_suffix(".txt"))
    try:
        found = read_captions(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such caption file; give one for every picture, or for none") from None
    if not found:
        raise UserError(f"{path}: holds no caption")
    return found[0]


def _leave_out_caption_accuracy(scorer: Scorer, texts: Sequence[str]) -> None:
    """Where a caption is not of the demo's kind ("a red dog") and there are other metrics, and say so."""
    if "caption_accuracy" in scorer.names and len(scorer.names) > 1:
        try:
            for text in texts:
                parse_caption(text)
        except ValueError as error:
            scorer.names.remove("caption_accuracy")
            distributed.say(f"without caption_accuracy: {error}")


def score_folder(scorer: Scorer, folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Scores, and protocols, of the pictures in a folder, as they are.

    A picture's caption is the first line of the file of its name with .txt beside it; without any such files, the
    metrics that need captions are left out, and `caption_accuracy` with captions of another kind than the demo's.
    """
    paths = find_pictures(folder)
    _need_two(len(paths), str(folder))
    texts, sentences = None, None
    if any(path.with_suffix(".txt").is_file() for path in paths):
        texts = [_caption_of(path) for path in paths]
        table = captions.CaptionTable([[text] for text in texts])
        sentences = captions.embed(table, scorer.clip).to(scorer.device)
        captions.say_cut(table, scorer.clip, f"captions of {folder}")
        _leave_out_caption_accuracy(scorer, texts)

    def batches() -> Iterator[Scored]:
        loading = (scorer.config.eval.batch_size, scorer.config.data.num_workers, scorer.device)
        for images, numbers in picture_batches(Pictures(paths), *loading):
            captioned = (None, None)
            if texts:
                captioned = [texts[n] for n in numbers], sentences[devices.send(numbers, scorer.device)]
            yield Scored(numbers, images, *captioned)

    return scorer(batches(), len(paths), texts is not None), scorer.protocols(len(paths), texts is not None)


class Stages:
    """Seconds spent in each stage, those of what a GPU then still has to do included: there the GPU notes the times as
    it comes by, and is waited for only when they are asked for."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.started = device.type == "cuda", time.time()
        self.spans: dict[str, list] = {name: [] for name in ("generate", "features", "statistics", "distance")}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = self._now()
        yield
        self.spans[stage].append((started, self._now()))

    def seconds(self) -> dict[str, float]:
        """{"seconds": since the beginning, "seconds/<stage>": ...}."""
        if self.on_gpu:
            torch.cuda.synchronize()
        spent = {
            f"seconds/{name}": sum(a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in spans)
            for name, spans in self.spans.items()
        }
        return {"seconds": time.time() - self.started, **spent}

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _kinds(names: Sequence[str]) -> list[type]:
    """The classes of these metrics, each once: one class may have several names."""
    return list(dict.fromkeys(METRICS[name] for name in names))


def check_counts(settings: EasyDict, images: int) -> int:
    """How many samples a generator's evaluation draws for so many test images; `settings` is the config's eval group.

    Raises:
        UserError: too few of either.
    """
    samples = settings.samples or settings.sample_times * images
    kinds = _kinds([name for name in settings.metrics if name in METRICS])
    stated = {"inception_released"} if settings.released_npz else set()  # spaces whose statistics need no test image
    if any(kind.against_real and kind.space not in stated for kind in kinds):
        _need_two(images, "the test split (a tenth where no list names it: have 15 pictures or more)")
    _need_two(samples, "eval.samples")
    return samples


def _need_two(count: int, what: str) -> None:
    if count < 2:
        raise UserError(f"evaluation needs at least 2 test images and 2 samples; {what}: {count}")


def scores_table(columns: dict[str, dict[str, float]]) -> str:
    """Scores side by side: {"start": {...}, "end": {...}} -> lines of text, a score each.

    What each stage took is shown for a single evaluation only.
    """
    names = dict.fromkeys(name for scores in columns.values() for name in scores)
    names = [name for name in names if len(columns) == 1 or not name.startswith("seconds/")]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{title:>12}" for title in columns)]
    for name in names:
        lines.append(
            name.ljust(width) + "".join(f"{scores.get(name, float('nan')):12.4g}" for scores in columns.values())
        )
    return "\n".join(lines)
