"""What every system promises, of each in the list: the next one is tested by being in it."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, tiny_run

from ratlip import checkpoint, config
from ratlip.data.loader import to_floats
from ratlip.sampling import generate, noise_of
from ratlip.systems import SYSTEMS
from ratlip.trainer import prepare, restore, save, train_step

# Residual branches that begin at 0 would hide what is in them.
MORE = {
    "ratlip": ("model.d_channels=16", "model.d_start=1.0", "train.augment_shift=0.1", "train.augment_brightness=0.1"),
    "galip": ("model.d_channels=16", "model.d_start=1.0"),
    "dfgan": ("model.d_start=1.0", "train.ema=0.9"),
    "ratgan": ("model.d_start=1.0", "ratgan.g_start=1.0", "ratgan.affines=6", "ratgan.attention=true"),
}


@pytest.fixture(params=SYSTEMS)
def words(request, demo_folder, clip_file, tmp_path):
    """Overrides of cfg/demo.yml for a small run of a system on a few pictures."""
    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=32", "eval.metrics=[clip_score]")
    places = (f"log.dir={tmp_path}/logs", f"log.save_dir={tmp_path}/saved", f"clip.weights={clip_file}")
    more = (*few, *places, "train.device=cpu", "train.max_epoch=2", f"model.name={request.param}")
    return [*tiny_run(request.param), *more, *MORE[request.param]]


@pytest.fixture
def make(words):
    """make() -> (Training, batches, resolved configuration), ready for the first step."""

    def make(*more):
        resolved = config.load("cfg/demo.yml", [*words, *more])
        training, batches, loader, _ = prepare(resolved)
        for network in training.networks.values():
            network.train()
        found = []
        for batches.epoch in range(2):
            found += list(loader)
        return training, found, resolved

    return make


def numbers(t) -> list[torch.Tensor]:
    """All that a step changes."""
    networks = [*t.networks.values(), *([t.ema] if t.ema is not None else [])]
    values = [value for network in networks for value in network.state_dict().values()]
    values += [value for name in sorted(t.system.state) for value in [t.system.state[name]]]
    for optimizer in t.optimizers.values():
        values += [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    return [value.clone() for value in values]


def test_a_step_learns_and_what_is_frozen_stays(make):
    t, batches, _ = make()
    frozen = copy.deepcopy(t.system.clip.state_dict())
    before = {name: copy.deepcopy(network.state_dict()) for name, network in t.networks.items()}
    for batch in batches[:2]:
        values = train_step(t, batch)
    assert all(torch.isfinite(value).all() for value in values.values())
    for name, network in t.networks.items():
        parameters = dict(network.named_parameters())
        still = [key for key in parameters if torch.equal(parameters[key], before[name][key])]
        assert not still, (name, still)
    assert all(torch.equal(value, frozen[key]) for key, value in t.system.clip.state_dict().items())
    assert all(parameter.requires_grad for network in t.networks.values() for parameter in network.parameters())


def test_a_picture_does_not_depend_on_its_batch(make):
    t, batches, _ = make()
    train_step(t, batches[0])
    generator, sentences = t.generator.eval(), t.sentences[:4]
    noise = noise_of(generator, 0, range(4))
    together = generate(generator, noise, sentences)
    alone = torch.cat([generate(generator, noise[i : i + 1], sentences[i : i + 1]) for i in range(4)])
    assert float((together - alone).abs().max()) < 1e-5
    assert float((together[0] - together[1]).abs().max()) > 1e-3 and together.shape == (4, 3, 32, 32)


def test_pictures_are_of_the_present_weights(make):
    """What a generator keeps for drawing does not outlive a step; a second one of the same weights has kept nothing."""
    t, batches, resolved = make()
    noise, sentences = noise_of(t.generator, 0, range(2)), t.sentences[:2]
    before = generate(t.generator.eval(), noise, sentences)
    t.generator.train()
    train_step(t, batches[0])
    after = generate(t.generator.eval(), noise, sentences)
    fresh = SYSTEMS[resolved.model.name].make_generator(resolved, t.system.clip, t.encoder)
    fresh.load_state_dict(t.generator.state_dict())
    assert torch.equal(after, generate(fresh.eval(), noise, sentences)) and not torch.equal(before, after)


def test_going_on_from_a_checkpoint_is_going_on(make, tmp_path):
    whole, batches, resolved = make()
    for batch in batches[:2]:
        train_step(whole, batch)
    save(whole, resolved, {}, 3, tmp_path / "two.pth")
    train_step(whole, batches[2])
    again, _, _ = make("train.seed=101")  # other weights until they are replaced
    again.settings.seed = whole.settings.seed
    restore(again, checkpoint.read(tmp_path / "two.pth"), place=True)
    train_step(again, batches[2])
    for one, other in zip(numbers(whole), numbers(again), strict=True):
        assert torch.equal(one, other)


def test_a_save_that_is_killed_leaves_the_file_before(make, tmp_path, monkeypatch):
    t, batches, resolved = make()
    save(t, resolved, {}, 3, tmp_path / "state.pth")
    kept = (tmp_path / "state.pth").read_bytes()
    train_step(t, batches[0])
    write = torch.save

    def killed(content, file):
        write(content, file)
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), 9)

    monkeypatch.setattr(torch, "save", killed)
    child = os.fork()
    if not child:
        save(t, resolved, {}, 3, tmp_path / "state.pth")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9
    assert (tmp_path / "state.pth").read_bytes() == kept
    restore(t, checkpoint.read(tmp_path / "state.pth"), place=True)


def test_a_batch_that_is_not_finite_changes_nothing(make):
    t, batches, _ = make()
    train_step(t, batches[0])
    before = numbers(t)
    poisoned = batches[1]._replace(images=to_floats(batches[1].images))
    poisoned.images[0, 0, 5, 5] = torch.nan
    train_step(t, poisoned)
    assert all(map(torch.equal, before, numbers(t))) and t.bad_steps == 1
    train_step(t, batches[2])
    assert t.bad_in_a_row == 0 and not all(map(torch.equal, before, numbers(t)))


STEP = """
import sys
import clip.model
import torch
from ratlip import config, distributed
from ratlip.data.loader import to_floats
from ratlip.trainer import prepare, randomness, train_step

clip.model.LayerNorm.forward = torch.nn.LayerNorm.forward  # OpenAI's own goes through float32
training, batches, loader, _ = prepare(config.load(sys.argv[2], sys.argv[3:]))
found = {}
for name, network in training.networks.items():
    network.train().double()
    optimizer = training.optimizers[name]
    def note(*_, name=name, network=network):
        for key, p in network.named_parameters():
            if p.grad is not None:
                found[f"{name}.{key}.{sum(k.startswith(f'{name}.{key}.') for k in found)}"] = p.grad.clone()
    optimizer.register_step_pre_hook(note)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
training.system.clip.double()
training.sentences = training.sentences.double()
training.settings.lr_g = training.settings.lr_d = 0.0
training.ema = None
batch = next(iter(loader))
draws = {name: value.double() for name, value in randomness(training, len(batch.images)).items()}
train_step(training, batch._replace(images=to_floats(batch.images).double()), draws)
for name, network in training.networks.items():
    found |= {f"{name}.{key}": value for key, value in network.named_buffers()}
if distributed.rank() == 0:
    torch.save(found, sys.argv[1])
distributed.stop()
"""


def test_two_processes_learn_what_one_does(words, tmp_path):
    """Gradients of every phase, and running statistics, in float64."""
    (tmp_path / "step.py").write_text(STEP)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for name, start in (("one", ()), ("two", torchrun)):
        command = [sys.executable, *start, tmp_path / "step.py", tmp_path / name, "cfg/demo.yml", *words]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and one
    for key, value in one.items():
        near = 1e-5 * float(value.double().abs().max()) + 1e-12
        assert torch.allclose(two[key].double(), value.double(), rtol=1e-5, atol=near), key


def test_what_a_system_does_not_read_is_refused(words):
    name = next(word.split("=")[1] for word in words if word.startswith("model.name="))
    unread = config.unread_settings(name)
    assert unread
    for key in sorted(unread)[:3]:
        value = config.default_settings()[key]
        with pytest.raises(config.UserError, match=f"{key} is not read by {name}"):
            config.load("cfg/demo.yml", [f"model.name={name}", f"{key}={'null' if value is None else value}"])
    kept = config.kept_settings(config.load("cfg/demo.yml", words))
    assert not unread & kept.keys() and kept["model.name"] == name
