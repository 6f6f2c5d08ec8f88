"""reuse_memory() and the benchmarks' hold_heap(): what they are for, in a process of its own: there is no way back."""

import ctypes
import os
import pathlib
import platform
import subprocess
import sys

import pytest

import gpt_kernels

FAULTS = """
import resource, sys, torch, gpt_kernels
if sys.argv[1] == "reuse":
    gpt_kernels.reuse_memory()
x = torch.ones(2**24)  # 64 MB: 32 pages of 2 MB, 16384 of 4 KB
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for op in (lambda: x * 2, lambda: gpt_kernels.gelu(x.view(2**12, -1))):
        for _ in range(4):
            op()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))  # what else the process does takes a page now and then
"""


HELD = """
import ctypes, sys, gpt_kernels
if sys.argv[1] == "hold":
    gpt_kernels.memory.hold_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
libc.mallinfo2.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
blocks = [libc.malloc(24 << 20) for _ in range(5)]
for block in blocks:
    libc.free(block)
print(libc.mallinfo2().keepcost >> 20)  # at the heap's end, and free
mapped = libc.mallinfo2().hblkhd
block = libc.malloc(200 << 20)
print(libc.mallinfo2().hblkhd - mapped >> 20)
libc.free(block)
"""


def printed(script: str, how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, timeout=300, check=True)
    return [int(word) for word in done.stdout.split()]


def page_faults(how: str) -> int:
    return printed(FAULTS, how)[0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    assert page_faults("as it is") > 4 * 32
    assert page_faults("reuse") < 32, "of eight tensors of 64 MB"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_heap_of_a_benchmark():
    """120 MB in blocks of 24 are kept, where else the system gets what is above 64; the heap grows by no block above 32."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("mallinfo2 came with glibc 2.33")
    kept, mapped = printed(HELD, "as it is")
    assert kept < 65 and mapped == 200
    kept, mapped = printed(HELD, "hold")
    assert kept >= 4 * 24 and mapped == 200


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_rows_written_past_the_cache():
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "streamed_rows"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_other_c_libraries_are_refused(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(RuntimeError, match="reuse_memory: needs Linux with glibc, this is "):
        gpt_kernels.reuse_memory()
