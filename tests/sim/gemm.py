"""selftest.cu's gemm with one of its faults under many schedules: how often is its result wrong? ctypes alone, so that it
also runs where a sanitizer's runtime is preloaded: python gemm.py <library> <fault> <schedules>."""

import ctypes
import random
import struct
import sys

K, FAULTS = 64, ("none", "wait_too_lax", "no_barrier_after_wait", "no_barrier_before_refill", "swapped_accumulators")


def aligned(kind, count):
    """A ctypes array of `count` on a multiple of 64 bytes."""
    memory = (ctypes.c_char * (ctypes.sizeof(kind) * count + 64))()
    return (kind * count).from_buffer(memory, -ctypes.addressof(memory) % 64)


def bf16(value):
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


def wrong(library, fault, seeds):
    """Of how many schedules? Integers in, so the right result is exact."""
    library.test_gemm.restype = ctypes.c_char_p
    library.test_seed.argtypes, library.test_seed.restype = [ctypes.c_int64], None
    random.seed(1)
    a, b = ([random.randint(-4, 4) for _ in range(rows * K)] for rows in (32, 8))
    A, B, C = aligned(ctypes.c_uint16, len(a)), aligned(ctypes.c_uint16, len(b)), aligned(ctypes.c_float, 256)
    A[:], B[:] = [*map(bf16, a)], [*map(bf16, b)]
    expected = [sum(a[i * K + k] * b[j * K + k] for k in range(K)) for i in range(32) for j in range(8)]
    count = 0
    for seed in range(seeds):
        library.test_seed(seed)
        report = library.test_gemm(C, A, B, K, FAULTS.index(fault))
        count += report is not None or list(C) != expected
    library.test_seed(0)
    return count


if __name__ == "__main__":
    print(wrong(ctypes.CDLL(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
