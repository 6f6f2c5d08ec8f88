"""The names that arguments, targets and tests choose from, without torch."""

from __future__ import annotations

import functools
import pathlib

DTYPES = ("float32", "bfloat16", "float16")  # that a GPU's kernels take


@functools.cache
def families() -> tuple[str, ...]:
    """The ops, as files and public functions are called: each has a forward and a backward, and its calls in cases/."""
    files = pathlib.Path(__file__).with_name("cases").glob("[!_]*.py")
    return tuple(sorted(file.stem for file in files))


def family(op: str) -> str:
    """That of a kernel: "cross_entropy" of cross_entropy_bwd_out. Raises ValueError where it is of none."""
    found = [name for name in families() if op.startswith(f"{name}_")]
    if not found:
        raise ValueError(f"family: {op!r} is of no op, expected one of {', '.join(families())} and _fwd or _bwd")
    return max(found, key=len)
