"""Several processes under torchrun: who this one is, sums and means over all, and saying things once."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from ratlip.errors import UserError

Result = TypeVar("Result")

# A process that waits longer than this for another gives up. They all wait while the first checks a large data set
# that `prepare.sh` has not.
TIMEOUT = timedelta(hours=1)


def start() -> int:
    """Join the other processes where torchrun started this one (nccl on GPUs, gloo else); the local rank."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        # Between GPUs nccl; gloo for what the hosts tell each other, which then wait for no GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    return local_rank


def stop() -> None:
    """Leave the group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of processes on this machine, where torchrun says so; else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def say(message: str) -> None:
    """Print on the first process only."""
    if rank() == 0:
        print(message, flush=True)


def same(text: str) -> str:
    """The first process's text, on all."""
    if not dist.is_initialized():
        return text
    box = [text]
    dist.broadcast_object_list(box)
    return box[0]


def first_decides(decide: Callable[[], Result]) -> Result:
    """What `decide()` gives on the first process, on all; where it raises UserError there, all leave."""
    if not dist.is_initialized():
        return decide()
    box: list = [None, None]
    if rank() == 0:
        try:
            box[0] = decide()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box)
    result, refusal = box
    if refusal and rank() == 0:
        raise refusal
    if refusal:
        sys.exit(2)  # the first process says why
    return result


def sum_over_processes(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Replace each tensor by its sum over all processes. `device`: where the backend can reduce."""
    if world_size() == 1:
        return
    for tensor in tensors:
        moved = tensor.to(device)
        dist.all_reduce(moved)
        tensor.copy_(moved)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on at least one process. The hosts ask each other, and no GPU."""
    if world_size() == 1:
        return flag
    box = torch.tensor(float(flag))
    dist.all_reduce(box)
    return bool(box > 0)


class Elsewhere(Exception):
    """Another process has failed, or was asked to stop."""


def meet() -> None:
    """Before work in which processes wait for each other. One that cannot go on comes with `any_process(True)`.

    Raises:
        Elsewhere: one of the others did.
    """
    if any_process(False):
        raise Elsewhere


def gather(thing: Any) -> list[Any]:
    """What each process gives, by rank, on all of them."""
    things = [thing] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def mean_gradients(network: nn.Module, *numbers: Tensor) -> None:
    """Replace each gradient, and each of `numbers`, by its mean over all processes, in one message."""
    if world_size() == 1:
        return
    tensors = [p.grad for p in network.parameters() if p.grad is not None] + list(numbers)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


def sum_with_gradient(x: Tensor) -> Tensor:
    """The sum of every process's x. Its gradient is that of what all processes make of the sum, twice if need be."""
    return x if world_size() == 1 else all_reduce(x)


def whole_batch(share: Tensor) -> Tensor:
    """The global batch (B * processes, ...), in its order, of each process's share (B, ...): sample i of process r is
    number i * processes + r of it. Gradients go through, as in `sum_with_gradient`."""
    if world_size() == 1:
        return share
    places = [share if other == rank() else torch.zeros_like(share) for other in range(world_size())]
    return all_reduce(torch.stack(places, dim=1)).flatten(0, 1)


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block alone, the others after it: what it writes to disk, they find."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier()
