"""GELU, with the bias of the linear layer before it added in the same pass.

    v = x + bias,   y = v * cdf(v)                                          approximate="none": the normal distribution's
                    y = v * (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3))) / 2   approximate="tanh": GPT-2's

x, y: (..., N) in float32, bfloat16, float16 or float64. bias: (N,) in x's dtype or in float32 beside a 16-bit x; optional.
Its gradient is the sum of dx over rows, in float32 and in a fixed order. Source: Hendrycks, Gimpel, arXiv 1606.08415.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import sharding
from ..dispatch import define
from .calls import (
    all_contiguous,
    check_tensors,
    contiguous,
    handle_torch_function,
    has_torch_function_variadic,
    is_grad_enabled,
    laid_out,
    memory_order,
    one_input,
    restored,
)
from .common import TRANSFORMED, derivative_of, rederived, rows_of, stat_dtype, transforms_active

__all__ = ["gelu"]  # the public functions


def _biased(x, bias):
    xf = x.to(stat_dtype(x.dtype))
    return xf if bias is None else xf + bias


def reference_fwd(x, bias, tanh):
    y = torch.nn.functional.gelu(_biased(x, bias), approximate="tanh" if tanh else "none")
    return y.to(x.dtype).contiguous()


def reference_bwd(dy, x, bias, tanh):
    v = _biased(x, bias)
    if tanh:
        s = torch.sigmoid(math.sqrt(8 / math.pi) * (v + 0.044715 * v**3))
        square = (v**2).clamp(max=1e30)  # s (1 - s) is 0 there, and times inf it were NaN
        slope = s + v * s * (1 - s) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * square)
    else:
        slope = torch.special.ndtr(v) + v * torch.exp(-0.5 * v**2) / math.sqrt(2 * math.pi)
    dx = dy.to(v.dtype) * slope
    dbias = x.new_empty(0) if bias is None else rows_of(dx).sum(0).to(bias.dtype)
    return dx.to(x.dtype), dbias


fwd = define("gelu_fwd(Tensor x, Tensor? bias, bool tanh) -> Tensor", reference_fwd)
bwd = define("gelu_bwd(Tensor dy, Tensor x, Tensor? bias, bool tanh) -> (Tensor dx, Tensor dbias)", reference_bwd)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, tanh):
        ctx.save_for_backward(x, bias)
        ctx.tanh = tanh
        return fwd(x, bias, tanh)

    @staticmethod
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        dx, dbias = (reference_bwd if rederived(dy) else bwd)(dy.contiguous(), x, bias, ctx.tanh)
        return dx, None if bias is None else dbias, None


def _general(x, bias, approximate, input):
    """gelu in every form of call."""
    if has_torch_function_variadic(x, bias, input):
        return handle_torch_function(gelu, (x, bias, input), x, bias, approximate, input=input)
    x = one_input("gelu", x, input)
    check_tensors("gelu", bias=bias)
    if approximate not in ("tanh", "none"):
        kind = RuntimeError if isinstance(approximate, str) else TypeError
        raise kind(f"gelu: approximate must be 'tanh' or 'none', got {approximate!r}")
    if sharding.spread(x, bias):
        return sharding.gelu(lambda x, b: gelu(x, b, approximate), x, bias)
    if not x.is_contiguous():
        order = memory_order(x)
        if bias is None:
            return _general(x.permute(order).contiguous(), None, approximate, None).permute(restored(order))
        return laid_out(_general(x.contiguous(), bias, approximate, None), order)
    (bias,), tanh = contiguous(bias), approximate == "tanh"
    derivative = derivative_of(x, bias)
    if derivative == TRANSFORMED:
        return reference_fwd(x, bias, tanh)
    return _GELU.apply(x, bias, tanh) if derivative else fwd(x, bias, tanh)


def gelu(
    x: Tensor = None,  # type: ignore[assignment]
    bias: Tensor | None = None,
    approximate: str = "tanh",
    *,
    input: Tensor | None = None,
) -> Tensor:
    """GELU of x + bias, as torch.nn.functional.gelu(x + bias, approximate=approximate).

    x (also by torch's name, `input`): (..., N), any strides. bias: (N,). approximate: "tanh", the default here, or "none",
    which is torch's. Returns y like x, in its strides as torch's. Raises RuntimeError for another `approximate`, and for a
    bias of another length, dtype or device.
    """
    if (
        type(x) is not Tensor
        or (bias is not None and not isinstance(bias, Tensor))
        or has_torch_function_variadic(x, bias)
        or input is not None
        or transforms_active()
        or forward_ad._current_level >= 0
        or not x.is_contiguous()
        or (approximate != "tanh" and approximate != "none")
    ):
        return _general(x, bias, approximate, input)
    tanh = approximate == "tanh"
    try:
        if is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _GELU.apply(x, bias, tanh)
        return fwd(x, bias, tanh)
    except RuntimeError:
        if all_contiguous(bias):
            raise
        return _general(x, bias, approximate, input)


def gelu_cost(x: Tensor, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops; an exponential is one): forward reads x, writes y; backward reads dy and x, writes dx."""
    n = x.numel()
    return (3 if backward else 2) * n * x.element_size(), (18 if backward else 9) * n
