"""Training steps of DF-GAN and RAT-GAN against those of the released programs: losses, and every gradient's norm."""

import json
import re

import pytest
import torch
from helpers import ROOT, fixture_input, released_weights

from ratlip import config
from ratlip.data.loader import Batch
from ratlip.released import load_networks
from ratlip.released.df_gan import ORDERS, discriminator_key, generator_key
from ratlip.systems.df_gan import DfGan
from ratlip.trainer import Training, train_step

TERMS = {
    "df": ("d/real", "d/mismatched", "d/fake", "d/ma_gp", None, "g/adversarial"),
    "rat": ("d/real", "d/mismatched", "d/fake", None, "gp/ma_gp", "g/adversarial"),
}  # in the order of the fixtures' columns; None: the whole loss of D


def training(prefix: str, size: int, sentences: torch.Tensor) -> Training:
    if prefix == "df":
        name = "dfgan" if size == 256 else f"dfgan{size}"
        model = {"netG": released_weights(f"{name}.netG"), "netD": released_weights(f"{name}.netD")}
        made = load_networks({"model": {**model, "netC": released_weights("dfgan.netC")}}, None)[:2]
    else:
        weights = released_weights("ratgan.netG")
        still = {key: value * 0 for key, value in weights.items() if ".affine4.fc_gamma.linear2.weight" in key}
        made = load_networks({**weights, **still}, None)[0], load_networks(released_weights("ratgan.netD"), None)[1]
    settings = config.EasyDict(config.unflatten(config.base_settings("dfgan", "bird"))).train
    system = DfGan(settings, None, *(network.to(sentences.dtype).train() for network in made))
    return Training(system, None, sentences, "fp32", 10**9)


def released_norms(found: dict[str, torch.Tensor], names: dict[str, str], shapes: dict) -> list[float]:
    """Norms of our gradients under the released keys, in the order of the shapes files; 0 where there is none."""
    norms = {names[key]: float(gradient.norm()) for key, gradient in found.items()}
    for leaf in ("weight", "bias"):
        if (own := f"conditioner.start.{leaf}") in found:
            for state, half in zip("hc", found[own].chunk(2), strict=True):
                norms[f"lstm.noise2{state}.{leaf}"] = float(half.norm())
    return [norms.get(key, 0.0) for key in shapes if not re.match(r"block\d+\.lstm\.", key)]


def shapes(name: str, head: str = "") -> dict:
    found = json.loads((ROOT / "tests" / "data" / "dfgan" / f"{name}.shapes.json").read_text())
    return {f"{head}{key}": value for key, value in found.items()}


@pytest.mark.parametrize(("prefix", "size"), [("df", 64), ("df", 256), ("rat", 256)])
def test_two_steps_are_the_released_ones(prefix, size, dfgan_answers):
    step = "step64" if size == 64 else "step"
    # RAT-GAN's gammas are single numbers, whose gradients are small sums of large numbers.
    dtype = torch.float64 if prefix == "rat" else torch.float32
    batch = 4 if size == 64 else 3
    images = fixture_input(f"{step}.image", batch, 3, size, size).tanh().to(dtype)
    noise, sentences = (
        fixture_input(f"{step}.{name}", batch, dim).to(dtype) for name, dim in (("noise", 100), ("sent", 256))
    )
    t = training(prefix, size, sentences)

    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for name, network in t.networks.items():

        def note(*_, name=name, network=network):
            own = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
            gradients.setdefault(f"{name}_gp" if name in gradients else name, own)

        t.optimizers[name].register_step_pre_hook(note)

    rows = torch.arange(batch)
    # DF-GAN: features of image i + 1 with sentence i, cyclic; RAT-GAN: of image i with sentence i + 1.
    pairs = Batch(images, rows, rows.roll(1) if prefix == "df" else rows.roll(-1))
    key = f"{prefix}.step{size}" if prefix == "df" else "rat.step"
    expected = torch.from_numpy(dfgan_answers[f"{key}.losses"])  # (2, 6)
    for turn in range(2):
        values = train_step(t, pairs, {"noise": noise})
        for term, answer in zip(TERMS[prefix], expected[turn], strict=True):
            if term:
                tolerance = 1e-3 if turn else 1e-4 if term == "g/adversarial" else 1e-5
                assert float(values[f"loss_{term}"]) == pytest.approx(float(answer), rel=tolerance), (turn, term)
        if turn:
            break
        if prefix == "df":
            name = "dfgan" if size == 256 else "dfgan64"
            blocks, head, order = "DBlocks.", "netC.", None
            of_d = {**shapes(f"{name}.netD"), **shapes("dfgan.netC", "netC.")}
        else:
            name, blocks, head, order, of_d = "ratgan", "block", "COND_DNET.", ORDERS[4], shapes("ratgan.netD")
        for own, suffix in (("discriminator", "gradD"), ("discriminator_gp", "gradGP"), ("generator", "gradG")):
            if own not in gradients:
                continue
            if own == "generator":
                names = {k: generator_key(k, order) for k in gradients[own]}
                found = released_norms(gradients[own], names, shapes(f"{name}.netG"))
            else:
                names = {k: discriminator_key(k, blocks, head) for k in gradients[own]}
                found = released_norms(gradients[own], names, of_d)
            answers = torch.from_numpy(dfgan_answers[f"{key}.{suffix}"]).double()
            near = (torch.tensor(found, dtype=torch.float64) - answers).abs() <= 2e-3 * answers + 1e-9
            assert near.all(), (suffix, [(k, found[k], float(answers[k])) for k in range(len(found)) if not near[k]])
