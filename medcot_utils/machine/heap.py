"""Give main memory back to the system as glibc's malloc would not: tensors of many sizes leave gaps in its heap."""

from __future__ import annotations

import ctypes
import platform

_M_MMAP_THRESHOLD = -3  # malloc.h


def return_large_blocks() -> None:
    """Make blocks of 8 MB and more go back to the system as soon as they are freed; malloc would raise that size to 32 MB."""
    if _is_glibc():
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 8 << 20)


def trim_heap() -> None:
    """Give back what is free now: 0.2 GB of the demo after its held-out loss, before its training asks for other sizes."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
