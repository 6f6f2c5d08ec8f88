"""What the launchers share: checks with the CPU backend's messages, the GPU at hand, and the one place that launches."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..architectures import ARCHITECTURES, family
from . import INTERPRETED, Declined

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# ---- checks: op, argument, value, limit ----


def fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"{op}: {message}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        fail(op, f"{name} must be on {like.device} like the other arguments, it is not on the expected device: {t.device}")


def check_float(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        fail(op, f"{name} must be float32, bfloat16 or float16, got {dtype_name(t.dtype)} (Triton kernels)")


def check_dtype(op: str, name: str, t: Tensor, want: torch.dtype) -> None:
    if t.dtype != want:
        fail(op, f"{name} must be {dtype_name(want)}, got {dtype_name(t.dtype)}")


def check_contiguous(op: str, name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        fail(op, f"{name} must be contiguous, got shape {tuple(t.shape)} with other strides")


def check_rows(op: str, name: str, t: Tensor) -> None:
    """A contiguous floating tensor of at least one dimension: rows of its last one."""
    check_float(op, name, t)
    check_contiguous(op, name, t)
    if t.dim() < 1:
        fail(op, f"{name} must have at least 1 dimension, got a scalar")


def check_same_shape(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.shape != like.shape:
        fail(op, f"{name} must have the shape of {like_name} {tuple(like.shape)}, got {tuple(t.shape)}")


def check_like(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    """A contiguous tensor of like's shape, dtype and device, as a gradient is."""
    check_device(op, name, t, like)
    check_same_shape(op, name, t, like_name, like)
    check_dtype(op, name, t, like.dtype)
    check_contiguous(op, name, t)


def check_column(op: str, name: str, t: Tensor, N: int, x: Tensor) -> None:
    """A per-column parameter: weight or bias of N elements, in x's dtype or in float32 beside a 16-bit x."""
    check_device(op, name, t, x)
    if t.shape != (N,):
        fail(op, f"{name} must have shape ({N},), got {tuple(t.shape)}")
    if t.dtype not in (x.dtype, torch.float32):
        fail(op, f"{name} must be {dtype_name(x.dtype)} like x or float32, got {dtype_name(t.dtype)}")
    check_contiguous(op, name, t)


# ---- the GPU at hand ----


def unserved(op: str, arch: str) -> str | None:
    """Why the reference serves `op` on architecture `arch`; None where our kernels do."""
    if family(arch) is None:
        return f"{arch}: Triton compiles for no architecture of its kind"
    if op.startswith("attention") and re.fullmatch(r"sm_[1-7]\d|gfx10..", arch):
        return f"{arch} has no matrix instructions that the attention kernels could use; sm_80, gfx908 and gfx1100 do"
    return None


_arch_override: list[str] = []


@functools.cache
def _target_of(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _arch_of(index: int) -> str | None:
    properties, target = torch.cuda.get_device_properties(index), _target_of(index)
    shared = getattr(properties, "shared_memory_per_block_optin", None)  # where torch tells
    return family(target, shared and shared // 1024)


@functools.cache
def _processors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def target(device: torch.device) -> str:
    """The architecture that is compiled for: "sm_103", "gfx950", ...; sm_80 under the interpreter; use_arch overrides."""
    if _arch_override:
        return _arch_override[-1]
    return _target_of(device.index) if device.type == "cuda" else "sm_80"


def arch(device: torch.device) -> str:
    """The one of ARCHITECTURES whose launch parameters serve the device. Raises Declined where none does."""
    if _arch_override:
        return str(family(_arch_override[-1]))
    if device.type != "cuda":
        return "sm_80"
    found = _arch_of(device.index)
    if found is None:
        raise Declined(unserved("", target(device)))
    return found


def wave_of(arch: str) -> int:
    return ARCHITECTURES[arch].wave


def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device. Few under the interpreter, so that small tests loop over rows."""
    if _recording is not None:
        return ARCHITECTURES[arch(device)].processors
    return _processors_of(device.index) if device.type == "cuda" else 3


def overridden() -> bool:
    """Inside use_arch, where launch parameters are not those of a GPU at hand."""
    return bool(_arch_override)


@contextlib.contextmanager
def use_arch(name: str) -> Iterator[None]:
    """Choose launch parameters as on architecture `name` inside the block: for tests and compilation without a GPU."""
    if family(name) is None:
        raise ValueError(f"use_arch: unknown architecture {name!r}, expected one like {', '.join(ARCHITECTURES)}")
    _arch_override.append(name)
    try:
        yield
    finally:
        _arch_override.pop()


# ---- launch ----


@dataclass(frozen=True)
class Launch:
    """One launch as it would have happened: what tools/static_triton.py compiles."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    parameters: dict[str, Any]  # constexprs by name, and num_warps, num_stages


_recording: list[Launch] | None = None
local = threading.local()  # .recorder: what writes down a thread's launches for replay.py
generation = 0  # of the choice of launch parameters: replay.py asks anew after each


def unsettled() -> None:
    """The parameters of the launch to come are for this time only."""
    if (recorder := getattr(local, "recorder", None)) is not None:
        recorder.whole = False


def changed() -> None:
    """Launch parameters may be others from now on."""
    global generation
    generation += 1


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Collect launches instead of doing them, with the launch parameters of `architecture`; tensors may be on "meta"."""
    global _recording
    before, _recording = _recording, []
    try:
        with use_arch(architecture):
            yield _recording
    finally:
        _recording = before


def launch(kernel: Any, grid: Sequence[int], like: Tensor, *args, **parameters) -> None:
    """kernel[grid](*args, **parameters) on like's device and its current stream; nothing for an empty grid.

    parameters: constexprs by name, num_warps, num_stages.
    """
    grid = tuple(grid)
    if 0 in grid:
        return
    parameters["enable_fp_fusion"] = True  # multiply-adds, also where that is not Triton's default
    if _recording is not None:
        _recording.append(Launch(kernel, grid, args, parameters))
    elif INTERPRETED:
        from .interpreter import mend_bfloat16

        mend_bfloat16()
        kernel[grid](*args, **parameters)
    else:
        here = like.device.index == torch.cuda.current_device()
        with contextlib.nullcontext() if here else torch.cuda.device(like.device):
            compiled = kernel[grid](*args, **parameters)
        if (recorder := getattr(local, "recorder", None)) is not None:
            recorder.launched(kernel, compiled, grid, args, parameters)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
