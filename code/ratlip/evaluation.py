"""Evaluation: generate images for the test captions and feed every metric in one pass over them."""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from easydict import EasyDict
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ratlip import device as devices
from ratlip import distributed
from ratlip.data import captions, demo
from ratlip.data.inventory import cache_folder
from ratlip.data.items import Item
from ratlip.data.loader import EnlargedTestImages, TestImages, resize_shorter, to_bytes, to_floats
from ratlip.encoders import TextEncoder
from ratlip.encoders.clip_towers import FrozenClip, load_clip
from ratlip.errors import UserError
from ratlip.metrics import METRICS, reference
from ratlip.metrics.diversity import CAPTIONS, PICTURES
from ratlip.metrics.features import SPACES, MissingWeights, Space, padded
from ratlip.metrics.metric import Metric, Scored
from ratlip.metrics.reference import Reference
from ratlip.paths import full
from ratlip.sampling import generate, noise_of

MISSING = "missing"  # of a file of statistics
JUDGED_BY = "judged by "  # begins a protocol
NOISE_SEED = 0  # sample i is the same image in every evaluation of the same weights


class Stream(NamedTuple):
    """Pictures to score, and what by."""

    batches: Iterable[Scored]  # this process's share, features still to be computed
    count: int  # pictures over all processes
    names: Sequence[str]  # metrics


class Against(NamedTuple):
    """Pictures that take the test split's place."""

    pictures: Dataset  # of (image, number)
    source: str  # which they are, in words


class Scorer:
    """Scores pictures, whoever made them, by the metrics of `eval.metrics`; all that does not depend on them is
    made once. Statistics of the test split are kept in `<data.dir>/stats/`; this is what makes them.

    Args:
        config: resolved; its `eval`, `data`, `clip` and `model.imsize` are read.
        clip: that of the generator, on the device that computes. It is the judge where `eval.clip_weights` is null.
        items: the test split, for the real pictures. None where `against` is given.
        against: what to compare with in its place.

    Raises:
        UserError: an unknown metric, a judge that cannot be loaded, or a file of statistics that was made otherwise.
    """

    def __init__(
        self, config: EasyDict, clip: FrozenClip, items: Sequence[Item] | None = None, against: Against | None = None
    ):
        asked = list(dict.fromkeys(config.eval.metrics))
        unknown = [name for name in asked if name not in METRICS]
        if unknown or not asked:
            raise UserError(f"eval.metrics: {unknown or 'empty'}; there are {', '.join(METRICS)}")
        if "caption_accuracy" in asked and config.data.layout != "demo":
            raise UserError("eval.metrics: caption_accuracy reads the demo's shapes; it needs data.layout demo")
        self.config, self.clip, self.device = config, clip, clip.mean.device
        self.judge = judge_of(config, clip)
        self.spaces: dict[str, Space] = {}
        self.references: dict[str, Reference] = {}
        self.missing: list[str] = []  # metrics whose weights are not there
        for name in dict.fromkeys(METRICS[name].space for name in asked if METRICS[name].space):
            users = [metric for metric in asked if METRICS[metric].space == name]
            try:
                # DAMSM is no judge's: it may be made with the generator's CLIP.
                self.spaces[name] = SPACES[name](config, clip if name == "damsm" else self.judge)
            except MissingWeights as error:
                self.missing += users
                if distributed.rank() == 0:
                    print(f"without {', '.join(users)}: {error}", file=sys.stderr, flush=True)
                continue
            if any(METRICS[metric].against_real for metric in users):
                self.references[name] = self._reference(self.spaces[name], items, against)
        self.names = [name for name in asked if name not in self.missing]

    def __call__(self, streams: Sequence[Stream], beside: Mapping[str, float] | None = None) -> dict[str, float]:
        """Scores by name, with "images" (of the first stream) and "seconds", and "seconds/<stage>" of each stage.

        Args:
            beside: scores that were made before, to stand with these.
        """
        streams, stages = [stream for stream in streams if stream.names], Stages(self.device)
        metrics = [
            [kind(self.references.get(kind.space), stream.count) for kind in _kinds(stream.names)] for stream in streams
        ]
        total = sum(stream.count for stream in streams)
        quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
        with tqdm(total=total, desc="evaluation", unit="image", leave=False, disable=quiet) as bar:
            for stream, own in zip(streams, metrics, strict=True):
                self._read(stream, own, stages, bar)

        distributed.meet()
        every, scores = [metric for own in metrics for metric in own], {}
        with stages("statistics"):
            for metric in every:
                distributed.sum_over_processes(metric.totals, self.device)
        with stages("distance"):
            for metric in every:
                scores.update(metric.compute())
        names = {name for stream in streams for name in stream.names}
        scores |= beside or {}
        ordered = [name for asked in self.names if asked in names for name in scores if name.split("/")[0] == asked]
        counted = {"images": streams[0].count if streams else 0}
        return {**{name: scores[name] for name in ordered}, **counted, **stages.seconds()}

    def _read(self, stream: Stream, metrics: Sequence[Metric], stages: "Stages", bar: tqdm) -> None:
        """One pass over a stream's pictures."""
        spaces = [self.spaces[name] for name in dict.fromkeys(metric.space for metric in metrics) if name]
        left = iter(stream.batches)
        while True:
            with stages("generate"):  # or read
                scored = next(left, None)
            if scored is None:
                return
            with stages("features"):
                for space in spaces:
                    if space.name not in scored.features:
                        scored.features[space.name] = space(scored.images)
                    scored.features.update(space.also(scored.features[space.name], scored.captions))
            with stages("statistics"):
                for metric in metrics:
                    metric.update(scored)
            bar.update(len(scored.images) * distributed.world_size())

    def protocols(self, streams: Sequence[Stream]) -> dict[str, str]:
        """How each score comes about, in words: what must be the same for two to compare."""
        found = {}
        for name, count in ((name, stream.count) for stream in streams for name in stream.names):
            kind = METRICS[name]
            if kind.space is None:
                continue
            space, real = self.spaces[kind.space], self.references.get(kind.space)
            parts = [self._judge_in_words()] if kind.space == "clip" else []
            parts += [f"{space.protocol}, weights {space.checksum}"]
            parts += [f"against {real.source}"] if kind.against_real else []
            parts += [kind.caveat(real, count)]
            found[name] = "; ".join(part for part in parts if part)
        return found

    def _judge_in_words(self) -> str:
        key = "clip.weights" if self.judge is self.clip else "eval.clip_weights"
        return f"{JUDGED_BY}{self.judge.name} ({key})"

    def better(self, scores: dict[str, float], than: dict[str, float] | None) -> bool:
        """Whether `scores` beat `than` in the first metric there is."""
        if not self.names:
            return False
        first = self.names[0]
        if than is None or first not in than:
            return True
        difference = scores[first] - than[first]
        return difference > 0 if METRICS[first].higher_is_better else difference < 0

    def _reference(self, space: Space, items: Sequence[Item] | None, against: Against | None) -> Reference:
        """Read where there is a file, else measured and, for the test split, kept."""
        settings, imsize = self.config.eval, self.config.model.imsize
        released = space.name == "inception_released"
        loading = (space, self.device, settings.batch_size, self.config.data.num_workers)
        if against is not None:
            need_two(len(against.pictures), f"{against.source} as the reference")
            return reference.measure(against.pictures, *loading, against.source)
        if released and settings.released_npz:
            path = Path(settings.released_npz)
            if not path.is_file():
                raise UserError(f"eval.released_npz: no file {full(path)}; null makes statistics of the test split")
            expected = {"protocol": space.protocol, "weights": space.checksum}
            return reference.load(path, space, self.device, expected, bare=True)

        need_two(len(items), "the test split")
        fit, pads = self.config.data.fit, self.config.data.fit != "crop"
        pictures = TestImages(items, imsize, fit)
        protocol = f"{space.protocol}; {imsize} px, {'padded' if pads else 'centre'}"
        if released:
            pictures = EnlargedTestImages(pictures, max(1, round(settings.released_images / len(items))))
            protocol += f"; {pictures.copies} views of each"
        folder = cache_folder(self.config.data).with_name("stats")
        path = folder / f"{space.statistics}_test_{imsize}{f'_{fit}' if pads else ''}_{len(pictures)}.npz"
        facts = {"protocol": protocol, "weights": space.checksum, "count": len(pictures)}
        facts["pictures"] = reference.fingerprint(items)
        reason = distributed.same(reference.outdated(path, facts, space.keeps_features) if path.is_file() else MISSING)
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
    alone: neither the batch size nor the number of processes changes it. For `diversity` there are further ones: of
    CAPTIONS test images, spread over the split, the first caption, each with PICTURES noises.

    Args:
        scorer: of pictures. Its configuration says how many samples there are; its judge encodes the captions for the
            metrics, whatever the generator reads.
        items: the test split.
        precision: "fp32" or "bf16", of generating; features are always computed in float32.
        encoder: reads the captions for the generator. None: the scorer's CLIP.
    """

    def __init__(
        self, scorer: Scorer, items: Sequence[Item], precision: str = "fp32", encoder: TextEncoder | None = None
    ):
        self.scorer, self.items, self.precision = scorer, items, precision
        settings = scorer.config.eval
        self.batch_size = settings.batch_size
        self.samples = check_counts(settings, len(items))
        self.table = captions.CaptionTable([item.captions for item in items])
        encoders = dict.fromkeys((encoder or scorer.clip, scorer.judge))  # one or two
        read = [self._embedded(each, " (by the judge)" * bool(turn)) for turn, each in enumerate(encoders)]
        self.sentences, self.judged = read[0], read[-1]  # what generators read; what scores compare with
        images = np.arange(min(CAPTIONS, len(items))) * len(items) // min(CAPTIONS, len(items))
        self.repeated = self.table.starts[images].tolist()  # the caption rows that get several pictures
        self.better = scorer.better
        self.protocols = scorer.protocols(self._streams(None))

    @cached_property
    def beside(self) -> dict[str, float]:
        """{"diversity/real": what as many real pictures of the same captions have}, where the data has them: the demo;
        measured when it is first asked for."""
        _, several = split_names(self.scorer.names)
        if not several or self.scorer.config.data.layout != "demo":
            return {}
        texts = [self.table.texts[row] for row in self.repeated]
        scores = self.scorer([Stream(rendered_repeats(self.scorer, texts), len(texts) * PICTURES, several)])
        return {f"{name}/real": scores[name] for name in several}

    def __call__(self, generator: nn.Module) -> dict[str, float]:
        """Scores of a generator, by name. Its mode, its statistics and all random states are left as they were."""
        training = generator.training
        scores = self.scorer(self._streams(generator.eval()), self.beside)
        generator.train(training)
        return scores

    def samples_of(self, generator: nn.Module, numbers: Sequence[int]) -> Scored:
        """The samples of these numbers, as they are scored."""
        return self._drawn(generator, numbers, [self.row(number) for number in numbers], numbers)

    def row(self, number: int) -> int:
        """Caption row of sample `number`."""
        turn, image = divmod(number, len(self.table.starts) - 1)
        start, end = self.table.starts[image : image + 2]
        return int(start + turn % (end - start))

    def _embedded(self, encoder: TextEncoder, by: str) -> Tensor:
        with distributed.first_process_first():
            sentences = captions.embed(self.table, encoder, cache_folder(self.scorer.config.data), self.items)
        captions.say_cut(self.table, encoder, f"test captions{by}")
        return sentences.to(self.scorer.device)

    def _streams(self, generator: nn.Module | None) -> list[Stream]:
        single, several = split_names(self.scorer.names)
        return [
            Stream(self._generated(generator), self.samples, single),
            Stream(self._repeated(generator), len(self.repeated) * PICTURES, several),
        ]

    def _generated(self, generator: nn.Module) -> Iterator[Scored]:
        """This process's share of the samples."""
        for batch in _shares(self.samples, self.batch_size):
            yield self.samples_of(generator, batch)

    def _repeated(self, generator: nn.Module) -> Iterator[Scored]:
        """This process's share of the pictures of `repeated`; a caption's are together."""
        for batch in _shares(len(self.repeated), max(1, self.batch_size // PICTURES)):
            places = [(number, picture) for number in batch for picture in range(PICTURES)]
            numbers = [PICTURES * number + picture for number, picture in places]
            yield self._drawn(generator, numbers, [self.repeated[number] for number, _ in places], places)

    def _drawn(
        self, generator: nn.Module, numbers: Sequence[int], rows: Sequence[int], keys: Sequence[int | tuple[int, int]]
    ) -> Scored:
        """Pictures of these numbers, of captions `rows` and with the noises of `keys`."""
        place = self.sentences.device
        noise = devices.send(noise_of(generator, NOISE_SEED, keys), place)
        where = devices.send(torch.from_numpy(np.array(rows)), place)
        images = generate(generator, padded(noise), padded(self.sentences[where]), self.precision)[: len(numbers)]
        texts = [self.table.texts[row] for row in rows]
        items = torch.from_numpy(np.searchsorted(self.table.starts, rows, side="right"))  # from 1: only to tell apart
        return Scored(torch.from_numpy(np.array(numbers)), images, texts, self.judged[where], items=items)


def judge_of(config: EasyDict, clip: FrozenClip) -> FrozenClip:
    """The CLIP that judges, on the device of `clip`: the one of `eval.clip_weights`, else `clip` itself.

    Raises:
        UserError: it cannot be loaded.
    """
    settings = config.eval
    if settings.clip_weights is None:
        return clip
    try:
        with torch.random.fork_rng(devices=[]):  # a training's networks do not depend on who judges them
            judge = load_clip(
                settings.clip_weights, settings.clip_source, settings.clip_activation, preprocess=clip.preprocess
            )
    except UserError as error:
        raise UserError(re.sub(r"(?<![\w.])clip\.(weights|source|activation)", r"eval.clip_\1", str(error))) from None
    return judge.to(clip.mean.device)


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Metrics that read single pictures, and those that read all pictures of a caption together."""
    single = [name for name in names if not METRICS[name].of_repeats]
    return single, [name for name in names if METRICS[name].of_repeats]


def rendered_repeats(scorer: Scorer, texts: Sequence[str]) -> Iterator[Scored]:
    """This process's share of the demo's pictures of these captions, PICTURES of each."""

    def pictures(number: int) -> Tensor:
        drawn = demo.render([demo.parse_caption(texts[number])] * PICTURES, np.random.default_rng((NOISE_SEED, number)))
        resized = (resize_shorter(Image.fromarray(picture), scorer.config.model.imsize) for picture in drawn)
        return torch.stack([to_bytes(picture) for picture in resized])

    return repeats(scorer, len(texts), pictures)


def repeats(scorer: Scorer, count: int, pictures: Callable[[int], Tensor]) -> Iterator[Scored]:
    """This process's share of `count` captions' pictures, those of one at a time.

    Args:
        pictures: gives those of the caption of a number, (PICTURES, 3, H, W) bytes.
    """
    for number in range(distributed.rank(), count, distributed.world_size()):
        images = to_floats(devices.send(pictures(number), scorer.device))
        yield Scored(torch.arange(PICTURES) + PICTURES * number, images, None, None)


def _shares(count: int, size: int) -> Iterator[range]:
    """This process's share of the numbers below `count`, in batches."""
    numbers = range(distributed.rank(), count, distributed.world_size())
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


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
        need_two(images, "the test split (a tenth where no list names it: have 15 pictures or more)")
    need_two(samples, "eval.samples")
    return samples


def need_two(count: int, what: str) -> None:
    """A UserError where there are fewer pictures, with `what` they are."""
    if count < 2:
        raise UserError(f"evaluation needs at least 2 test images and 2 samples; {what}: {count}")


def scores_table(columns: dict[str, dict[str, float]], protocols: Mapping[str, str] | None = None) -> str:
    """Scores side by side: {"start": {...}, "end": {...}} -> lines of text, a score each.

    What each stage took is shown for a single evaluation only.

    Args:
        protocols: of the scores; those that a CLIP judges are marked by its name.
    """
    names = dict.fromkeys(name for scores in columns.values() for name in scores)
    names = [name for name in names if len(columns) == 1 or not name.startswith("seconds/")]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{title:>12}" for title in columns)]
    for name in names:
        protocol = (protocols or {}).get(name, "")
        judge = "  " + protocol.partition("; ")[0] if protocol.startswith(JUDGED_BY) else ""
        values = "".join(f"{scores.get(name, float('nan')):12.4g}" for scores in columns.values())
        lines.append(f"{name.ljust(width)}{values}{judge}")
    return "\n".join(lines)
