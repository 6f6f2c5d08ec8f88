"""cross_entropy: forward reads the logits once for maximum, sum and loss, and where asked writes the gradient while the row is
in registers or L2; backward writes it from the saved statistics, also over the logits themselves.

Nothing is read on the host: a target out of range, where the CPU backend raises, makes the loss and the gradient of its row
NaN and is never used as an address. Sums over rows are one program's, in fixed order. Launches: forward 1, and 1 for the sum
over rows; a gradient of the mean needs the number of rows that count, 1 more; few rows of many classes are split, 1 more.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from .common import (
    arch,
    cdiv,
    check_contiguous,
    check_device,
    check_dtype,
    check_float,
    check_same_shape,
    fail,
    launch,
    wave_of,
)
from .tuning import Parameters, Tunable

# ---- a row's mathematics; formulas: ops/cross_entropy.py ----


@triton.jit
def tanh(u):
    """Within a few units of float32's last place, which 1 - 2 / (exp(2 u) + 1) is not near 0."""
    e, s = tl.exp2(tl.abs(u) * (-2 * LOG2E)), u * u
    series = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
    far = (1 - e) / (1 + e)
    return tl.where(s < 0.09, u * series, tl.where(u < 0, -far, far))


@triton.jit
def expm1(d):
    series = d * (1 + d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7 * (1 + d / 8)))))))
    return tl.where(tl.abs(d) < 0.5, series, tl.exp2(d * LOG2E) - 1)


@triton.jit
def load_capped(x, inside, softcap, SOFTCAP: tl.constexpr):
    z = tl.load(x, inside, 0.0).to(tl.float32)
    if SOFTCAP:
        z = softcap * tanh(z * (1 / softcap))
    return z


@triton.jit
def load_target(target, row, live, ignore_index, V):
    """(class, or -1 where it is none; is the row counted; is its target out of range)"""
    t = tl.load(target + row, live, ignore_index)
    counted = t != ignore_index
    valid = counted & (t >= 0) & (t < V)
    return tl.where(valid, t, -1).to(tl.int32), counted, counted & (valid == 0)


@triton.jit
def store_loss(
    loss, z_loss, lse, row, M, live, counted, bad, top, log_sum, x_target, distance, smoothing, square_scale,
    SMOOTHING: tl.constexpr,
):  # fmt: skip
    """distance: mean of x - top"""
    z = square_scale * (top + log_sum) * (top + log_sum)
    value = (1 - smoothing) * (top - x_target + log_sum) + z
    if SMOOTHING:
        value += smoothing * (log_sum - distance)
    tl.store(loss + row, tl.where(counted, tl.where(bad, float("nan"), value), 0.0), live)
    tl.store(z_loss + row, tl.where(counted, tl.where(bad, float("nan"), z), 0.0), live)
    tl.store(lse + row, tl.where(counted, top, 0.0), live)
    tl.store(lse + M + row, tl.where(counted, log_sum, 0.0), live)


@triton.jit
def scale_of(dloss, count, row, live, bad):
    """The factor of a row's gradient: dloss, its own or the sum's, over the count of a mean; either may be missing."""
    scale = tl.where(bad, float("nan"), 1.0)
    if dloss is not None:
        scale *= tl.load(dloss + row, live, 0.0)
    if count is not None:
        scale /= tl.load(count)
    return scale


@triton.jit
def gradient(z, at_target, x_target, top, log_sum, V, smoothing, square_scale, softcap, scale, SOFTCAP: tl.constexpr):
    """(p (1 + slope) - smoothing / V - (1 - smoothing) [v == target]) scale; the target's p - 1 is an expm1"""
    slope, uniform = 2 * square_scale * (top + log_sum), smoothing / V
    here = expm1(x_target - top - log_sum) * (1 + slope) + slope + (smoothing - uniform)
    d = tl.exp2((z - top - log_sum) * LOG2E) * (1 + slope) - uniform
    d = tl.where(at_target, here, d) * scale
    if SOFTCAP:
        d *= 1 - (z * (1 / softcap)) * (z * (1 / softcap))
    return d


# ---- short rows: a tile of them in registers ----


@triton.jit
def tile_rows(M, sizes, x_strides, dx_strides, ALIGNED: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr):
    """(row indices, which of them exist, offsets of their beginnings in x and in dx)"""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    x_at, dx_at = offset_of(row, sizes, x_strides), offset_of(row, sizes, dx_strides)
    if ALIGNED:
        x_at, dx_at = floor_to(x_at, VEC), floor_to(dx_at, VEC)
    return row, row < M, x_at, dx_at


@triton.jit
def cross_entropy_fwd_kernel(
    loss, z_loss, lse, dx, x, target, count, M, V, sizes, x_strides, dx_strides, ignore_index, smoothing, square_scale, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, live, x_at, dx_at = tile_rows(M, sizes, x_strides, dx_strides, ALIGNED, VEC, BLOCK_M)
    x += x_at
    t, counted, bad = load_target(target, row, live, ignore_index, V)
    column = tl.arange(0, BLOCK_N)[None, :]
    end = floor_to(V, VEC) if ALIGNED else V
    inside = column < end
    x_target = load_capped(x + t, t >= 0, softcap, SOFTCAP)
    z = tl.where(inside, load_capped(x + column, inside & counted, softcap, SOFTCAP), float("-inf"))
    top = tl.max(z, 1, keep_dims=True)
    away = z - tl.maximum(top, LOWEST)
    log_sum = tl.log(tl.sum(tl.exp2(away * LOG2E), 1, keep_dims=True))
    distance = tl.sum(tl.where(inside, away, 0.0), 1, keep_dims=True) / V
    store_loss(
        loss, z_loss, lse, row, M, live, counted, bad, top, log_sum, x_target, distance, smoothing, square_scale, SMOOTHING
    )  # fmt: skip
    if dx is not None:
        scale = scale_of(None, count, row, live, bad)
        d = gradient(z, column == t, x_target, top, log_sum, V, smoothing, square_scale, softcap, scale, SOFTCAP)
        tl.store(dx + dx_at + column, tl.where(counted, d, 0.0).to(dx.dtype.element_ty), inside & live)


@triton.jit
def cross_entropy_bwd_kernel(
    dx, dloss, x, target, lse, count, M, V, sizes, x_strides, dx_strides, ignore_index, smoothing, square_scale, softcap,
    MADE: tl.constexpr, EACH: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if MADE:  # in forward, for dloss = 1
        if tl.load(dloss) == 1:
            return
    row, live, x_at, dx_at = tile_rows(M, sizes, x_strides, dx_strides, ALIGNED, VEC, BLOCK_M)
    x, dx = x + x_at, dx + dx_at
    t, counted, bad = load_target(target, row, live, ignore_index, V)
    column = tl.arange(0, BLOCK_N)[None, :]
    end = floor_to(V, VEC) if ALIGNED else V
    inside = column < end
    x_target = load_capped(x + t, t >= 0, softcap, SOFTCAP)
    tl.debug_barrier()  # dx may be x: nobody writes before everybody has the target's logit
    z = load_capped(x + column, inside & counted, softcap, SOFTCAP)
    top, log_sum = tl.load(lse + row, live, 0.0), tl.load(lse + M + row, live, 0.0)
    scale = scale_of(dloss, count, row * EACH, live, bad)
    d = gradient(z, column == t, x_target, top, log_sum, V, smoothing, square_scale, softcap, scale, SOFTCAP)
    tl.store(dx + column, tl.where(counted, d, 0.0).to(dx.dtype.element_ty), inside & live)


# ---- long rows: chunks of one row; or, with SPLIT, of a part of it ----


@triton.jit
def write_gradient(
    dx, x, t, counted, top, log_sum, x_target, scale, skew, n, V, smoothing, square_scale, softcap,
    SOFTCAP: tl.constexpr, EDGES: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """n elements of a row; t: the target's column, negative or beyond them if it isn't here"""
    first, last = floor_to(skew + VEC - 1, VEC), floor_to(skew + n, VEC)
    seen = tl.where(counted, last + VEC, 0)  # an ignored row is not read
    for chunk in tl.range(0, last, BLOCK_N, num_stages=STAGES):
        column = floor_to(last - 1, BLOCK_N) - chunk + tl.arange(0, BLOCK_N)  # backwards, as in softmax
        body = is_body(column, first, last)
        z = load_capped(x + column, body & (column < seen), softcap, SOFTCAP)
        d = gradient(z, column == t, x_target, top, log_sum, V, smoothing, square_scale, softcap, scale, SOFTCAP)
        tl.store(dx + column, tl.where(counted, d, 0.0).to(dx.dtype.element_ty), body)
    if EDGES:
        column, edge = edge_columns(skew, first, last, n, VEC)
        z = load_capped(x + column, edge & (column < seen), softcap, SOFTCAP)
        d = gradient(z, column == t, x_target, top, log_sum, V, smoothing, square_scale, softcap, scale, SOFTCAP)
        tl.store(dx + column, tl.where(counted, d, 0.0).to(dx.dtype.element_ty), edge)


@triton.jit
def long_row(row, begin, sizes, x_strides, dx_strides, SAME: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """(offsets of column 0 of the row's part in x and in dx, skew). SAME: dx has x's skew in every row; it too is written by
    16 bytes."""
    x_at, dx_at = offset_of(row, sizes, x_strides) + begin, offset_of(row, sizes, dx_strides) + begin
    skew, _, _ = window(x_at, 0, VEC, ALIGNED)
    return floor_to(x_at, VEC), floor_to(dx_at, VEC) if SAME else dx_at - skew, skew


@triton.jit
def cross_entropy_fwd_long_kernel(
    loss, z_loss, lse, dx, partial, x, target, count, M, V, span, splits, sizes, x_strides, dx_strides, ignore_index, smoothing,
    square_scale, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, SAME: tl.constexpr, ALIGNED: tl.constexpr, EDGES: tl.constexpr,
    VEC: tl.constexpr, SPLIT: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, begin, n = part_of(V, span, splits, SPLIT)
    t, counted, bad = load_target(target, row, row < M, ignore_index, V)
    x_at, dx_at, skew = long_row(row, begin, sizes, x_strides, dx_strides, SAME, ALIGNED, VEC)
    x += x_at
    # distances are measured from the row's first logit: a sum of large ones would lose the digits of their mean
    anchor = load_capped(x + skew - begin, counted, softcap, SOFTCAP)
    anchor = tl.where(tl.abs(anchor) < float("inf"), anchor, 0.0)
    if READ:
        m = tl.where(counted, n, 0)  # an ignored row is not read
        first, last = floor_to(skew + VEC - 1, VEC), floor_to(skew + m, VEC)
        top, total = tl.full([BLOCK_N], LOWEST, tl.float32), tl.zeros([BLOCK_N], tl.float32)
        distance, lane = tl.zeros([BLOCK_N], tl.float32), tl.arange(0, BLOCK_N)
        if EDGES:
            head = is_head(lane, skew, first, m)
            z = load_capped(x + lane, head, softcap, SOFTCAP)
            top, total = online(top, total, tl.where(head, z, float("-inf")))
            distance += tl.where(head, z - anchor, 0.0)
        for chunk in tl.range(0, last, BLOCK_N, num_stages=STAGES):
            body = is_body(chunk + lane, first, last)
            z = load_capped(x + (chunk + lane), body, softcap, SOFTCAP)
            top, total = online(top, total, tl.where(body, z, float("-inf")))
            if SMOOTHING:
                distance += tl.where(body, z - anchor, 0.0)
        if EDGES:
            column = floor_to(last, BLOCK_N) + lane
            tail = is_tail(column, skew, first, last, m)
            z = load_capped(x + column, tail, softcap, SOFTCAP)
            top, total = online(top, total, tl.where(tail, z, float("-inf")))
            distance += tl.where(tail, z - anchor, 0.0)
        row_top = tl.max(top, 0)
        row_total = tl.sum(unturned(total * tl.exp2((top - row_top) * LOG2E), skew, BLOCK_N, ALIGNED), 0)
        row_distance = 0.0
        if SMOOTHING:
            row_distance = tl.sum(unturned(distance, skew, BLOCK_N, ALIGNED), 0)
        if SPLIT:
            at = partial + tl.program_id(0) * 3
            tl.store(at, row_top)
            tl.store(at + 1, row_total)
            tl.store(at + 2, row_distance)
    if WRITE:
        if SPLIT:
            s = tl.arange(0, MAX_SPLITS)
            at = partial + (row * splits + s) * 3
            tops, totals = tl.load(at, s < splits, LOWEST), tl.load(at + 1, s < splits, 0.0)
            row_top = tl.max(tops, 0)
            row_total = tl.sum(totals * tl.exp2((tops - row_top) * LOG2E), 0)
            row_distance = tl.sum(tl.load(at + 2, s < splits, 0.0), 0)
        row_top = tl.where(row_total == 0, float("-inf"), row_top)
        log_sum, row_distance = tl.log(row_total), row_distance / V + (anchor - row_top)
        x_target = load_capped(x + skew - begin + t, t >= 0, softcap, SOFTCAP)
        store_loss(
            loss, z_loss, lse, row, M, begin == 0, counted, bad, row_top, log_sum, x_target, row_distance, smoothing,
            square_scale, SMOOTHING,
        )  # fmt: skip
        if dx is not None:
            scale = scale_of(None, count, row, row < M, bad)
            write_gradient(
                dx + dx_at, x, tl.where(t >= 0, t - begin + skew, -1), counted, row_top, log_sum, x_target, scale, skew, n, V,
                smoothing, square_scale, softcap, SOFTCAP, EDGES, VEC, BLOCK_N, STAGES,
            )  # fmt: skip


@triton.jit
def cross_entropy_bwd_long_kernel(
    dx, dloss, x, target, lse, count, M, V, span, splits, sizes, x_strides, dx_strides, ignore_index, smoothing, square_scale,
    softcap,
    MADE: tl.constexpr, EACH: tl.constexpr, SOFTCAP: tl.constexpr, SAME: tl.constexpr, ALIGNED: tl.constexpr,
    EDGES: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if MADE:
        if tl.load(dloss) == 1:
            return
    row, begin, n = part_of(V, span, splits, SPLIT)
    t, counted, bad = load_target(target, row, row < M, ignore_index, V)
    x_at, dx_at, skew = long_row(row, begin, sizes, x_strides, dx_strides, SAME, ALIGNED, VEC)
    x, dx = x + x_at, dx + dx_at
    t = tl.where((t >= begin) & (t < begin + n), t - begin + skew, -1)
    # dx may be x: only the part that overwrites the target's logit reads it, and nobody there writes before everybody has it
    x_target = load_capped(x + t, t >= 0, softcap, SOFTCAP)
    tl.debug_barrier()
    top, log_sum, scale = tl.load(lse + row), tl.load(lse + M + row), scale_of(dloss, count, row * EACH, row < M, bad)
    write_gradient(
        dx, x, t, counted, top, log_sum, x_target, scale, skew, n, V, smoothing, square_scale, softcap,
        SOFTCAP, EDGES, VEC, BLOCK_N, STAGES,
    )  # fmt: skip


# ---- sums over rows, by one program ----


@triton.jit
def count_kernel(count, target, M, ignore_index, BLOCK: tl.constexpr):
    """count = number of rows that are not ignored"""
    kept = tl.zeros([BLOCK], tl.int32)
    for m in range(0, M, BLOCK):
        row = m + tl.arange(0, BLOCK)
        kept += (tl.load(target + row, row < M, ignore_index) != ignore_index).to(tl.int32)
    tl.store(count, tl.sum(kept, 0).to(tl.float32))


@triton.jit
def reduce_kernel(loss, z_loss, losses, z_losses, target, M, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    total, z_total, kept = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for m in range(0, M, BLOCK):
        row = m + tl.arange(0, BLOCK)
        total += tl.load(losses + row, row < M, 0.0)
        z_total += tl.load(z_losses + row, row < M, 0.0)
        kept += (tl.load(target + row, row < M, ignore_index) != ignore_index).to(tl.int32)
    n = tl.sum(kept, 0).to(tl.float32) if MEAN else 1.0  # the mean of nothing is nan, as in torch
    tl.store(loss, tl.sum(total, 0) / n)
    tl.store(z_loss, tl.sum(z_total, 0) / n)


# ---- launch parameters ----

SHORT = 4096  # the longest row that stays in registers


def _default(arch: str, V: int, dtype: torch.dtype, plain: bool) -> Parameters:
    """BLOCK_M == 0: a long row, in chunks; as in softmax.py. plain: neither smoothing nor a cap, which take registers."""
    wave = wave_of(arch)
    if V > SHORT:
        warps = (512 if plain else 256) // wave
        return {"BLOCK_M": 0, "BLOCK_N": warps * wave * 16 // dtype.itemsize, "STAGES": 4, "num_warps": warps}
    block_n = max(16, triton.next_power_of_2(V))
    block_m = max(1, 2048 // block_n)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": max(128 // wave, block_m * block_n // (16 * wave))}


def _candidates(arch: str, V: int, dtype: torch.dtype, plain: bool) -> list[Parameters]:
    best = _default(arch, V, dtype, plain)
    if V <= SHORT:
        more = [{**best, "num_warps": warps} for warps in (1, 2, 4, 8, 16)]
    else:
        lane = best["BLOCK_N"] // best["num_warps"]
        more = [
            {**best, "BLOCK_N": lane * warps, "STAGES": stages, "num_warps": warps}
            for warps in (4, 8, 16, 32)
            for stages in (2, 3, 4, 5)
            if lane * warps * dtype.itemsize <= 2**14
        ]
    return [best, *(p for p in more if p != best)]


def _problem(backward: bool):
    def problem(device, V: int, dtype: torch.dtype, plain: bool):
        M, options = max(1, 2**27 // V), (-100, 1, 0.0 if plain else 0.1, 0.0, 0.0 if plain else 30.0)
        logits, target = torch.randn(M, V, device=device, dtype=dtype), torch.randint(V, (M,), device=device)
        loss, _, lse, _ = cross_entropy_fwd(logits, target, *options, False)
        if backward:
            return lambda: cross_entropy_bwd(loss, logits, target, lse, *options)
        return lambda: cross_entropy_fwd(logits, target, *options, True)

    return problem


CROSS_ENTROPY_FWD = Tunable("cross_entropy_fwd", _default, _candidates, _problem(False))
CROSS_ENTROPY_BWD = Tunable("cross_entropy_bwd", _default, _candidates, _problem(True))


# ---- launchers ----


def _check(op: str, logits: Tensor, target: Tensor, reduction: int, smoothing: float, square_scale: float, softcap: float):
    check_float(op, "logits", logits)
    if logits.dim() < 1:
        fail(op, "logits must have at least 1 dimension, got a scalar")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        fail(op, f"the last dimension of logits must be contiguous, its stride is {logits.stride(-1)}")
    check_device(op, "target", target, logits)
    check_dtype(op, "target", target, torch.int64)
    check_contiguous(op, "target", target)
    if target.shape != logits.shape[:-1]:
        shapes = tuple(logits.shape), tuple(target.shape)
        fail(op, "target must have the shape of logits {} without the last dimension, got {}".format(*shapes))
    if not 0 <= reduction <= 2:
        fail(op, f"reduction must be 0 (none), 1 (mean) or 2 (sum), got {reduction}")
    if not 0 <= smoothing <= 1:
        fail(op, f"label_smoothing must be between 0 and 1, got {smoothing:g}")
    if not 0 <= square_scale < math.inf:
        fail(op, f"lse_square_scale must be finite and not negative, got {square_scale:g}")
    if not 0 <= softcap < math.inf:
        fail(op, f"logit_softcap must be finite and not negative (0: none), got {softcap:g}")


def _disjoint(t: Tensor) -> bool:
    """May rows of a tensor be written without touching one another?"""
    extent = t.shape[-1]
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1):
        if stride < extent:
            return False
        extent = stride * size
    return True


def _rows(logits: Tensor, dlogits: Tensor | None):
    """(sizes, x_strides, dx_strides) of the joined leading dimensions, and the constexprs that follow from alignment"""
    V, VEC = logits.shape[-1], vector(logits)
    sizes, (x, dx) = joined(logits.shape[:-1], logits.stride()[:-1], (logits if dlogits is None else dlogits).stride()[:-1])
    x_aligned, same = all(s % VEC == 0 for s in x), all((a - b) % VEC == 0 for a, b in zip(x, dx, strict=True))
    return (tuple(sizes), tuple(x), tuple(dx)), {"x_aligned": x_aligned, "same": same, "whole": V % VEC == 0, "VEC": VEC}


def _short_options(a) -> dict:
    return {"ALIGNED": a["x_aligned"] and a["same"] and a["whole"], "VEC": a["VEC"]}


def _long_options(a) -> dict:
    return {"SAME": a["same"], "ALIGNED": a["x_aligned"], "EDGES": not (a["x_aligned"] and a["whole"]), "VEC": a["VEC"]}


def _count(target: Tensor, ignore_index: int) -> Tensor:
    count = target.new_empty((), dtype=torch.float32)
    launch(count_kernel, (1,), target, count, target, target.numel(), ignore_index, BLOCK=4096, num_warps=8)
    return count


def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    lse_square_scale: float,
    logit_softcap: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("cross_entropy_fwd", logits, target, reduction, label_smoothing, lse_square_scale, logit_softcap)
    M, V = target.numel(), logits.shape[-1]
    losses, z_losses = (target.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
    lse = logits.new_empty((2, M), dtype=torch.float32)
    dlogits = logits.new_empty(logits.shape) if with_grad and reduction else None
    count = _count(target, ignore_index) if dlogits is not None and reduction == 1 else None
    rows, a = _rows(logits, dlogits)
    plain = not (label_smoothing or logit_softcap)
    p = dict(CROSS_ENTROPY_FWD(arch(logits.device), V=V, dtype=logits.dtype, plain=plain))
    numbers = (ignore_index, label_smoothing, lse_square_scale, logit_softcap)
    options = {"SMOOTHING": label_smoothing > 0, "SOFTCAP": logit_softcap > 0}
    if p["BLOCK_M"]:
        launch(
            cross_entropy_fwd_kernel, (cdiv(M, p["BLOCK_M"]),), logits, losses, z_losses, lse, dlogits, logits, target, count,
            M, V, *rows, *numbers, **options, **_short_options(a), **p,
        )  # fmt: skip
    else:
        del p["BLOCK_M"]
        splits, span = split_rows(M, V, p["BLOCK_N"], logits)
        partial = logits.new_empty((M, splits, 3), dtype=torch.float32) if splits > 1 else None
        for read, write in ((True, False), (False, True)) if splits > 1 else ((True, True),):
            launch(
                cross_entropy_fwd_long_kernel, (M * splits,), logits, losses, z_losses, lse, dlogits, partial, logits, target,
                count, M, V, span, splits, *rows, *numbers, **options, **_long_options(a), **p,
                SPLIT=splits > 1, READ=read, WRITE=write, MAX_SPLITS=triton.next_power_of_2(splits),
            )  # fmt: skip
    empty = logits.new_empty(0) if dlogits is None else dlogits
    if reduction == 0:
        return losses, z_losses, lse, empty
    loss, z_loss = (lse.new_empty(()) for _ in range(2))
    launch(
        reduce_kernel, (1,), logits, loss, z_loss, losses, z_losses, target, M, ignore_index, MEAN=reduction == 1, BLOCK=4096,
        num_warps=8,
    )  # fmt: skip
    return loss, z_loss, lse, empty


def cross_entropy_bwd_out(
    dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, reduction: int, label_smoothing: float,
    lse_square_scale: float, logit_softcap: float, made: bool, dlogits: Tensor,
) -> None:  # fmt: skip
    op = "cross_entropy_bwd"
    _check(op, logits, target, reduction, label_smoothing, lse_square_scale, logit_softcap)
    M, V = target.numel(), logits.shape[-1]
    for name, t in (("dloss", dloss), ("lse", lse)):
        check_device(op, name, t, logits)
        check_dtype(op, name, t, torch.float32)
        check_contiguous(op, name, t)
    if dloss.numel() != (1 if reduction else M):
        fail(op, f"dloss must have {1 if reduction else M} elements, got {dloss.numel()}")
    if lse.shape != (2, M):
        fail(op, f"lse must have shape (2, {M}), got {tuple(lse.shape)}")
    check_device(op, "dlogits", dlogits, logits)
    check_dtype(op, "dlogits", dlogits, logits.dtype)
    check_same_shape(op, "dlogits", dlogits, "logits", logits)
    if logits.numel() == 0:
        return
    if (V > 1 and dlogits.stride(-1) != 1) or not _disjoint(dlogits):
        fail(op, "dlogits must have a contiguous last dimension and rows that do not overlap in memory")
    count = _count(target, ignore_index) if reduction == 1 else None
    rows, a = _rows(logits, dlogits)
    p = dict(CROSS_ENTROPY_BWD(arch(logits.device), V=V, dtype=logits.dtype, plain=not logit_softcap))
    numbers = (ignore_index, label_smoothing, lse_square_scale, logit_softcap)
    options = {"MADE": made and reduction != 0, "EACH": int(reduction == 0), "SOFTCAP": logit_softcap > 0}
    if p["BLOCK_M"]:
        launch(
            cross_entropy_bwd_kernel, (cdiv(M, p["BLOCK_M"]),), logits, dlogits, dloss, logits, target, lse, count, M, V,
            *rows, *numbers, **options, **_short_options(a), **p,
        )  # fmt: skip
        return
    del p["BLOCK_M"]
    splits, span = split_rows(M, V, p["BLOCK_N"], logits)
    launch(
        cross_entropy_bwd_long_kernel, (M * splits,), logits, dlogits, dloss, logits, target, lse, count, M, V, span, splits,
        *rows, *numbers, **options, **_long_options(a), **p, SPLIT=splits > 1,
    )  # fmt: skip


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, reduction: int, label_smoothing: float,
    lse_square_scale: float, logit_softcap: float,
) -> Tensor:  # fmt: skip
    dlogits = logits.new_empty(logits.shape)
    options = (ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap)
    cross_entropy_bwd_out(dloss, logits, target, lse, *options, False, dlogits)
    return dlogits
