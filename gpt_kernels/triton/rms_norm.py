"""rms_norm: the launchers. Kernels: norm.py."""

from __future__ import annotations

from torch import Tensor

from .common import check_rows
from .norm import backward, forward


def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    check_rows("rms_norm_fwd", "x", x)
    y, _, rstd = forward("rms_norm_fwd", x, weight, None, eps)
    return y, rstd


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    check_rows("rms_norm_bwd", "x", x)
    dx, dweight, _ = backward("rms_norm_bwd", dy, x, weight, None, rstd, False)
    return dx, dweight
