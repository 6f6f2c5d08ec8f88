"""Memory for results. A large tensor's memory is returned to the system when the tensor dies, and each call that makes another
pays for fresh pages: at 100 MB that costs more than the arithmetic of a memory-bound op. `reuse_memory` keeps it instead."""

from __future__ import annotations

import ctypes
import platform

# glibc's malloc.h, and the largest block that it takes from the heap by itself
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _LARGEST_IN_HEAP = -1, -3, -4, 32 << 20


def _mallopt(*options: tuple[int, int]) -> bool:
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, value) for option, value in options)


def reuse_memory() -> None:
    """Let this process keep the CPU memory that it frees, for its next tensors, torch's own among them, from now on.

    For training and inference loops, which free and make tensors of the same sizes again and again. Resident memory then
    stays at its highest until the process ends. Nothing is kept of what was allocated before the call, so call it first.
    Raises RuntimeError where the C library is not glibc: there nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        raise RuntimeError(f"reuse_memory: needs Linux with glibc, this is {platform.system()} without it")
    # no allocation by a mapping of its own, which free would unmap; the heap's top is never given back
    if not _mallopt((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        raise RuntimeError("reuse_memory: the C library refused; another allocator may be preloaded")


def hold_heap() -> None:
    """For benchmarks: blocks of up to 32 MB come from the heap, as they do by themselves once one of 32 MB was freed, and the
    heap's top is never given back, which happens from twice the size of that block on (LOG L135). Without
    glibc nothing is changed."""
    if platform.libc_ver()[0] == "glibc":
        _mallopt((_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP), (_M_TRIM_THRESHOLD, -1))
