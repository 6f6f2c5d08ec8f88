"""reuse_memory(): what it is for, counted in page faults, in a process of its own: there is no way back."""

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


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    assert page_faults("as it is") > 4 * 32
    assert page_faults("reuse") < 32, "of eight tensors of 64 MB"


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
