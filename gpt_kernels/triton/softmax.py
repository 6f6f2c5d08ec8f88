"""softmax: forward reads x (and mask) and writes y, backward reads dy and y and writes dx.

A short row stays in registers, several of them to a program. A long one is read twice by the same program within
microseconds, the second time backwards from L2: once for maximum and sum, then for the values. Where long rows are too few
for the GPU each is split over several programs, in two launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.common import rows_of
from .aligned import (
    LOG2E,
    LOWEST,
    edge_columns,
    floor_to,
    is_body,
    is_head,
    is_tail,
    joined,
    offset_of,
    online,
    part_of,
    split_rows,
    unturned,
    vector,
    window,
)
from .common import arch, cdiv, check_device, check_like, check_rows, dtype_name, fail, launch, wave_of
from .tuning import Parameters, Tunable


@triton.jit
def visible_of(t, T, N, CAUSAL: tl.constexpr):
    """Columns that row t of a (T, N) matrix sees: all, or bottom-right causal 0 ... t + N - T."""
    visible = tl.zeros_like(t).to(tl.int32) + N
    if CAUSAL:
        visible = tl.minimum(tl.maximum(t + N - T + 1, 0), N).to(tl.int32)
    return visible


@triton.jit
def scores(x, mask, column, STEP: tl.constexpr, inside, scale):
    """z = scale x + mask where inside, else -inf"""
    z = tl.load(x, inside, 0.0).to(tl.float32) * scale
    if mask is not None:
        if mask.dtype.element_ty == tl.int1:
            inside &= tl.load(mask + column * STEP, inside, 0)
        else:
            z += tl.load(mask + column * STEP, inside, 0.0).to(tl.float32)
    return tl.where(inside, z, float("-inf"))


# ---- short rows: a tile of them in registers ----


@triton.jit
def softmax_fwd_kernel(
    y, x, mask, T, N, scale, mask_t, mask_sizes, mask_strides,
    STEP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    outer, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    t = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    if ALIGNED:
        N = floor_to(N, VEC)
    at = (outer.to(tl.int64) * T + t) * N + column
    if mask is not None:
        mask += offset_of(outer, mask_sizes, mask_strides) + t * mask_t
    visible, inside = visible_of(t, T, N, CAUSAL), (t < T) & (column < N)
    # whole groups are read up to the last visible column, so that accesses stay wide
    read = inside
    if CAUSAL:
        read &= column < floor_to(visible + VEC - 1, VEC)
    z = scores(x + at, mask, column, STEP, read, scale)
    if CAUSAL:
        z = tl.where(column < visible, z, float("-inf"))
    top = tl.maximum(tl.max(z, 1, keep_dims=True), LOWEST)
    e = tl.exp2((z - top) * LOG2E)
    total = tl.sum(e, 1, keep_dims=True)
    tl.store(y + at, (e * tl.where(total == 0, 0.0, 1.0 / total)).to(y.dtype.element_ty), inside)


@triton.jit
def softmax_bwd_kernel(
    dx, dy, y, T, N, scale,
    CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    outer, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    t = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    if ALIGNED:
        N = floor_to(N, VEC)
    at, inside = (outer.to(tl.int64) * T + t) * N + column, (t < T) & (column < N)
    read = inside & (column < floor_to(visible_of(t, T, N, CAUSAL) + VEC - 1, VEC))  # beyond it y is zero
    p, g = tl.load(y + at, read, 0.0).to(tl.float32), tl.load(dy + at, read, 0.0).to(tl.float32)
    tl.store(dx + at, (p * (g - tl.sum(p * g, 1, keep_dims=True)) * scale).to(dx.dtype.element_ty), inside)


# ---- long rows: chunks of one row; or, with SPLIT, of a part of it: READ and WRITE are launches of their own then ----


@triton.jit
def softmax_fwd_long_kernel(
    y, x, mask, partial, T, N, span, splits, scale, mask_t, mask_sizes, mask_strides,
    STEP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, READ: tl.constexpr,
    WRITE: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, begin, n = part_of(N, span, splits, SPLIT)
    outer, t, start, lane = row // T, row % T, row.to(tl.int64) * N + begin, tl.arange(0, BLOCK_N)
    visible = tl.minimum(tl.maximum(visible_of(t, T, N, CAUSAL) - begin, 0), n)
    x, y = x + floor_to(start, VEC), y + floor_to(start, VEC)
    skew, first, last = window(start, visible, VEC, ALIGNED)
    if mask is not None:
        mask += offset_of(outer, mask_sizes, mask_strides) + t.to(tl.int64) * mask_t + (begin - skew) * STEP
    EDGES: tl.constexpr = CAUSAL or not ALIGNED
    if READ:
        top, total = tl.full([BLOCK_N], LOWEST, tl.float32), tl.zeros([BLOCK_N], tl.float32)
        if EDGES:
            head = is_head(lane, skew, first, visible)
            top, total = online(top, total, scores(x + lane, mask, lane, STEP, head, scale))
        for chunk in tl.range(0, last, BLOCK_N, num_stages=STAGES):
            column = chunk + lane
            z = scores(x + column, mask, column, STEP, is_body(column, first, last), scale)
            top, total = online(top, total, z)
        if EDGES:
            column = floor_to(last, BLOCK_N) + lane
            tail = is_tail(column, skew, first, last, visible)
            top, total = online(top, total, scores(x + column, mask, column, STEP, tail, scale))
        row_top = tl.max(top, 0)
        row_total = tl.sum(unturned(total * tl.exp2((top - row_top) * LOG2E), skew, BLOCK_N, ALIGNED), 0)
        if SPLIT:
            tl.store(partial + tl.program_id(0) * 2, row_top)
            tl.store(partial + tl.program_id(0) * 2 + 1, row_total)
    if WRITE:
        if SPLIT:
            s = tl.arange(0, MAX_SPLITS)
            at = partial + (row * splits + s) * 2
            tops, totals = tl.load(at, s < splits, LOWEST), tl.load(at + 1, s < splits, 0.0)
            row_top = tl.max(tops, 0)
            row_total = tl.sum(totals * tl.exp2((tops - row_top) * LOG2E), 0)
        inverse = tl.where(row_total == 0, 0.0, 1.0 / row_total)
        seen = floor_to(skew + visible + VEC - 1, VEC)
        skew, first, last = window(start, n, VEC, ALIGNED)
        for chunk in tl.range(0, last, BLOCK_N, num_stages=STAGES):
            column = floor_to(last - 1, BLOCK_N) - chunk + lane  # backwards: what was read last is the likeliest to be in L2
            body = is_body(column, first, last)
            inside = body
            if CAUSAL:
                inside &= column < seen
            z = scores(x + column, mask, column, STEP, inside, scale)
            if CAUSAL:
                z = tl.where(column < skew + visible, z, float("-inf"))
            tl.store(y + column, (tl.exp2((z - row_top) * LOG2E) * inverse).to(y.dtype.element_ty), body)
        if not ALIGNED:
            column, edge = edge_columns(skew, first, last, n, VEC)
            z = scores(x + column, mask, column, STEP, edge & (column < skew + visible), scale)
            tl.store(y + column, (tl.exp2((z - row_top) * LOG2E) * inverse).to(y.dtype.element_ty), edge)


@triton.jit
def softmax_bwd_long_kernel(
    dx, dy, y, partial, T, N, span, splits, scale,
    CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, READ: tl.constexpr,
    WRITE: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, begin, n = part_of(N, span, splits, SPLIT)
    start, lane = row.to(tl.int64) * N + begin, tl.arange(0, BLOCK_N)
    dx, dy, y = dx + floor_to(start, VEC), dy + floor_to(start, VEC), y + floor_to(start, VEC)
    skew, first, last = window(start, n, VEC, ALIGNED)
    seen = floor_to(skew + visible_of(row % T, T, N, CAUSAL) - begin + VEC - 1, VEC)  # beyond it y is zero
    if READ:
        dot = tl.zeros([BLOCK_N], tl.float32)
        if not ALIGNED:
            head = is_head(lane, skew, first, n)
            dot += tl.load(dy + lane, head, 0.0).to(tl.float32) * tl.load(y + lane, head, 0.0).to(tl.float32)
        for chunk in tl.range(0, tl.minimum(last, seen), BLOCK_N, num_stages=STAGES):
            column = chunk + lane
            body = is_body(column, first, last)
            dot += tl.load(dy + column, body, 0.0).to(tl.float32) * tl.load(y + column, body, 0.0).to(tl.float32)
        if not ALIGNED:
            column = floor_to(last, BLOCK_N) + lane
            tail = is_tail(column, skew, first, last, n)
            dot += tl.load(dy + column, tail, 0.0).to(tl.float32) * tl.load(y + column, tail, 0.0).to(tl.float32)
        row_dot = tl.sum(unturned(dot, skew, BLOCK_N, ALIGNED), 0)
        if SPLIT:
            tl.store(partial + tl.program_id(0), row_dot)
    if WRITE:
        if SPLIT:
            s = tl.arange(0, MAX_SPLITS)
            row_dot = tl.sum(tl.load(partial + row * splits + s, s < splits, 0.0), 0)
        for chunk in tl.range(0, last, BLOCK_N, num_stages=STAGES):
            column = floor_to(last - 1, BLOCK_N) - chunk + lane  # backwards: what was read last is the likeliest to be in L2
            body = is_body(column, first, last)
            inside = body
            if CAUSAL:
                inside &= column < seen
            p, g = tl.load(y + column, inside, 0.0).to(tl.float32), tl.load(dy + column, inside, 0.0).to(tl.float32)
            tl.store(dx + column, (p * (g - row_dot) * scale).to(dx.dtype.element_ty), body)
        if not ALIGNED:
            column, edge = edge_columns(skew, first, last, n, VEC)
            p, g = tl.load(y + column, edge, 0.0).to(tl.float32), tl.load(dy + column, edge, 0.0).to(tl.float32)
            tl.store(dx + column, (p * (g - row_dot) * scale).to(dx.dtype.element_ty), edge)


# ---- launch parameters ----


def _table(short: int) -> tuple[Callable[..., Parameters], Callable[..., list[Parameters]]]:
    """Launch parameters of a kernel whose rows stay in registers up to `short` columns; BLOCK_M == 0: a long row, in chunks.

    Two programs share a processor, one reads while the other reduces. More would not be good for long rows: those under way
    have to stay in L2 until their second reading.
    """

    def default(arch: str, N: int, dtype: torch.dtype) -> Parameters:
        wave = wave_of(arch)
        if N > short:
            warps = 512 // wave
            return {"BLOCK_M": 0, "BLOCK_N": warps * wave * 16 // dtype.itemsize, "STAGES": 4, "num_warps": warps}
        block_n = max(16, triton.next_power_of_2(N))
        block_m = max(1, 2048 // block_n)
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": max(128 // wave, block_m * block_n // (16 * wave))}

    def candidates(arch: str, N: int, dtype: torch.dtype) -> list[Parameters]:
        best, more = default(arch, N, dtype), []
        if N > short:
            more = [
                {**best, "BLOCK_N": best["BLOCK_N"] // best["num_warps"] * warps, "STAGES": stages, "num_warps": warps}
                for warps in (4, 8, 16, 32)
                for stages in (2, 3, 4, 5)
                if warps * 32 <= 1024
            ]
        else:
            more = [
                {**best, "BLOCK_M": m, "num_warps": warps}
                for m in (1, 2, 4, 8, 16)
                for warps in (1, 2, 4, 8, 16, 32)
                if 4 <= m * best["BLOCK_N"] // (32 * warps) <= 32
            ]
        return [best, *(p for p in more if p != best)]

    return default, candidates


def _problem(backward: bool):
    def problem(device, N: int, dtype: torch.dtype):
        x = torch.randn(max(1, 2**25 // N), N, device=device, dtype=dtype)
        return lambda: softmax_bwd(x, x, 1.0, False) if backward else softmax_fwd(x, None, 1.0, False)

    return problem


SOFTMAX_FWD = Tunable("softmax_fwd", *_table(16384), _problem(False))
SOFTMAX_BWD = Tunable("softmax_bwd", *_table(8192), _problem(True))


# ---- launchers ----


def launch_long(kernel, M: int, N: int, x: Tensor, tensors: tuple, numbers: int, T: int, rest: tuple, options, p) -> None:
    """A whole row per program; or parts of rows in two launches, `numbers` floats of each part between them."""
    splits, span = split_rows(M, N, p["BLOCK_N"], x)
    partial = x.new_empty((M, splits, numbers), dtype=torch.float32) if splits > 1 else None
    for read, write in ((True, False), (False, True)) if splits > 1 else ((True, True),):
        launch(
            kernel, (M * splits,), x, *tensors, partial, T, N, span, splits, *rest,
            **options, **p, SPLIT=splits > 1, READ=read, WRITE=write, MAX_SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip


def _check(op: str, name: str, x: Tensor, causal: bool) -> None:
    check_rows(op, name, x)
    if causal and x.dim() < 2:
        fail(op, f"causal needs x with at least 2 dimensions (rows, columns), got {tuple(x.shape)}")


def _mask_rows(op: str, mask: Tensor | None, x: Tensor, causal: bool):
    """(T, mask_t, sizes, strides, step): x as matrices of T rows; the mask moves by mask_t from row to row of a matrix, by
    strides over the joined dimensions of the matrices, whose sizes stand beside, and by step from column to column."""
    if mask is None:
        return x.shape[-2] if causal else x.shape[:-1].numel(), 0, (), (), 0
    check_device(op, "mask", mask, x)
    if mask.dtype not in (torch.bool, x.dtype, torch.float32):
        fail(op, f"mask must be bool, {dtype_name(x.dtype)} like x or float32, got {dtype_name(mask.dtype)}")
    if x.dim() > 16:
        fail(op, f"x must have at most 16 dimensions with a mask, got {x.dim()}")
    if mask.dim() > x.dim() or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(x.shape), strict=False)):
        fail(op, f"mask must broadcast to x {tuple(x.shape)}, got {tuple(mask.shape)}")
    missing = x.dim() - mask.dim()
    *steps, step = [0] * missing + [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    if step not in (0, 1):
        fail(op, f"mask must be contiguous in its last dimension, got stride {step}")
    if causal:
        sizes, (strides,) = joined(x.shape[:-2], steps[:-1])
        return x.shape[-2], steps[-1], tuple(sizes), tuple(strides), step
    sizes, (strides,) = joined(x.shape[:-1], steps)
    return sizes[0], strides[0], tuple(sizes[1:]), tuple(strides[1:]), step


def softmax_fwd(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    op = "softmax_fwd"
    _check(op, "x", x, causal)
    if not math.isfinite(scale):
        fail(op, f"scale must be finite, got {scale:g}")
    T, mask_t, sizes, strides, step = _mask_rows(op, mask, x, causal)
    y = x.new_empty(x.shape)
    (M, N), VEC = rows_of(x).shape, vector(x)
    p = dict(SOFTMAX_FWD(arch(x.device), N=N, dtype=x.dtype))
    options = {"STEP": step, "CAUSAL": causal, "ALIGNED": N % VEC == 0, "VEC": VEC}
    masked = (scale, mask_t, sizes, strides)
    if x.numel() == 0:
        return y
    if p["BLOCK_M"]:
        grid = (M // T * cdiv(T, p["BLOCK_M"]),)
        launch(softmax_fwd_kernel, grid, x, y, x, mask, T, N, *masked, **options, **p)
        return y
    del p["BLOCK_M"]
    launch_long(softmax_fwd_long_kernel, M, N, x, (y, x, mask), 2, T, masked, options, p)
    return y


def softmax_bwd(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    op = "softmax_bwd"
    _check(op, "y", y, causal)
    check_like(op, "dy", dy, "y", y)
    dx = y.new_empty(y.shape)
    (M, N), VEC = rows_of(y).shape, vector(y)
    T = y.shape[-2] if causal else M
    p = dict(SOFTMAX_BWD(arch(y.device), N=N, dtype=y.dtype))
    options = {"CAUSAL": causal, "ALIGNED": N % VEC == 0, "VEC": VEC}
    if y.numel() == 0:
        return dx
    if p["BLOCK_M"]:
        grid = (M // T * cdiv(T, p["BLOCK_M"]),)
        launch(softmax_bwd_kernel, grid, y, dx, dy, y, T, N, scale, **options, **p)
        return dx
    del p["BLOCK_M"]
    launch_long(softmax_bwd_long_kernel, M, N, y, (dx, dy, y), 1, T, (scale,), options, p)
    return dx
