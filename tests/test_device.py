"""Device, precision, and what the C library does with freed memory."""

import platform
import subprocess
import sys

import pytest
from helpers import ROOT

FAULTS = """
import resource, sys, torch
from ratlip.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(2**24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_mapped_again():
    """Page faults of filling 64 MiB five times: a page has 4 KiB, or 2 MiB where the kernel gives huge ones."""
    faults = {}
    for word in ("keep", "give back"):
        command = [sys.executable, "-c", FAULTS, word]
        result = subprocess.run(command, cwd=ROOT / "code", capture_output=True, text=True, check=True)
        faults[word] = int(result.stdout)
    assert faults["keep"] < 16 < 5 * 32 <= faults["give back"], faults
