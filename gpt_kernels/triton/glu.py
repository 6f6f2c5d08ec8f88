"""swiglu and geglu: each tensor is read or written once, rows at any stride."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, factor_and_slope
from .common import arch, cdiv, check_contiguous, check_device, check_dtype, check_float, check_same_shape, fail, launch
from .elementwise import columns, load, store, strided, tile
from .tuning import Parameters, Tunable


@triton.jit
def halves(first, second, N, UP_FIRST: tl.constexpr, VEC: tl.constexpr):
    """(gate, up), or those of a row that holds both: N is a multiple of VEC where VEC is not 1, so that the compiler sees it"""
    if second is None:
        middle = first + N // VEC * VEC
        if UP_FIRST:
            return middle, first
        else:
            return first, middle
    else:
        return first, second


@triton.jit
def fwd_tile(
    y, gate, up, at, gate_at, up_at, inside, whole, ACT: tl.constexpr, EDGE: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    v = activate(load(gate, gate_at, inside, whole, EDGE, VEC), ACT) * load(up, up_at, inside, whole, EDGE, VEC)
    store(y, at, v, inside, whole, EDGE, VEC)


@triton.jit
def glu_fwd_kernel(
    y, gate, up, M, N, chunks, gate_stride, up_stride,
    ACT: tl.constexpr, UP_FIRST: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slab, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    at, inside, whole, interior = tile(slab, chunk, M, N, BLOCK_M, BLOCK_N, VEC)
    gate_at = strided(slab, chunk, gate_stride, BLOCK_M, BLOCK_N, VEC)
    up_at = strided(slab, chunk, up_stride, BLOCK_M, BLOCK_N, VEC)
    g, u = halves(gate, up, N, UP_FIRST, VEC)
    if interior:
        fwd_tile(y, g, u, at, gate_at, up_at, inside, whole, ACT, False, VEC)
    else:
        fwd_tile(y, g, u, at, gate_at, up_at, inside, whole, ACT, True, VEC)


@triton.jit
def bwd_tile(
    dgate, dup, dy, gate, up, out_at, at, gate_at, up_at, inside, whole,
    ACT: tl.constexpr, EDGE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    v, d = load(gate, gate_at, inside, whole, EDGE, VEC), load(dy, at, inside, whole, EDGE, VEC)
    s, slope = factor_and_slope(v, ACT)
    store(dgate, out_at, d * load(up, up_at, inside, whole, EDGE, VEC) * slope, inside, whole, EDGE, VEC)
    store(dup, out_at, d * (v * s), inside, whole, EDGE, VEC)


@triton.jit
def glu_bwd_kernel(
    dgate, dup, dy, gate, up, M, N, chunks, gate_stride, up_stride, out_stride,
    ACT: tl.constexpr, UP_FIRST: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slab, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    at, inside, whole, interior = tile(slab, chunk, M, N, BLOCK_M, BLOCK_N, VEC)
    gate_at = strided(slab, chunk, gate_stride, BLOCK_M, BLOCK_N, VEC)
    up_at = strided(slab, chunk, up_stride, BLOCK_M, BLOCK_N, VEC)
    out_at = strided(slab, chunk, out_stride, BLOCK_M, BLOCK_N, VEC)
    g, u = halves(gate, up, N, UP_FIRST, VEC)
    dg, du = halves(dgate, dup, N, UP_FIRST, VEC)
    if interior:
        bwd_tile(dg, du, dy, g, u, out_at, at, gate_at, up_at, inside, whole, ACT, False, VEC)
    else:
        bwd_tile(dg, du, dy, g, u, out_at, at, gate_at, up_at, inside, whole, ACT, True, VEC)


def _default(arch: str, N: int, dtype) -> Parameters:
    """N: 0 where rows mean nothing and the tensors are one."""
    elements = 4 * 32 * 2 * (16 // dtype.itemsize)  # two 16-byte accesses per thread and tensor
    block_n = columns(N, elements // 2) if N else elements
    return {"BLOCK_M": elements // block_n, "BLOCK_N": block_n, "num_warps": 4}


def _candidates(arch: str, N: int, dtype) -> list[Parameters]:
    default = _default(arch, N, dtype)
    grow = "BLOCK_M" if N else "BLOCK_N"
    return [default, {**default, "num_warps": 8}, {**default, grow: default[grow] * 2, "num_warps": 8}]


def _problem(op: str):
    def problem(device, N: int, dtype):
        gate = torch.randn(2**23 // (N or 1024), 2 * (N or 1024), device=device, dtype=dtype)
        dy = torch.randn(gate.shape[0], gate.shape[1] // 2 if N else gate.shape[1], device=device, dtype=dtype)
        args = (gate, None if N else gate, 0, False)
        return (lambda: glu_fwd(*args)) if op == "glu_fwd" else lambda: glu_bwd(dy, *args)

    return problem


FWD = Tunable("glu_fwd", _default, _candidates, _problem("glu_fwd"))
BWD = Tunable("glu_bwd", _default, _candidates, _problem("glu_bwd"))


def row_stride(op: str, name: str, x: Tensor) -> int:
    """What separates the rows of x, (..., N), each contiguous, where it is the same for all of them."""
    N = x.shape[-1]
    if x.is_contiguous():
        return N
    size, stride, alike = 1, N, x.stride(-1) == 1 or N == 1
    for n, s in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if n != 1:
            alike = alike and (size == 1 or s == size * stride)
            size, stride = size * n, stride if size != 1 else s
    if not alike:
        fail(op, f"{name} must have contiguous rows at one stride, got shape {tuple(x.shape)} with others")
    return stride


def _check(op: str, gate: Tensor, up: Tensor | None, act: int, up_first: bool) -> tuple[int, int, int, int, bool]:
    """(M, N, the strides of gate's rows and of up's, do rows mean nothing); of flat tensors one row of everything."""
    check_float(op, "gate", gate)
    if not 0 <= act <= 2:
        fail(op, f"act must be 0 (silu), 1 (gelu, tanh form) or 2 (gelu), got {act}")
    if up is None:
        if gate.dim() < 1:
            fail(op, "gate must have at least 1 dimension, got a scalar")
        if gate.shape[-1] % 2:
            fail(op, f"gate without an up must have an even last dimension, got shape {tuple(gate.shape)}")
        N, stride = gate.shape[-1] // 2, row_stride(op, "gate", gate)
        return gate.numel() // (2 * N) if N else 0, N, stride, stride, False
    if up_first:
        fail(op, "up_first is of a gate that holds both, got an up beside it")
    check_device(op, "up", up, gate)
    check_same_shape(op, "up", up, "gate", gate)
    check_dtype(op, "up", up, gate.dtype)
    if gate.is_contiguous() and up.is_contiguous():
        return 1, gate.numel(), gate.numel(), gate.numel(), True
    N = gate.shape[-1]
    return gate.numel() // N if N else 0, N, row_stride(op, "gate", gate), row_stride(op, "up", up), False


def _geometry(tunable: Tunable, gate: Tensor, N: int, flat: bool, *strides: int) -> tuple[Parameters, int, int]:
    """(launch parameters, elements of an access, chunks of columns)"""
    p, vec = tunable(arch(gate.device), N=0 if flat else N, dtype=gate.dtype), 16 // gate.itemsize
    if not flat and any(n % vec for n in (N, *strides)):
        vec = 1
    return p, vec, cdiv(N, p["BLOCK_N"])


def glu_fwd(gate: Tensor, up: Tensor | None, act: int, up_first: bool) -> Tensor:
    M, N, gate_stride, up_stride, flat = _check("glu_fwd", gate, up, act, up_first)
    y = gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], N))
    if not M:
        return y
    p, vec, chunks = _geometry(FWD, gate, N, flat, gate_stride, up_stride)
    launch(
        glu_fwd_kernel, (cdiv(M, p["BLOCK_M"]) * chunks,), gate, y, gate, up, M, N, chunks, gate_stride, up_stride,
        ACT=act, UP_FIRST=up_first, VEC=vec, **p,
    )  # fmt: skip
    return y


def glu_bwd(dy: Tensor, gate: Tensor, up: Tensor | None, act: int, up_first: bool) -> tuple[Tensor, Tensor]:
    op = "glu_bwd"
    M, N, gate_stride, up_stride, flat = _check(op, gate, up, act, up_first)
    check_device(op, "dy", dy, gate)
    if up is not None:
        check_same_shape(op, "dy", dy, "gate", gate)
    elif dy.shape != (*gate.shape[:-1], N):
        half = f"gate {tuple(gate.shape)} with half the columns"
        fail(op, f"dy must have the shape of {half}, got {tuple(dy.shape)}")
    check_dtype(op, "dy", dy, gate.dtype)
    check_contiguous(op, "dy", dy)
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(0 if up is None else gate.shape)
    if not M:
        return dgate, dup
    out_stride = N if up is not None else 2 * N
    p, vec, chunks = _geometry(BWD, gate, N, flat, gate_stride, up_stride)
    launch(
        glu_bwd_kernel, (cdiv(M, p["BLOCK_M"]) * chunks,), gate, dgate, None if up is None else dup, dy, gate, up, M, N,
        chunks, gate_stride, up_stride, out_stride, ACT=act, UP_FIRST=up_first, VEC=vec, **p,
    )  # fmt: skip
    return dgate, dup
