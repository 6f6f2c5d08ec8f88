"""A module's own code over functions of ours: what stands in its forward as a global name (a rotary embedding, a table of
attention functions) is replaced there, and nowhere else.

The forward is rebuilt from the class's own code with other globals (reading.rebuilt). It serves only while those of the module
are still what they were: a function that somebody puts in their place later is theirs to run.

What a name may be replaced by is said by finders: finder(name, value, module) -> Substitute, a reason not to, or None. Families
add theirs (integrations/).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .reading import globals_read, rebuilt, unwrapped


@dataclass(frozen=True)
class Substitute:
    """What is put in the place of a global: `make`(its value) gives ours. Picklable: make is a module's function."""

    make: Callable[[Any], Any]
    op: str
    why: str


@dataclass(frozen=True)
class Substituted:
    build: Callable[..., Any]
    args: tuple
    ops: tuple[str, ...]
    why: str


substitutes: list[Callable[[str, Any, nn.Module], Substitute | str | None]] = []


def substituted(module: nn.Module, cls: type) -> Substituted | str | None:
    """The substitutes for what the forward of `cls` names, a reason why there is none, or None where nothing is to be."""
    inner = unwrapped(cls.forward)
    if inner is None:
        return None
    found: list[tuple[str, Substitute]] = []
    reason = None
    for name, value in globals_read(inner).items():
        for finder in substitutes:
            answer = finder(name, value, module)
            if isinstance(answer, str):
                reason = answer
            elif answer is not None:
                found.append((name, answer))
                break
    if not found:
        return reason
    if rebuilt(cls.forward, {}) is None:
        return "its forward is under a decorator that hides it"
    ops = tuple(dict.fromkeys(one.op for _, one in found))
    why = ", ".join(dict.fromkeys(one.why for _, one in found)) + (f"; {reason}" if reason else "")
    return Substituted(build, tuple((name, one.make) for name, one in found), ops, why)


def build(base: Any, *replaced: tuple[str, Callable[[Any], Any]]) -> tuple[Callable[..., Any], Callable[..., bool]]:
    """(forward, serves) over base's own forward. Raises TypeError where it cannot be rebuilt."""
    inner = unwrapped(base.forward)
    assert inner is not None
    read = globals_read(inner)
    forward = rebuilt(base.forward, {name: make(read[name]) for name, make in replaced})
    if forward is None:
        raise TypeError(f"the forward of {base.__qualname__} is under a decorator that hides it")
    scope, known = inner.__globals__, tuple(read.items())

    def serves(self: Any, *args: Any, **kwargs: Any) -> bool:
        for name, value in known:
            if scope.get(name) is not value:
                return False
        return True

    return forward, serves
