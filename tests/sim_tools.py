"""The CUDA kernels on their CPU model (csrc/sim): the library that `make test` builds, as backend "cuda_sim", and its dials.

GPT_KERNELS_SIM_LIBRARY names another build of it, such as the one for ThreadSanitizer.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from gpt_kernels import dispatch

BUILD = "GPT_KERNELS_BUILD=sim python setup.py build_ext --inplace"
PATH = pathlib.Path(os.environ.get("GPT_KERNELS_SIM_LIBRARY") or pathlib.Path(dispatch.__file__).with_name("_cuda_sim.so"))
SEEDS = range(10)  # schedules: in order, reversed, first and last warp ahead, six random ones
_library: ctypes.CDLL | None = None
_namespace = torch.library.Library("gpt_kernels_cuda_sim", "FRAGMENT")


def register() -> None:
    """Every op that the library has becomes the kernel of backend "cuda_sim" for CPU tensors."""
    if not PATH.exists():
        raise RuntimeError(f"the CUDA kernels were not built for the simulator: {BUILD}")
    for op in dispatch.ops():
        schema = str(getattr(torch.ops.gpt_kernels, op).default._schema)
        _namespace.define(schema.partition("::")[2])
    torch.ops.load_library(str(PATH))
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for op in dispatch.ops():
        name = f"gpt_kernels_cuda_sim::{op}"
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            handle = torch.library.get_kernel(name, "CPU")
            dispatch.kernel(op, "cuda_sim", "CPU")(lambda *args, handle=handle: handle.call_boxed(keyset, *args))


def library() -> ctypes.CDLL:
    global _library
    if _library is None:
        _library = ctypes.CDLL(str(PATH))
        _library.gpt_kernels_sim_configure.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        _library.gpt_kernels_sim_counters.restype = ctypes.c_char_p
    return _library


def configure(name: str, value: int, of: ctypes.CDLL | None = None) -> None:
    """A dial of csrc/sim: seed, count, arch, processors, trap; in the environment GPT_KERNELS_SIM_<NAME>."""
    if (of or library()).gpt_kernels_sim_configure(name.encode(), value):
        raise ValueError(f"configure: the simulator has no {name!r}")


@contextlib.contextmanager
def configured(**dials: int) -> Iterator[None]:
    """Dials inside the block; afterwards as the environment has them."""
    defaults = {"seed": 0, "count": 0, "arch": 80, "processors": 3, "trap": 0}
    for name, value in dials.items():
        configure(name, value)
    try:
        yield
    finally:
        for name in dials:
            configure(name, int(os.environ.get(f"GPT_KERNELS_SIM_{name.upper()}", defaults[name])))


@contextlib.contextmanager
def counting() -> Iterator[dict[str, dict[str, Any]]]:
    """Filled at the end of the block: kernel -> what its launches did (mma, bank conflicts, sectors, ...)."""
    counters: dict[str, dict[str, Any]] = {}
    library().gpt_kernels_sim_counters()
    with configured(count=1):
        yield counters
    counters.update(json.loads(library().gpt_kernels_sim_counters()))
