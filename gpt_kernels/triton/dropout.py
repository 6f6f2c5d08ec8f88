"""dropout: y = residual + keep * x / (1 - p), its own backward. Read x (and residual), write y; no mask is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.common import rows_of
from .common import arch, cdiv, check_like, check_rows, launch
from .philox import check_dropout, philox_uint16
from .tuning import Parameters, Tunable


@triton.jit
def dropout_fwd_kernel(
    y, x, residual, rng_state, M, N, threshold, keep_scale, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    group = tl.program_id(1) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)[None, :]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    keep = philox_uint16(rng_state, group, row, tl.full([1, 1], 0, tl.int32)) >= threshold
    at, inside = row.to(tl.int64) * N + column, (row < M) & (column < N)
    v = tl.where(keep, tl.load(x + at, inside, 0.0).to(tl.float32) * keep_scale, 0.0)
    if HAS_RESIDUAL:
        v += tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(y + at, v.to(y.dtype.element_ty), inside)


def _default(arch: str, N: int, dtype) -> Parameters:
    block_n = min(max(triton.next_power_of_2(N), 16), 1024)
    return {"BLOCK_M": max(1, 2048 // block_n), "BLOCK_N": block_n, "num_warps": 4}


def _candidates(arch: str, N: int, dtype) -> list[Parameters]:
    return [_default(arch, N, dtype)]


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
    launch(
        dropout_fwd_kernel, (cdiv(M, p["BLOCK_M"]), cdiv(N, p["BLOCK_N"])), x, y, x, residual, rng_state, M, N, threshold, keep_scale,
        HAS_RESIDUAL=residual is not None, **p,
    )  # fmt: skip
    return y
