"""Several processes under torchrun: who this one is, sums and means over all, and saying things once."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A process that waits longer than this for another gives up. They all wait while the first checks a large data set
# that `prepare.sh` has not.
TIMEOUT = timedelta(hours=1)


def start() -> int:
    """Join the other processes where torchrun started this one (nccl on GPUs, gloo else); the local rank."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
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


def sum_over_processes(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Replace each tensor by its sum over all processes. `device`: where the backend can reduce."""
    if world_size() == 1:
        return
    for tensor in tensors:
        moved = tensor.to(device)
        dist.all_reduce(moved)
        tensor.copy_(moved)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one process. `device`: where the backend can reduce."""
    if world_size() == 1:
        return flag
    box = torch.tensor(float(flag), device=device)
    dist.all_reduce(box)
    return bool(box > 0)


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


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block alone, the others after it: what it writes to disk, they find."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier()
