"""R-precision against a plain count, whatever the batches, and what may not be compared with."""

import numpy as np
import pytest
import torch

from ratlip import distributed
from ratlip.metrics.metric import Scored
from ratlip.metrics.r_precision import CANDIDATES, RPrecision, first_of


def score(images, sentences, texts, items=None, batches=1) -> dict[str, float]:
    metric = RPrecision(None, len(images))
    for part in torch.arange(len(images)).tensor_split(batches):
        own = None if items is None else items[part]
        found = {"clip": images[part]}
        metric.update(Scored(part, images[part], [texts[n] for n in part], sentences[part], found, own))
    return metric.compute()


@pytest.fixture(scope="module")
def many():
    """400 pictures near their captions, of 40 items."""
    torch.manual_seed(0)
    sentences = torch.randn(400, 8)
    return (
        sentences + torch.randn(400, 8) * 0.8,
        sentences,
        [f"caption {n}" for n in range(400)],
        torch.arange(400) // 10,
    )


def test_the_share_is_that_of_random_candidates(many):
    """Of a plain draw of 99 others for each picture, by hand, within what the draws differ by."""
    images, sentences, texts, items = many
    found = score(*many)
    cosines = (images / images.norm(dim=1, keepdim=True)) @ (sentences / sentences.norm(dim=1, keepdim=True)).T
    rng, shares = np.random.default_rng(1), []
    for _ in range(20):
        others = [rng.choice(np.flatnonzero(items.numpy() != int(items[n])), 99, False) for n in range(400)]
        shares.append(np.mean([bool(cosines[n, n] > cosines[n, others[n]].max()) for n in range(400)]))
    assert 0.2 < np.mean(shares) < 0.8
    assert abs(found["r_precision"] - np.mean(shares)) < 4 * np.std(shares) + 0.01
    assert 0 < found["r_precision/std"] < 0.2 and found["r_precision/candidates"] == CANDIDATES


def test_neither_batches_nor_processes_nor_scale_change_it(many, monkeypatch):
    images, sentences, texts, items = many
    expected = score(*many)
    assert score(*many, batches=7) == expected
    assert score(images * 3, sentences / 7, texts, items) == expected
    shares = []  # of two processes, each with every second picture
    for rank in range(2):
        metric = RPrecision(None, 400)
        numbers = torch.arange(rank, 400, 2)
        found = {"clip": images[numbers]}
        own = [texts[n] for n in numbers]
        metric.update(Scored(numbers, images[numbers], own, sentences[numbers], found, items[numbers]))
        shares.append(metric)
    idle = RPrecision(None, 400)
    monkeypatch.setattr(distributed, "gather", lambda own: [own, shares[1].seen, idle.seen])
    assert shares[0].compute() == expected


def test_chance_and_certainty():
    torch.manual_seed(0)
    texts, vectors = [str(n) for n in range(2000)], torch.randn(2000, 64)
    assert score(vectors, vectors, texts)["r_precision"] == 1
    assert score(-vectors, vectors, texts)["r_precision"] == 0
    assert abs(score(torch.randn(2000, 64), vectors, texts)["r_precision"] - 0.01) < 0.008


def test_what_is_no_other_caption():
    """One of the same words, one of the same item; one that is embedded alike is a hit."""
    images = torch.tensor([[1.0, 0], [0, 1], [0.2, 1]])
    sentences = torch.tensor([[1.0, 0.1], [1, 0], [0, 1]])  # the second picture's is better of the first one's
    same, others = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    hits, candidates = first_of(images, sentences, others, others)
    assert hits.tolist() == [0, 0, 1] and candidates.tolist() == [3, 3, 3]
    hits, candidates = first_of(images, sentences, torch.tensor([0, 0, 1]), others)
    assert hits.tolist() == [1, 0, 1] and candidates.tolist() == [2, 2, 3]
    hits, candidates = first_of(images, sentences, others, torch.tensor([5, 5, 1]))
    assert hits.tolist() == [1, 0, 1] and candidates.tolist() == [2, 2, 3]
    assert first_of(images, torch.ones(3, 2), others, others)[0].tolist() == [1, 1, 1]
    assert first_of(images, sentences, same, others)[1].tolist() == [1, 1, 1]


def test_few_captions_are_said():
    found = score(torch.eye(5), torch.eye(5), list("abcde"))
    assert found["r_precision"] == 1 and found["r_precision/candidates"] == 5
    assert np.isnan(score(torch.eye(5), torch.eye(5), ["a"] * 5)["r_precision"])
    assert "which 5 pictures have fewer" in RPrecision.caveat(None, 5) and "fewer" not in RPrecision.caveat(None, 100)
