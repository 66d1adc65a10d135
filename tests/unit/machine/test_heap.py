"""The heap: what is freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other rules")

# Blocks of a size that malloc keeps after it has seen one such block freed, each with a small one behind it that stays.
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
libc.free(take(size))
held = [(take(size), take(1000)) for _ in range(count)]
full = psutil.Process().memory_info().rss
for block, _ in held:
    libc.free(block)
print((full - psutil.Process().memory_info().rss) / (size * count))
"""


def returned(size, count, before=""):
    """The share of freed memory that the system has again."""
    code = PROGRAM.format(size=size, count=count, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def kept(size, count, before=""):
    """Whether malloc keeps what is freed. Where another mapping stands above its heap it maps every block, now and then."""
    return min(returned(size, count, before) for _ in range(3)) < 0.2


def test_large_blocks_go_back_when_they_are_freed():
    assert kept(4 << 20, 10)
    assert returned(4 << 20, 10, before="returning = heap.return_large_blocks(); returning.__enter__()") > 0.9


def test_afterwards_large_blocks_are_kept_as_ever():
    assert kept(4 << 20, 10, before="with heap.return_large_blocks(): pass")
