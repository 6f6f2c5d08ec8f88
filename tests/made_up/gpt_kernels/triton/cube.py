"""cube in Triton."""

import torch
import triton
import triton.language as tl

from .common import cdiv, check_contiguous, check_float, check_like, launch

BLOCK = 1024


@triton.jit
def cube_fwd_kernel(y, x, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, at < N, 0.0).to(tl.float32)
    tl.store(y + at, (v * v * v).to(y.dtype.element_ty), at < N)


@triton.jit
def cube_bwd_kernel(dx, dy, x, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v, d = tl.load(x + at, at < N, 0.0).to(tl.float32), tl.load(dy + at, at < N, 0.0).to(tl.float32)
    tl.store(dx + at, (3 * (v * d) * v).to(dx.dtype.element_ty), at < N)


def cube_fwd(x):
    check_float("cube_fwd", "x", x), check_contiguous("cube_fwd", "x", x)
    y = torch.empty_like(x)
    launch(cube_fwd_kernel, (cdiv(x.numel(), BLOCK),), x, y, x, x.numel(), BLOCK=BLOCK, num_warps=4)
    return y


def cube_bwd(dy, x):
    check_float("cube_bwd", "x", x), check_contiguous("cube_bwd", "x", x), check_like("cube_bwd", "dy", dy, "x", x)
    dx = torch.empty_like(x)
    launch(cube_bwd_kernel, (cdiv(x.numel(), BLOCK),), x, dx, dy, x, x.numel(), BLOCK=BLOCK, num_warps=4)
    return dx
