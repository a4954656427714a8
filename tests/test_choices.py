"""Choices that the machine decides: what is clearly faster is taken, and a run keeps what it took."""

import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import ROOT, TINY_RUN, relative_error

from ratlip import checkpoint, choices, config
from ratlip import device as devices
from ratlip.encoders import clip_towers
from ratlip.sampling import own_precision
from ratlip.systems import clip_gan
from ratlip.systems.clip_gan import ClipGan

CPU = torch.device("cpu")
UNDECIDED = ("train.precision=auto", "clip.products=auto")


@pytest.mark.parametrize(
    ("published", "other", "expected"),
    [
        ([9, 2, 2, 2], [9, 1, 1, 1], "other"),
        ([9, 2, 2, 2], [9, 3, 3, 3], "published"),
        ([9, 2, 2, 2], [9, 1.9, 1.9, 1.9], "published"),  # a lead of a twentieth
        ([9, 2, 2, 2], [9, 1.79, 1.79, 1.79], "other"),
        ([9, 2, 2, 2], [0.1, 3, 3, 3], "published"),  # the first call does not count
        ([9, 2, 2, 2], [9, 7, 1, 7], "other"),  # disturbed in the others
        ([9, 2, 7, 2], [9, 2, 1, 2], "other"),
    ],
)
def test_the_rule(published, other, expected, monkeypatch):
    """On a clock that the two ways move by these seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def way(seconds):
        left = itertools.chain(seconds, itertools.repeat(seconds[-1]))
        return lambda: now.__setitem__(0, now[0] + next(left))

    found, said = choices.fastest({"published": way(published), "other": way(other)}, 45)
    assert found == expected and said.startswith("published ") and ", other " in said


def test_time_is_bounded(monkeypatch):
    """No round is begun that would not fit, but for the first."""
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def way(seconds):
        return lambda: (calls.append(seconds), now.__setitem__(0, now[0] + seconds))

    for seconds, rounds in ((0.4, 3), (0.9, 1), (5.0, 1), (0.001, choices.ROUNDS)):
        calls.clear()
        found, _ = choices.fastest({"a": way(seconds), "b": way(seconds * 0.8)}, 2.5)
        assert len(calls) == 2 * rounds and found == "b"


def delayed(function):
    def slow(*args, **kwargs):
        time.sleep(2)  # more than what else a busy machine does
        return function(*args, **kwargs)

    return slow


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize(("slow", "fast"), [("linear", "convolution"), ("convolution", "linear")])
def test_a_slowed_form_loses(small_clip, monkeypatch, slow, fast, learning):
    monkeypatch.setattr(small_clip, "products", slow)
    monkeypatch.setitem(clip_towers.PRODUCTS, slow, delayed(clip_towers.PRODUCTS[slow]))
    measured = choices.settle_products(small_clip, "auto", 4, CPU, learning)
    assert small_clip.products == fast and "linear " in measured and "convolution " in measured
    for form in ("linear", "convolution"):  # asked for: nothing is measured
        assert choices.settle_products(small_clip, form, 4, CPU, learning) == "" and small_clip.products == form
    assert choices.settle_products(small_clip, "auto", 4, torch.device("cuda"), learning) == ""
    assert small_clip.products == "linear"


@pytest.mark.parametrize(("slow", "fast"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_slowed_precision_loses(small_clip, monkeypatch, slow, fast):
    """And what is timed leaves no trace in the networks, nor in the random numbers."""
    resolved = config.load("cfg/demo.yml", ["model.imsize=16", "model.d_channels=16"])
    system, sentences = ClipGan.build(resolved, small_clip, small_clip), torch.ones(4, small_clip.embedding_dim)
    parts, autocast, networks = system.parts_of_a_step, devices.autocast, system.networks.values()
    monkeypatch.setattr(devices, "has_bf16_routines", lambda: True)
    monkeypatch.setattr(
        system,
        "parts_of_a_step",
        lambda *a: (delayed(parts) if torch.is_autocast_enabled("cpu") == low else parts)(*a),
    )
    low = slow == "bf16"
    before = [value.clone() for network in networks for value in network.state_dict().values()]
    state = torch.get_rng_state()
    found, measured = choices.settle_precision("auto", system, sentences, CPU)
    assert found == fast and "fp32 " in measured and "bf16 " in measured, measured
    after = [value for network in networks for value in network.state_dict().values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) and system.generator.training
    assert all(p.grad is None for network in (*networks, small_clip) for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state) and devices.autocast is autocast
    assert choices.settle_precision("fp16", system, sentences, CPU) == ("fp16", "")
    monkeypatch.setattr(devices, "has_bf16_routines", lambda: False)
    assert choices.settle_precision("auto", system, sentences, CPU) == ("fp32", "")


def test_large_maps_are_timed_an_image_at_a_time(small_clip, monkeypatch):
    """All small blocks on the whole share, or the last small and the last large one on one image, in their shapes."""
    resolved = config.load("cfg/demo.yml", ["model.imsize=64", "model.d_channels=16"])
    system = ClipGan.build(resolved, small_clip, small_clip)
    for large, sides, batch in (
        (2**20, [4, 8, 16, 32], 6),
        (16 * 64**2, [16, 32], 1),  # the last block's
        (64 * 16**2, [4, 32], 1),  # all but the first's
        (128 * 8**2, [32], 1),
    ):
        monkeypatch.setattr(clip_gan, "LARGE", large)
        inputs = [own[0] for _, own in system.parts_of_a_step(torch.ones(6, small_clip.embedding_dim))]
        assert [x.shape[-1] for x in inputs[:-1]] == sides and {len(x) for x in inputs} == {batch}
        assert inputs[-1].shape[1:] == (3, 64, 64)


def test_both_forms_give_the_same(small_clip, monkeypatch):
    """Embeddings, feature maps, what the mapper and the text tower give, and gradients, to rounding."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 64, 64, generator=random) * 2 - 1
    features = torch.randn(3, small_clip.width, small_clip.grid, small_clip.grid, generator=random)
    prompts = torch.randn(3, len(small_clip.prompt_blocks), small_clip.width, generator=random)
    tokens = small_clip.tokenize(["a red star", "a blue ring", "a box"])
    found = {}
    for form in clip_towers.PRODUCTS:
        monkeypatch.setattr(small_clip, "products", form)
        inputs = [value.clone().requires_grad_() for value in (images, features, prompts)]
        outputs = [*small_clip.image(inputs[0]), small_clip.mapper(*inputs[1:]), *small_clip.text(tokens)]
        gradients = torch.autograd.grad(sum(value.square().mean() for value in outputs[:3]), inputs)
        found[form] = [*outputs, *gradients]
    for one, other in zip(found["linear"], found["convolution"], strict=True):
        assert relative_error(other, one) < 1e-5
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(3)
    assert relative_error(clip_towers.as_convolution(x, weight, bias), F.linear(x, weight, bias)) < 1e-5
    assert clip_towers.as_convolution(x, weight).shape == (2, 5, 3)


@pytest.fixture
def words(demo_folder, clip_file, tmp_path):
    """words(folder, *more) -> a small run that leaves the choices open, with its files below tmp_path / folder."""

    def words(folder: str, *more: str) -> list[str]:
        places = (f"log.dir={tmp_path}/{folder}/logs", f"log.save_dir={tmp_path}/{folder}/saved")
        small = (f"data.dir={demo_folder}", "data.layout=folder", "model.imsize=16", f"clip.weights={clip_file}")
        kind = ("eval.metrics=[clip_score]", "train.device=cpu", "log.save_interval=1", "train.max_epoch=2")
        return ["cfg/demo.yml", *TINY_RUN, *UNDECIDED, *places, *small, *kind, *more]

    return words


@pytest.fixture
def force(monkeypatch):
    """force(number): from now on the way of that number is the fastest, whatever is timed."""
    monkeypatch.setattr(devices, "has_bf16_routines", lambda: True)
    return lambda number: monkeypatch.setattr(choices, "fastest", lambda ways, _: (list(ways)[number], f"by {number}"))


def trained(call, words: list[str]) -> str:
    result = call("train.py", *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def first_line(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if " on cpu in " in line]
    return line


def test_the_first_line_says_what_was_measured(words, tmp_path, call):
    line = first_line(trained(call, words("one", "train.max_epoch=1")))
    (folder,) = (tmp_path / "one/saved/demo").iterdir()
    kept = checkpoint.read(folder / "state_epoch_001.pth")["config"]
    assert line.startswith(f"ratlip on cpu in {kept['train.precision']}, CLIP's products as {kept['clip.products']} (")
    assert "linear " in line and "convolution " in line and ("fp32 " in line) == devices.has_bf16_routines()
    own = config.load(folder)
    assert (own.train.precision, own.clip.products) == (kept["train.precision"], kept["clip.products"])
    assert own.train.precision in ("fp32", "bf16") and own.clip.products in clip_towers.PRODUCTS


@pytest.mark.parametrize("number", [0, 1])
def test_a_resumed_run_keeps_what_it_began_with(words, tmp_path, call, force, number):
    """To the last bit of a run that nothing disturbed, though the other way is the faster one by then."""
    began = f"in {('fp32', 'bf16')[number]}, CLIP's products as {('linear', 'convolution')[number]}"
    force(number)
    assert f"{began} (measured: by {number}; by {number})" in first_line(trained(call, words("whole")))
    trained(call, words("parts", "train.max_hours=1e-9"))
    force(1 - number)
    again = [
        word for word in words("parts") if word not in UNDECIDED and "precision" not in word and "prod" not in word
    ]
    resumed = trained(call, [*again, "train.resume=auto"])
    assert f"{began}: " in first_line(resumed) and "warning" not in resumed
    (whole,), (parts,) = (
        (checkpoint.read(path) for path in tmp_path.glob(f"{name}/saved/demo/*/state_epoch_002.pth"))
        for name in ("whole", "parts")
    )
    for network in ("generator", "discriminator", "ema"):
        assert all(torch.equal(value, parts[network][key]) for key, value in whole[network].items()), network
    assert parts["scores"]["end"]["clip_score"] == whole["scores"]["end"]["clip_score"]


def test_a_setting_overrules_and_may_ask_anew(words, tmp_path, call, force):
    force(0)
    trained(call, words("one", "train.max_hours=1e-9"))
    (folder,) = (tmp_path / "one/saved/demo").iterdir()
    force(1)
    stated = trained(call, [str(folder), "train.resume=auto", "train.max_hours=1e-9", "clip.products=convolution"])
    assert "in fp32, CLIP's products as convolution: " in first_line(stated)
    assert "clip.products: linear -> convolution" in stated
    anew = trained(call, [str(folder), "train.resume=auto", "train.max_hours=1e-9", "train.precision=auto"])
    assert "in bf16, CLIP's products as convolution (measured: by 1): " in first_line(anew)
    assert "train.precision: fp32 -> bf16" in anew


def test_a_run_of_an_earlier_program_goes_on_as_it_was(words, tmp_path, call, force):
    """Those measured nothing: by what the processor has, and as convolutions."""
    force(0)
    trained(call, words("one", "train.max_hours=1e-9"))
    (path,) = tmp_path.glob("one/saved/demo/*/state_epoch_*.pth")
    content = checkpoint.read(path)
    del content["config"]["clip.products"]
    content["config"]["train.precision"] = "auto"
    torch.save(content, path)
    own = path.with_name("config.yml")
    kept = yaml.safe_load(own.read_text())
    del kept["clip"]["products"]
    kept["train"]["precision"] = "auto"
    own.write_text(yaml.safe_dump(kept))
    before = devices.choose_precision("auto", CPU)
    assert config.load(path.parent).train.precision == config.load(path.parent).clip.products == "auto"
    printed = trained(call, [str(path.parent), "train.resume=auto", "train.max_hours=1e-9"])
    assert f"in {before}, CLIP's products as convolution: " in first_line(printed) and "warning" not in printed


def test_no_score_depends_on_a_stopwatch(words, tmp_path, call, force, monkeypatch):
    """test.sh and sample.sh take the precision that the checkpoint was trained in, wherever they run."""
    force(1)
    trained(call, words("one"))
    (path,) = tmp_path.glob("one/saved/demo/*/state_epoch_002.pth")
    content = checkpoint.read(path)
    assert own_precision(path) == content["config"]["train.precision"] == "bf16"
    force(0)
    monkeypatch.setattr(devices, "choose_precision", lambda *_: pytest.fail("by what the machine has"))
    found = {}
    for precision in ("auto", "bf16", "fp32"):
        logs = tmp_path / f"scored/{precision}"
        result = call("test.py", *words("one", f"train.precision={precision}", f"log.dir={logs}"), path)
        assert result.returncode == 0, result.stderr
        found[precision] = json.loads(next(logs.glob("demo/test_*/metrics.jsonl")).read_text())["clip_score"]
    assert found["auto"] == found["bf16"] == pytest.approx(content["scores"]["end"]["clip_score"], rel=1e-5)
    assert found["fp32"] != found["bf16"]
    out = tmp_path / "drawn"
    drawn = call("sample.py", *words("one"), "a red star", "--checkpoint", path, "--precision", "auto", "--out", out)
    assert drawn.returncode == 0, drawn.stderr
    assert json.loads((out / ".drawn.json").read_text())["precision"] == "bf16"

    content["config"]["train.precision"] = "auto"  # of an earlier program
    torch.save(content, tmp_path / "earlier.pth")
    torch.save({"model": {}}, tmp_path / "released.pth")
    assert own_precision(tmp_path / "earlier.pth") == own_precision(tmp_path / "released.pth") == "fp32"


def test_pictures_are_gone_on_with_in_the_form_they_were_begun_in(tmp_path, call, force, monkeypatch):
    def sample(*more: object) -> None:
        few = ("log.save_dir=nothing_trained_here", "--n", 2, "--out", tmp_path / "mine")
        result = call("sample.py", "cfg/demo.yml", "a small blue heart", *few, *more)
        assert result.returncode == 0 and f"2 pictures in {tmp_path}/mine," in result.stdout, result.stderr

    force(0)
    sample()
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    sorted((tmp_path / "mine").glob("*.png"))[1].unlink()
    monkeypatch.setitem(clip_towers.PRODUCTS, "convolution", lambda *_: pytest.fail("another form"))
    sample("clip.products=convolution")
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


TWO = """
import json, os, sys
from ratlip import choices, config, device
from ratlip.trainer import prepare

rank = int(os.environ["RANK"])
device.has_bf16_routines = lambda: True
choices.fastest = lambda ways, seconds: (list(ways)[rank], f"by {rank}")  # each process finds another
training, _, _, evaluator = prepare(config.load(sys.argv[2], sys.argv[3:]))
found = [training.precision, evaluator.precision, training.settings.precision, training.system.clip.products]
open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps([*found, training.measured]))
"""


def test_the_first_process_decides_for_all(words, tmp_path):
    (tmp_path / "script.py").write_text(TWO)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, tmp_path / "script.py", tmp_path, *words("two")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [["fp32", "fp32", "fp32", "linear", "by 0; by 0"]] * 2
