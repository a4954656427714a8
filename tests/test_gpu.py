"""What a GPU would do, seen without one: no host waits for it in a step, while sampling and while scoring; every tensor
is on it; products and convolutions are in the precision asked for. The same on a real one is marked `gpu`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_run, watch_gradients
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ratlip import config, device, evaluation
from ratlip.data.loader import Batch, to_floats
from ratlip.metrics import METRICS
from ratlip.metrics.features import released_inception_input
from ratlip.metrics.frechet import Gaussian
from ratlip.metrics.metric import Scored
from ratlip.sampling import draw, interpolate, seeded_noise, truncated
from ratlip.trainer import Training, prepare, train_step

aten = torch.ops.aten
# How the host learns what the device has: a value, or how many rows there are.
READS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive,
}  # fmt: skip
COPIES = {aten._to_copy, aten.copy_}
CONVOLUTIONS = {aten.convolution, aten.convolution_backward}
PRODUCTS = {aten.mm, aten.addmm}


class NeverWait(TorchDispatchMode):
    """Refuses each operation for which the host would have to wait until a GPU has come to it, and notes in which
    precision convolutions and products are. Where all is on the CPU, all is taken for the GPU's: what the host has to
    know, it reads from NumPy's arrays."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {"convolutions": set(), "products": set()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, operation = kwargs or {}, func.overloadpacket
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        assert operation not in READS and func is not aten.repeat_interleave.Tensor, f"the host reads: {func}"
        if operation in (aten.index, aten.index_put, aten.index_put_):
            rows = [row for row in args[1] if row is not None]
            assert all(row.dtype is not torch.bool for row in rows), f"the host counts: {func}"
        places = [tensor.device.type for tensor in tensors if tensor.ndim or operation in COPIES]
        places += [torch.device(kwargs["device"]).type] if operation in COPIES and kwargs.get("device") else []
        if len(set(places)) > 1:  # numbers without dimensions alone go along with a call
            sent = operation in COPIES and tensors[-1].device.type == "cpu"
            assert sent and (kwargs.get("non_blocking") or True in args[2:]), f"over from one device to another: {func}"
        for name, kinds in (("convolutions", CONVOLUTIONS), ("products", PRODUCTS)):
            if operation in kinds:
                self.seen[name].add(tensors[-1].dtype)
        return func(*args, **kwargs)


def python_backward(output: Tensor, wanted=(), create_graph: bool = False) -> tuple[Tensor, ...]:
    """torch.autograd.grad(output, wanted), or without `wanted` output.backward(), from node to node in Python:
    PyTorch's own engine asks the driver for the streams of a GPU, which has to exist."""
    edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in wanted]
    order, met, stack = [], set(), [(output.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in met:
            met.add(node)
            stack += [(node, True), *((below, False) for below, _ in node.next_functions if below is not None)]
    given = {node: {} for node in order}  # the gradients of each node's outputs, by their number
    given[output.grad_fn][0] = torch.ones_like(output)
    with torch.set_grad_enabled(create_graph):
        for node in reversed(order):
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                if not wanted and given[node]:
                    leaf.grad = given[node][0] if leaf.grad is None else leaf.grad + given[node][0]
            elif given[node]:
                call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
                found = call(*(given[node].get(number) for number in range(len(node._input_metadata))))
                found = found if isinstance(found, tuple) else (found,)
                for (below, number), own in zip(node.next_functions, found, strict=True):
                    if below is not None and own is not None:
                        like = getattr(below, "variable", None)
                        like = below._input_metadata[number] if like is None else like
                        own = own.sum_to_size(like.shape).to(like.dtype)
                        given[below][number] = given[below][number] + own if number in given[below] else own
    return tuple(given[edge.node][edge.output_nr] for edge in edges)


class Gpu:
    """A GPU that is not there: fake tensors on it, to which `ratlip.device.send` is the only way."""

    device = torch.device("cuda", 0)

    def __init__(self, monkeypatch):
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        monkeypatch.setattr("ratlip.device.send", self._send)
        monkeypatch.setattr("torch.Tensor.backward", python_backward)
        monkeypatch.setattr("torch.autograd.grad", python_backward)
        # Autocast and the scaler turn themselves off where they find no GPU.
        monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
        # What comes from NumPy is the host's, and keeps its numbers.
        monkeypatch.setattr("torch.from_numpy", _without_modes(torch.from_numpy))
        monkeypatch.setattr("torch.Tensor.numpy", _without_modes(torch.Tensor.numpy))

    @contextmanager
    def __call__(self) -> Iterator[NeverWait]:
        """Inside, everything is fake."""
        with self.fake, NeverWait() as never_wait:
            yield never_wait

    def tensor(self, like: Tensor) -> Tensor:
        """A tensor of that kind here."""
        with self.fake:
            return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=self.device)

    def take(self, t: Training) -> Training:
        """Move networks, CLIP and captions here, in place; a fresh Training of them."""
        for part in (part for net in (t.system.clip, *t.networks.values(), t.ema) for part in net.modules()):
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(self.tensor(parameter), parameter.requires_grad))
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, self.tensor(buffer))
        sentences = self.tensor(t.sentences)
        t.system.state = {name: self.tensor(value) for name, value in t.system.state.items()}
        with self.fake:
            return Training(t.system, t.ema, sentences, t.precision, t.total_steps)

    def _send(self, tensor: Tensor, place: torch.device) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            tensor = self.fake.from_tensor(tensor)
        return tensor.to(place, non_blocking=True)


def _without_modes(function):
    def call(*args):
        with _disable_current_modes():
            return function(*args)

    return call


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.fixture(scope="module")
def ready(demo_folder, clip_file, tmp_path_factory):
    """ready(*words) -> what `prepare` gives for a small run; the generator is in training mode."""
    folder = tmp_path_factory.mktemp("runs")

    def ready(*words: str):
        few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=16", "train.device=cpu")
        places = (f"log.dir={folder}/logs", f"log.save_dir={folder}/saved", f"clip.weights={clip_file}")
        system = next((word.split("=")[1] for word in words if word.startswith("model.name=")), "ratlip")
        own = [*tiny_run(system), *few, *places, "eval.metrics=[clip_score]", *words]
        made = prepare(config.load("cfg/demo.yml", own))
        made[0].generator.train()
        return made

    return ready


EVERYTHING = ("train.augment_shift=0.1", "train.augment_brightness=0.1", "train.clip_grad=1.0", "model.d_whiten=true")
VARIANTS = [
    (*EVERYTHING, "train.precision=bf16"),
    ("model.name=galip", "model.d_whiten=false", "train.precision=fp16"),
    ("model.name=dfgan", "model.imsize=32", "train.ema=0.9", "train.precision=bf16"),
    ("model.name=ratgan", "model.imsize=32", "train.ema=0.9", "ratgan.attention=true", "train.precision=fp16"),
]


@pytest.mark.parametrize("words", [*VARIANTS, EVERYTHING])
def test_nothing_is_read_in_a_step(ready, words):
    """Good steps and one that is not finite, on the CPU."""
    training, _, loader, _ = ready(*words)
    for number, batch in enumerate(loader):
        if number == 1:
            batch = batch._replace(images=to_floats(batch.images))
            batch.images[0, 0, 5, 5] = torch.nan
        with NeverWait():
            values = train_step(training, batch)
    assert training.bad_steps == (2 if training.precision == "fp16" else 1)  # the first scale is too large
    assert all(torch.isfinite(value) for value in values.values())


@pytest.mark.parametrize("words", VARIANTS)
def test_a_step_stays_on_the_gpu_and_in_its_precision(ready, gpu, words):
    """Both backward passes and the penalty's second derivative included."""
    training, _, loader, _ = ready(*words)
    training = gpu.take(training)
    batch = Batch(*map(gpu.tensor, next(iter(loader))))
    with gpu() as never_wait:
        values = train_step(training, batch)
    host = {"learning_rate/g", "learning_rate/d"}
    assert {name for name, value in values.items() if value.device != gpu.device} == host
    states = [state for optimizer in training.optimizers.values() for state in optimizer.state.values()]
    assert states and all(value.device == gpu.device for state in states for value in state.values())
    low = torch.bfloat16 if training.precision == "bf16" else torch.float16
    assert never_wait.seen["convolutions"] == {low}
    # LSTMs are computed in float32. (So is attention, where no GPU's own is found: by bmm, which is not looked at.)
    recurrent = any(training.generator.conditioner.recurrent)
    assert never_wait.seen["products"] == ({low, torch.float32} if recurrent else {low})
    assert all(p.dtype == torch.float32 for net in (training.generator, training.ema) for p in net.parameters())


@pytest.fixture
def scoring(ready, monkeypatch):
    """A Training, and an Evaluator by CLIP's metrics, of which all runs but what they answer at the end."""
    for metric in METRICS.values():
        monkeypatch.setattr(metric, "compute", lambda self: {})
    metrics = "eval.metrics=[fd_clip,cmmd,clip_score,diversity]"
    training, _, _, evaluator = ready(metrics, "eval.batch_size=4", "eval.samples=6")
    return training, evaluator


def test_nothing_is_read_while_sampling_and_scoring(scoring):
    training, evaluator = scoring
    with NeverWait():
        assert evaluator(training.ema)["images"] == 6
        noise = truncated(seeded_noise(0, range(2), training.ema.noise_dim), 1.5)
        images = draw(training.ema.eval(), evaluator.sentences[:1], interpolate(*noise, 3), "bf16")
    assert images.shape == (1, 3, 3, 16, 16) and images.isfinite().all()


def test_sampling_and_scoring_stay_on_the_gpu(scoring, gpu, monkeypatch):
    training, evaluator = scoring
    scorer, training = evaluator.scorer, gpu.take(training)
    evaluator.sentences = evaluator.judged = gpu.tensor(evaluator.sentences)
    evaluator.precision, scorer.device = "bf16", gpu.device
    (real,) = scorer.references.values()
    gaussian = Gaussian(gpu.tensor(real.gaussian.mean), gpu.tensor(real.gaussian.covariance))
    scorer.references["clip"] = real = replace(real, gaussian=gaussian)
    stages = evaluation.Stages(torch.device("cpu"))  # a GPU's clock is no tensor
    monkeypatch.setattr(evaluation, "Stages", lambda _: stages)
    with gpu() as never_wait:
        assert evaluator(training.ema)["images"] == 6
        noise = device.send(seeded_noise(0, range(2), training.ema.noise_dim), gpu.device)
        images = draw(training.ema.eval(), evaluator.sentences[:1], noise, "bf16")[0]
    assert images.device == gpu.device and images.dtype == torch.float32
    assert never_wait.seen["convolutions"] == {torch.bfloat16, torch.float32}  # generating; features

    with gpu():  # the metrics whose networks take long to make, with CLIP's features in place of theirs
        released_inception_input(images)
        for name in ("fid", "kid", "precision"):
            metric = METRICS[name](replace(real, count=6, features=torch.empty(6, len(gaussian.mean))), 6)
            numbers = torch.from_numpy(np.array([1, 4]))
            metric.update(Scored(numbers, images, None, None, {metric.space: gpu.tensor(torch.ones(2, 64))}))
            assert {total.device for total in metric.totals} == {gpu.device}


@pytest.mark.parametrize(
    "mistake",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.isfinite().all()),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t.cpu(),
        lambda t: t.to("cpu", non_blocking=True),
        lambda t: t + torch.ones(4),
        lambda t: t[torch.tensor([0, 1])],
        lambda t: t * torch.ones(4).to(t.device),
        lambda t: t + torch.from_numpy(np.ones(4, np.float32)),
    ],
)
def test_what_would_wait_is_refused(gpu, mistake):
    numbers = gpu.tensor(torch.ones(4))
    with gpu():
        assert (numbers * 2 + torch.tensor(1.0) + device.send(torch.ones(4), gpu.device)).device == gpu.device
        with pytest.raises((AssertionError, RuntimeError)):
            mistake(numbers)


def test_python_backward_is_autograds(ready, monkeypatch):
    """The gradients of a step on the CPU, to rounding."""
    found = []
    for _ in range(2):
        training, _, loader, _ = ready("model.d_start=1.0", "train.lr_d=0", *EVERYTHING)
        gradients = watch_gradients(training)
        train_step(training, next(iter(loader)))
        found.append({key + name: value for key, own in gradients.items() for name, value in own.items()})
        monkeypatch.setattr("torch.Tensor.backward", python_backward)
        monkeypatch.setattr("torch.autograd.grad", python_backward)
    for name, expected in found[0].items():
        assert torch.allclose(found[1][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-9), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("words", [*VARIANTS, EVERYTHING])
def test_pytorch_sees_no_wait_in_a_step_either(ready, words):
    """On a GPU, after a step in which libraries are loaded; then scoring, all but what the metrics answer."""
    metrics = "eval.metrics=[fd_clip,cmmd,clip_score,diversity]"
    training, _, loader, evaluator = ready("train.device=cuda", metrics, *words)
    pinned = [Batch(*(tensor.pin_memory() for tensor in batch)) for batch in loader]
    for number, batch in enumerate(pinned):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            train_step(training, Batch(*(tensor.to("cuda", non_blocking=True) for tensor in batch)))
            for stream in evaluator._streams(training.ema.eval()) if number else ():
                for scored in stream.batches:
                    for space in evaluator.scorer.spaces.values():
                        scored.features[space.name] = space(scored.images)
                    for name in stream.names:
                        METRICS[name](evaluator.scorer.references["clip"], stream.count).update(scored)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert training.step == 3
