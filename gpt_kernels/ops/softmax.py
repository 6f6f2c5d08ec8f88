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

from ..dispatch import define
from .common import TRANSFORMED, derivative_of, rederived, softmax_lse, stat_dtype


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


def softmax(x: Tensor, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False) -> Tensor:
    """softmax(scale * x + mask) over the last dimension; torch.softmax(x, -1) without options.

    x: (..., S), any strides (made contiguous). mask: broadcastable to x, never expanded in memory; bool (True = keep) or
    added, and then differentiable. causal: row t of the last two dimensions (T, S) keeps columns 0 ... t + S - T. Rows with
    nothing visible give zeros. Returns y like x, contiguous. The CPU kernel raises RuntimeError for a mask that does not
    broadcast or has another dtype or device, for a scale that is not finite, and for causal with fewer than 2 dimensions.
    """
    x = x.contiguous()
    if mask is not None and mask.dim() and mask.stride(-1) != 1:
        mask = mask.contiguous()  # rows of a mask are read by stride, their elements one after another
    derivative = derivative_of(x, mask)
    if derivative == TRANSFORMED:
        return reference_fwd(x, mask, scale, causal)
    if derivative:
        return _Softmax.apply(x, mask, scale, causal)
    return fwd(x, mask, scale, causal)


def softmax_cost(x: Tensor, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops; an exponential is one): forward reads x, writes y; backward reads dy and y, writes dx."""
    n = x.numel()
    return (3 if backward else 2) * n * x.element_size(), 5 * n
