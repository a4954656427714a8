"""Moments, Fréchet distance and CLIP score against numpy, SciPy, closed forms and OpenAI's own CLIP."""

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import fixture_input

from ratlip.encoders.clip_towers import MEAN, STD
from ratlip.metrics.clip_score import ClipScore
from ratlip.metrics.fid import FrechetClip
from ratlip.metrics.frechet import Gaussian, Moments, frechet_distance
from ratlip.metrics.metric import Scored
from ratlip.metrics.reference import Reference

CAPTIONS = ["a red bird", "two green birds on a branch", "a photo", "this flower has petals", "a face"]


def moments_of(features: np.ndarray, sizes: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    moments = Moments(features.shape[1])
    for part in torch.from_numpy(features).split(sizes or [len(features)]):
        moments.update(part)
    return arrays(moments)


def arrays(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    gaussian = moments.gaussian()
    return gaussian.mean.numpy(), gaussian.covariance.numpy()


def distance(mu1, sigma1, mu2, sigma2) -> float:
    return frechet_distance(*(Gaussian(*map(torch.from_numpy, pair)) for pair in ((mu1, sigma1), (mu2, sigma2))))


def random_gaussian(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    factor = rng.standard_normal((dim, dim)) / np.sqrt(dim)
    return rng.standard_normal(dim), factor @ factor.T + 0.05 * np.eye(dim)


def distance_by_scipy(mu1, sigma1, mu2, sigma2) -> float:
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root).real)


@torch.no_grad()
def openai_features(clip, images: torch.Tensor) -> np.ndarray:
    """OpenAI's encode_image of images that have CLIP's side already."""
    prepared = (images * 0.5 + 0.5 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return clip.clip.encode_image(prepared).double().numpy()


@pytest.mark.parametrize("sizes", [[103], [1] * 103, [50, 53], [7, 96], [100, 2, 1]])
def test_moments_in_any_split(sizes):
    features = np.random.default_rng(0).standard_normal((103, 12)) * np.linspace(0.5, 3, 12) + np.arange(12)
    mean, covariance = moments_of(features, sizes)
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(covariance, np.cov(features.T), rtol=1e-10, atol=1e-10)


def test_moments_keep_float64_precision_for_float32_features():
    features = torch.from_numpy(np.random.default_rng(1).standard_normal((3000, 4)).astype(np.float32)) + 20
    mean, covariance = moments_of(features.numpy(), [1000] * 3)
    np.testing.assert_allclose(mean, features.numpy().astype(np.float64).mean(0), rtol=1e-10)
    np.testing.assert_allclose(covariance, np.cov(features.numpy().astype(np.float64).T), rtol=1e-8, atol=1e-9)


def test_moments_of_several_processes_add_up():
    features = np.random.default_rng(2).standard_normal((40, 5))
    parts = [Moments(5), Moments(5)]
    for part, own in zip(parts, (features[::2], features[1::2]), strict=True):
        part.update(torch.from_numpy(own))
    for total, other in zip(parts[0].totals, parts[1].totals, strict=True):
        total += other
    for found, expected in zip(arrays(parts[0]), moments_of(features), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 3, 16, 64])
def test_distance_equals_scipy(dim):
    rng = np.random.default_rng(dim)
    for _ in range(4):
        one, other = random_gaussian(rng, dim), random_gaussian(rng, dim)
        found = distance(*one, *other)
        assert found == pytest.approx(distance_by_scipy(*one, *other), rel=1e-6)
        assert found == pytest.approx(distance(*other, *one), rel=1e-9)


def test_distance_as_dfgan_computes_it(dfgan_answers):
    one, other = fixture_input("fid.a", 200, 16).double().numpy(), fixture_input("fid.b", 150, 16).double().numpy()
    found = distance(*moments_of(one), *moments_of(1.2 * other + 0.1))
    assert found == pytest.approx(float(dfgan_answers["fid.value"]), rel=1e-5)


def test_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(3)
    mu1, mu2 = rng.standard_normal((2, 32))
    var1, var2 = rng.uniform(0.01, 4, (2, 32))
    var2[:5] = 0  # directions that one of them does not use
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(var1) - np.sqrt(var2)) ** 2)
    assert distance(mu1, np.diag(var1), mu2, np.diag(var2)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 10, 400])
def test_distance_to_itself_is_0_even_with_fewer_images_than_dimensions(count):
    features = np.random.default_rng(4).standard_normal((count, 64)) * 2 + 1
    moments = moments_of(features)
    assert abs(distance(*moments, *moments)) < 1e-3
    other = moments_of(features + 1)  # the same cloud, moved: |shift|^2
    assert distance(*moments, *other) == pytest.approx(64, rel=1e-4)


def test_few_images_give_a_finite_distance():
    rng = np.random.default_rng(5)
    few, many = moments_of(rng.standard_normal((6, 64))), moments_of(rng.standard_normal((500, 64)))
    found = distance(*few, *many)
    assert np.isfinite(found) and found > 1
    # A singular covariance is the limit of regular ones.
    regular = (few[0], few[1] + 1e-8 * np.eye(64))
    assert found == pytest.approx(distance_by_scipy(*regular, *many), rel=1e-3)


def test_fd_clip_is_the_distance_of_openai_embeddings(small_clip):
    real, drawn = fixture_input("real", 12, 3, 64, 64).tanh(), fixture_input("drawn", 9, 3, 64, 64).clamp(-1, 1)
    reference = Moments(small_clip.embedding_dim)
    reference.update(torch.from_numpy(openai_features(small_clip, real)))
    metric = FrechetClip(Reference(reference.gaussian(), 12, None, "here"), 9)
    for numbers in torch.arange(9).split(4):
        part = drawn[numbers]
        metric.update(Scored(numbers, part, None, None, {"clip": small_clip.image(part)[1]}))
    found = metric.compute()
    for name, images in (("fd_clip", drawn), ("fd_clip/half", drawn[::2])):
        features = [openai_features(small_clip, some) for some in (images, real)]
        (mu1, mu2), (sigma1, sigma2) = [f.mean(0) for f in features], [np.cov(f.T) for f in features]
        # Few images in many dimensions: regular enough for sqrtm, and near enough.
        ridge = 1e-10 * np.trace(sigma1) * np.eye(64)
        expected = distance_by_scipy(mu1, sigma1 + ridge, mu2, sigma2 + ridge)
        assert found[name] == pytest.approx(expected, rel=1e-2)
    assert not metric.higher_is_better
    assert "9 pictures in 64 dimensions" in metric.caveat(metric_reference(64, 12), 9)
    assert metric.caveat(metric_reference(64, 100), 65) == ""


def metric_reference(dim: int, count: int) -> Reference:
    return Reference(Gaussian(torch.zeros(dim).double(), torch.eye(dim).double()), count, None, "here")


@torch.no_grad()
def test_clip_score_equals_openai(small_clip):
    images = fixture_input("scored", len(CAPTIONS), 3, 64, 64).tanh()
    tokens = small_clip.tokenize(CAPTIONS)
    text = small_clip.clip.encode_text(tokens).double().numpy()
    image = openai_features(small_clip, images)
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    expected = 100 * np.mean(np.sum(image * text, axis=1) / norms)

    metric = ClipScore(None, len(CAPTIONS))
    sentences = small_clip.text(tokens)[0]
    for part in torch.arange(5).split(2):
        features = {"clip": small_clip.image(images[part])[1]}
        metric.update(Scored(part, images[part], [CAPTIONS[i] for i in part], sentences[part], features))
    cosines = 100 * np.sum(image * text, axis=1) / norms
    error = cosines.std(ddof=1) / len(cosines) ** 0.5
    assert metric.compute() == {
        "clip_score": pytest.approx(expected, rel=1e-4),
        "clip_score/standard_error": pytest.approx(error, rel=1e-3),
    }
    assert metric.higher_is_better


def test_clip_score_of_equal_and_opposite_embeddings(small_clip):
    images = fixture_input("scored", 2, 3, 64, 64).tanh()
    embedding = torch.from_numpy(openai_features(small_clip, images)).float()
    for factor in (3.0, -0.5):
        metric = ClipScore(None, 2)
        metric.update(Scored(torch.arange(2), images, CAPTIONS[:2], embedding * factor, {"clip": embedding}))
        assert metric.compute()["clip_score"] == pytest.approx(100 if factor > 0 else -100, rel=1e-4)
