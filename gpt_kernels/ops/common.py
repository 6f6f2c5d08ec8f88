"""What the home files share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of statistics and accumulators: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(x: Tensor) -> Tensor:
    """(..., N) as (M, N), also when there are no elements."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def unit_of(x: Tensor) -> Tensor:
    """(M, 1) for rows (M, N): 1, or an exact factor with which the squares of a row of huge elements stay finite."""
    most, factor = (1e150, 2.0**-600) if x.dtype == torch.float64 else (1e18, 2.0**-80)
    return torch.where(x.abs().sum(1, keepdim=True) > most, factor, 1.0).to(x.dtype)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Is there anything to differentiate? Without it an op skips autograd.Function, which costs microseconds."""
    if torch.is_grad_enabled():
        for t in tensors:  # not any(...), whose generator costs as much as the rest of a tiny call
            if t is not None and t.requires_grad:
                return True
    return False


def once_differentiable(backward: Callable) -> Callable:
    """torch.autograd.function.once_differentiable, at its price (4 us) only where a second derivative may be asked for, that is
    under create_graph=True."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx, *grads):
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return call
