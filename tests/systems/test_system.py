"""What the loop does for any system: phases of their own interval, and state that a bad step leaves as it was."""

import numpy as np
import pytest
import torch
from torch import nn

from ratlip import config
from ratlip.data.loader import Batch
from ratlip.systems.system import Phase, System
from ratlip.trainer import Training, restore, save, train_step


class Draw(nn.Module):
    """A generator whose BatchNorm moves with every call."""

    noise_dim, sizes = 2, [2]

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 12), nn.BatchNorm1d(12)

    def forward(self, noise, sentences):
        return self.norm(self.layer(noise)).unflatten(1, (3, 2, 2))


class Counting(System):
    """The generator in each step; in each second the critic, which is also given what the state has counted."""

    def __init__(self, settings):
        super().__init__(settings, None, {"critic": nn.Linear(12, 1), "generator": Draw()})
        self.phases = [Phase("g", "generator", self.generate), Phase("d", "critic", self.criticise, every=2)]
        self.state = {"seen": torch.zeros(())}
        self.bad = ""  # the phase that gives no number

    def generate(self, s):
        pictures = self.generator(s.draws["noise"], s.sentences)
        return {"size": (pictures.square().mean() * (torch.nan if self.bad == "g" else 1), 1)}

    def criticise(self, s):
        s.moved["seen"] = self.state["seen"] + len(s.images)
        pictures = self.generator(s.draws["noise"], s.sentences).detach()
        logits = self.networks["critic"](pictures.flatten(1))
        return {"fake": (logits.mean() * (torch.nan if self.bad == "d" else 1), 1)}


@pytest.fixture
def t() -> Training:
    torch.manual_seed(0)
    settings = config.EasyDict(config.unflatten(config.default_settings())).train
    return Training(Counting(settings), None, torch.zeros(4, 2), "fp32", 100)


BATCH = Batch(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4), torch.arange(4).roll(1))


def test_a_phase_comes_every_so_many_steps(t):
    logged = [train_step(t, BATCH) for _ in range(4)]
    assert ["loss_d/fake" in values for values in logged] == [True, False, True, False]
    assert all("loss_g/size" in values for values in logged)
    assert {float(state["step"]) for state in t.optimizers["critic"].state.values()} == {2.0}
    assert float(t.system.state["seen"]) == 8


@pytest.mark.parametrize(("bad", "moved"), [("g", set()), ("d", {"generator"})])
def test_from_where_a_step_is_bad_on_it_changes_nothing(t, bad, moved):
    """The generator steps first: where the critic alone is bad it keeps its step, and the running statistics of it, but
    not those that the critic's own phase has moved."""
    train_step(t, BATCH)
    train_step(t, BATCH)
    before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in t.networks.items()}
    state, t.system.bad = t.system.state["seen"].clone(), bad
    train_step(t, BATCH)
    assert t.bad_steps == 1 and torch.equal(t.system.state["seen"], state)
    for name, network in t.networks.items():
        same = all(torch.equal(value, before[name][key]) for key, value in network.state_dict().items())
        assert same == (name not in moved), name
    calls = int(t.generator.norm.num_batches_tracked) - int(before["generator"]["norm.num_batches_tracked"])
    assert calls == len(moved)  # of two that were made


def test_a_checkpoint_holds_the_state(t, tmp_path):
    resolved = config.load("cfg/demo.yml")
    t.system.sees_clip, t.encoder = False, object()  # no CLIP whose identity would be stored
    train_step(t, BATCH)
    save(t, resolved, {}, 3, tmp_path / "one.pth")
    kept = torch.load(tmp_path / "one.pth")
    t.system.state["seen"].zero_()
    restore(t, kept, place=True)
    assert float(t.system.state["seen"]) == 4 and t.step == 1


def test_draws_belong_to_the_step(t):
    found = []
    t.system.draws = lambda rng, count: found.append(rng.integers(1 << 30)) or {"noise": np.zeros((count, 2), "f4")}
    for step in (0, 1, 0):
        t.step = step
        train_step(t, BATCH)
    assert found[0] == found[2] != found[1]
