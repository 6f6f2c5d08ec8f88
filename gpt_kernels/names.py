"""The names that arguments, targets and tests choose from, without torch."""

from __future__ import annotations

_FAMILIES = ("attention", "cross_entropy", "dropout", "gelu", "layer_norm", "rms_norm", "softmax")
DTYPES = ("float32", "bfloat16", "float16")  # that a GPU's kernels take


def families() -> tuple[str, ...]:
    """The ops, as files and public functions are called: each has a forward and a backward."""
    return _FAMILIES
