"""GPU kernels in Triton, one file per op: kernels above, the launchers that the dispatcher calls below.

A launcher has the op's name and the schema's arguments. It lives in the CUDA slot (NVIDIA and AMD), and with
TRITON_INTERPRET=1 it serves CPU tensors, so that tests execute the kernels where there is no GPU. Nothing of Triton is
imported before an op's first call.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re

# torch -> the Triton that its CUDA build asks for: the tests know the machine code and the interpreter of each
PAIRS = {"2.10": "3.6.0", "2.11": "3.6.0", "2.12": "3.7.1", "2.13": "3.7.1", "2.14": "3.8.0", "2.15": "3.9.0"}
_minors = sorted(tuple(int(n) for n in version.split(".")[:2]) for version in PAIRS.values())
SUPPORTED = (_minors[0], _minors[-1])
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


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
