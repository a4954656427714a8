"""What the C library does with freed memory."""

import platform
import subprocess
import sys

import pytest
from helpers import ROOT

RESIDENT = """
import sys, torch
from pathlib import Path
from ratlip.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
before = resident()
torch.ones(2**26)  # 256 MiB, freed at once
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    """MiB resident after 256 have been freed; by itself glibc gives a block of this size back."""
    held = {}
    for word in ("keep", "give back"):
        command = [sys.executable, "-c", RESIDENT, word]
        result = subprocess.run(command, cwd=ROOT / "code", capture_output=True, text=True, check=True)
        held[word] = float(result.stdout)
    assert held["keep"] > 200 and held["give back"] < 50, held
