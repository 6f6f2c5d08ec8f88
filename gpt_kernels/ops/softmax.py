"""Softmax over the last dimension, of scaled and masked scores.

    z = scale * x + mask,   y = exp(z - max z) / sum exp(z - max z)

x, y: (..., S) in float32, bfloat16, float16 or float64. mask: anything that broadcasts to x; bool (True = keep) or added, in
x's dtype or in float32 beside a 16-bit x. causal: the last two dimensions are (T, S), and row t keeps columns 0 ... t + S - T
(aligned bottom-right). A row in which nothing is kept, or every score is -inf, gives zeros and a zero gradient.
Source: Milakov, Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import sharding
from ..dispatch import define
from .calls import (
    autocast_dtype,
    cast,
    check_tensors,
    handle_torch_function,
    has_torch_function_variadic,
    in_any_autocast,
    is_grad_enabled,
    one_input,
)
from .common import TRANSFORMED, derivative_of, rederived, softmax_lse, stat_dtype, transforms_active

__all__ = ["softmax"]  # the public functions


def reference_fwd(x, mask, scale, causal):
    z = x.to(stat_dtype(x.dtype)) * scale
    if mask is not None:
        z = torch.where(mask, z, -torch.inf) if mask.dtype == torch.bool else z + mask
    if causal:
        T, S = x.shape[-2:]
        z = z.masked_fill(torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1), -torch.inf)
    # hidden rows are filled before softmax too: of NaN times zero, which is NaN, a gradient would be made
    hidden = (z == -torch.inf).all(-1, keepdim=True)
    y = softmax_lse(z.masked_fill(hidden, 0.0))[0].masked_fill(hidden, 0.0)
    return y.to(x.dtype).contiguous()


def reference_bwd(dy, y, scale, causal):
    yf = y.to(stat_dtype(y.dtype))
    dyf = dy.to(yf.dtype)
    return (yf * (dyf - (dyf * yf).sum(-1, keepdim=True)) * scale).to(y.dtype)


fwd = define("softmax_fwd(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor", reference_fwd)
bwd = define("softmax_bwd(Tensor dy, Tensor y, float scale, bool causal) -> Tensor", reference_bwd)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, scale, causal):
        y = fwd(x, mask, scale, causal)
        ctx.save_for_backward(y)
        ctx.scale, ctx.causal = scale, causal
        ctx.mask = (mask.shape, mask.dtype) if mask is not None and mask.requires_grad else None
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dy, backward = (dy, reference_bwd) if rederived(dy) else (dy.contiguous(), bwd)
        if ctx.mask is None:
            return backward(dy, y, ctx.scale, ctx.causal), None, None, None
        # dz serves both: dx = scale dz, and the mask's gradient is dz summed over the dimensions that it was broadcast over
        shape, dtype = ctx.mask
        dz = backward(dy, y, 1.0, ctx.causal)
        return dz * ctx.scale, dz.to(dtype).sum_to_size(shape), None, None


def _general(x, mask, scale, causal, dim, dtype, input):
    """softmax in every form of call."""
    if has_torch_function_variadic(x, mask, input):
        return handle_torch_function(softmax, (x, mask, input), x, mask, scale, causal, dim=dim, dtype=dtype, input=input)
    x = one_input("softmax", x, input)
    if isinstance(mask, int) and not isinstance(mask, bool):  # torch has dim and dtype in these places
        dim, mask = mask, None
        if isinstance(scale, torch.dtype):
            dtype, scale = scale, 1.0
    check_tensors("softmax", mask=mask)
    if not isinstance(dim, int):
        raise TypeError(f"softmax: dim must be an int, got {dim!r}")
    if dtype is not None:
        x = x.to(dtype)
    else:
        x, mask = cast(autocast_dtype("softmax", x), x, mask)
    if not -max(x.dim(), 1) <= dim < max(x.dim(), 1):
        raise IndexError(f"softmax: dim {dim} is out of range for x of {x.dim()} dimensions")
    if not x.dim():
        return _general(x.reshape(1), mask, scale, causal, -1, x.dtype, None).reshape(())
    if dim not in (-1, x.dim() - 1):
        if mask is not None or causal:
            raise RuntimeError(f"softmax: mask and causal go with the last dimension, got dim {dim} for x {tuple(x.shape)}")
        return _general(x.movedim(dim, -1), None, scale, False, -1, x.dtype, None).movedim(-1, dim).contiguous()
    if sharding.spread(x, mask):
        return sharding.softmax(lambda x, m: softmax(x, m, scale, causal), x, mask, causal)
    x = x.contiguous()
    if mask is not None and mask.dim() and mask.stride(-1) != 1:
        mask = mask.contiguous()  # rows of a mask are read by stride, their elements one after another
    derivative = derivative_of(x, mask)
    if derivative == TRANSFORMED:
        return reference_fwd(x, mask, scale, causal)
    return _Softmax.apply(x, mask, scale, causal) if derivative else fwd(x, mask, scale, causal)


def softmax(
    x: Tensor = None,  # type: ignore[assignment]
    mask: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    *,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    input: Tensor | None = None,
) -> Tensor:
    """softmax(scale * x + mask) over the last dimension; without options torch.softmax(x, -1), which may be written so.

    x (also by torch's name, `input`): (..., S), any strides. mask: broadcastable to x, never expanded in memory; bool (True =
    keep) or added, and then differentiable. causal: row t of the last two dimensions (T, S) keeps columns 0 ... t + S - T.
    Rows with nothing visible, or of -inf alone, give zeros. dim (also as second argument): another dimension, without mask
    and causal. dtype: x is cast to it first. Under autocast on a GPU the result is float32, as torch's. Returns y like x,
    contiguous. Raises IndexError for dim; RuntimeError for a mask that does not broadcast or has another dtype or device, for
    a scale that is not finite, and for causal with fewer than 2 dimensions.
    """
    if (
        type(x) is not Tensor
        or (mask is not None and type(mask) is not Tensor)
        or dim != -1
        or dtype is not None
        or input is not None
        or has_torch_function_variadic(x, mask)
        or transforms_active()
        or forward_ad._current_level >= 0
        or (not x.is_cpu and in_any_autocast())
    ):
        return _general(x, mask, scale, causal, dim, dtype, input)
    x = x.contiguous()
    if mask is not None and mask.dim() and mask.stride(-1) != 1:
        mask = mask.contiguous()
    try:
        if is_grad_enabled() and (x.requires_grad or (mask is not None and mask.requires_grad)):
            return _Softmax.apply(x, mask, scale, causal)
        return fwd(x, mask, scale, causal)
    except RuntimeError:
        if x.dim():
            raise
        return _general(x, mask, scale, causal, dim, dtype, input)


def softmax_cost(x: Tensor, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops; an exponential is one): forward reads x, writes y; backward reads dy and y, writes dx."""
    n = x.numel()
    return (3 if backward else 2) * n * x.element_size(), 5 * n
