"""The training step and the training script, on small networks and a few pictures."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from helpers import TINY_RUN, assert_refused, run, watch_gradients
from PIL import Image

from ratlip import checkpoint, config
from ratlip.course import LOOK_EVERY
from ratlip.data.loader import Batch, Draw, to_floats
from ratlip.models import blocks
from ratlip.trainer import prepare, train_step


def words(folder, clip_file, *more):
    """Overrides for a run on a few pictures that leaves its files below `folder`."""
    places = (f"log.dir={folder}/logs", f"log.save_dir={folder}/saved", f"clip.weights={clip_file}")
    return [*TINY_RUN, *places, *more]


@pytest.fixture
def make(demo_folder, clip_file, tmp_path):
    """make(*overrides) -> (Training, batches, loader), ready for the first step."""

    def make(*more):
        few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=32", "eval.metrics=[clip_score]")
        resolved = config.load("cfg/demo.yml", words(tmp_path, clip_file, *few, "train.device=cpu", *more))
        training, batches, loader, _ = prepare(resolved)
        training.generator.train()
        return training, batches, loader

    return make


def steps(made, count: int) -> dict[str, torch.Tensor]:
    """Train and give every weight."""
    training, batches, loader = made
    while training.step < count:
        batches.epoch = training.step // len(batches)
        for batch in loader:
            if training.step < count:
                train_step(training, batch)
    networks = {"g": training.generator, "d": training.networks["discriminator"], "ema": training.ema}
    return {f"{n}.{key}": value.clone() for n, net in networks.items() for key, value in net.state_dict().items()}


def test_the_seed_decides_every_bit(make):
    first, again, other = (steps(make(f"train.seed={seed}"), 3) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("more", [(), ("model.name=galip", "train.augment_shift=0.1", "train.ema=0.5")])
def test_everything_that_should_learn_changes_and_clip_does_not(make, more):
    made = make(*more)
    clip_before = copy.deepcopy(made[0].system.clip.state_dict())
    before = steps(made, 0)
    after = steps(made, 3)
    for prefix in ("g.", "d.", "ema."):
        assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith(prefix)), prefix
    assert all(torch.equal(value, clip_before[key]) for key, value in made[0].system.clip.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in made[0].system.clip.parameters())
    assert all(p.requires_grad for p in made[0].networks["discriminator"].parameters())


def test_whitening_is_that_of_training_images(make):
    training, _, loader = make("model.d_whiten=true")
    items = range(len(loader.dataset))
    images = torch.stack([loader.dataset[Draw(0, number, 0, 0)][0] for number in items])  # fewer than are looked at
    maps = training.system.clip.feature_maps(to_floats(images))
    prepared = training.networks["discriminator"].prepare(maps)
    assert prepared.mean(0).abs().max() < 1e-3 and 0.1 < prepared.std() <= 1
    assert not make("model.d_whiten=false")[0].networks["discriminator"].whiten


class Recorder(torch.optim.Adam):
    """Notes which parameters have a gradient at each of its steps, and both networks' weights around it."""

    def watch(self, own: torch.nn.Module, other: torch.nn.Module) -> "Recorder":
        self.own, self.other, self.seen = own, other, []
        return self

    def step(self):
        other = [p.clone() for p in self.other.parameters()]
        own = [p.clone() for p in self.own.parameters()]
        super().step()
        left_alone = all(torch.equal(a, b) for a, b in zip(other, self.other.parameters(), strict=True))
        moved = any(not torch.equal(a, b) for a, b in zip(own, self.own.parameters(), strict=True))
        self.seen.append((left_alone, moved))


def test_each_update_leaves_the_other_network_alone(make):
    training, batches, loader = make()
    g, d = training.generator, training.networks["discriminator"]
    training.optimizers["generator"] = Recorder(g.parameters(), 1e-3).watch(g, d)
    training.optimizers["discriminator"] = Recorder(d.parameters(), 1e-3).watch(d, g)
    for batch in loader:
        before = {key: value.clone() for key, value in g.named_parameters()}
        train_step(training, batch)
    for optimizer in training.optimizers.values():
        assert optimizer.seen == [(True, True)] * len(batches)
    assert any(not torch.equal(value, before[key]) for key, value in g.named_parameters())


@pytest.mark.parametrize("whiten", ["false", "true"])
def test_step_equals_the_losses_written_out(make, whiten):
    """One step against DESIGN's formulas, with every pass made anew and plain Adam. MA-GP's gradients are with respect
    to what the discriminator reads."""
    still = ("train.ema=0", "train.augment_shift=0", "train.augment_brightness=0")
    training, _, loader = make(*still, f"model.d_whiten={whiten}")
    batch = next(iter(loader))
    clip, s = training.system.clip, training.settings
    sentence, wrong = training.sentences[batch.rows], training.sentences[batch.mismatched_rows]
    g, d = (build_copy(network, clip) for network in (training.generator, training.networks["discriminator"]))
    rng = np.random.default_rng((s.seed, 0))
    noise = torch.from_numpy(rng.standard_normal((s.batch_size, g.noise_dim), dtype=np.float32))

    real = d.prepare(clip.image(to_floats(batch.images))[0]).requires_grad_()
    leaf = sentence.clone().requires_grad_()
    logits = d.logits(d.features(real), leaf)
    gradients = torch.autograd.grad(logits.sum(), (real, leaf), create_graph=True)
    norm = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).norm(dim=1)
    fake = clip.image(g(noise, sentence))[0]
    loss_d = (1 - logits).relu().mean() + 0.5 * (1 + d(fake.detach(), sentence)).relu().mean()
    loss_d = loss_d + 0.5 * (1 + d.logits(d.features(real), wrong)).relu().mean() + 2 * (norm**6).mean()
    expected_d = dict(zip(names(d), torch.autograd.grad(loss_d, list(d.parameters())), strict=True))

    found = watch_gradients(training)
    values = train_step(training, batch)
    for name, expected in expected_d.items():
        near = 1e-5 * float(expected.abs().max()) + 1e-9
        assert torch.allclose(found["d"][name], expected, rtol=1e-3, atol=near), name

    # The generator then faces the updated discriminator.
    maps, embedding = clip.image(g(noise, sentence))
    similarity = torch.nn.functional.cosine_similarity(embedding, sentence).mean()
    loss_g = -training.networks["discriminator"](maps, sentence).mean() - s.sim_w * similarity
    expected_g = dict(zip(names(g), torch.autograd.grad(loss_g, list(g.parameters()), allow_unused=True), strict=True))
    for name, expected in expected_g.items():
        near = 1e-4 * float(expected.abs().max()) + 1e-9
        assert torch.allclose(found["g"][name], expected, rtol=1e-3, atol=near), name
    assert float(values["loss_g/clip_similarity"]) == pytest.approx(float(similarity), abs=1e-5)


def test_bf16_step_is_near_float32(make):
    terms = {}
    for precision in ("fp32", "bf16"):
        training, _, loader = make(f"train.precision={precision}")
        terms[precision] = train_step(training, next(iter(loader)))
        assert all(p.dtype == torch.float32 for p in training.generator.parameters())
    for name, expected in terms["fp32"].items():
        if name.startswith("loss"):
            assert float(terms["bf16"][name]) == pytest.approx(float(expected), abs=0.02), name


def test_a_batch_that_is_not_finite_changes_nothing(make):
    training, batches, loader = make("train.max_bad_steps=3")
    first, second, third = list(loader)
    train_step(training, first)
    adam = [state for optimizer in training.optimizers.values() for state in optimizer.state.values()]
    networks = (*training.networks.values(), training.ema)
    before = copy.deepcopy([network.state_dict() for network in networks])
    before += copy.deepcopy(adam)
    poisoned = second._replace(images=to_floats(second.images))
    poisoned.images[0, 0, 5, 5] = torch.nan
    values = train_step(training, poisoned)
    after = [network.state_dict() for network in networks] + adam
    assert all(torch.equal(b[key], a[key]) for b, a in zip(before, after, strict=True) for key in b)
    assert int(values["bad_steps"]) == training.bad_steps == training.bad_in_a_row == 1 and training.step == 2
    values = train_step(training, third)
    assert all(torch.isfinite(value) for value in values.values())
    assert (training.bad_steps, training.bad_in_a_row) == (1, 0)
    assert not torch.equal(before[1]["to_rgb.weight"], training.generator.state_dict()["to_rgb.weight"])


def test_generator_that_is_not_finite_leaves_averages_alone(make):
    """Pictures that are not numbers reach neither BatchNorm's running statistics nor the averaged generator."""
    training, _, loader = make()
    training.generator.fc_code.weight.data[0, 0] = torch.inf
    before = {key: value.clone() for key, value in training.ema.state_dict().items()}
    buffers = [buffer.clone() for buffer in training.generator.buffers()]
    train_step(training, next(iter(loader)))
    assert training.bad_steps == 1
    assert all(torch.equal(value, before[key]) for key, value in training.ema.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(buffers, training.generator.buffers(), strict=True))


def test_discriminator_keeps_its_step_where_only_the_generator_is_not_finite(make):
    found = []
    for weight in (4.0, torch.nan):  # of the similarity, which enters the generator's loss alone
        training, _, loader = make()
        training.settings.sim_w = weight
        start = {key: value.clone() for key, value in training.generator.state_dict().items()}
        values = train_step(training, next(iter(loader)))
        found.append([*training.networks["discriminator"].state_dict().values(), values["gradient_norm/d"]])
    assert all(torch.equal(good, bad) for good, bad in zip(*found, strict=True))
    assert training.bad_steps == 1 and torch.isnan(values["gradient_norm/g"])
    for network in (training.generator, training.ema):
        assert all(torch.equal(value, start[key]) for key, value in network.state_dict().items())
    assert {float(state["step"]) for state in training.optimizers["generator"].state.values()} == {0.0}
    assert {float(state["step"]) for state in training.optimizers["discriminator"].state.values()} == {1.0}


def test_divergence_is_seen_at_the_next_look(demo_folder, clip_file, tmp_path, call, monkeypatch):
    """On a GPU, where the count is not read in every step: here at the end of each epoch, of three steps."""
    monkeypatch.setitem(LOOK_EVERY, "cpu", 10)
    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=16", "eval.metrics=[clip_score]")
    endless = ("train.lr_d=1e30", "train.max_bad_steps=1", "log.save_interval=9", "train.max_epoch=9")
    result = call("train.py", "cfg/demo.yml", *words(tmp_path, clip_file, *few, *endless))
    assert_refused(result, "training diverged: 3 steps in a row (to step 3)")


def test_divergence_ends_the_run_and_names_the_last_good_checkpoint(demo_folder, clip_file, tmp_path):
    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=16", "eval.metrics=[clip_score]")
    endless = ("train.lr_d=1e30", "train.max_bad_steps=4", "log.save_interval=1", "train.max_epoch=50")
    result = run("train.py", "cfg/demo.yml", *words(tmp_path, clip_file, *few, *endless))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "training diverged: 4 steps in a row" in line and "the last good checkpoint is" in line
    for path in (tmp_path / "saved").rglob("*.pth"):
        state = checkpoint.read(path)
        for network in ("generator", "discriminator", "ema"):
            assert all(torch.isfinite(value).all() for value in state[network].values())


ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


# BatchNorm divides what bfloat16 has rounded by a standard deviation that is small against the mean at first.
@pytest.mark.parametrize(
    ("precision", "name", "least"), [("bf16", "galip", 0.99), ("bf16", "ratlip", 0.95), ("fp16", "ratlip", 0.99)]
)
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_low_precision_gradients_point_the_same_way(make, precision, name, least, device):
    gradients, terms = {}, {}
    for each in ("fp32", precision):
        # Adam's first step follows the sign of every gradient, however small: the generator is to face the same D.
        still = ("train.lr_d=0", "train.lr_g=0", "train.batch_size=12", f"train.device={device}")
        training, _, loader = make(
            f"train.precision={each}", f"model.name={name}", "model.d_start=1.0", "model.d_whiten=true", *still
        )
        batch = Batch(*(tensor.to(device) for tensor in next(iter(loader))))
        found = watch_gradients(training)
        values = train_step(training, batch)
        while training.bad_in_a_row:  # fp16 begins with a scale that is too large, and halves it
            assert precision == "fp16" and training.bad_in_a_row < 20
            training.step = 0  # the same noise
            values = train_step(training, batch)
        gradients[each] = [torch.cat([g.flatten() for g in found[network].values()]) for network in "dg"]
        terms[each] = {key: float(value) for key, value in values.items() if key.startswith("loss")}
    cosines = [
        float(torch.nn.functional.cosine_similarity(full, low, dim=0))
        for full, low in zip(gradients["fp32"], gradients[precision], strict=True)
    ]
    assert cosines[0] > 0.99 and cosines[1] > least, cosines
    assert terms[precision] == pytest.approx(terms["fp32"], abs=0.02)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_a_compiled_step_has_the_same_gradients(make, device, monkeypatch):
    """In two steps, the second of which CUDA graphs replay, with all maps taken for large. Code for a CPU, which nobody
    trains with, would take minutes to generate: there the graphs that torch.compile makes run as they are."""
    monkeypatch.setattr(blocks, "LARGE", 1)
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    found = {}
    for compiled in ("false", "true"):
        still = ("train.lr_d=0", "train.lr_g=0", "train.batch_size=2", "model.imsize=16", f"train.device={device}")
        training, _, loader = make(f"train.compile={compiled}", "model.d_start=1.0", *still)
        batch = Batch(*(tensor.to(device) for tensor in next(iter(loader))))
        gradients = watch_gradients(training)
        found[compiled] = []
        for _ in range(2):
            train_step(training, batch)
            found[compiled] += [*gradients["d"].items(), *gradients["g"].items(), *training.generator.named_buffers()]
    for (name, expected), (_, value) in zip(found["false"], found["true"], strict=True):
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-9), name


def build_copy(network, clip):
    """A deep copy that shares CLIP."""
    return copy.deepcopy(network, {id(clip): clip}).train()


def names(network) -> list[str]:
    return [name for name, _ in network.named_parameters()]


def test_script_trains_and_leaves_what_it_says(demo_folder, clip_file, tmp_path):
    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=32", "eval.metrics=[fd_clip,clip_score]")
    result = run("train.py", "cfg/demo.yml", *words(tmp_path, clip_file, *few, "train.max_epoch=2"))
    assert result.returncode == 0, result.stderr
    assert "epoch 2/2" in result.stdout and "fd_clip" in result.stdout and "minutes" in result.stdout
    (logs,) = (tmp_path / "logs" / "demo").iterdir()
    (saved,) = (tmp_path / "saved" / "demo").iterdir()
    assert list(logs.glob("events.out.tfevents.*"))
    scores = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in scores] == [0, 2]
    assert all(np.isfinite(line[name]) for line in scores for name in ("fd_clip", "clip_score"))
    assert {path.name for path in (logs / "grids").iterdir()} == {f"epoch_000{i}.png" for i in (0, 1, 2)}
    assert Image.open(logs / "grids" / "epoch_0002.png").width > 6 * 128
    assert config.load(saved / "config.yml").train.max_epoch == 2
    content = checkpoint.read(saved / "state_epoch_002.pth")
    assert (content["epoch"], content["step"]) == (2, 6)
    assert not list(saved.glob("*.partial"))

    # What it leaves can be sampled, and only with a CLIP that fits.
    places = (f"clip.weights={clip_file}", f"log.save_dir={tmp_path}/saved", "--out", tmp_path / "pictures")
    sampled = run("sample.py", "cfg/demo.yml", "a red bird", *places, "--n", 2)
    assert sampled.returncode == 0, sampled.stderr
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    state = saved / "state_epoch_002.pth"
    refused = run("sample.py", "cfg/demo.yml", "a bird", "--checkpoint", state)
    assert_refused(refused, "state_epoch_002.pth was trained with a CLIP of", "embedding 64", "embedding 128")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["cfg/nothing.yml"], ["no configuration file", "cfg/nothing.yml", "demo.yml"]),
        (["cfg/demo.yml", "train.batchsize=4"], ["'train.batchsize'", "did you mean 'train.batch_size'"]),
        (["cfg/demo.yml", "train.lr_g=fast"], ["train.lr_g must be of type float", "'fast'"]),
        (["cfg/demo.yml", "model.imsize=100"], ["model.imsize", "4 * 2^k", "100"]),
        (["cfg/demo.yml", "train.batch_size=0"], ["train.batch_size", "at least 2"]),
        (["cfg/demo.yml", "train.batch_size=13"], ["train.batch_size", "13", "12 training images"]),
        (["cfg/demo.yml", "train.device=cuda"], ["train.device", "no GPU"]),
        (["cfg/demo.yml", "train.batch_size=4", "clip.weights=README.md"], ["clip.weights", "README.md is not a CLIP"]),
        (["cfg/demo.yml", "train.batch_size=4", "clip.weights=nowhere.pt"], ["clip.weights", "nowhere.pt"]),
        (["cfg/demo.yml", "data.dir=nowhere"], ["data.dir", "nowhere"]),
        (["cfg/demo.yml", "train.batch_size=4", "eval.metrics=[fid_]"], ["eval.metrics", "fid_", "fd_clip"]),
        (["cfg/demo.yml", "train.batch_size=4", "eval.metrics=[caption_accuracy]"], ["caption_accuracy", "demo"]),
    ],
    ids=lambda value: "".join(value[-1:]) if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_line(demo_folder, arguments, parts, tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    few = ["data.layout=folder", *([] if "data.dir=nowhere" in arguments else [f"data.dir={demo_folder}"])]
    places = [f"log.dir={tmp_path}/logs", f"log.save_dir={tmp_path}/saved"]
    assert_refused(run("train.py", *arguments, *few, *places, environment=hidden), *parts)
    assert not list(tmp_path.iterdir())  # nothing was begun
