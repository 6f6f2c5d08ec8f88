"""RMS norm over the last dimension.

    y = x * rstd * weight,   rstd = 1 / sqrt(mean(x^2) + eps)

x, y: (..., N) in float32, bfloat16, float16 or float64. weight: (N,) in x's dtype or in float32 beside a 16-bit x; optional.
rstd: (rows,) in float32 (float64 for float64). Source: Zhang, Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import define
from .common import TRANSFORMED, derivative_of, rederived, rows_of, stat_dtype, unit_of


def _statistics(x, eps):
    xf = rows_of(x).to(stat_dtype(x.dtype))  # (M, N)
    unit = unit_of(xf)  # (M, 1)
    return xf, (unit / ((xf * unit).square().mean(1, keepdim=True) + eps * unit**2).sqrt())[:, 0]


def reference_fwd(x, weight, eps):
    xf, rstd = _statistics(x, eps)
    y = xf * rstd[:, None]
    if weight is not None:
        y = y * weight
    return y.to(x.dtype).reshape(x.shape), rstd


def reference_bwd(dy, x, weight, rstd):
    dyf, x_hat = rows_of(dy).to(rstd.dtype), rows_of(x).to(rstd.dtype) * rstd[:, None]
    g = dyf if weight is None else dyf * weight  # (M, N)
    dx = (g - x_hat * (g * x_hat).mean(1, keepdim=True)) * rstd[:, None]
    dweight = x.new_empty(0) if weight is None else (dyf * x_hat).sum(0).to(weight.dtype)
    return dx.to(x.dtype).reshape(x.shape), dweight


fwd = define("rms_norm_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)", reference_fwd)
bwd = define("rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor dx, Tensor dweight)", reference_bwd)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        if rederived(dy):
            dx, dweight = reference_bwd(dy, x, weight, _statistics(x, ctx.eps)[1])
        else:
            dx, dweight = bwd(dy.contiguous(), x, weight, rstd)
        return dx, None if weight is None else dweight, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMS norm over the last dimension, as torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps).

    x: (..., N), any strides (made contiguous). weight: (N,). Returns y like x, contiguous. The CPU kernel raises
    RuntimeError for a weight of another length, dtype or device, and for a negative eps.
    """
    x = x.contiguous()
    derivative = derivative_of(x, weight)
    if derivative == TRANSFORMED:
        return reference_fwd(x, weight, eps)[0]
    if derivative:
        return _RMSNorm.apply(x, weight, eps)
    return fwd(x, weight, eps)[0]


def rms_norm_cost(x: Tensor, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops): forward reads x and writes y; backward reads dy and x and writes dx."""
    n = x.numel()
    return (3 if backward else 2) * n * x.element_size(), (10 if backward else 4) * n
