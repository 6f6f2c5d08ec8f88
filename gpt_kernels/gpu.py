"""Whether the CUDA C++ kernels can serve the GPUs of this machine; where they cannot, Triton's fill the CUDA slots, else the
reference.

Two things are asked, each as early as it can be: at import whether the driver is new enough for the runtime that the library
holds, without initialising it, and when torch initialises CUDA whether the library has code for each GPU. `where(op)` tells the
reason.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from . import dispatch, library
from .architectures import number_of, runs


def driver_version() -> int | None:
    """The CUDA version that the driver serves, 12080 for 12.8; None where there is no driver. Initialises nothing."""
    version = ctypes.c_int()
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            return version.value if ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version)) == 0 else None
        except (OSError, AttributeError):
            continue
    return None


def too_old(driver: int | None, needed: int) -> str | None:
    """Why a driver cannot run a library built with CUDA `needed`: within one major version every driver does."""
    if driver is None or driver // 1000 >= needed // 1000:
        return None
    return f"the driver serves CUDA {text(driver)}, the CUDA kernels were built with {text(needed)}"


def text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def no_code(archs: str, capability: tuple[int, int], driver: int | None, built: int) -> str | None:
    """Why a GPU finds no code of its own among "sm_80 sm_90 compute_80".

    Machine code runs on its own generation from its number on, an `a` on that number alone; PTX on everything since, if the
    driver knows the CUDA version that wrote it.
    """
    number = capability[0] * 10 + capability[1]
    for code in archs.split():
        if code.startswith("sm_"):
            served = runs(code, number)
        else:
            of = number_of(code)
            served = of == number or (code[-1] not in "af" and of < number and (driver is None or driver >= built))
        if served:
            return None
    return f"the CUDA kernels are built for {archs}, which sm_{number} does not run"


# op -> generation -> products of elements of q with keys, from which on Triton's kernel was the faster in 16 bits (LOG L149);
# the CUDA C++ kernels of these generations do without their asynchronous products
TRITON_FROM = {"attention_fwd": {9: 3 << 27}, "attention_bwd": {9: 3 << 27}}


def by_size(op: str, cuda: Callable, triton: Callable, *, least: int) -> Callable:
    """The kernel that was measured to be the faster: of a small call launching is all, which costs Triton's more."""
    keys = 1 if op.endswith("_fwd") else 2  # where k stands; the first argument has a row for each of q's

    def call(*args):
        rows, k = args[0], args[keys]
        large = rows.dtype is not torch.float32 and k.dim() == 4 and rows.numel() * k.shape[2] >= least
        return (triton if large else cuda)(*args)

    return call


def settle() -> None:
    """Called once, when all kernels are registered. Raises nothing: a check that fails must not end an import."""
    if library.cuda is None:
        return
    library.cuda.gpt_kernels_cuda_version.restype = ctypes.c_int64
    driver, built = driver_version(), library.cuda.gpt_kernels_cuda_version()
    if reason := too_old(driver, built):
        dispatch.without_cuda(reason)
        return

    def check() -> None:
        for index in range(torch.cuda.device_count()):
            reason = no_code(library.cuda_archs() or "", torch.cuda.get_device_capability(index), driver, built)
            if reason:
                dispatch.without_cuda(f"{torch.cuda.get_device_name(index)}: {reason}")
                return
        generations = {torch.cuda.get_device_capability(index)[0] for index in range(torch.cuda.device_count())}
        if len(generations) == 1:
            (generation,) = generations
            for op, least in TRITON_FROM.items():
                if generation in least:
                    dispatch.share_with_triton(op, functools.partial(by_size, op, least=least[generation]))

    torch.cuda._lazy_call(check)
