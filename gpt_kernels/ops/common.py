"""What the home files share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of statistics and accumulators: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(x: Tensor) -> Tensor:
    """(..., N) as (M, N), also when there are no elements."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def wants_grad(*tensors: Tensor | None) -> bool:
    """Is there anything to differentiate? Without it an op skips autograd.Function, which costs microseconds."""
    if torch.is_grad_enabled():
        for t in tensors:  # not any(...), whose generator costs as much as the rest of a tiny call
            if t is not None and t.requires_grad:
                return True
    return False


def transformed(*tensors: Tensor | None) -> bool:
    """Does torch.func (grad, vmap, jvp ...) transform this call, or does a tensor carry a tangent?

    Then an op runs its reference: plain PyTorch has every derivative, a kernel one alone, and torch takes its tangents for zero.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def rederived(*grads: Tensor | None) -> bool:
    """Is a backward pass differentiated in its turn (create_graph), or batched (is_grads_batched)? It then runs the reference's
    formulas too, on inputs and outputs as they were saved, and with statistics computed anew: those that were saved have lost
    how they depend on the input."""
    return torch.is_grad_enabled() or transformed(*grads)
