"""LAFITE's phases against the released system's numbers, over processes, and what makes a step of them."""

import os
import runpy
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, SALT, fixture_input, relative_error
from released_lafite import SETTINGS, answers, gradient_names, inputs, networks
from torch import Tensor, nn

from ratlip.encoders.clip_towers import FrozenClip
from ratlip.models.lafite.condition import seen
from ratlip.models.lafite.discriminator import Discriminator
from ratlip.models.lafite.generator import Generator
from ratlip.systems import lafite
from ratlip.systems.lafite import Networks, Real, Settings, State

FORWARD, GRADIENT = 1e-5, 5e-4  # tolerances in float32
SIZES = {"64": ("lafite64", 8, 64), "256": ("lafite", 2, 256)}
both = pytest.mark.parametrize("key", SIZES)
CONTRASTS = ("clip_condition", "clip_image", "feature_condition", "feature_real")  # in the fixtures' order


@pytest.fixture(scope="module")
def standard(vitb32) -> FrozenClip:
    """ViT-B/32 with the fixtures' weights, read as LAFITE does."""
    return FrozenClip(vitb32.clip)


@pytest.fixture(scope="module")
def made(standard):
    """made(key): the networks of the fixtures of 64 or 256 pixels, a batch and draws."""
    cases = {}

    def made(key: str) -> tuple[Networks, Real, lafite.Draws]:
        name, count, size = SIZES[key]
        if key not in cases:
            n = networks(name, standard)
            cases[key] = (n, *inputs(name, count, size)), n.generator.mapping.w_avg.clone()
        case, w_avg = cases[key]
        case[0].generator.mapping.w_avg.copy_(w_avg)  # phases move it
        return case

    return made


def norms(network: nn.Module, names: list[str], terms: lafite.Terms) -> Tensor:
    """L2 norms of the gradients of a phase's loss by these parameters."""
    named = dict(network.named_parameters())
    found = torch.autograd.grad(lafite.loss_of(terms), [named[name] for name in names], allow_unused=True)
    return torch.stack([torch.zeros(()) if gradient is None else gradient.norm() for gradient in found])


def of_each(terms: lafite.Terms) -> Tensor:
    """The loss (B, 1) that the released program has for each sample: of contrasts it takes the mean at once."""
    return sum(term.weight * (term.values.mean() if "_" in name else term.values) for name, term in terms.items())[
        :, None
    ]


def run(phase, n, real, draws, settings) -> tuple[lafite.Terms, list[Tensor]]:
    """A phase's terms, and the logits that the discriminator gave in it, call by call."""
    logits = []
    hook = n.discriminator.register_forward_hook(lambda module, inputs, outputs: logits.append(outputs[0].detach()))
    try:
        return phase(n, real, draws, settings), logits
    finally:
        hook.remove()


def check_generator(prefix, n, real, draws, settings):
    terms, (scores, *_) = run(lafite.generator_phase, n, real, draws, settings)
    assert relative_error(scores, answers()[f"{prefix}.scores_fake"]) < FORWARD
    contrasts = [terms[name].values for name in CONTRASTS if name in terms]
    for number, values in enumerate(contrasts):
        assert relative_error(values, answers()[f"{prefix}.contra{number}"]) < FORWARD
    assert f"{prefix}.contra{len(contrasts)}" not in answers()
    assert relative_error(of_each(terms), answers()[f"{prefix}.G_loss"]) < FORWARD
    assert relative_error(norms(n.generator, gradient_names(n)[0], terms), answers()[f"{prefix}.grad"]) < GRADIENT


def check_discriminator(prefix, n, real, draws, settings):
    terms, (fake, scores) = run(lafite.discriminator_phase, n, real, draws, settings)
    assert relative_error(fake, answers()[f"{prefix}.scores_fake"]) < FORWARD
    assert relative_error(scores, answers()[f"{prefix}.scores_real"]) < FORWARD
    assert relative_error(terms["feature_condition"].values, answers()[f"{prefix}.contra0"]) < FORWARD
    assert relative_error(of_each(terms), answers()[f"{prefix}.D_loss"]) < FORWARD
    assert relative_error(norms(n.discriminator, gradient_names(n)[1], terms), answers()[f"{prefix}.grad"]) < GRADIENT


def check_r1(prefix, n, real, draws, settings):
    terms, (scores,) = run(lafite.r1_phase, n, real, draws, settings)
    assert relative_error(scores, answers()[f"{prefix}.scores_real"]) < FORWARD
    assert relative_error(terms["r1"].values, answers()[f"{prefix}.r1_penalty"]) < GRADIENT
    regulariser = terms["r1"].weight / settings.r1_interval * terms["r1"].values
    assert relative_error(regulariser, answers()[f"{prefix}.D_reg"]) < GRADIENT
    assert relative_error(norms(n.discriminator, gradient_names(n)[1], terms), answers()[f"{prefix}.grad"]) < GRADIENT


def check_path_length(prefix, n, real, draws, settings):
    (term,) = (terms := lafite.path_length_phase(n, real, draws, settings)).values()
    assert relative_error(term.values, answers()[f"{prefix}.pl_penalty"]) < GRADIENT
    assert relative_error(term.weight / settings.path_interval * term.values, answers()[f"{prefix}.G_reg"]) < GRADIENT
    assert relative_error(n.state.path_mean, answers()[f"{prefix}.pl_mean"]) < GRADIENT
    assert relative_error(norms(n.generator, gradient_names(n)[0], terms), answers()[f"{prefix}.grad"]) < GRADIENT


@both
def test_forward(made, key):
    """What both networks and CLIP give."""
    n, real, draws = made(key)
    number, step, features = (2, 7, 32) if key == "64" else (2, 15, 512)
    with torch.no_grad():
        images = n.generator(draws.noise, real.text)
        alone, own = n.discriminator.judge(real.images)
        logits, _ = n.discriminator(real.images, real.text)
        view = seen(images[:number], 224, draws.view)
        clip_step, embedding = {"64": 13, "256": 27}[key], n.clip.image(view)[1]
    for name, found in {
        "image.slice": images[:number, :, ::step, ::step],
        "image.mean": images.mean((2, 3)),
        "image.std": images.std((2, 3)),
        "D.base": alone,
        "D.fts": own[:, :features],
        "D.logit": logits,
        "clip_input": n.clip.clip_input(view)[..., ::clip_step, ::clip_step],
        "clip_emb": embedding,
    }.items():
        assert relative_error(found, answers()[f"{key}.{name}"]) < FORWARD, name


@both
def test_generator_phase(made, key):
    check_generator(f"{key}.Gmain", *made(key), SETTINGS)


@both
def test_path_length_phase(made, key):
    """Twice at 64 pixels: the mean that the first leaves counts in the second."""
    check_path_length(f"{key}.Greg", *made(key), SETTINGS)
    if key == "64":
        check_path_length("64.Greg2", *made(key), SETTINGS)


@both
def test_discriminator_phase(made, key):
    check_discriminator(f"{key}.Dmain", *made(key), SETTINGS)


@both
def test_r1_phase(made, key):
    check_r1(f"{key}.Dreg", *made(key), SETTINGS)


def test_inside_of_the_large_networks(made):
    """Rows of w, styles, blocks, noise left out, and mixed styles, at 256 pixels."""
    n, real, draws = made("256")
    g, d = n.generator, n.discriminator
    styles, blocks, halves, hooks = [], [], [], []
    for block in g.blocks:
        for part in (*block.layers, block.torgb):
            divided = part.weight.shape[1] ** 0.5 if part is block.torgb else 1

            def note(module, inputs, output, divided=divided):
                styles.append(output[:, :8] / divided)

            hooks.append(part.style.register_forward_hook(note))
        hooks.append(block.register_forward_hook(lambda module, inputs, outputs: blocks.append(outputs)))
    for block in d.blocks:
        hooks.append(block.register_forward_hook(lambda module, inputs, output: halves.append(output)))
    with torch.no_grad():
        rows = g.styles(draws.noise)
        images = g(draws.noise, real.text)
        alone, features = d.judge(real.images)
        for hook in hooks:
            hook.remove()
        second = fixture_input("lafite.z2", 2, 512)
        mixed = g.synthesis(g.styles(draws.noise, second, 6), real.text, g.maps(draws.noise))
        nonoise = g.synthesis(rows, real.text, [None] * 13)
    for name, found in {
        "w": rows[:, 13],
        "w.trunc": g.truncated(rows, 0.7)[:, 0, :32],
        "ws.trunc": g.truncated(rows, 0.6, 5)[:, :, :16],
        "styles": torch.stack(styles, 1),
        "block.mean": torch.stack([x.mean((2, 3))[:, :16] for x, _ in blocks], 1),
        "rgb8": blocks[1][1],
        "image.corner": images[:, :, :6, :6],
        "image.nonoise": nonoise[:, :, ::32, ::32],
        "image.mixed": mixed[:, :, ::32, ::32],
        "D.block.mean": torch.stack([x.mean((2, 3))[:, :16] for x in halves], 1),
        "D.logit.per_sample": alone + (features * real.text).sum(1, keepdim=True),
    }.items():
        assert relative_error(found, answers()[f"256.{name}"]) < FORWARD, name


def test_in_float64_each_gradient_is_the_released_one(made, standard):
    """To 1e-6, the smallest ones too, which drown in float32's rounding."""
    n, (_, real, draws) = networks("lafite64", standard), made("64")
    for part in (n.generator, n.discriminator, n.state):
        part.double()
    real = Real(*(part.double() for part in real))
    draws = draws._replace(**{k: getattr(draws, k).double() for k in ("noise", "perturbation", "direction")})
    settings = replace(SETTINGS, itc=0)  # CLIP's own layers round to float32
    for phase, prefix, network in (
        (lafite.path_length_phase, "64.Greg", "generator"),
        (lafite.discriminator_phase, "64.Dmain", "discriminator"),
        (lafite.r1_phase, "64.Dreg", "discriminator"),
    ):
        names = gradient_names(n)[network == "discriminator"]
        found = norms(getattr(n, network), names, phase(n, real, draws, settings))
        expected = torch.from_numpy(answers()[f"{prefix}.grad"]).double()
        assert ((found - expected).abs() <= 1e-6 * expected).all(), prefix


def test_language_free_and_mixed(made):
    """Image features alone; and a mixture, with all four contrasts, another temperature and share of the columns."""
    n, real, draws = made("64")
    check_generator("64.Gmain.free", n, real._replace(text=None), draws, replace(SETTINGS, condition="image"))
    uniform = np.random.RandomState(zlib.crc32(f"{SALT}:input.lafite64.coin".encode())).uniform(size=(8, 1))
    coin = torch.from_numpy(uniform.astype(np.float32))
    more = replace(SETTINGS, condition="mixed", mixing_prob=0.5, lam=0.3, temperature=0.7, iid=2, iic=3)
    check_generator("64.Gmain.mix", n, real, draws._replace(coin=coin), more)


def test_logits_of_each_sample(made):
    """The paper's reading of the logit."""
    n, real, draws = made("64")
    n.discriminator.logits = "per_sample"
    try:
        check_generator("64.ps.Gmain", n, real, draws, SETTINGS)
        check_discriminator("64.ps.Dmain", n, real, draws, SETTINGS)
        check_r1("64.ps.Dreg", n, real, draws, SETTINGS)
    finally:
        n.discriminator.logits = "released"


STEP = """
import sys
from pathlib import Path
import numpy as np
import torch
from ratlip import distributed
from ratlip.models.lafite.discriminator import Discriminator
from ratlip.models.lafite.generator import Generator
from ratlip.systems import lafite


def step(clip):
    '''Gradients of each phase of a batch of 8, their means over processes, and the state.'''
    rank, processes = distributed.rank(), distributed.world_size()
    torch.manual_seed(0)
    tiny = {"condition_dim": clip.embedding_dim, "imsize": 16, "base": 64, "most": 8}
    n = lafite.Networks(Generator(**tiny, noise_dim=8, depth=1), Discriminator(**tiny), clip, lafite.State())
    real = torch.randn(8, 3, 16, 16), torch.randn(8, tiny["condition_dim"]), torch.randn(8, tiny["condition_dim"])
    real = lafite.Real(*(whole[rank::processes] for whole in real))
    settings = lafite.Settings(condition="mixed", lam=0.4, itd=3, iid=2, itc=2, iic=1)
    found = {}
    for number, phase in enumerate((lafite.generator_phase, lafite.path_length_phase, lafite.discriminator_phase, lafite.r1_phase)):
        draws = lafite.draw(np.random.default_rng((1, number)), n, settings, 8 // processes, rank, processes)
        network = n.generator if number < 2 else n.discriminator
        loss = lafite.loss_of(phase(n, real, draws, settings))
        loss.backward()
        loss = loss.detach().clone()
        distributed.mean_gradients(network, loss)
        found[phase.__name__] = {"loss": loss, **{k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}}
        n.generator.zero_grad(), n.discriminator.zero_grad()
    found["state"] = {"path_mean": n.state.path_mean, "w_avg": n.generator.mapping.w_avg}
    return found


if __name__ == "__main__":
    from ratlip.encoders.clip_towers import load_clip
    distributed.start()
    torch.save(step(load_clip(sys.argv[1])), Path(sys.argv[2], f"{distributed.rank()}.pth"))
    distributed.stop()
"""  # noqa: E501


def test_two_processes_learn_what_one_does(small_clip, clip_file, tmp_path):
    """Contrasts, summed logits, the minibatch's deviation and both running means are those of the global batch."""
    (tmp_path / "step.py").write_text(STEP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [*command, tmp_path / "step.py", clip_file, tmp_path]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    alone = runpy.run_path(str(tmp_path / "step.py"))["step"](small_clip)
    for rank in range(2):
        both = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        for phase, expected in alone.items():
            assert both[phase].keys() == expected.keys()
            for key, value in expected.items():
                assert (both[phase][key] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-7, (rank, phase, key)


def test_draws_do_not_depend_on_the_number_of_processes(small_clip):
    tiny = {"condition_dim": small_clip.embedding_dim, "imsize": 16, "base": 64, "most": 8}
    n = Networks(Generator(**tiny, noise_dim=8, depth=1), Discriminator(**tiny), small_clip, State())

    def drawn(step: int, rank: int, processes: int) -> lafite.Draws:
        return lafite.draw(np.random.default_rng((3, step)), n, Settings(), 8 // processes, rank, processes)

    mixes = []
    for step in range(60):
        whole, halves = drawn(step, 0, 1), [drawn(step, rank, 2) for rank in range(2)]
        for rank, half in enumerate(halves):
            assert half.view == whole.view and half.crossover == whole.crossover
            for one, share in zip(whole, half, strict=True):
                if isinstance(one, Tensor):
                    assert torch.equal(one[rank::2], share)
        mixes.append(whole.crossover)
    assert {2, 3, 4, 5} <= set(mixes) <= {None, 1, 2, 3, 4, 5} and 1 <= mixes.count(None) <= 14


def test_settings_of_the_optimisers_and_of_the_average():
    rate, betas = lafite.lazy_adam(0.0025, (0.0, 0.99), 4)
    assert rate == pytest.approx(0.002) and betas == pytest.approx((0.0, 0.99**0.8))
    assert lafite.lazy_adam(0.0025, (0.0, 0.99), 16)[0] == pytest.approx(0.0025 * 16 / 17)
    assert lafite.lazy_adam(0.0025, (0.0, 0.99), 0) == (0.0025, (0.0, 0.99))
    assert lafite.default_gamma(256, 64) == pytest.approx(0.2048)
    assert lafite.average_kept(64, 0) == 0  # the first step copies
    assert lafite.average_kept(64, 100_000) == pytest.approx(0.5 ** (64 / 5000))
    assert lafite.average_kept(64, 10**7) == pytest.approx(0.5 ** (64 / 20_000))
    assert lafite.average_kept(64, 0, ramp=None) == pytest.approx(0.5 ** (64 / 20_000))


def test_language_free_needs_no_text(small_clip):
    """Every phase, with pictures and their features alone; without contrasts, without the features too."""
    tiny = {"condition_dim": small_clip.embedding_dim, "imsize": 16, "base": 64, "most": 8}
    n = Networks(Generator(**tiny, noise_dim=8, depth=1), Discriminator(**tiny), small_clip, State())
    real, settings = Real(torch.randn(4, 3, 16, 16), None, torch.randn(4, 64)), Settings(condition="image")
    for number, phase in enumerate((lafite.generator_phase, lafite.path_length_phase, lafite.discriminator_phase)):
        draws = lafite.draw(np.random.default_rng(number), n, settings, 4, 0, 1)
        assert lafite.loss_of(phase(n, real, draws, settings)).isfinite()
    only = Settings(itd=0, itc=0)
    terms = lafite.generator_phase(n, real._replace(text=torch.randn(4, 64), features=None), draws, only)
    assert list(terms) == ["adversarial"]
