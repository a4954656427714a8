"""Two processes under torchrun: ranks, sums, mean gradients, one text for all, and the first process first."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY_RUN

from ratlip import checkpoint, distributed

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch
from torch import nn
from ratlip import distributed
from ratlip.guard import Guard
from ratlip.models.blocks import BatchNorm
from ratlip.models.moments import moments

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
guard = Guard({}, [], torch.device("cpu"))
guard.begin()
guard.watch(torch.tensor(float("nan" if rank else 1)))  # of one of them alone
distributed.mean_gradients(network, guard.bad)
guard.watch(torch.tensor(1.0))
guard.end()
found["bad"] = int(guard.bad_steps)
found["gradients"] = [p.grad if p.grad is None else p.grad.tolist() for p in network.parameters()]

# BatchNorm: a half of the batch each.
torch.manual_seed(0)
x, weights = torch.randn(6, 3, 2, 2, dtype=torch.float64) * 3 + 1, torch.randn(6, 3, 2, 2, dtype=torch.float64)
norm = BatchNorm(3).double()
own = x[3 * rank :][:3].clone().requires_grad_()
scale, shift = norm(*moments(own), 4)
out = own * scale[:, None, None] + shift[:, None, None]
(out * weights[3 * rank :][:3]).sum().backward()
found["norm"] = [t.tolist() for t in (out, own.grad, norm.weight.grad, norm.running_mean, norm.running_var)]

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


def test_a_number_of_one_that_is_not_finite_makes_the_step_bad_on_both(two):
    assert [found["bad"] for found in two[0]] == [1, 1]


def test_batch_norm_takes_its_statistics_over_both(two):
    torch.manual_seed(0)
    x, weights = torch.randn(6, 3, 2, 2, dtype=torch.float64) * 3 + 1, torch.randn(6, 3, 2, 2, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(3).double()
    x.requires_grad_()
    out = norm(x)
    (out * weights).sum().backward()
    first, second = ([torch.tensor(t, dtype=torch.float64) for t in found["norm"]] for found in two[0])
    close = {"rtol": 1e-6, "atol": 1e-6}  # it computes in float32 at least, as torch's own does on GPUs
    assert torch.allclose(torch.cat([first[0], second[0]]), out, **close)
    assert torch.allclose(torch.cat([first[1], second[1]]), x.grad, **close)
    assert torch.allclose(first[2] + second[2], norm.weight.grad, **close)
    for found in (first, second):
        assert torch.allclose(found[3], norm.running_mean, **close)
        assert torch.allclose(found[4], norm.running_var, **close)


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


@pytest.fixture
def words(demo_folder, clip_file):
    """words(folder, *more) -> the command line of a small run that leaves its files below `folder`."""

    def words(folder: Path, *more: str) -> list[str]:
        places = (f"log.dir={folder}/logs", f"log.save_dir={folder}/saved", f"data.dir={demo_folder}")
        small = ("data.layout=folder", "model.imsize=16", "eval.metrics=[clip_score]", f"clip.weights={clip_file}")
        return ["cfg/demo.yml", *TINY_RUN, *places, *small, "log.save_interval=1", "train.device=cpu", *more]

    return words


def script(name: str, words: list[str], processes: int) -> subprocess.Popen:
    """scripts/NAME.sh in so many processes."""
    environment = {**os.environ, "GPUS": str(processes), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", f"scripts/{name}.sh", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen, code: int = 0) -> str:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    return output


def state(folder: Path, name: str) -> dict:
    (path,) = folder.glob(f"saved/demo*/*/{name}")
    return checkpoint.read(path)


def test_two_processes_train_as_one_does(words, tmp_path):
    """Three steps of a global batch of 4 with GALIP, which has no BatchNorm."""
    more = ("model.name=galip", "model.d_start=1.0", "train.lr_g=1e-4", "train.lr_d=1e-4", "train.lr_decay=0")
    for processes in (1, 2):
        finished(script("train", words(tmp_path / str(processes), *more), processes))
    one, two = (state(tmp_path / str(processes), "state_epoch_001.pth") for processes in (1, 2))
    assert one["step"] == two["step"] == 3
    for network in ("generator", "discriminator", "ema"):
        difference = torch.cat(
            [(two[network][key].float() - value.float()).abs().flatten() for key, value in one[network].items()]
        )
        # A handful of gradients are zero but for rounding, and Adam's first steps take their sign.
        assert float((difference > 1e-5).float().mean()) < 1e-4 and float(difference.max()) < 3 * 2e-4, network
    assert two["scores"]["end"]["clip_score"] == pytest.approx(one["scores"]["end"]["clip_score"], abs=1e-3)


def test_two_processes_have_the_gradients_of_one_with_batch_norm(words, tmp_path):
    """RATLIP's statistics are taken over both processes: gradients and running averages agree after one step.

    Gradients, not weights: BatchNorm enlarges rounding errors, and Adam's first steps follow a gradient's sign.
    """
    for processes in (1, 2):
        finished(script("train", words(tmp_path / str(processes), "train.batch_size=12", "train.lr_d=0"), processes))
    one, two = (state(tmp_path / str(processes), "state_epoch_001.pth") for processes in (1, 2))
    assert one["step"] == two["step"] == 1
    for optimizer in ("discriminator", "generator"):  # exp_avg is the gradient times 1 - beta1
        alone, both = (
            torch.cat([s["exp_avg"].flatten() for s in state["optimizers"][optimizer]["state"].values()])
            for state in (one, two)
        )
        assert float((both - alone).norm() / alone.norm()) < 1e-3, optimizer
    for key, value in one["generator"].items():
        if "running" in key:
            assert torch.allclose(two["generator"][key], value, rtol=1e-4, atol=1e-6), key


POISONED = """
import sys
import torch
from ratlip import config, distributed
from ratlip.data.loader import to_floats
from ratlip.trainer import prepare, train_step

training, batches, loader, _ = prepare(config.load(sys.argv[1], sys.argv[2:]))
training.generator.train()
networks = *training.networks.values(), training.ema
for number, batch in enumerate(loader):
    before = [value.clone() for network in networks for value in network.state_dict().values()]
    if number == 1 and distributed.rank() == 1:
        batch = batch._replace(images=to_floats(batch.images))
        batch.images[0, 0, 5, 5] = torch.nan
    train_step(training, batch)
    after = [value for network in networks for value in network.state_dict().values()]
    assert all(map(torch.equal, before, after)) == (number == 1)
    assert (training.bad_steps, training.bad_in_a_row) == (min(number, 1), number == 1)
distributed.stop()
"""


def test_a_step_that_is_bad_in_one_process_changes_nothing_in_either(words, tmp_path):
    (tmp_path / "script.py").write_text(POISONED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*command, tmp_path / "script.py", *words(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_two_processes_stop_together_and_resume(words, tmp_path):
    long = words(tmp_path, "train.max_epoch=400", "log.save_interval=400", "log.test_interval=400")
    process = script("train", long, 2)
    while not list(tmp_path.glob("logs/demo/*/grids/epoch_0002.png")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM and saved" in finished(process)
    step = state(tmp_path, "state_epoch_*_step_*.pth")["step"]
    epochs = step // 3 + 2
    assert "going on from" in finished(script("resume", [*long, f"train.max_epoch={epochs}"], 2))
    assert state(tmp_path, f"state_epoch_{epochs:03}.pth")["step"] == 3 * epochs


def test_two_processes_go_on_to_what_an_undisturbed_run_gives(words, tmp_path):
    """Two epochs in two processes, and the same stopped after a step and resumed: every bit."""
    whole, parts = (words(tmp_path / name, "train.max_epoch=2") for name in ("whole", "parts"))
    finished(script("train", whole, 2))
    finished(script("train", [*parts, "train.max_hours=1e-9"], 2))
    assert state(tmp_path / "parts", "state_epoch_*_step_*.pth")["step"] == 1
    finished(script("resume", parts, 2))
    one, two = (state(tmp_path / name, "state_epoch_002.pth") for name in ("whole", "parts"))
    assert one["step"] == two["step"] == 6
    for network in ("generator", "discriminator", "ema"):
        for key, value in one[network].items():
            assert torch.equal(two[network][key], value), (network, key)
    assert one["scores"]["end"]["clip_score"] == two["scores"]["end"]["clip_score"]


def test_a_killed_process_takes_the_run_down_and_the_run_resumes(words, tmp_path):
    long = words(tmp_path, "train.max_epoch=4000", "log.test_interval=4000", "train.keep=2")
    process = script("train", long, 2)
    while not list(tmp_path.glob("saved/demo/*/state_epoch_002.pth")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    found = subprocess.run(["pgrep", "-f", f"code/train.py.*{tmp_path}"], capture_output=True, text=True).stdout.split()
    workers = [pid for pid in found if b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    workers = [pid for pid in workers if b"bash" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    began = time.time()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - began < 60
    assert "SIGKILL" in errors or "Signal 9" in errors
    (run_folder,) = tmp_path.glob("saved/demo/*")
    newest = checkpoint.newest_first(run_folder)[0]
    epoch = checkpoint.read(newest)["epoch"]
    finished(script("resume", [*long, f"train.max_epoch={epoch + 1}"], 2))
    assert checkpoint.read(run_folder / f"state_epoch_{epoch + 1:03}.pth")["step"] == 3 * (epoch + 1)


FAILS = """
import os, runpy, sys
from ratlip import course

real = course.sample_grid


def grid(t, evaluator):
    if t.step == 3 and os.environ["RANK"] == "1":
        raise course.UserError("a grid failed on one process")
    return real(t, evaluator)


course.sample_grid = grid
runpy.run_path("code/train.py", run_name="__main__")
"""


def test_what_fails_on_one_process_ends_both_saved(words, tmp_path):
    """While the other is at the evaluation, whose sums wait for both."""
    (tmp_path / "fails.py").write_text(FAILS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "code")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    found = subprocess.run(
        [*torchrun, tmp_path / "fails.py", *words(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 1
    assert "stopped by process 1: a grid failed on one process; saved as" in found.stdout, found.stderr
    assert "error: a grid failed on one process; saved as" in found.stderr
    assert state(tmp_path, "state_epoch_000_step_*.pth")["step"] == 3


def test_a_hangup_reaches_both_processes(words, tmp_path):
    process = script("train", words(tmp_path, "train.max_epoch=400", "log.test_interval=400"), 2)
    while not list(tmp_path.glob("logs/demo/*/grids/epoch_0001.png")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert "stopped by SIGHUP and saved" in finished(process)
    assert state(tmp_path, "state_epoch_*_step_*.pth")["step"] >= 3
