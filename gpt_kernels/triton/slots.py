"""What Triton puts into the dispatcher's slots: a launcher for every op, imported at its first call."""

from __future__ import annotations

import functools
import importlib
import pathlib
from collections.abc import Callable

import torch

from .. import dispatch
from . import INTERPRETED, Declined, absence

OPS: dict[str, str] = {}  # op -> the module here that has its launcher; register() fills it
_declined: dict[str, str] = {}  # op -> why a call went to the reference


def declined(op: str) -> str | None:
    """Why the reference serves the op's calls on the current GPU; None where Triton's kernel does."""
    if op in _declined or INTERPRETED or not torch.cuda.is_available():
        return _declined.get(op)
    from . import common

    return common.unserved(op, common.target(torch.device("cuda", torch.cuda.current_device())))


def modules() -> dict[str, str]:
    """op -> the module here that has its launcher: the file whose name the op's begins with, the longest there is."""
    files = {file.stem for file in pathlib.Path(__file__).parent.glob("*.py")}
    parts = {op: op.split("_") for op in dispatch.ops()}
    names = {op: ["_".join(words[:n]) for n in range(len(words), 0, -1)] for op, words in parts.items()}
    found = {op: next((name for name in names[op] if name in files), None) for op in names}
    return {op: file for op, file in found.items() if file is not None}


def launcher(op: str) -> Callable:
    """The op's launcher, not by way of the dispatcher: it takes "meta" tensors while launches are recorded."""
    return getattr(importlib.import_module(f"{__package__}.{OPS[op]}"), op)


def _served(op: str) -> Callable:
    """The op's launcher, imported at its first call; the reference where it declines, unless use_backend asked for it."""
    found: list[Callable] = []

    def call(*args):
        if not found:
            found.extend((launcher(op), importlib.import_module(f"{__package__}.replay").call))
        try:
            return found[0](*args) if INTERPRETED else found[1](op, found[0], args)
        except Declined as reason:
            if dispatch.pushed(op) == "triton":
                raise RuntimeError(f"{op}: the Triton kernels cannot serve it: {reason}") from reason
            _declined[op] = str(reason)
        return dispatch.reference(op)(*args)

    return call


def register() -> None:
    """Tell the dispatcher: the backend "triton" for every op, and the CUDA slots unless the kernels are interpreted."""
    reason = absence()
    OPS.update(modules())
    for op in OPS:
        if reason is not None:
            dispatch.explain_absence(op, "triton", reason)
        else:
            # where the library has the op in CUDA C++, that is what the slot keeps
            default = not INTERPRETED and dispatch.kernel_of(op, "cuda") is None
            why = functools.partial(declined, op)
            dispatch.kernel(op, "triton", "CPU" if INTERPRETED else "CUDA", default, why)(_served(op))
