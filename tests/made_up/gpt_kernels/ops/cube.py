"""An op that tests/test_added_op.py adds to a copy of the tree: y = x^3, dx = 3 x^2 dy, in any shape."""

import torch

from ..dispatch import define
from .common import rederived, stat_dtype

__all__ = ["cube"]  # the public functions


def reference_fwd(x):
    v = x.to(stat_dtype(x.dtype))
    return (v * v * v).to(x.dtype)


def reference_bwd(dy, x):
    torch._check(dy.shape == x.shape, lambda: f"cube_bwd: dy must have the shape of x {tuple(x.shape)}, got {tuple(dy.shape)}")
    torch._check(dy.dtype == x.dtype, lambda: f"cube_bwd: dy must be {x.dtype}, got {dy.dtype}")
    v = x.to(stat_dtype(x.dtype))
    return (3 * (v * dy) * v).to(x.dtype)


fwd = define("cube_fwd(Tensor x) -> Tensor", reference_fwd)
bwd = define("cube_bwd(Tensor dy, Tensor x) -> Tensor", reference_bwd)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return fwd(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return (reference_bwd if rederived(dy) else bwd)(dy.contiguous(), x)


def cube(x):
    """x cubed. Raises RuntimeError for another dtype than a float one."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return reference_fwd(x)
    if not x.is_floating_point():
        raise RuntimeError(f"cube: x must be a float tensor, got {str(x.dtype).removeprefix('torch.')}")
    return _Cube.apply(x.contiguous())


def cube_cost(x, backward=False):
    n = x.numel()
    return (3 if backward else 2) * n * x.element_size(), (3 if backward else 2) * n
