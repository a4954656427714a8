"""Scores of pictures that no generator draws: those of a folder, and the test split's own."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from easydict import EasyDict
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ratlip import device as devices
from ratlip import distributed
from ratlip.data import captions
from ratlip.data.demo import parse_caption
from ratlip.data.files import find_pictures
from ratlip.data.items import Item
from ratlip.data.loader import Pictures, TestImages, picture_batches
from ratlip.errors import UserError
from ratlip.evaluation import (
    Against,
    Evaluator,
    Scorer,
    Stream,
    need_two,
    rendered_repeats,
    repeats,
    split_names,
)
from ratlip.metrics import METRICS
from ratlip.metrics.diversity import CAPTIONS, PICTURES
from ratlip.metrics.metric import Scored
from ratlip.text import existing, read_captions


def folder_as_reference(folder: Path) -> Against:
    """The pictures of a folder, to compare with."""
    pictures = Pictures(find_pictures(folder))
    return Against(pictures, f"{len(pictures):,} pictures of {folder}")


def half_as_reference(config: EasyDict, items: Sequence[Item]) -> Against:
    """Every second picture of the test split, to compare the others with."""
    if len(items) < 4:
        raise UserError(f"the test split has {len(items)} pictures; to compare its halves it needs 4")
    half = items[1::2]
    return Against(_test_images(config, half), f"{len(half):,} pictures of the test split, the others are scored")


def score_folder(scorer: Scorer, folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Scores, and protocols, of the pictures in a folder, as they are.

    A picture's caption is the first line of the file of its name with .txt beside it; without any such files, the
    metrics that need captions are left out, and `caption_accuracy` with captions of another kind than the demo's.
    `diversity` is that of the captions that have PICTURES pictures or more, of one size.
    """
    paths = find_pictures(folder)
    need_two(len(paths), str(folder))
    texts, sentences = None, None
    if any(path.with_suffix(".txt").is_file() for path in paths):
        texts = [_caption_of(path) for path in paths]
        table = captions.CaptionTable([[text] for text in texts])
        sentences = captions.embed(table, scorer.judge).to(scorer.device)
        captions.say_cut(table, scorer.judge, f"captions of {folder}")
        _leave_out_caption_accuracy(scorer, texts)
    single, several = split_names(scorer.names)
    single = [name for name in single if texts or not METRICS[name].needs_captions]
    keys = [[(text, _size(path))] for text, path in zip(texts, paths, strict=True)] if several and texts else []
    pictures = Pictures(paths)

    def batches() -> Iterator[Scored]:
        for images, numbers in _loaded(scorer, pictures):
            captioned = (None, None)
            if texts:
                captioned = [texts[n] for n in numbers], sentences[devices.send(numbers, scorer.device)]
            yield Scored(numbers, images, *captioned)

    streams = [Stream(batches(), len(paths), single), _alike(scorer, pictures, keys, several)]
    return scorer(streams), scorer.protocols(streams)


def score_real(evaluator: Evaluator, halved: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Scores, and protocols, of the test split's own pictures, as if they had been generated: what a score means.

    Sample i is the real picture of the caption that generated sample i has.

    Args:
        halved: distances are of every second picture, since the scorer's reference is the others
            (`half_as_reference`); else of all.
    """
    scorer, items = evaluator.scorer, evaluator.items
    single, several = split_names(scorer.names)
    compared = _test_images(scorer.config, items[::2] if halved else items)
    if scorer.config.data.layout == "demo":
        texts = [evaluator.table.texts[row] for row in evaluator.repeated]
        drawn = Stream(rendered_repeats(scorer, texts), len(texts) * PICTURES, several)
    else:
        drawn = _alike(scorer, _test_images(scorer.config, items), [item.captions for item in items], several)
    streams = [
        Stream(_real(evaluator), evaluator.samples, [name for name in single if not METRICS[name].against_real]),
        Stream(
            (Scored(numbers, images, None, None) for images, numbers in _loaded(scorer, compared)),
            len(compared),
            [name for name in single if METRICS[name].against_real],
        ),
        drawn,
    ]
    return scorer(streams), scorer.protocols(streams)


def _real(evaluator: Evaluator) -> Iterator[Scored]:
    """This process's share of the real pictures with the samples' captions; a picture's features are found once."""
    table, count, place = evaluator.table, len(evaluator.items), evaluator.judged.device
    pictures = _test_images(evaluator.scorer.config, evaluator.items[: evaluator.samples])
    for images, numbers in _loaded(evaluator.scorer, pictures):
        features: dict[str, Tensor] = {}
        for first in range(0, evaluator.samples, count):
            kept = torch.tensor([row for row, n in enumerate(numbers.tolist()) if first + n < evaluator.samples])
            if not len(kept):
                break
            samples, on_device = first + numbers[kept], devices.send(kept, place)
            rows = torch.tensor([evaluator.row(sample) for sample in samples.tolist()])
            texts, sentences = [table.texts[row] for row in rows], evaluator.judged[devices.send(rows, place)]
            known = {name: values[on_device] for name, values in features.items()}
            scored = Scored(samples, images[on_device], texts, sentences, known, numbers[kept])
            yield scored
            features = features or scored.features  # of all: the first turn leaves none out


def _test_images(config: EasyDict, items: Sequence[Item]) -> TestImages:
    return TestImages(items, config.model.imsize, config.data.fit)


def _loaded(scorer: Scorer, pictures: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    config = scorer.config
    return picture_batches(pictures, config.eval.batch_size, config.data.num_workers, scorer.device)


def _alike(scorer: Scorer, pictures: Dataset, keys: Sequence[Iterable[Hashable]], names: Sequence[str]) -> Stream:
    """The pictures that share a key: of the first CAPTIONS keys that PICTURES pictures have, the first PICTURES.

    Args:
        keys: of each picture.
        names: metrics of such pictures; where there are none they are left out, which is said.
    """
    numbers: dict[Hashable, list[int]] = {}
    for number, own in enumerate(keys):
        for key in dict.fromkeys(own):
            numbers.setdefault(key, []).append(number)
    alike = [own[:PICTURES] for own in numbers.values() if len(own) >= PICTURES][:CAPTIONS]
    if names and not alike:
        distributed.say(f"without {', '.join(names)}: no caption has {PICTURES} pictures")

    def load(group: int) -> Tensor:
        return torch.stack([pictures[number][0] for number in alike[group]])

    return Stream(repeats(scorer, len(alike), load), len(alike) * PICTURES, names if alike else [])


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:  # its first bytes alone
        return picture.size


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
