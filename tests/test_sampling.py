"""Sampling through the real entry point: pictures, seeds, and mistakes."""

import os
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_refused, relative_error, released_weights, run
from PIL import Image
from scipy.stats import norm, truncnorm

from ratlip.clip_towers import load_clip
from ratlip.errors import UserError
from ratlip.models.generator import Generator
from ratlip.sampling import compiled, embed_captions, generate, interpolate, seeded_noise, similarities, truncated

CAPTION = "a small blue heart at the top left on a yellow background"
UNTRAINED = "log.save_dir=nothing_trained_here"


def test_noise_belongs_to_the_sample():
    noise = seeded_noise(3, [0, 5, 2], 100)
    assert torch.equal(noise[1], seeded_noise(3, [5], 100)[0])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[1], seeded_noise(4, [5], 100)[0])
    assert seeded_noise(0, range(500), 100).std() == pytest.approx(1, abs=0.02)


def test_truncated_noise_has_the_truncated_normal_distribution():
    """Quantiles against SciPy's, and the order of the numbers kept."""
    noise = seeded_noise(0, range(50), 100)
    for limit in (0.3, 1.0, 2.5):
        found = truncated(noise, limit)
        expected = truncnorm.ppf(norm.cdf(noise.double()), -limit, limit)
        assert found.abs().max() <= limit and found.dtype == torch.float32
        assert np.allclose(found, expected, atol=1e-5)
    assert torch.allclose(truncated(noise, float("inf")), noise, atol=1e-5)
    with pytest.raises(UserError, match="above 0, not 0"):
        truncated(noise, 0)


def test_interpolation_keeps_to_the_great_circle():
    start, end = seeded_noise(0, [0, 1], 100)
    end = 2 * end
    path = interpolate(start, end, 5)
    assert path.shape == (5, 100)
    assert torch.allclose(path[0], start, atol=1e-5) and torch.allclose(path[-1], end, atol=1e-5)
    lengths = path.norm(dim=1)
    assert torch.allclose(lengths.diff(), lengths.diff()[:1].expand(4), rtol=1e-3)
    angles = torch.nn.functional.cosine_similarity(path[:-1], path[1:]).arccos()
    assert torch.allclose(angles, angles[:1].expand(4), rtol=1e-3)
    assert torch.equal(interpolate(start, start, 3), start.expand(3, -1))
    assert torch.isfinite(interpolate(start, -start, 3)).all()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_generator_draws_the_same(clip_file):
    torch.manual_seed(0)
    generator = Generator(load_clip(str(clip_file)), 16, 16, 8).eval()
    noise, sentences = torch.randn(2, 8), torch.randn(2, 64)
    expected = generate(generator, noise, sentences)
    assert relative_error(generate(compiled(generator), noise, sentences), expected) < 1e-4


def test_compiling_without_a_compiler_says_what_to_install(clip_file, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="apt-get install"):
        compiled(Generator(load_clip(str(clip_file)), 16, 16))


def test_similarities_are_clips_cosines(clip_file):
    clip = load_clip(str(clip_file))
    images, sentences = torch.rand(3, 3, 32, 32) * 2 - 1, embed_captions(clip, ["a bird", "a red bird", "two birds"])
    found = similarities(clip, images, sentences)
    for image, sentence, cosine in zip(images, sentences, found, strict=True):
        embedding = clip.image(image[None])[1][0]
        assert float(cosine) == pytest.approx(
            float(embedding @ sentence / embedding.norm() / sentence.norm()), abs=1e-5
        )


def test_shipped_checkpoint_draws_the_caption(tmp_path):
    result = run("sample.py", "cfg/demo.yml", CAPTION, UNTRAINED, "--n", 4, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "assets/demo/generator.pth" in result.stdout
    pictures = sorted(tmp_path.glob("01_*_seed0_*.png"))
    assert len(pictures) == 4
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert pixels.shape == (64, 64, 3)
        red, green, blue = pixels[-8:].reshape(-1, 3).mean(0)  # the bottom is background: yellow
        assert red > 200 and green > 180 and blue < 140
        red, green, blue = pixels[12:18, 12:20].reshape(-1, 3).mean(0)  # inside the heart: blue
        assert blue > 150 and red < 120
    again = run("sample.py", "cfg/demo.yml", "a large red ring at the top on a white background", CAPTION, UNTRAINED,
                "--n", 2, "--out", tmp_path / "again")  # fmt: skip
    assert again.returncode == 0, again.stderr
    for k in range(2):  # the same seed, another place among the captions
        one, two = (
            next(folder.glob(f"0{n}_a-small*_{k}.png")) for folder, n in ((tmp_path, 1), (tmp_path / "again", 2))
        )
        assert np.abs(np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(two))).max() <= 1
    grid = Image.open(tmp_path / "again" / "grid.png")
    assert grid.width > 2 * 128 and grid.height > 2 * 128


def test_bf16_pictures_are_near_float32s(tmp_path):
    pictures = []
    for precision in ("fp32", "bf16"):
        words = (UNTRAINED, "--n", 1, "--precision", precision, "--out", tmp_path / precision)
        result = run("sample.py", "cfg/demo.yml", CAPTION, *words)
        assert result.returncode == 0, result.stderr
        (path,) = (tmp_path / precision).glob("01_*_0.png")
        pictures.append(np.asarray(Image.open(path)).astype(int))
    difference = np.abs(pictures[0] - pictures[1])
    assert 0 < difference.max() and difference.mean() < 4  # levels of 255


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([""], ["caption 1 is empty"]),
        ([CAPTION, "   "], ["caption 2 is empty"]),
        (["train.seed=1"], ["no caption"]),
        ([CAPTION, "--checkpoint", "nowhere.pth"], ["no checkpoint", "/nowhere.pth"]),
        ([CAPTION, "--checkpoint", "README.md"], ["README.md"]),
        ([CAPTION, "--n", "0"], ["--n"]),
        ([CAPTION, "--device", "cuda"], ["no GPU"]),
    ],
)
def test_mistakes_end_in_one_line(arguments, parts, tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    result = run("sample.py", "cfg/demo.yml", UNTRAINED, *arguments, "--out", tmp_path / "out", environment=hidden)
    assert_refused(result, *parts)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, call):
    torch.save({"model": {"netG": Trap()}}, tmp_path / "trap.pth")
    result = call("sample.py", "cfg/demo.yml", CAPTION, "--checkpoint", tmp_path / "trap.pth")
    assert_refused(result, "trap.pth", "refused", "mkdir")
    assert not (ROOT / "executed").exists()


def test_nothing_trained_says_what_to_run():
    assert_refused(run("sample.py", "cfg/bird.yml", "a bird", UNTRAINED), "bash scripts/train.sh cfg/bird.yml")


def test_released_checkpoint_with_another_clip(tmp_path):
    path = tmp_path / "galip.pth"
    torch.save({"model": {"netG": released_weights("galip.netG")}, "epoch": 3}, path)
    result = run("sample.py", "cfg/demo.yml", CAPTION, "--checkpoint", path)
    assert_refused(result, "CLIP of width 768 and embedding 512", "192 and 128")
