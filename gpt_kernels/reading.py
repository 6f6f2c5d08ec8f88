"""What a module's forward reads, seen in its bytecode: attributes, constants, globals, whether it branches by shapes. And the
same forward over other globals.

All of it is a property of code, not of a call: structure.py asks it once per class.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# names whose presence beside a branch or a loop may make a result depend on its input's shape
_SHAPES = frozenset(("shape", "size", "ndim", "dim", "numel", "len", "nelement", "stride", "is_contiguous"))
_WRITES = frozenset(("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR"))
_SCALARS = (int, float, bool, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Reading:
    """Of a forward with the methods of its class and the functions of its library that it calls."""

    names: frozenset[str]  # attributes and globals
    floats: tuple[float, ...]  # constants and defaults, in order
    functions: tuple[tuple[str, Callable], ...]  # the class's own methods that it calls
    codes: tuple[types.CodeType, ...]
    by_shape: bool  # may it take another way for another shape?
    writes: bool  # does it write globals, or attributes of anything?


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """code and all that is defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)


def unwrapped(function: Any) -> types.FunctionType | None:
    """The function in Python under decorators that used functools.wraps; None where there is none."""
    for _ in range(16):
        if not isinstance(function, types.FunctionType):
            return None
        if not hasattr(function, "__wrapped__"):
            return function
        function = function.__wrapped__
    return None


@functools.cache
def reading(cls: type, forward: Any) -> Reading | None:
    """Of `forward`, which is cls.forward or one that was; None where it is not written in Python."""
    first = unwrapped(forward)
    if first is None:
        return None
    library = first.__module__.split(".")[0]
    names: set[str] = set()
    floats: list[float] = []
    methods: dict[str, Callable] = {}
    codes: list[types.CodeType] = []
    pending, seen = [first], {first}
    while pending:
        function = pending.pop(0)
        floats += [d for d in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()) if type(d) is float]
        here = list(codes_of(function.__code__))
        codes += here
        for code in here:
            names |= set(code.co_names)
            floats += [c for c in code.co_consts if type(c) is float]
        for name in sorted(set().union(*(code.co_names for code in here))):
            method = getattr(cls, name, None) if not hasattr(nn.Module, name) else None
            method = method.fget if isinstance(method, property) else method
            called = unwrapped(method)
            if called is not None:
                methods[name] = getattr(cls, name)
            else:
                called = unwrapped(function.__globals__.get(name))
                if called is not None and (called.__module__ or "").split(".")[0] != library:
                    called = None
            if called is not None and called not in seen:
                seen.add(called)
                pending.append(called)
    operations = {i.opname for code in codes for i in dis.get_instructions(code)}
    by_shape = any(o.startswith(("POP_JUMP", "FOR_ITER")) for o in operations) and not _SHAPES.isdisjoint(names)
    writes = not _WRITES.isdisjoint(operations)
    return Reading(frozenset(names), tuple(dict.fromkeys(floats)), tuple(methods.items()), tuple(codes), by_shape, writes)


# ---- attributes ----


def described(value: Any) -> Any:
    """What can be compared with what it is later: scalars, functions, partials and a module's own methods; NotImplemented for
    all else."""
    if isinstance(value, _SCALARS) or isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return value
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, tuple(value.keywords.items()))
        return (
            parts
            if all(described(p) is not NotImplemented for p in (*value.args, *value.keywords.values()))
            else NotImplemented
        )
    if isinstance(value, types.MethodType):
        return value.__func__
    if isinstance(value, tuple | list):
        return tuple(value) if all(isinstance(v, _SCALARS) for v in value) else NotImplemented
    return NotImplemented


def attributes(module: nn.Module, read: Reading) -> tuple[tuple[str, Any], ...] | str:
    """((name or "object.name", what it is now), ...) of what a forward reads of the module itself and of plain objects in it,
    such as a config; or the name of an attribute that cannot be compared later."""
    found: list[tuple[str, Any]] = []
    for name in sorted(read.names):
        if name in module._parameters or name in module._buffers or name in module._modules or name == "training":
            continue
        if hasattr(nn.Module, name):
            continue
        if name not in module.__dict__ and (not hasattr(type(module), name) or name in dict(read.functions)):
            continue
        try:
            value = getattr(module, name)
        except Exception:  # a property that has its own conditions
            return name
        what = described(value)
        if what is not NotImplemented:
            found.append((name, what))
        elif isinstance(value, torch.Tensor | dict | list | set):
            return name
        else:
            for inner in sorted(read.names):
                what = described(getattr(value, inner, NotImplemented)) if inner != name else NotImplemented
                if what is not NotImplemented and not callable(what):
                    found.append((f"{name}.{inner}", what))
    return tuple(found)


def attribute(module: Any, path: str) -> Any:
    """module.a or module.a.b."""
    name, _, inner = path.partition(".")
    value = getattr(module, name)
    return getattr(value, inner) if inner else value


def unchanged(module: Any, known: tuple[tuple[str, Any], ...]) -> bool:
    """Are these attributes what they were?"""
    for path, what in known:
        value = attribute(module, path)
        if value is not what and described(value) != what:
            return False
    return True


# ---- the same code over other globals ----


def _globals_named(function: types.FunctionType, *operations: str) -> set[str]:
    found = (i for code in codes_of(function.__code__) for i in dis.get_instructions(code))
    return {i.argval for i in found if i.opname in operations}


def globals_read(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function's code names, with what they are now."""
    return {n: function.__globals__[n] for n in sorted(_globals_named(function, "LOAD_GLOBAL")) if n in function.__globals__}


def _keeps_to_its_globals(function: types.FunctionType) -> bool:
    """Does it write none, and are all that it reads there by now?"""
    scope = function.__globals__
    builtin = scope["__builtins__"]
    builtin = builtin if isinstance(builtin, dict) else vars(builtin)
    there = all(n in scope or n in builtin for n in _globals_named(function, "LOAD_GLOBAL"))
    return there and not _globals_named(function, "STORE_GLOBAL", "DELETE_GLOBAL")


def dotted(function: types.FunctionType) -> set[tuple[str, ...]]:
    """The globals that a function's code names, each with the attributes read of it at once: ("torch", "nn", "GELU")."""
    found: set[tuple[str, ...]] = set()
    for code in codes_of(function.__code__):
        chain: tuple[str, ...] = ()
        for i in dis.get_instructions(code):
            if i.opname == "LOAD_GLOBAL":
                found.add(chain)
                chain = (i.argval,)
            elif chain and i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                chain += (i.argval,)
            elif i.opname not in ("EXTENDED_ARG", "CACHE", "PUSH_NULL"):
                found.add(chain)
                chain = ()
    return found - {()}


def methods(cls: type) -> dict[str, types.FunctionType]:
    """The methods in Python that a module's class has from its own library: forward among them, if it is there, and what was
    written beside it (training_step, _attn)."""
    library = cls.__module__.split(".")[0]
    found: dict[str, types.FunctionType] = {}
    for base in cls.__mro__:
        # transformers' base classes generate, save and load
        near = base.__module__ == cls.__module__ if library == "transformers" else base.__module__.split(".")[0] == library
        for name, value in vars(base).items() if near and issubclass(base, nn.Module) else ():
            if isinstance(value, types.FunctionType) and not name.startswith("__"):
                found.setdefault(name, value)
    return {name: method for name, method in found.items() if getattr(cls, name) is method}


def rebuilt(function: types.FunctionType, replaced: Mapping[str, Any]) -> types.FunctionType | None:
    """`function` with other objects under these global names, decorators and all; None where a decorator hides it, or it writes
    a global, or reads one that is not there yet.

    Its globals are those that it reads, as they are now: whoever changes one later does not change this function.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        if not _keeps_to_its_globals(function):
            return None
        # without __name__, from which the compiler would look the globals up in the module that has the name
        scope = {"__builtins__": function.__globals__["__builtins__"], **globals_read(function), **replaced}
        made = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
        made.__kwdefaults__ = function.__kwdefaults__
    else:
        # a decorator calls what it wraps through a cell of its closure
        held = [cell for cell in function.__closure__ or () if _content(cell) is inner]
        if len(held) != 1 or not isinstance(inner, types.FunctionType):
            return None
        again = rebuilt(inner, replaced)
        if again is None:
            return None
        closure = tuple(types.CellType(again) if cell is held[0] else cell for cell in function.__closure__ or ())
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
        made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function, updated=())
    return made


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
