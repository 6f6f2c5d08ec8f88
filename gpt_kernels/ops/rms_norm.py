"""RMS norm over the last dimension.

    y = x * rstd * weight,   rstd = 1 / sqrt(mean(x^2) + eps)

x, y: (..., N) in float32, bfloat16, float16 or float64. weight: (N,) in x's dtype or in float32 beside a 16-bit x; optional.
rstd: (rows,) in float32 (float64 for float64). Source: Zhang, Sennrich, arXiv 1910.07467.
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

__all__ = ["rms_norm"]  # the public functions


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


EPS = 1e-6


def _general(x, weight, eps, more, normalized_shape, input):
    """rms_norm in every form of call."""
    if has_torch_function_variadic(x, weight, input):
        return handle_torch_function(
            rms_norm, (x, weight, input), x, weight, eps, *more, normalized_shape=normalized_shape, input=input
        )
    if isinstance(weight, (tuple, list)) and normalized_shape is None and len(more) < 2:
        normalized_shape, weight = weight, None
        if more or eps is None or isinstance(eps, Tensor):
            weight, eps, more = eps, more[0] if more else None, ()
    if more:
        raise TypeError("rms_norm: expected x, weight, eps or x, normalized_shape, weight, eps")
    if normalized_shape is not None and eps is EPS:
        eps = None  # it was not given, and torch's default goes with torch's form
    x = one_input("rms_norm", x, input)
    check_tensors("rms_norm", weight=weight)
    x, weight = cast(autocast_dtype("rms_norm", x), x, weight)
    stat = stat_dtype(x.dtype)
    eps = torch.finfo(stat).eps if eps is None else eps
    shape = x.shape
    if normalized_shape is not None:
        x, weight = last_as_one("rms_norm", x, normalized_shape, weight)
    if sharding.spread(x, weight):
        return sharding.rows("rms_norm", lambda x, w: rms_norm(x, w, eps), x, weight).reshape(shape)
    if weight is not None and weight.dtype not in (x.dtype, stat) and weight.is_floating_point():
        weight = weight.to(stat)
    x, weight = contiguous(x, weight)
    derivative = derivative_of(x, weight)
    if derivative == TRANSFORMED:
        y = reference_fwd(x, weight, eps)[0]
    else:
        y = _RMSNorm.apply(x, weight, eps) if derivative else fwd(x, weight, eps)[0]
    return y.reshape(shape)


def rms_norm(
    x: Tensor = None,  # type: ignore[assignment]
    weight: Tensor | None = None,
    eps: float | None = EPS,
    *more,
    normalized_shape: Sequence[int] | None = None,
    input: Tensor | None = None,
) -> Tensor:
    """RMS norm over the last dimension, as torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps).

    x (also by torch's name, `input`): (..., N), any strides. weight: (N,), in any floating dtype. eps: None is torch's
    default, that of the statistics' dtype. normalized_shape: more than one last dimension, by name or, as in torch, as second
    argument, with weight and eps moved back by one and eps None by default. Under autocast on a GPU the result is float32, as
    torch's. Returns y like x, contiguous. Raises RuntimeError for a weight of another shape or device, and for a negative eps.
    """
    if (
        type(x) is not Tensor
        or more
        or eps is None
        or normalized_shape is not None
        or input is not None
        or has_torch_function_variadic(x, weight)
        or (weight is not None and (not isinstance(weight, Tensor) or weight.dtype is not x.dtype))
        or transforms_active()
        or forward_ad._current_level >= 0
        or (not x.is_cpu and in_any_autocast())
    ):
        return _general(x, weight, eps, more, normalized_shape, input)
    x = x.contiguous()
    try:
        if is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
            return _RMSNorm.apply(x, weight, eps)
        return fwd(x, weight, eps)[0]
    except RuntimeError:
        if all_contiguous(weight):
            raise
        return _general(x, weight, eps, more, normalized_shape, input)


def rms_norm_cost(x: Tensor, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops): forward reads x and writes y; backward reads dy and x and writes dx."""
    n = x.numel()
    return (3 if backward else 2) * n * x.element_size(), (10 if backward else 4) * n
