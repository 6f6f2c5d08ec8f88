"""The dispatcher is PyTorch's own: one slot per (op, device key). This module only fills, pushes, pops and names slots.

| slot of gpt_kernels::<op>     | filled by                                                            |
|-------------------------------|----------------------------------------------------------------------|
| CompositeExplicitAutograd     | the Python reference: fake tensors, and every slot without a kernel  |
| CPU                           | csrc/cpu/<op>.cpp, when the compiled library is there                |
| CUDA                          | csrc/cuda/<op>.cu when built, else gpt_kernels/triton/<op>.py         |

`use_backend(name)` pushes one backend's kernels over the slots and pops them again; `where(op)` says what is in each.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

NAMESPACE = "gpt_kernels"
BACKENDS = ["reference", "cpu"]  # and those that kernel() has been told of
ISA_LEVELS = ("base", "avx2", "avx512", "avx512_bf16")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass
class _Op:
    reference: Callable
    kernels: dict[str, tuple[str, Callable]] = field(default_factory=dict)  # backend -> (device key, function)
    absent: dict[str, str] = field(default_factory=dict)  # backend -> why it has no kernel
    # backend -> why its kernel leaves the GPU at hand to the reference, None where it doesn't
    declines: dict[str, Callable[[], str | None]] = field(default_factory=dict)
    cuda: str | None = None  # the backend that fills the CUDA slot
    shared: bool = False  # with Triton, which serves large calls


_ops: dict[str, _Op] = {}
_pushed: list[tuple[str, frozenset[str]]] = []  # (backend, ops), innermost last
_pushes: list[tuple[torch.library.Library, list[tuple[str, Callable, str]]]] = []  # the same: what holds them, what they are


def define(schema: str, reference: Callable):
    """Define an op from its schema and fill every slot with its reference; returns the callable op.

    The reference is the specification: it serves fake tensors (so shapes, dtypes and strides of the outputs are
    written once) and any device that has no kernel.
    """
    name = schema.split("(")[0]
    reference = _on_one_device(name, reference)
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _ops[name] = _Op(reference)
    for backend, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        handle = _native_kernel(name, key)
        if handle is not None:
            _ops[name].kernels[backend] = (key, handle)
    if cuda_library is not None:
        _name("cuda")
        if "cuda" in _ops[name].kernels:
            _ops[name].cuda = "cuda"
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _on_one_device(name: str, reference: Callable) -> Callable:
    """A reference beside which torch's own ops may not notice: a tensor without memory that nothing reads, or one of another
    GPU that they copy."""

    @functools.wraps(reference)
    def call(*args):
        devices = {str(a.device) for a in args if isinstance(a, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: all tensors must be on one device, got {' and '.join(sorted(devices))}")
        return reference(*args)

    return call


def kernel(
    op: str, backend: str, key: str, default: bool = False, declines: Callable[[], str | None] = lambda: None
) -> Callable[[Callable], Callable]:
    """Decorator: the function, with the schema's arguments, is `backend`'s kernel of `op` for tensors of device `key`.

    key: "CPU" or "CUDA". use_backend(backend) then runs it; with `default`, it also fills the slot from now on. declines()
    tells where(): why the function itself calls the reference, None where it does not. Raises ValueError for an unknown op
    or key, for the names of the built-in backends, and for a default of the CPU slot.
    """
    _known(op, "kernel")
    if key not in ("CPU", "CUDA"):
        raise ValueError(f"kernel: unknown device key {key!r}, expected CPU or CUDA")
    if backend in ("reference", "cpu", "cuda"):
        raise ValueError(f"kernel: backend {backend!r} is built in")
    if default and key == "CPU":
        raise ValueError("kernel: the CPU slot's default is the C++ kernel")

    def add(function: Callable) -> Callable:
        _ops[op].kernels[backend], _ops[op].declines[backend] = (key, function), declines
        if default:
            _fill(_library, op, _or_reference(op, function), key)
            _ops[op].cuda = backend
        _name(backend)
        return function

    return add


def without_cuda(reason: str) -> None:
    """The CUDA C++ kernels cannot serve this machine's GPUs: each op's slot goes to Triton's kernel, else to the reference."""
    for name, op in _ops.items():
        if op.kernels.pop("cuda", None) is None:
            continue
        op.absent["cuda"] = reason
        key, function = op.kernels.get("triton", ("", op.reference))
        op.cuda, function = ("triton", _or_reference(name, function)) if key == "CUDA" else (None, op.reference)
        _settle(name, function)


def share_with_triton(op: str, choose: Callable[[Callable, Callable], Callable]) -> None:
    """The CUDA slot of op is choose(CUDA C++ kernel, Triton's): either may be the faster, by the call's size. Nothing where one
    of the two is not there."""
    kernels = _ops[op].kernels
    if "cuda" in kernels and kernels.get("triton", ("",))[0] == "CUDA" and not _ops[op].declines["triton"]():
        _ops[op].shared = True
        _settle(op, choose(kernels["cuda"][1], kernels["triton"][1]))


def _settle(op: str, function: Callable) -> None:
    """The CUDA slot's own from now on. torch's first use of a GPU decides it, maybe inside use_backend, which stays above."""
    _fill(_library, op, function, "CUDA")
    for library, slots in _pushes:
        for name, pushed_function, key in slots:
            if (name, key) == (op, "CUDA"):
                _fill(library, name, pushed_function, key)


def _fill(library: torch.library.Library, op: str, function: Callable, key: str) -> None:
    """Over whatever stands in the slot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that a kernel is being overridden: that is the point
        library.impl(op, function, key, allow_override=True)  # which is the default from torch 2.13 on


def _or_reference(op: str, function: Callable) -> Callable:
    """What stands in a GPU's slot unasked: the kernel, and for float64, which no kernel for GPUs has, the reference, as where()
    says. use_backend pushes the kernel alone."""
    reference = _ops[op].reference

    def call(first, *rest):
        return (reference if first.dtype is torch.float64 else function)(first, *rest)

    return call


def explain_absence(op: str, backend: str, reason: str) -> None:
    """Say why `backend` has no kernel of `op` here: for where() and for the error of use_backend()."""
    _known(op, "explain_absence")
    _ops[op].absent[backend] = reason
    _name(backend)


def _known(op: str, function: str) -> None:
    if op not in _ops:
        raise ValueError(f"{function}: unknown op {op!r}, expected one of {', '.join(_ops)}")


def _name(backend: str) -> None:
    if backend not in BACKENDS:
        BACKENDS.append(backend)


def ops() -> list[str]:
    """Names of all ops, in order of definition."""
    return list(_ops)


@contextlib.contextmanager
def use_backend(backend: str, *only: str) -> Iterator[None]:
    """Run `backend`'s kernels ("reference", "cpu", "triton", "cuda") for all ops, or for the ops named, inside the block.

    Slots belong to the process, not to a thread. Raises ValueError for an unknown backend or op, RuntimeError when
    the backend has no kernel for an op that was asked for, or no device: nothing is served by another backend in silence.
    Derivatives other than the first in reverse are the reference's on every backend (ops/__init__.py).
    """
    if backend not in BACKENDS:
        raise ValueError(f"use_backend: unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    unknown = [name for name in only if name not in _ops]
    if unknown:
        raise ValueError(f"use_backend: unknown op {unknown[0]!r}, expected one of {', '.join(_ops)}")
    chosen = only or tuple(_ops)
    slots = [(name, function, key) for name in chosen for key, function in _slots(name, backend)]
    pushed = torch.library.Library(NAMESPACE, "IMPL")
    try:
        for name, function, key in slots:
            _fill(pushed, name, function, key)
        _pushed.append((backend, frozenset(chosen)))
        _pushes.append((pushed, slots))
        try:
            yield
        finally:
            _pushes.pop()
            _pushed.pop()
    finally:
        pushed._destroy()


def _slots(name: str, backend: str) -> list[tuple[str, Callable]]:
    if backend == "reference":
        return [("CPU", _ops[name].reference), ("CUDA", _ops[name].reference)]
    if backend not in _ops[name].kernels:
        raise RuntimeError(f"use_backend: backend {backend!r} has no kernel for {name}: {_absence(name, backend)}")
    key, function = _ops[name].kernels[backend]
    if key == "CUDA" and not torch.cuda.is_available():
        hint = "; TRITON_INTERPRET=1 in the environment runs its kernels on CPU tensors" if backend == "triton" else ""
        raise RuntimeError(f"use_backend: backend {backend!r} needs a GPU and torch sees none{hint}")
    return [(key, function)]


def pushed(op: str) -> str | None:
    """The backend that use_backend() has put in the op's slots, the innermost; None where none has."""
    return next((backend for backend, names in reversed(_pushed) if op in names), None)


def where(op: str) -> dict[str, str]:
    """Which backend serves each device for `op` now, with the reason: {"CPU": "cpu (...)", "CUDA": "reference (...)"}."""
    _known(op, "where")
    answer = {}
    for key, native in (("CPU", "cpu"), ("CUDA", _ops[op].cuda)):
        for backend, names in reversed(_pushed):
            if op in names and key in dict(_slots(op, backend)):
                answer[key] = f"{backend} (pushed by use_backend)"
                break
        else:
            if native not in _ops[op].kernels:
                reasons = (_absence(op, native or "triton"), _ops[op].absent.get("cuda") if key == "CUDA" else None)
                answer[key] = f"reference ({'; '.join(filter(None, reasons))})"
            elif key == "CPU":
                answer[key] = f"cpu (C++ kernel, {isa()})"
            elif native == "cuda":
                large = "; triton for large calls in 16 bits, where it was measured to be faster" * _ops[op].shared
                answer[key] = f"cuda (compiled kernel, {cuda_archs()}; float64: none{large})"
            elif reason := _ops[op].declines.get(native, lambda: None)():
                answer[key] = f"reference ({reason})"
            else:
                instead = f"; not cuda: {_ops[op].absent['cuda']}" if "cuda" in _ops[op].absent else ""
                answer[key] = f"{native} (compiled at its first call for each kind of argument; float64: reference{instead})"
    return answer


def _absence(name: str, backend: str) -> str:
    if backend == "cpu":
        return library_error or f"the compiled library has no {name}"
    if backend == "cuda":
        return _ops[name].absent.get("cuda") or cuda_error or f"the compiled CUDA library has no {name}"
    if backend in _ops[name].kernels:
        return "TRITON_INTERPRET is set: the Triton kernels serve CPU tensors"
    return _ops[name].absent.get(backend, "no kernel was registered")


# ---- the compiled library ----


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


def _load_library() -> tuple[ctypes.CDLL | None, str | None]:
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
    return cuda_library.gpt_kernels_cuda_archs().decode() if cuda_library else None


def _native_kernel(name: str, key: str) -> Callable | None:
    qualified = f"{NAMESPACE}::{name}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
        return None
    # the handle stays valid while other kernels are pushed over the slot
    handle = torch.library.get_kernel(qualified, key)
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda *args: handle.call_boxed(keyset, *args)


def isa() -> str | None:
    """The instruction set that the CPU kernels use now ("base", "avx2", "avx512", "avx512_bf16"); None if not built."""
    return library.gpt_kernels_isa().decode() if library else None


def best_isa() -> str | None:
    """The best instruction set that both this CPU and the compiled kernels have; None if not built."""
    return library.gpt_kernels_best_isa().decode() if library else None


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process; the environment's GPT_KERNELS_ISA does it at import."""
    if library is None:
        raise RuntimeError(f"set_isa: {library_error}")
    status = library.gpt_kernels_set_isa(name.encode())
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


library, library_error = _load_library()
cuda_library, cuda_error = _load_cuda()
if library is not None and os.environ.get("GPT_KERNELS_ISA"):
    set_isa(os.environ["GPT_KERNELS_ISA"])
