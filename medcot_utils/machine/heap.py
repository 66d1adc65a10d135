"""Give main memory back to the system as glibc's malloc would not: tensors of many sizes leave gaps in its heap."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGEST = 32 << 20  # up to here glibc raises the threshold by itself


@contextlib.contextmanager
def return_large_blocks() -> Iterator[None]:
    """Give back what is free now, and inside this block every piece of 3 MB and more when it is freed.

    A training step keeps pieces of 1 to 4 MB for its backward pass, and the gaps between them added 0.2 to 0.3 GiB to the demo's
    peak; its speed stays. A forward pass alone is slower inside: each of its large results then costs new pages."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, 3 << 20)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
