"""What the home files share."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch.autograd import forward_ad


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of statistics and accumulators: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def count_of(shape: Iterable[int]) -> int:
    """Size.numel(), which makes a compiler's symbols for sizes numbers, and each batch size a compilation."""
    return math.prod(shape)


def rows_of(x: Tensor) -> Tensor:
    """(..., N) as (M, N), also when there are no elements; rows without columns are none, as in every launcher."""
    N = x.shape[-1]
    return x.reshape(count_of(x.shape[:-1]) if N else 0, N)


def unit_of(x: Tensor) -> Tensor:
    """(M, 1) for rows (M, N): 1, or an exact factor with which the squares of a row of huge elements stay finite."""
    most, factor = (1e150, 2.0**-600) if x.dtype == torch.float64 else (1e18, 2.0**-80)
    return torch.where(x.abs().sum(1, keepdim=True) > most, factor, 1.0).to(x.dtype)


def softmax_lse(z: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and logsumexp over the last dimension; not torch's, whose forward derivatives have no reverse one."""
    top = z.detach().amax(-1, keepdim=True) if z.shape[-1] else z.new_zeros((*z.shape[:-1], 1))
    e = (z - top).exp()
    total = e.sum(-1, keepdim=True)
    return e / total, (top + total.log())[..., 0]


REVERSE, TRANSFORMED = 1, 2


def derivative_of(*tensors: Tensor | None) -> int:
    """How is a call with these tensors differentiated?

    0: not at all; the kernel runs without autograd.Function, which costs microseconds. REVERSE: by autograd. TRANSFORMED: by
    torch.func (grad, vmap, jvp ...), or a tensor carries a tangent. The op then runs its reference: plain PyTorch has every
    derivative, a kernel the first alone, and torch drops its tangents.
    """
    if transforms_active() or (forward_ad._current_level >= 0 and _with_tangent(tensors)):
        return TRANSFORMED
    if torch.is_grad_enabled():
        for t in tensors:  # not any(...), whose generator costs as much as the rest of a tiny call
            if t is not None and t.requires_grad:
                return REVERSE
    return 0


def rederived(dy: Tensor) -> bool:
    """Is a backward pass differentiated in its turn (create_graph), or transformed?

    It then runs the reference's formulas too, on inputs and outputs as they were saved, and with statistics computed anew: the
    saved ones have lost how they depend on the input.
    """
    return torch.is_grad_enabled() or transforms_active() or (forward_ad._current_level >= 0 and _with_tangent((dy,)))


def _with_tangent(tensors) -> bool:
    # a compiler's stand-ins show no tangents
    return torch.compiler.is_compiling() or any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
