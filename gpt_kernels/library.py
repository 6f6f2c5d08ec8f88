"""The compiled files: _cpu.so, the C++ kernels, and _cuda.so, those in CUDA C++; loading one fills its ops' slots.

`cpu` and `cuda` are their handles, None where one is not there, with the reason in `cpu_error` and `cuda_error`. The
instruction set of the CPU's kernels is chosen here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
from collections.abc import Iterator

import torch

ISA_LEVELS = ("base", "avx2", "avx512", "avx512_bf16")


def _load(file: str, what: str, how: str) -> tuple[ctypes.CDLL | None, str | None]:
    """(a compiled library with its ops registered, None), or (None, why not)."""
    path = pathlib.Path(__file__).with_name(file)
    if not path.exists():
        return None, f"the {what} kernels were not built: install with {how}"
    try:
        torch.ops.load_library(str(path))
        return ctypes.CDLL(str(path)), None
    except OSError as error:
        return None, f"the {what} kernels could not be loaded under torch {torch.__version__}: {error}"


def _load_cpu() -> tuple[ctypes.CDLL | None, str | None]:
    library, error = _load("_cpu.so", "C++", "a C++ compiler present and GPT_KERNELS_BUILD unset")
    if library is not None:
        for function in ("isa", "best_isa", "compiler"):
            getattr(library, f"gpt_kernels_{function}").restype = ctypes.c_char_p
        library.gpt_kernels_torch_target.restype = ctypes.c_int64
    return library, error


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    if torch.version.hip:  # whose tensors have the CUDA slots, too
        return None, f"the CUDA kernels are for NVIDIA GPUs, torch {torch.__version__} is for AMD's"
    library, error = _load("_cuda.so", "CUDA", "nvcc and a GPU present, or GPT_KERNELS_BUILD=cuda")
    if library is not None:
        library.gpt_kernels_cuda_archs.restype = library.gpt_kernels_cuda_streams.restype = ctypes.c_char_p
    return library, error


def cuda_archs() -> str | None:
    """What the CUDA kernels are compiled for ("sm_80 sm_90a compute_80"); None if not built."""
    return cuda.gpt_kernels_cuda_archs().decode() if cuda else None


def isa() -> str | None:
    """The instruction set that the CPU kernels use now ("base", "avx2", "avx512", "avx512_bf16"); None if not built."""
    return cpu.gpt_kernels_isa().decode() if cpu else None


def best_isa() -> str | None:
    """The best instruction set that both this CPU and the compiled kernels have; None if not built."""
    return cpu.gpt_kernels_best_isa().decode() if cpu else None


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process; the environment's GPT_KERNELS_ISA does it at import."""
    if cpu is None:
        raise RuntimeError(f"set_isa: {cpu_error}")
    status = cpu.gpt_kernels_set_isa(name.encode())
    if status == 1:
        raise ValueError(f"set_isa: unknown instruction set {name!r}, expected one of {', '.join(ISA_LEVELS)}")
    if status == 2:
        raise ValueError(f"set_isa: this CPU has no {name}, its best is {best_isa()}")


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels compiled for instruction set `name` inside the block."""
    before = isa()
    set_isa(name)
    try:
        yield
    finally:
        if before is not None:
            set_isa(before)


cpu, cpu_error = _load_cpu()
cuda, cuda_error = _load_cuda()
if cpu is not None and os.environ.get("GPT_KERNELS_ISA"):
    set_isa(os.environ["GPT_KERNELS_ISA"])
