"""dropout: y = residual + keep * x / (1 - p), its own backward. Read x (and residual), write y; no mask is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.common import rows_of
from .common import arch, cdiv, check_like, check_rows, launch, wave_of
from .elementwise import columns, load, store, tile, vector
from .philox import check_dropout, philox_uint16
from .tuning import Parameters, Tunable


@triton.jit
def dropout_tile(y, x, residual, keep, keep_scale, at, inside, whole, EDGE: tl.constexpr, VEC: tl.constexpr):
    v = tl.where(keep, load(x, at, inside, whole, EDGE, VEC) * keep_scale, 0.0)
    if residual is not None:
        v += load(residual, at, inside, whole, EDGE, VEC)
    store(y, at, v, inside, whole, EDGE, VEC)


@triton.jit
def dropout_fwd_kernel(
    y, x, residual, rng_state, M, N, chunks, threshold, keep_scale,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slab, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    row = slab * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    group = chunk * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)[None, :]
    keep = philox_uint16(rng_state, group, row, tl.full([1, 1], 0, tl.int32)) >= threshold
    at, inside, whole, interior = tile(slab, chunk, M, N, BLOCK_M, BLOCK_N, VEC)
    if interior:
        dropout_tile(y, x, residual, keep, keep_scale, at, inside, whole, False, VEC)
    else:
        dropout_tile(y, x, residual, keep, keep_scale, at, inside, whole, True, VEC)


def _default(arch: str, N: int, dtype) -> Parameters:
    elements = 4 * wave_of(arch) * 8  # a Philox call's per thread: fewer would change hands
    block_n = columns(N, elements)
    return {"BLOCK_M": elements // block_n, "BLOCK_N": block_n, "num_warps": 4}


def _candidates(arch: str, N: int, dtype) -> list[Parameters]:
    default = _default(arch, N, dtype)
    return [default, {**default, "BLOCK_M": 2 * default["BLOCK_M"]}, {**default, "num_warps": 8}]


def _problem(device, N: int, dtype):
    x, rng_state = torch.randn(max(1, 2**24 // N), N, device=device, dtype=dtype), torch.tensor([1, 2], device=device)
    return lambda: dropout_fwd(x, None, rng_state, 0.1)


DROPOUT = Tunable("dropout_fwd", _default, _candidates, _problem)


def dropout_fwd(x: Tensor, residual: Tensor | None, rng_state: Tensor, dropout_p: float) -> Tensor:
    op = "dropout_fwd"
    check_rows(op, "x", x)
    if residual is not None:
        check_like(op, "residual", residual, "x", x)
    threshold, keep_scale = check_dropout(op, rng_state, dropout_p, x)
    y = x.new_empty(x.shape)
    M, N = rows_of(x).shape
    p = DROPOUT(arch(x.device), N=N, dtype=x.dtype)
    chunks = cdiv(N, p["BLOCK_N"])
    launch(
        dropout_fwd_kernel, (cdiv(M, p["BLOCK_M"]) * chunks,), x,
        y, x, residual, rng_state, M, N, chunks, threshold, keep_scale, VEC=vector(N, x.itemsize), **p,
    )  # fmt: skip
    return y
