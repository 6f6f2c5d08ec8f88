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
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from . import library

NAMESPACE = "gpt_kernels"
BACKENDS = ["reference", "cpu"]  # and those that kernel() has been told of

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Served(NamedTuple):
    """What serves an op on a device, and why it does."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


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
in_aten: dict[str, tuple[str, ...]] = {}  # by family: ATen's slots that accelerate() has filled
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
    if library.cuda is not None:
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
    for pushed_library, slots in _pushes:
        for name, pushed_function, key in slots:
            if (name, key) == (op, "CUDA"):
                _fill(pushed_library, name, pushed_function, key)


def _fill(into: torch.library.Library, op: str, function: Callable, key: str) -> None:
    """Over whatever stands in the slot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that a kernel is being overridden: that is the point
        into.impl(op, function, key, allow_override=True)  # which is the default from torch 2.13 on


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


def reference(op: str) -> Callable:
    """The op in plain PyTorch, whatever is in its slots."""
    _known(op, "reference")
    return _ops[op].reference


def kernel_of(op: str, backend: str) -> Callable | None:
    """The backend's kernel of op, whatever is in its slots; None where it has none."""
    _known(op, "kernel_of")
    return _ops[op].kernels.get(backend, ("", None))[1]


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


def where(op: str) -> dict[str, Served]:
    """Which backend serves each device for `op` now, and why: {"CPU": Served("cpu", "C++ kernel, avx2"), "CUDA": ...}."""
    _known(op, "where")
    answer = {}
    for key, native in (("CPU", "cpu"), ("CUDA", _ops[op].cuda)):
        for backend, names in reversed(_pushed):
            if op in names and key in dict(_slots(op, backend)):
                answer[key] = Served(backend, "pushed by use_backend")
                break
        else:
            if native not in _ops[op].kernels:
                reasons = (_absence(op, native or "triton"), _ops[op].absent.get("cuda") if key == "CUDA" else None)
                answer[key] = Served("reference", "; ".join(filter(None, reasons)))
            elif key == "CPU":
                answer[key] = Served("cpu", f"C++ kernel, {library.isa()}")
            elif native == "cuda":
                large = "; triton for large calls in 16 bits, where it was measured to be faster" * _ops[op].shared
                answer[key] = Served("cuda", f"compiled kernel, {library.cuda_archs()}; float64: none{large}")
            elif reason := _ops[op].declines.get(native, lambda: None)():
                answer[key] = Served("reference", reason)
            else:
                instead = f"; not cuda: {_ops[op].absent['cuda']}" if "cuda" in _ops[op].absent else ""
                what = f"compiled at its first call for each kind of argument; float64: reference{instead}"
                answer[key] = Served(str(native), what)
    slots = next((slots for family, slots in in_aten.items() if op.startswith(f"{family}_")), None)
    if slots:
        told = f"; in ATen's slots, process-wide: {', '.join(slots)}"
        answer = {key: s._replace(reason=s.reason + told) for key, s in answer.items()}
    return answer


def _absence(name: str, backend: str) -> str:
    if backend == "cpu":
        return library.cpu_error or f"the compiled library has no {name}"
    if backend == "cuda":
        return _ops[name].absent.get("cuda") or library.cuda_error or f"the compiled CUDA library has no {name}"
    if backend in _ops[name].kernels:
        return "TRITON_INTERPRET is set: the Triton kernels serve CPU tensors"
    return _ops[name].absent.get(backend, "no kernel was registered")


def _native_kernel(name: str, key: str) -> Callable | None:
    qualified = f"{NAMESPACE}::{name}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
        return None
    # the handle stays valid while other kernels are pushed over the slot
    handle = torch.library.get_kernel(qualified, key)
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda *args: handle.call_boxed(keyset, *args)
