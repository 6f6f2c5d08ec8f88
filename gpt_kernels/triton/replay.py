"""A launcher's second call of a kind costs a look-up, its allocations and Triton's compiled launchers.

What a launcher does depends on the shapes, strides, dtypes, devices and alignment of its tensors and on its options: it reads
no data. So what its first call of a kind allocates and launches is written down as a function, and the next call of that kind,
whose key is the same, runs that instead of the checks, the choice of parameters and Triton's own specialisation of arguments.
A kind that does anything else is left to the launcher, and so is every call while somebody watches or changes launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import common, tuning

KINDS = 1024  # that are remembered
ALLOCATIONS = {  # of zeros or not
    torch.ops.aten.new_empty.default: False,
    torch.ops.aten.empty_like.default: False,
    torch.ops.aten.empty_strided.default: False,
    torch.ops.aten.empty.memory_format: False,
    torch.ops.aten.new_zeros.default: True,
}
_SMALL = 2**31 - 1  # bytes of a storage for which Triton compiles 32-bit offsets on AMD's GPUs

_replays: dict[tuple, Callable[..., Any] | None] = {}  # None: a kind that does more


def forget() -> None:
    _replays.clear()


class _Described:
    """A tensor descriptor, which Triton encodes at every launch."""

    __slots__ = ("base", "shape", "strides", "block_shape", "padding", "round_f32_to_tf32")

    def __init__(self, base, shape, strides, block_shape, padding, rounds):
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape
        self.padding, self.round_f32_to_tf32 = padding, rounds


class _Unknown(Exception):
    """What cannot be written down."""


class _Recorder(TorchDispatchMode):
    def __init__(self, given: list[Tensor | None]):
        super().__init__()
        self.whole, self.kept = True, [*given]  # kept: an id is an object's own as long as that lives
        self.at: dict[int, tuple[str, int]] = {}  # tensor -> (name, bytes from its beginning)
        self.base: dict[str, int] = {}
        self.made: dict[str, tuple[int, Tensor]] = {}  # name -> (its line, tensor)
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {"empty": torch.empty_strided, "zeros": torch.zeros, "described": _Described}
        for i, t in enumerate(given):
            if t is not None:
                self._name(t, f"a{i}")

    def _name(self, t: Tensor, name: str) -> None:
        self.at[id(t)], self.base[name] = (name, 0), t.data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in ALLOCATIONS:
            name = f"t{len(self.kept)}"
            self._name(result, name)
            self.made[name] = len(self.lines), result
            self.lines += [self.allocation(name, result, ALLOCATIONS[function]), f"p_{name} = {name}.data_ptr()"]
            self.whole &= not ALLOCATIONS[function] or result.is_contiguous()
        elif function.is_view and id(args[0]) in self.at:
            for t in result if isinstance(result, (tuple, list)) else [result]:
                name, _ = self.at[id(args[0])]
                self.at[id(t)] = name, t.data_ptr() - self.base[name]
        else:
            self.whole = False
        self.kept += result if isinstance(result, (tuple, list)) else [result]
        return result

    def allocation(self, name: str, t: Tensor, zeros: bool = False) -> str:
        options = f"dtype={self.constant(t.dtype)}, device={self.constant(t.device)}"
        size, stride = self.constant(tuple(t.shape)), self.constant(t.stride())
        return f"{name} = zeros({size}, {options})" if zeros else f"{name} = empty({size}, {stride}, {options})"

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def written(self, value: Any) -> str:
        """An expression for a kernel's argument: of a tensor its address."""
        if isinstance(value, Tensor):
            if id(value) not in self.at:
                raise _Unknown
            name, offset = self.at[id(value)]
            return f"p_{name} + {offset}" if offset else f"p_{name}"
        if isinstance(value, TensorDescriptor):
            name, offset = self.at.get(id(value.base), ("", 1))
            if offset:
                raise _Unknown
            rest = (value.shape, value.strides, value.block_shape, value.padding, getattr(value, "round_f32_to_tf32", False))
            return f"described({name}, {', '.join(map(self.constant, rest))})"
        if isinstance(value, tuple) and _has_tensor(value):
            return f"({', '.join(map(self.written, value))},)"
        return self.constant(value)

    def launched(self, kernel, compiled, grid, args, parameters) -> None:
        try:
            values = dict(zip(kernel.arg_names, args, strict=False)) | parameters
            written = ", ".join(self.written(values[name]) for name in kernel.arg_names)
        except (_Unknown, KeyError):
            self.whole = False
            return
        run, function, metadata = map(self.constant, (compiled.run, compiled.function, compiled.packed_metadata))
        x, y, z = (*grid, 1, 1)[:3]
        self.lines += [f"{run}({x}, {y}, {z}, stream, {function}, {metadata}, None, None, None, {written})"]

    def function(self, result: Any, given: list[Tensor | None]) -> Callable[..., Any] | None:
        """replay(stream, *args), if all that was done can be."""
        results = result if isinstance(result, tuple) else () if result is None else (result,)
        names = [self.at.get(id(t), ("", 0))[0] for t in results]
        if not self.whole or any(name not in self.made for name in names) or len({*names}) < len(names):
            return None
        for name, t in zip(names, results, strict=True):
            line, made = self.made[name]
            if t is not made:  # all of it in another order of dimensions: then it is made in that
                if "= zeros" in self.lines[line] or t.numel() != made.numel() or self.at[id(t)][1]:
                    return None
                self.lines[line] = self.allocation(name, t)
        answer = f"{', '.join(names)}{',' * isinstance(result, tuple)}" if results else "None"
        pointers = [f"p_a{i} = a{i}.data_ptr()" for i, t in enumerate(given) if t is not None]
        lines = [
            f"def replay(stream, {', '.join(f'a{i}' for i in range(len(given)))}):",
            *pointers,
            *self.lines,
            f"return {answer}",
        ]
        exec("\n    ".join(lines), self.constants)  # noqa: S102, of names and numbers of ours
        return self.constants["replay"]


def _has_tensor(value: tuple) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, tuple) and _has_tensor(v)) for v in value)


def _key(op: str, args: tuple) -> tuple:
    """All that a launcher and Triton look at."""
    key: list[Any] = [op, common.generation]
    for a in args:
        if isinstance(a, Tensor):
            key += (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() % 16)
            if torch.version.hip:
                key.append(a.untyped_storage().nbytes() <= _SMALL)
        else:
            key.append(a)
    if op.startswith("attention") and args[0].dtype == torch.float32:
        key.append(torch.backends.cuda.matmul.fp32_precision)
    return tuple(key)


_runtime, _compilation = triton.knobs.runtime, triton.knobs.compilation


def _calls(hook: Any) -> Any:
    return getattr(hook, "calls", hook)


def _watched() -> bool:
    """Somebody wants to see or to change launches: Triton's profilers and hooks, a measurement, a recording."""
    return bool(
        tuning.measuring()
        or common.overridden()
        or _calls(_runtime.launch_enter_hook)
        or _calls(_runtime.launch_exit_hook)
        or _runtime.add_stages_inspection_hook
        or "instrumentation_mode" in _compilation.__dict__
    )


def call(op: str, launcher: Callable[..., Any], args: tuple) -> Any:
    """launcher(*args), or what its first call of this kind did."""
    if _watched():
        return launcher(*args)
    key = _key(op, args)
    replay = _replays.get(key)
    if replay is not None:
        device = args[0].device
        index = device.index
        if index == torch.cuda.current_device():
            return replay(driver.active.get_current_stream(index), *args)
        with torch.cuda.device(device):
            return replay(driver.active.get_current_stream(index), *args)
    if key in _replays:
        return launcher(*args)
    return _first(key, launcher, args)


def _first(key: tuple, launcher: Callable[..., Any], args: tuple) -> Any:
    # an object for each argument, also where one tensor is given twice
    aliases = [a.detach() if isinstance(a, Tensor) else a for a in args]
    given = [a if isinstance(a, Tensor) else None for a in aliases]
    recorder = _Recorder(given)
    before, common.local.recorder = getattr(common.local, "recorder", None), recorder
    try:
        with recorder:
            result = launcher(*aliases)
    finally:
        common.local.recorder = before
    if len(_replays) >= KINDS:
        forget()
    _replays[key] = recorder.function(result, given)
    return result
