"""Layer norm over the last dimension.

    y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps),   var without Bessel's correction

x, y: (..., N) in float32, bfloat16, float16 or float64. weight, bias: (N,) in x's dtype or in float32 beside a 16-bit x;
both optional. mean, rstd: (rows,) in float32 (float64 for float64). Source: Ba, Kiros, Hinton, arXiv 1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import sharding
from ..dispatch import define
from .calls import (
    all_contiguous,
    autocast_dtype,
    cast,
    check_tensors,
    contiguous,
    handle_torch_function,
    has_torch_function_variadic,
    in_any_autocast,
    is_grad_enabled,
    last_as_one,
    one_input,
)
from .common import TRANSFORMED, derivative_of, rederived, rows_of, stat_dtype, transforms_active, unit_of

__all__ = ["layer_norm"]  # the public functions


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


def _general(x, weight, bias, eps, more, normalized_shape, input):
    """layer_norm in every form of call."""
    if has_torch_function_variadic(x, weight, bias, input):
        return handle_torch_function(
            layer_norm, (x, weight, bias, input), x, weight, bias, eps, *more, normalized_shape=normalized_shape, input=input
        )
    if isinstance(weight, (tuple, list)) and normalized_shape is None and len(more) < 2:
        normalized_shape, weight = weight, None
        if more or eps is None or isinstance(eps, Tensor):
            weight, bias, eps, more = bias, eps, more[0] if more else 1e-5, ()
        elif bias is not None:  # by place it would be the weight, by name the bias: nobody can tell
            raise TypeError("layer_norm: after normalized_shape, give weight and bias both by place, or all three by name")
    if more:
        raise TypeError("layer_norm: expected x, weight, bias, eps or x, normalized_shape, weight, bias, eps")
    x = one_input("layer_norm", x, input)
    check_tensors("layer_norm", weight=weight, bias=bias)
    x, weight, bias = cast(autocast_dtype("layer_norm", x), x, weight, bias)
    shape = x.shape
    if normalized_shape is not None:
        x, weight, bias = last_as_one("layer_norm", x, normalized_shape, weight, bias)
    if sharding.spread(x, weight, bias):
        return sharding.rows("layer_norm", lambda x, w, b: layer_norm(x, w, b, eps), x, weight, bias).reshape(shape)
    x, weight, bias = contiguous(x, weight, bias)
    derivative = derivative_of(x, weight, bias)
    if derivative == TRANSFORMED:
        y = reference_fwd(x, weight, bias, eps)[0]
    else:
        y = _LayerNorm.apply(x, weight, bias, eps) if derivative else fwd(x, weight, bias, eps)[0]
    return y.reshape(shape)


def layer_norm(
    x: Tensor = None,  # type: ignore[assignment]
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *more,
    normalized_shape: Sequence[int] | None = None,
    input: Tensor | None = None,
) -> Tensor:
    """Layer norm over the last dimension, as torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps).

    x (also by torch's name, `input`): (..., N), any strides. weight, bias: (N,). normalized_shape: more than one last
    dimension, by name or, as in torch, as second argument, with weight, bias and eps moved back by one. Under autocast on a
    GPU the result is float32, as torch's. Returns y like x, contiguous. Raises RuntimeError for a weight or bias of another
    shape, dtype or device, and for a negative eps; TypeError where weight and bias could be taken for each other.
    """
    if (
        type(x) is not Tensor
        or (weight is not None and not isinstance(weight, Tensor))
        or more
        or normalized_shape is not None
        or input is not None
        or has_torch_function_variadic(x, weight, bias)
        or transforms_active()
        or forward_ad._current_level >= 0
        or (not x.is_cpu and in_any_autocast())
    ):
        return _general(x, weight, bias, eps, more, normalized_shape, input)
    x = x.contiguous()
    try:
        if is_grad_enabled() and (
            x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
        ):
            return _LayerNorm.apply(x, weight, bias, eps)
        return fwd(x, weight, bias, eps)[0]
    except RuntimeError:
        if all_contiguous(weight, bias):
            raise
        return _general(x, weight, bias, eps, more, normalized_shape, input)


def layer_norm_cost(x: Tensor, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops): forward reads x and writes y; backward reads dy and x and writes dx."""
    n = x.numel()
    return (3 if backward else 2) * n * x.element_size(), (13 if backward else 8) * n
