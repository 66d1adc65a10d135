"""The heap: what is freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other rules")

# Blocks of one size in a row, and one more behind them that stays: the end of the heap is trimmed in any case.
PROGRAM = """
import ctypes
import psutil
from medcot_utils.machine import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def take(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

size, count = {size}, {count}
{before}
held, last = [take(size) for _ in range(count)], take(size)
full = psutil.Process().memory_info().rss
for block in held:
    libc.free(block)
print((full - psutil.Process().memory_info().rss) / (size * count))
"""


def returned(size, count, before=""):
    """The share of freed memory that the system has again."""
    code = PROGRAM.format(size=size, count=count, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


# As after many freed blocks: glibc has raised its threshold by itself, as far as it does. Set, since some systems never raise it.
GROWN = "libc.mallopt(-3, 32 << 20)"
INSIDE = "returning = heap.return_large_blocks(); returning.__enter__()"


def test_large_blocks_go_back_when_they_are_freed():
    assert returned(4 << 20, 10, GROWN) < 0.2
    assert returned(4 << 20, 10, f"{GROWN}; {INSIDE}") > 0.9


def test_afterwards_large_blocks_are_kept_as_ever():
    assert returned(4 << 20, 10, f"{INSIDE}; returning.__exit__(None, None, None)") < 0.2
