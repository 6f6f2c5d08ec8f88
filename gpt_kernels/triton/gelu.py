"""gelu: each tensor is read or written once; the backward finishes the bias's gradient in the same launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import gelu, gelu_slope
from .common import arch, cdiv, check_column, check_contiguous, check_float, check_like, fail, launch, processors
from .elementwise import columns, load, store, tile, vector
from .partial_sums import COUNTERS, MOST_PROGRAMS, add_groups, add_slots, arrivals_for
from .tuning import Parameters, Tunable


@triton.jit
def fwd_tile(y, x, b, at, inside, whole, TANH: tl.constexpr, EDGE: tl.constexpr, VEC: tl.constexpr):
    store(y, at, gelu(load(x, at, inside, whole, EDGE, VEC) + b, TANH), inside, whole, EDGE, VEC)


@triton.jit
def gelu_fwd_kernel(
    y, x, bias, M, N, chunks, TANH: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    slab, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    at, inside, whole, interior = tile(slab, chunk, M, N, BLOCK_M, BLOCK_N, VEC)
    b = load_bias(bias, chunk, N, BLOCK_N)
    if interior:
        fwd_tile(y, x, b, at, inside, whole, TANH, False, VEC)
    else:
        fwd_tile(y, x, b, at, inside, whole, TANH, True, VEC)


@triton.jit
def load_bias(bias, chunk, N, BLOCK_N: tl.constexpr):
    if bias is None:
        return 0.0
    else:
        column = chunk * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        return tl.load(bias + column, column < N, 0.0).to(tl.float32)


@triton.jit
def bwd_tile(dx, dy, x, b, at, inside, whole, TANH: tl.constexpr, EDGE: tl.constexpr, VEC: tl.constexpr):
    d = load(dy, at, inside, whole, EDGE, VEC) * gelu_slope(load(x, at, inside, whole, EDGE, VEC) + b, TANH)
    store(dx, at, d, inside, whole, EDGE, VEC)
    return d


@triton.jit
def gelu_bwd_kernel(
    dx, dbias, partials, arrivals, dy, x, bias, M, N, chunks, tiles,
    TANH: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    slab, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    b = load_bias(bias, chunk, N, BLOCK_N)
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(tiles):
        at, inside, whole, interior = tile(slab.to(tl.int64) * tiles + i, chunk, M, N, BLOCK_M, BLOCK_N, VEC)
        if interior:
            db += bwd_tile(dx, dy, x, b, at, inside, whole, TANH, False, VEC)
        else:
            db += bwd_tile(dx, dy, x, b, at, inside, whole, TANH, True, VEC)
    if dbias is not None:
        start, lane = chunk.to(tl.int64) * BLOCK_N, tl.arange(0, BLOCK_N)
        width = tl.minimum(N - start, BLOCK_N).to(tl.int32)
        tl.store(partials + slab.to(tl.int64) * N + start + lane, tl.sum(db, 0), lane < width)
        own, slabs = arrivals + chunk * COUNTERS, tl.num_programs(0) // chunks
        last, step, groups = add_groups(partials + start, own, slab, slabs, N, width, SPAN)
        if last:
            add_slots(dbias + start, partials + start, step, groups, width, SPAN)


def _default(arch: str, N: int, dtype) -> Parameters:
    """N: 0 without a bias, where rows mean nothing and the tensor is one."""
    elements = 4 * 32 * 2 * (16 // dtype.itemsize)  # two 16-byte accesses per thread and tensor
    block_n = columns(N, elements // 2) if N else elements
    return {"BLOCK_M": elements // block_n, "BLOCK_N": block_n, "num_warps": 4}


def _candidates(arch: str, N: int, dtype) -> list[Parameters]:
    default = _default(arch, N, dtype)
    grow = "BLOCK_M" if N else "BLOCK_N"
    return [default, {**default, "num_warps": 8}, {**default, grow: default[grow] * 2, "num_warps": 8}]


def _problem(op: str):
    def problem(device, N: int, dtype):
        x = torch.randn(2**24 // (N or 1024), N or 1024, device=device, dtype=dtype)
        bias = torch.randn(N, device=device, dtype=dtype) if N else None
        return (lambda: gelu_fwd(x, bias, True)) if op == "gelu_fwd" else lambda: gelu_bwd(x, x, bias, True)

    return problem


FWD = Tunable("gelu_fwd", _default, _candidates, _problem("gelu_fwd"))
BWD = Tunable("gelu_bwd", _default, _candidates, _problem("gelu_bwd"))


def _check(op: str, x: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """(M, N): rows and columns; without a bias one row of everything."""
    check_float(op, "x", x)
    check_contiguous(op, "x", x)
    if bias is None:
        return 1, x.numel()
    if x.dim() < 1:
        fail(op, "x must have at least 1 dimension to add a bias, got a scalar")
    N = x.shape[-1]
    check_column(op, "bias", bias, N, x)
    return x.numel() // N if N else 0, N


def _geometry(tunable: Tunable, x: Tensor, bias: Tensor | None, N: int) -> tuple[Parameters, int, int]:
    """(launch parameters, elements of an access, chunks of columns)"""
    p = tunable(arch(x.device), N=0 if bias is None else N, dtype=x.dtype)
    return p, 16 // x.itemsize if bias is None else vector(N, x.itemsize), cdiv(N, p["BLOCK_N"])


def gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    M, N = _check("gelu_fwd", x, bias)
    y = torch.empty_like(x)
    p, vec, chunks = _geometry(FWD, x, bias, N)
    launch(gelu_fwd_kernel, (cdiv(M, p["BLOCK_M"]) * chunks,), x, y, x, bias, M, N, chunks, TANH=tanh, VEC=vec, **p)
    return y


def gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    op = "gelu_bwd"
    M, N = _check(op, x, bias)
    check_like(op, "dy", dy, "x", x)
    dx = torch.empty_like(x)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    if not x.numel():
        return dx, dbias.zero_()
    p, vec, chunks = _geometry(BWD, x, bias, N)
    slabs, tiles, partials, arrivals = cdiv(M, p["BLOCK_M"]), 1, None, None
    if bias is not None:
        # a few programs for each processor, each of many rows, so that partial sums are a small part of the traffic
        tiles = cdiv(slabs, max(1, min(4 * processors(x.device) // chunks, MOST_PROGRAMS)))
        slabs = cdiv(slabs, tiles)
        partials, arrivals = x.new_empty(slabs, N, dtype=torch.float32), arrivals_for(x, chunks)
    launch(
        gelu_bwd_kernel, (slabs * chunks,), x,
        dx, None if bias is None else dbias, partials, arrivals, dy, x, bias, M, N, chunks, tiles, TANH=tanh, VEC=vec, **p,
        SPAN=32 * p["num_warps"],
    )  # fmt: skip
    return dx, dbias
