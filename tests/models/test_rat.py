"""The recurrent affine layers against the LSTM's equations in float64."""

import pytest
import torch
from helpers import relative_error

from ratlip.models.rat import Conditioner

NOISE, SENTENCE, HIDDEN = 5, 7, 6


def conditioner(state: str, recurrent: list[bool]) -> Conditioner:
    torch.manual_seed(0)
    made = Conditioner([4, 8, 4], recurrent, NOISE, SENTENCE, state, HIDDEN).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def lstm_step(lstm, x, h, c):
    gates = x @ lstm.weight_ih.T + lstm.bias_ih + h @ lstm.weight_hh.T + lstm.bias_hh
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@pytest.mark.parametrize("state", ["shared", "independent", "ratgan"])
def test_unroll(state):
    recurrent = [True, False, True]
    made = conditioner(state, recurrent)
    noise, sentence = torch.randn(3, NOISE).double(), torch.randn(3, SENTENCE).double()
    condition = torch.cat([noise, sentence], dim=1)
    if state in ("shared", "ratgan"):
        h, c = made.start(noise).chunk(2, dim=1)
        hidden = []
        for _ in range(2):
            h, c = lstm_step(made.lstms[0], sentence if state == "ratgan" else condition, h, c)
            hidden.append(h)
    else:
        zero = torch.zeros(3, HIDDEN).double()
        hidden = [lstm_step(lstm, condition, zero, zero)[0] for lstm in made.lstms]
    expected = [hidden[0], condition, hidden[1]]
    for (gamma, beta), affine, h in zip(made(noise, sentence), made.affines, expected, strict=True):
        assert relative_error(gamma[:, :, 0, 0], affine.gamma(h)) < 1e-12
        assert relative_error(beta[:, :, 0, 0], affine.beta(h)) < 1e-12
    hidden_layers = [affine.gamma[0].out_features for affine in made.affines]
    assert hidden_layers == ([HIDDEN, 8, HIDDEN] if state == "ratgan" else [4, 8, 4])


def test_loads_what_was_saved_of_whole_lstms():
    for state in ("shared", "independent"):
        made = conditioner(state, [True] * 3)
        expected = {key: value + 1 for key, value in made.state_dict().items()}
        made.load_state_dict({f"{key}_l0" if "lstms." in key else key: value for key, value in expected.items()})
        assert all(torch.equal(value, expected[key]) for key, value in made.state_dict().items())


@pytest.mark.parametrize("recurrent", [[True] * 3, [False] * 3])
def test_starts_as_identity(recurrent):
    made = Conditioner([4, 8, 4], recurrent, NOISE, SENTENCE)
    for gamma, beta in made(torch.randn(2, NOISE), torch.randn(2, SENTENCE)):
        assert torch.equal(gamma, torch.ones_like(gamma)) and torch.equal(beta, torch.zeros_like(beta))
