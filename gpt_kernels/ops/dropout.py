"""Dropout, with an optional residual added in the same pass.

    y = residual + keep * x / (1 - p),   keep from Philox (ops/philox.py), plane 0, row = position among the rows of x

x, residual, y: (..., N) in float32, bfloat16, float16 or float64; rng_state: int64 (seed, offset). Linear in x, so the
backward is the same op on dy with the same rng_state: no mask is stored. Source: Srivastava et al., JMLR 15 (2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import sharding
from ..dispatch import define
from .calls import check_tensors, handle_torch_function, has_torch_function_variadic, laid_out, memory_order, one_input
from .common import TRANSFORMED, derivative_of, rederived, rows_of, stat_dtype
from .philox import draw_rng_state, dropout_factor

__all__ = ["dropout"]  # the public functions


def reference_fwd(x, residual, rng_state, dropout_p):
    y = rows_of(x).to(stat_dtype(x.dtype))[None, None]
    y = (y * dropout_factor(rng_state, dropout_p, y)).reshape(x.shape)
    return (y if residual is None else y + residual).to(x.dtype, copy=True)


fwd = define("dropout_fwd(Tensor x, Tensor? residual, Tensor rng_state, float dropout_p) -> Tensor y", reference_fwd)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, rng_state, dropout_p):
        ctx.save_for_backward(rng_state)
        ctx.dropout_p = dropout_p
        return fwd(x, residual, rng_state, dropout_p)

    @staticmethod
    def backward(ctx, dy):
        (rng_state,) = ctx.saved_tensors
        run = reference_fwd if rederived(dy) else fwd
        dx = run(dy.contiguous(), None, rng_state, ctx.dropout_p) if ctx.needs_input_grad[0] else None
        return dx, dy if ctx.needs_input_grad[1] else None, None, None


def dropout(
    x: Tensor = None,  # type: ignore[assignment]
    p: float = 0.5,
    training: bool = True,
    residual: Tensor | None = None,
    rng_state: Tensor | None = None,
    *,
    inplace: bool = False,
    input: Tensor | None = None,
) -> Tensor:
    """Dropout as torch.nn.functional.dropout(x, p, training, inplace), plus `residual` if given, in one pass.

    x (also by torch's name, `input`), residual: (..., N), any strides. p is rounded to a multiple of 1 / 65536. rng_state:
    int64 (seed, offset), drawn from torch's generator if not given; equal states give equal masks. Returns a tensor like x,
    in its strides as torch's, or x itself (plus residual) where there is nothing to drop. inplace (or a bool in residual's
    place, where torch has it): written into x, which is returned. Raises ValueError for p outside [0, 1], RuntimeError for a
    residual of another shape or dtype.
    """
    unusual = type(x) is not Tensor or input is not None or (residual is not None and not isinstance(residual, Tensor))
    if unusual or has_torch_function_variadic(x, residual):
        if has_torch_function_variadic(x, residual, input):
            return handle_torch_function(
                dropout, (x, residual, input), x, p, training, residual, rng_state, inplace=inplace, input=input
            )
        x = one_input("dropout", x, input)
        if isinstance(residual, bool):
            inplace, residual = residual, None
        check_tensors("dropout", residual=residual)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p must be between 0 and 1, got {p}")
    if inplace:
        y = dropout(x, p, training, residual, rng_state)
        return y if y is x else x.copy_(y)
    n = x.numel()
    if not training or p == 0.0 or not n:
        return x if residual is None else x + residual
    if p == 1.0:  # not zeros: what is not finite becomes NaN, as in torch
        return x * 0 if residual is None else x * 0 + residual
    if n == 1 and not x.dim():
        residual = residual if residual is None else residual.reshape(1)
        return dropout(x.reshape(1), p, training, residual, rng_state).reshape(())
    if unusual and sharding.spread(x, residual):
        rng_state = draw_rng_state(x.device) if rng_state is None else rng_state
        return sharding.dropout(lambda x, r, state: dropout(x, p, True, r, state), x, residual, rng_state)
    if not x.is_contiguous():
        # the mask goes by places, not by memory
        return laid_out(dropout(x.contiguous(), p, training, residual, rng_state), memory_order(x))
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    rng_state = draw_rng_state(x.device) if rng_state is None else rng_state
    derivative = derivative_of(x, residual)
    if derivative == TRANSFORMED:
        return reference_fwd(x, residual, rng_state, float(p))
    if derivative:
        return _Dropout.apply(x, residual, rng_state, float(p))
    return fwd(x, residual, rng_state, float(p))


def dropout_cost(x: Tensor, residual: Tensor | None = None) -> tuple[int, int]:
    """(bytes that must move, flops): reads x and the residual, writes y."""
    n = x.numel()
    return (2 if residual is None else 3) * n * x.element_size(), (1 if residual is None else 2) * n
