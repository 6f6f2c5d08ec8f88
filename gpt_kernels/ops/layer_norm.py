"""Layer norm over the last dimension.

    y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps),   var without Bessel's correction

x, y: (..., N) in float32, bfloat16, float16 or float64. weight, bias: (N,) in x's dtype or in float32 beside a 16-bit x;
both optional. mean, rstd: (rows,) in float32 (float64 for float64). Source: Ba, Kiros, Hinton, arXiv 1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import define
from .common import TRANSFORMED, derivative_of, rederived, rows_of, stat_dtype, unit_of


def _statistics(x, eps):
    xf = rows_of(x).to(stat_dtype(x.dtype))  # (M, N)
    unit = unit_of(xf)  # (M, 1)
    var, mean = torch.var_mean(xf * unit, 1, correction=0, keepdim=True)
    return xf, (mean / unit)[:, 0], (unit / (var + eps * unit**2).sqrt())[:, 0]


def reference_fwd(x, weight, bias, eps):
    xf, mean, rstd = _statistics(x, eps)
    y = (xf - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(x.shape), mean, rstd


def reference_bwd(dy, x, weight, mean, rstd, has_bias):
    dyf, xf = rows_of(dy).to(mean.dtype), rows_of(x).to(mean.dtype)
    x_hat = (xf - mean[:, None]) * rstd[:, None]
    g = dyf if weight is None else dyf * weight  # (M, N)
    dx = (g - g.mean(1, keepdim=True) - x_hat * (g * x_hat).mean(1, keepdim=True)) * rstd[:, None]
    param = x if weight is None else weight
    dweight = param.new_empty(0) if weight is None else (dyf * x_hat).sum(0).to(param.dtype)
    dbias = dyf.sum(0).to(param.dtype) if has_bias else param.new_empty(0)
    return dx.to(x.dtype).reshape(x.shape), dweight, dbias


fwd = define(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)", reference_fwd
)
bwd = define(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference_bwd,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.options = bias is not None, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        has_bias, eps = ctx.options
        if rederived(dy):
            _, mean, rstd = _statistics(x, eps)
            dx, dweight, dbias = reference_bwd(dy, x, weight, mean, rstd, has_bias)
        else:
            dx, dweight, dbias = bwd(dy.contiguous(), x, weight, mean, rstd, has_bias)
        return dx, None if weight is None else dweight, dbias if has_bias else None, None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last dimension, as torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps).

    x: (..., N), any strides (made contiguous). weight, bias: (N,). Returns y like x, contiguous. The CPU kernel raises
    RuntimeError for a weight or bias of another length, dtype or device, and for a negative eps.
    """
    x = x.contiguous()
    derivative = derivative_of(x, weight, bias)
    if derivative == TRANSFORMED:
        return reference_fwd(x, weight, bias, eps)[0]
    if derivative:
        return _LayerNorm.apply(x, weight, bias, eps)
    return fwd(x, weight, bias, eps)[0]


def layer_norm_cost(x: Tensor, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops): forward reads x and writes y; backward reads dy and x and writes dx."""
    n = x.numel()
    return (3 if backward else 2) * n * x.element_size(), (13 if backward else 8) * n
