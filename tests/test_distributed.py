"""Two processes under torchrun: ranks, sums, mean gradients, one text for all, and the first process first."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from ratlip import distributed

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch
from torch import nn
from ratlip import distributed

folder = Path(sys.argv[1])
assert (distributed.rank(), distributed.world_size()) == (0, 1)  # before it joins
local_rank = distributed.start()
distributed.start()  # a second time changes nothing
rank = distributed.rank()
found = {"local_rank": local_rank, "rank": rank, "world_size": distributed.world_size()}
distributed.say(f"said by {rank}")
found["same"] = distributed.same(f"text of {rank}")

totals = [torch.tensor(1.0 + rank, dtype=torch.float64), torch.arange(6.0).reshape(2, 3) * (10 ** rank)]
distributed.sum_over_processes(totals, torch.device("cpu"))
found["totals"] = [total.tolist() for total in totals]

network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.Linear(4, 1))
network[1].requires_grad_(False)
for number, parameter in enumerate(p for p in network.parameters() if p.requires_grad):
    parameter.grad = torch.arange(float(parameter.numel())).view_as(parameter) * (rank + 1) + 100 * number
distributed.mean_gradients(network)
found["gradients"] = [p.grad if p.grad is None else p.grad.tolist() for p in network.parameters()]

distributed.same("")  # both are here: without first_process_first, the other would now be the faster
with distributed.first_process_first():
    found["first is done"] = (folder / "done").exists()
    if rank == 0:
        time.sleep(0.5)
        found["other has begun"] = (folder / "begun").exists()
        (folder / "done").touch()
    else:
        (folder / "begun").touch()
distributed.same("")
found["both are done"] = (folder / "done").exists() and (folder / "begun").exists()
(folder / f"{rank}.json").write_text(json.dumps(found))
distributed.stop()
assert (distributed.rank(), distributed.world_size()) == (0, 1)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[list[dict], str]:
    """What each of two processes found, and what was printed."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, folder / "script.py", folder], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], result.stdout


def test_who_is_who(two):
    found, printed = two
    assert [(f["rank"], f["local_rank"], f["world_size"]) for f in found] == [(0, 0, 2), (1, 1, 2)]
    assert printed.split("\n").count("said by 0") == 1 and "said by 1" not in printed


def test_same_text(two):
    assert [found["same"] for found in two[0]] == ["text of 0"] * 2


def test_sums(two):
    for found in two[0]:
        assert found["totals"] == [3.0, [[0.0, 11.0, 22.0], [33.0, 44.0, 55.0]]]


def test_mean_gradients(two):
    """Gradients k and 2k plus a constant: 1.5 k plus it; parameters without a gradient stay so."""
    expected = [
        [[0.0, 1.5, 3.0], [4.5, 6.0, 7.5]],
        [100.0, 101.5],
        None,
        None,
        [[200.0, 201.5, 203.0, 204.5]],
        [300.0],
    ]
    for found in two[0]:
        assert found["gradients"] == expected


def test_first_process_first(two):
    first, second = two[0]
    assert not first["first is done"] and not first["other has begun"]
    assert second["first is done"]
    assert first["both are done"] and second["both are done"]


def test_alone(capsys):
    assert (distributed.start(), distributed.rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.same("text") == "text"
    total = torch.tensor([2.0])
    distributed.sum_over_processes([total], torch.device("cpu"))
    assert total.item() == 2.0
    network = torch.nn.Linear(2, 1)
    network.weight.grad = torch.tensor([[1.0, 2.0]])
    distributed.mean_gradients(network)
    assert network.weight.grad.tolist() == [[1.0, 2.0]]
    with distributed.first_process_first():
        distributed.say("hello")
    assert capsys.readouterr().out == "hello\n"
    distributed.stop()
