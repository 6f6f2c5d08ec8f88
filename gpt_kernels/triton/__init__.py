"""GPU kernels in Triton, one file per op: kernels above, the launchers that the dispatcher calls below.

A launcher has the op's name and the schema's arguments. It lives in the CUDA slot (NVIDIA and AMD), and with
TRITON_INTERPRET=1 it serves CPU tensors, so that tests execute the kernels where there is no GPU. Nothing of Triton is
imported before an op's first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable

import torch

from .. import dispatch

# torch -> the Triton that its CUDA build asks for: the tests know the machine code and the interpreter of each
PAIRS = {"2.10": "3.6.0", "2.11": "3.6.0", "2.12": "3.7.1", "2.13": "3.7.1", "2.14": "3.8.0", "2.15": "3.9.0"}
_minors = sorted(tuple(int(n) for n in version.split(".")[:2]) for version in PAIRS.values())
SUPPORTED = (_minors[0], _minors[-1])
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
OPS: dict[str, str] = {}  # op -> the module here that has its launcher; register() fills it


def version() -> str | None:
    """Triton's version without importing it (it takes a while, and a broken one must not break us); None if not installed."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"^__version__ *= *['\"](.+?)['\"]", pathlib.Path(spec.origin).read_text(), re.M)
    return found[1] if found else None


def absence() -> str | None:
    """Why there are no Triton kernels here; None when there are."""
    found = version()
    if found is None:
        return "Triton is not installed"
    first, last = (".".join(map(str, v)) for v in SUPPORTED)
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if not SUPPORTED[0] <= numbers <= SUPPORTED[1]:
        return f"Triton {found} is outside the supported range {first} to {last}"
    return None


class Declined(RuntimeError):
    """The GPU is one that this launcher has no kernel for."""


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
    return getattr(importlib.import_module(f"{__name__}.{OPS[op]}"), op)


def _served(op: str) -> Callable:
    """The op's launcher, imported at its first call; the reference where it declines, unless use_backend asked for it."""
    found: list[Callable] = []

    def call(*args):
        if not found:
            found.extend((launcher(op), importlib.import_module(f"{__name__}.replay").call))
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
