"""Which device and which precision a run uses."""

import ctypes
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ratlip.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def choose(name: str, local_rank: int = 0) -> torch.device:
    """ "auto", "cpu" or "cuda" -> the device of this process."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device: cuda was asked for, but PyTorch sees no GPU here; use cpu or auto")
    return torch.device("cuda", local_rank)


def choose_precision(name: str, device: torch.device) -> str:
    """ "auto" -> "bf16" where the hardware multiplies in it, else "fp32"; other names stay. On CPUs, of which some are
    slower in it all the same, training measures instead (`ratlip.choices`)."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def has_bf16_routines() -> bool:
    """Whether PyTorch has anything but its slow general loops for bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor that was made on the CPU, on `device`. A GPU fetches it by itself, from pinned memory, when it comes to
    it; the host does not wait until all has been done that was asked of the GPU before."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context in which matrix products and convolutions run in the given precision; weights stay float32."""
    low = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, low, enabled=precision != "fp32")


def compiled(function: Callable, **options: object) -> Callable:
    """`function` or module, compiled by torch.compile with its `options` for each shape that it meets: the same results
    but for rounding.

    Raises:
        UserError: no C++ compiler, without which PyTorch cannot.
    """
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise UserError("compiling needs a C++ compiler (on Debian: apt-get install g++), or set CXX to one")
    return torch.compile(function, dynamic=False, **options)


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones; elsewhere than in glibc nothing changes.

    By default it hands every block of more than 32 MiB back to the system, which maps and zeroes the next one anew,
    page by page. On a CPU that takes longer than the arithmetic on it.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
