"""Sampling through the real entry point: pictures, seeds, and mistakes."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_refused, relative_error, released_weights, run
from PIL import Image
from scipy.stats import norm, truncnorm

from ratlip import checkpoint, config
from ratlip.encoders.clip_towers import load_clip
from ratlip.encoders.damsm import Vocabulary
from ratlip.errors import UserError
from ratlip.models.clip_gan.generator import Generator
from ratlip.sampling import (
    compiled,
    draw,
    embed_captions,
    generate,
    interpolate,
    load_generator,
    seeded_noise,
    similarities,
    truncated,
)

CAPTION = "a small blue heart at the top left on a yellow background"
UNTRAINED = "log.save_dir=nothing_trained_here"
EXACT = "clip.products=linear"  # of pictures that are compared bit for bit: nothing is left to a stopwatch


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


def test_noise_of_dfgans_evaluation(dfgan_answers):
    """By quantiles: 0.88 times a normal cut at 2."""
    noise = torch.special.ndtri(torch.from_numpy(dfgan_answers["noise.u"]).double())
    assert relative_error(truncated(noise, 2.0, 0.88), dfgan_answers["noise.z"]) < 1e-6
    assert truncated(seeded_noise(0, range(500), 100), 2.0, 0.88).std() == pytest.approx(0.774, abs=0.01)


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
    grid = Image.open(tmp_path / "again_overview.png")
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
        ([CAPTION, "fun=x"], ["'fun=x'", "unknown key", "caption", "after --"]),
        ([CAPTION, "batch_size=8"], ["did you mean 'train.batch_size'"]),
        ([CAPTION, "train.sede=8"], ["did you mean 'train.seed'"]),
        ([CAPTION, "n=4"], ["the option --n 4"]),
        ([CAPTION, "Seed=4"], ["the option --seed 4"]),
        ([CAPTION, "--N", "4"], ["unknown option '--N'", "--n?"]),
        ([CAPTION, "-n8"], ["unknown option '-n8'", "--n?"]),
        ([CAPTION, "-5 degrees"], ["unknown option '-5 degrees'", "after --"]),
        (["--captions", "nowhere.txt"], ["no file nowhere.txt"]),
        ([CAPTION, "--captions", "README.md"], ["not both", CAPTION]),
        (["--captions", "docs/samples.png"], ["docs/samples.png", "no text"]),
        ([CAPTION, "--", "a bell \a"], ["caption 2 ", "no text"]),
        ([CAPTION, "--device", "cuda"], ["no GPU"]),
    ],
)
def test_mistakes_end_in_one_line(arguments, parts, tmp_path, call, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = call("sample.py", "cfg/demo.yml", UNTRAINED, "--out", tmp_path / "out", *arguments)
    assert_refused(result, *parts)
    assert not (tmp_path / "out").exists()


def captions_beside(folder: Path) -> dict[str, str]:
    """Each picture's name and the text beside it; nothing else is there to be seen."""
    pictures = sorted(path for path in folder.glob("*.png"))
    seen = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert seen == sorted([path.name for path in pictures] + [path.with_suffix(".txt").name for path in pictures])
    assert [Image.open(path).size for path in pictures] == [(64, 64)] * len(pictures)
    return {path.name: path.with_suffix(".txt").read_text("utf-8") for path in pictures}


def test_what_is_a_caption_and_what_is_not(tmp_path, call):
    words = ["x = y", "an\n  apple\tpie", "train.seed=3", "--n", 1, "--out", tmp_path / "x"]
    result = call("sample.py", "cfg/demo.yml", UNTRAINED, *words, "--", "-5 degrees", "a=b", "train.seed=1", "--n")
    assert result.returncode == 0, result.stderr
    texts = ["x = y\n", "an apple pie\n", "-5 degrees\n", "a=b\n", "train.seed=1\n", "--n\n"]
    assert list(captions_beside(tmp_path / "x").values()) == texts
    names = list(captions_beside(tmp_path / "x"))
    assert names[0] == "01_x-y_seed0_0.png" and names[2] == "03_5-degrees_seed0_0.png"


def test_names_of_captions_in_any_script(tmp_path, call):
    captions = ["большой красный круг", "हिन्दी में " * 30, "黄色背景" * 40, "???"]
    assert call("sample.py", "cfg/demo.yml", UNTRAINED, *captions, "--n", 1, "--out", tmp_path / "x").returncode == 0
    found = captions_beside(tmp_path / "x")
    assert list(found)[0] == "01_большой-красный-круг_seed0_0.png" and list(found)[3] == "04_seed0_0.png"
    assert list(found)[1].startswith("02_हिन्दी-में-हिन्दी") and all(len(name.encode()) < 200 for name in found)
    assert [text.strip() for text in found.values()] == [caption.strip() for caption in captions]


def test_what_was_drawn_is_scored_as_it_lies(tmp_path, call):
    """`test.sh --images` of the folder, against the cosines of what the generator draws, in one pass of our own."""
    captions = [CAPTION, "a large red ring at the top on a white background"]
    words = ("cfg/demo.yml", UNTRAINED)
    assert call("sample.py", *words, *captions, "--n", 8, "--out", tmp_path / "mine").returncode == 0
    again = ("eval.metrics=[clip_score]", f"log.dir={tmp_path}/logs", "train.device=cpu", "--images", tmp_path / "mine")
    result = call("test.py", *words, *again, "--against", tmp_path / "mine")
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "logs").glob("demo/test_*/metrics.jsonl")
    found = json.loads(line.read_text())
    assert found["images"] == 16

    generator, clip, _, _ = load_generator(config.load("cfg/demo.yml"), "assets/demo/generator.pth")
    sentences = embed_captions(clip, captions)
    images = draw(generator, sentences, seeded_noise(0, range(8), generator.noise_dim))
    levels = ((images + 1) * 127.5).round() / 127.5 - 1  # as 8 bits keep them
    for tolerance, drawn in ((1e-3, levels), (0.05, images)):
        cosines = similarities(clip, drawn.flatten(0, 1), sentences.repeat_interleave(8, 0))
        assert found["clip_score"] == pytest.approx(100 * float(cosines.mean()), abs=tolerance)


def test_calls_never_mix(tmp_path, call):
    def sample(caption: str, *more: object):
        result = call("sample.py", "cfg/demo.yml", UNTRAINED, caption, "--n", 2, "--out", tmp_path / "mine", *more)
        assert result.returncode == 0, result.stderr
        return result.stdout

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".DS_Store").touch()
    assert f"2 pictures in {tmp_path}/mine," in sample(CAPTION)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "mine").iterdir()}
    for number, more in enumerate((("--seed", 1), ("--precision", "bf16")), 2):
        printed = sample(CAPTION, *more)
        assert f"{tmp_path}/mine has files of something else" in printed
        assert f"2 pictures in {tmp_path}/mine_{number}," in printed
        assert (tmp_path / f"mine_{number}_overview.png").is_file()
    assert f"{tmp_path}/mine has 2 of these 2 pictures" in sample(CAPTION)  # the same call: nothing to do
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "mine").iterdir()} == before
    lost = sorted((tmp_path / "mine").glob("*.png"))[1]
    lost.unlink()
    assert f"{tmp_path}/mine has 1 of these 2 pictures" in sample(CAPTION) and lost.read_bytes() == before[lost][0]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["mine", "mine_2", "mine_3"]


def test_captions_from_a_file(tmp_path, call):
    """Line and number name a picture and its noise, whatever else is drawn with it."""
    lines = [
        CAPTION,
        "",
        "a large red ring",
        *[f"a small green star {n}" for n in range(9)],
        CAPTION,
        "  ",
        "a big box",
    ]
    (tmp_path / "all.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    (tmp_path / "few.txt").write_text("\n" * 12 + CAPTION + "\n\n", "utf-8")
    for name, *more in (("all", "--n", 3, "eval.batch_size=16"), ("few", "--n", 2)):
        words = ("--captions", tmp_path / f"{name}.txt", "--out", tmp_path / name, EXACT, *more)
        result = call("sample.py", "cfg/demo.yml", UNTRAINED, *words)
        assert result.returncode == 0, result.stderr
    many, few = (captions_beside(tmp_path / name) for name in ("all", "few"))
    assert len(many) == 13 * 3 and len(few) == 2
    assert list(many)[0].startswith("01_a-small-blue") and list(many)[-1] == "15_a-big-box_seed0_2.png"
    assert {name: many[name] for name in few} == few
    for name in few:
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "few" / name).read_bytes()
    same_caption = [name for name, text in many.items() if text.strip() == CAPTION]
    assert len({(tmp_path / "all" / name).read_bytes() for name in same_caption}) == len(same_caption) == 6
    assert "overview: " in result.stdout


def test_no_overview_of_many(tmp_path, call):
    result = call("sample.py", "cfg/demo.yml", UNTRAINED, CAPTION, "--n", 65, "--out", tmp_path / "many")
    assert result.returncode == 0 and "no overview" in result.stdout and len(captions_beside(tmp_path / "many")) == 65
    assert [path.name for path in tmp_path.iterdir()] == ["many"]


def test_a_caption_that_is_cut_is_named(tmp_path, call):
    (tmp_path / "captions.txt").write_text(f"{CAPTION}\n\n{CAPTION} {CAPTION} {CAPTION}\n")
    words = ("--captions", tmp_path / "captions.txt", "--n", 1, "--out", tmp_path / "x")
    printed = call("sample.py", "cfg/demo.yml", UNTRAINED, *words).stdout
    assert f"{tmp_path}/captions.txt, line 3 is cut at the 32 tokens" in printed and "line 1" not in printed


def test_a_stopped_drawing_loses_nothing_and_goes_on(tmp_path, call):
    (tmp_path / "captions.txt").write_text("".join(f"a small red star {number}\n" for number in range(150)))
    words = [
        "cfg/demo.yml",
        UNTRAINED,
        EXACT,
        "--captions",
        tmp_path / "captions.txt",
        "--n",
        1,
        "eval.batch_size=16",
        "--out",
    ]
    out, counts = tmp_path / "stopped", [0]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        command = [sys.executable, *map(str, [ROOT / "code" / "sample.py", *words, out])]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while len(list(out.glob("*.png"))) <= counts[-1]:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(number)
        printed = process.communicate(timeout=60)[1]
        assert process.returncode == code, printed
        for path in out.glob("*.png"):  # whole, and captioned
            Image.open(path).load()
            assert path.with_suffix(".txt").read_text().startswith("a small red star")
        counts.append(len(list(out.glob("*.png"))))
        if code > 0:
            assert f"stopped by {number.name}: {counts[-1]} of 150 pictures in {out}" in printed
    assert counts == sorted(counts) and counts[-1] < 150
    for folder in (out, tmp_path / "undisturbed"):
        assert call("sample.py", *words, folder).returncode == 0
    names = [path.name for path in (tmp_path / "undisturbed").iterdir() if path.suffix != ".json"]
    assert len(names) == 300
    assert all((out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("size", "parts"), [(1000, ["there are 0 of 2 pictures", "draws the others"]), (10, [".json"])]
)
def test_a_full_disk_is_one_line(size, parts, tmp_path):
    """As a limit on the size of files, which pictures exceed, or already the record of what was asked for."""
    small = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
    result = run("sample.py", "cfg/demo.yml", UNTRAINED, CAPTION, "--n", 2, "--out", tmp_path / "x", **small)
    assert_refused(result, f"{tmp_path}/x/", "cannot be written (File too large)", *parts)
    assert not [path for path in (tmp_path / "x").iterdir() if path.suffix in (".png", ".partial")]
    assert (tmp_path / "x" / ".drawn.json").exists() == (size == 1000)


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


def test_another_activation_is_another_order(call, tmp_path):
    """CLIP's weights alone do not say what it computes: pictures of two CLIPs never mix in a folder."""
    bare = tmp_path / "bare.pt"
    torch.save(dict(checkpoint.read(ROOT / "assets/demo/clip.pt")), bare)
    for activation, folder in (("quick_gelu", "out"), ("gelu", "out_2"), ("quick_gelu", "out")):
        words = (f"clip.weights={bare}", f"clip.activation={activation}", "clip.insist=true")
        result = call("sample.py", "cfg/demo.yml", "a small red star", "--n", 1, "--out", tmp_path / "out", *words)
        assert result.returncode == 0, result.stderr
        assert f"1 picture in {tmp_path / folder}," in result.stdout


def test_a_released_dfgan_with_its_encoder(call, demo_folder, tmp_path):
    """README's words; without the encoder the answer says what to set."""
    networks = {name: released_weights(f"dfgan64.{name}") for name in ("netG", "netD")}
    torch.save({"model": {**networks, "netC": released_weights("dfgan.netC")}, "epoch": 1220}, tmp_path / "state.pth")
    torch.save(released_weights("damsm.text"), tmp_path / "text_encoder200.pth")
    captions = [path.read_text() for path in demo_folder.rglob("text/**/*.txt")]
    words = Vocabulary.of(["a small red bird", *captions]).words
    words += [f"word{number}" for number in range(len(words), 5450)]
    content = [[[1]], [[1]], dict(enumerate(words)), {word: number for number, word in enumerate(words)}]
    (tmp_path / "captions.pickle").write_bytes(pickle.dumps(content, protocol=2))
    order = [
        "cfg/demo.yml",
        "a small red bird",
        "--checkpoint",
        tmp_path / "state.pth",
        "--n",
        1,
        "--out",
        tmp_path / "o",
    ]
    pair = [f"text.weights={tmp_path}/text_encoder200.pth", f"text.vocabulary={tmp_path}/captions.pickle"]
    result = call("sample.py", *order, "model.name=dfgan", "text.encoder=damsm", *pair)
    assert result.returncode == 0 and "released DF-GAN, epoch 1220" in result.stdout, result.stderr
    (picture,) = (tmp_path / "o").glob("*.png")
    assert Image.open(picture).size == (64, 64)
    few = ("data.layout=folder", f"data.dir={demo_folder}", "eval.samples=2", "eval.metrics=[clip_score]")
    scored = ("cfg/demo.yml", tmp_path / "state.pth", "model.name=dfgan", "text.encoder=damsm", *pair, *few)
    result = call("test.py", *scored, f"log.dir={tmp_path}/logs")
    assert result.returncode == 0 and "released DF-GAN" in result.stdout and "clip_score" in result.stdout, (
        result.stderr
    )
    assert_refused(call("sample.py", *order), "sentence vectors of 256", "model.name=dfgan text.encoder=damsm")
    result = call("sample.py", *order, "model.name=dfgan", "text.encoder=damsm", pair[0])
    assert_refused(result, "captions_DAMSM.pickle", "captions.pickle", "text_encoder200.pth", "text.encoder=clip")
