"""A bad step changes nothing, and is counted; all by tensors."""

import pytest
import torch
from torch import nn

from ratlip.guard import Guard


def train(gradients, device="cpu", leave_out=False):
    """Adam and BatchNorm's statistics over steps with these gradients: every number of both, and the guard.

    Args:
        leave_out: whether steps with a gradient that is not finite are not made at all.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 0.1, (0.5, 0.9), fused=True)
    guard = Guard({"network": network}, [optimizer], torch.device(device))
    kept = torch.zeros(2, device=device)
    for gradient in gradients:
        if leave_out and not torch.isfinite(torch.tensor(gradient)):
            continue
        guard.begin()
        network(torch.full((4, 3), gradient, device=device).nan_to_num())  # moves the running statistics
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        guard.watch(torch.ones((), device=device), next(network.parameters()).grad.norm())
        optimizer.step()
        kept = guard.unless_bad(kept + gradient, kept)
        guard.end()
    states = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    return [*network.state_dict().values(), *states, kept], guard


ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_a_bad_step_is_as_if_it_had_not_been(bad, place, device):
    """Weights, Adam's averages and counts of steps, running statistics, whatever else is chosen: every bit."""
    gradients = [1.0, -0.3, 0.7]
    gradients.insert(place, bad)
    found, guard = train(gradients, device)
    expected, _ = train(gradients, device, leave_out=True)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, expected, strict=True))
    assert (int(guard.bad_steps), int(guard.longest_row)) == (1, 1)


def test_bad_steps_are_counted():
    nan = torch.nan
    for gradients, expected in (
        ([1.0, 1.0], (0, 0, 0)),
        ([nan, 1.0, nan, nan], (3, 2, 2)),
        ([nan, nan, nan, 1.0, nan], (4, 1, 3)),
        ([nan, nan, 1.0], (2, 0, 2)),
    ):
        guard = train(gradients)[1]
        assert tuple(map(int, (guard.bad_steps, guard.bad_in_a_row, guard.longest_row))) == expected


def test_what_stepped_before_stays():
    """From the first number that is not finite on: the optimiser whose turn it was before has made its step."""
    networks = [nn.Linear(2, 1) for _ in range(3)]
    optimizers = [torch.optim.Adam(network.parameters(), 0.1, fused=True) for network in networks]
    guard = Guard(dict(enumerate(networks)), optimizers, torch.device("cpu"))
    before = [network.weight.detach().clone() for network in networks]
    guard.begin()
    for network, optimizer, loss in zip(networks, optimizers, (1.0, torch.nan, 1.0), strict=True):
        network.weight.grad = torch.ones_like(network.weight)
        guard.watch(torch.tensor(loss))
        optimizer.step()
    guard.end()
    moved = [not torch.equal(network.weight, weight) for network, weight in zip(networks, before, strict=True)]
    assert moved == [True, False, False] and int(guard.bad_steps) == 1
