"""layer_norm: the launchers. Kernels: norm.py."""

from __future__ import annotations

from torch import Tensor

from .common import check_rows
from .norm import backward, forward


def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    check_rows("layer_norm_fwd", "x", x)
    return forward("layer_norm_fwd", x, weight, bias, eps)


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows("layer_norm_bwd", "x", x)
    return backward("layer_norm_bwd", dy, x, weight, mean, rstd, has_bias)
