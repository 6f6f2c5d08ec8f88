"""Measure the Triton kernels' launch parameters on this GPU and keep the winners."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import option
from ..names import DTYPES, families


def _sizes() -> tuple[str, ...]:
    from ..cases import SIZES

    return (*SIZES, "all")


@dataclass
class Settings:
    op: str | None = option(None, "this op alone", choices=families)
    dtype: str | None = option(None, "this dtype alone", choices=DTYPES)
    sizes: str = option("gpt2", "of the model whose training step is tuned", choices=_sizes)


def run(settings: Settings) -> int:
    from ..triton.tune import tune

    return tune(settings.op, settings.dtype, settings.sizes)
