"""attention's backward pass, deterministic without atomics: every element of a gradient is summed by one program in one order.

delta = rowsum(do o) first; then dk and dv by key blocks (the products s, dp, dv, dk of a tile) and dq by query blocks (s, dp,
dq): seven products where five would do if many programs could add to one dq. A key block's program walks all query heads of its
key head, so that grouped heads need no sum afterwards. A bias's gradient is a pass of its own, only where it is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.attention import _empty_as
from .attention import (
    Table,
    add_product,
    check_call,
    check_heads,
    chosen,
    descriptors,
    exp_of,
    fitted,
    kept,
    load_parts,
    made_up,
    neighbours,
    product,
    ranges,
    score_steps,
    section,
    slope_of,
    store_parts,
    strides,
    tile_key,
    tile_of,
)
from .common import arch, cdiv, check_contiguous, check_device, check_dtype, fail, launch, wave_of
from .tuning import Parameters, Tunable

ROWS = 128  # lse and delta are padded to a multiple of it: tiles of up to ROWS rows load them without a mask


@triton.jit
def attention_bwd_delta_kernel(
    base, delta, lse, do, o, do_strides, o_strides, steps, H, Tq, padded, Dv: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta, and lse as the base of the exponent: +inf where there is no row or it saw no key, so that p = 0 there."""
    blocks = padded // BLOCK_M
    head, i0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    b, h = head // H, head % H
    do0, do1 = load_parts((do, None), do_strides, b, h, i0, Tq, Dv, V0, V1, BLOCK_M, True, False)
    o0, o1 = load_parts((o, None), o_strides, b, h, i0, Tq, Dv, V0, V1, BLOCK_M, True, False)
    total = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)
    if V1:
        total += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    row = i0 + tl.arange(0, BLOCK_M)
    x = tl.load(lse + head.to(tl.int64) * Tq + row, row < Tq, float("-inf"))
    at = head.to(tl.int64) * padded + row
    if not steps.natural:
        x = x * 1.4426950408889634  # exp_of's unit
    tl.store(base + at, tl.where(x == float("-inf"), float("inf"), x))
    tl.store(delta + at, total)


@triton.jit
def score_gradient(
    s, dp, base, delta, i0, j0, row, column, b, h, head, slope, steps, Tq, Tk, MASKED: tl.constexpr, BIASED: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What met v, but for 1 / (1 - dropout_p), and the gradient of the score before softcap, or after it if BIASED."""
    s, capped = score_steps(s, row, column, b, h, slope, steps, Tq, Tk, MASKED)
    p = exp_of(s, base, steps)
    weights = p
    if steps.rng_state is not None:
        keep = kept(i0, j0, head, steps, BLOCK_M, BLOCK_N, TRANSPOSED)
        weights = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * steps.keep_scale, 0.0)
    ds = p * (dp - delta)
    if steps.softcap is not None and not BIASED:
        ds = ds * (1.0 - capped * capped)
    return weights, ds


# ---- dk, dv ----


@triton.jit
def dkv_stage(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, do, q_strides, do_strides, base, delta, padded, j0, b, hk, key_head, steps, Tq, Tk,
    begin, end, GROUP: tl.constexpr,
    D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the query rows [begin, end) of all heads of the group give, in tiles of (key, query), so that both sums take
    them as they are. One loop: in two, what the inner one keeps in registers lives through the outer one."""
    column = j0 + tl.arange(0, BLOCK_N)[:, None]
    blocks = tl.cdiv(end - begin, BLOCK_M)
    for n in range(0, GROUP * blocks):
        g = n // blocks if GROUP > 1 else 0
        i = tl.multiple_of(begin + (n - g * blocks) * BLOCK_M, BLOCK_M)
        h, head = hk * GROUP + g, key_head * GROUP + g
        row = i + tl.arange(0, BLOCK_M)
        at, slope = head.to(tl.int64) * padded + row, slope_of(steps, b, h)
        q0, q1 = load_parts(q, q_strides, b, h, i, Tq, D, D0, D1, BLOCK_M, MASKED, TMA)
        s = product(k0, k1, q0, q1, D1 > 0, PRECISION)
        do0, do1 = load_parts(do, do_strides, b, h, i, Tq, Dv, V0, V1, BLOCK_M, MASKED, TMA)
        dp = product(v0, v1, do0, do1, V1 > 0, PRECISION)
        p, ds = score_gradient(
            s, dp, tl.load(base + at)[None, :], tl.load(delta + at)[None, :], i, j0, row[None, :], column, b, h, head, slope,
            steps, Tq, Tk, MASKED, False, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        p, ds = p.to(do0.dtype), ds.to(q0.dtype)
        dv0 = add_product(dv0, p, do0, PRECISION)
        dk0 = add_product(dk0, ds, q0, PRECISION)
        if V1:
            dv1 = add_product(dv1, p, do1, PRECISION)
        if D1:
            dk1 = add_product(dk1, ds, q1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def attention_bwd_dkv_kernel(
    dk, dv, do, q, k, v, do_tail, q_tail, k_tail, v_tail, base, delta, dk_strides, dv_strides, do_strides, q_strides, k_strides,
    v_strides, steps, scale, Hk, Tq, Tk, padded, blocks, heads, SECTION, GROUP: tl.constexpr,
    D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, key_head = tile_of(tl.program_id(0), blocks, heads, SECTION)  # the first keys are those that most rows see
    j0 = block * BLOCK_N
    b, hk = key_head // Hk, key_head % Hk
    q, do = (q, q_tail), (do, do_tail)
    k0, k1 = load_parts((k, k_tail), k_strides, b, hk, j0, Tk, D, D0, D1, BLOCK_N, True, TMA)
    v0, v1 = load_parts((v, v_tail), v_strides, b, hk, j0, Tk, Dv, V0, V1, BLOCK_N, True, TMA)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32) if D1 else dk0
    dv0 = tl.zeros([BLOCK_N, V0], tl.float32)
    dv1 = tl.zeros([BLOCK_N, V1], tl.float32) if V1 else dv0
    first, last = -steps.last if steps.last is not None else None, -steps.first if steps.first is not None else None
    edges = ranges(j0, first, last, Tq, BLOCK_N, BLOCK_M)
    for stage in tl.static_range(1 if first is None else 0, 3):
        dk0, dk1, dv0, dv1 = dkv_stage(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, do, q_strides, do_strides, base, delta, padded, j0, b, hk, key_head, steps,
            Tq, Tk, edges[stage], edges[stage + 1], GROUP, D, Dv, D0, D1, V0, V1, PRECISION, TMA, BLOCK_M, BLOCK_N, stage != 1,
        )  # fmt: skip
    store_parts(dk, dk_strides, b, hk, j0, Tk, dk0 * scale, dk1 * scale, D, D0, D1)
    store_parts(dv, dv_strides, b, hk, j0, Tk, dv0 * steps.keep_scale, dv1 * steps.keep_scale, Dv, V0, V1)


# ---- dq ----


@triton.jit
def dq_stage(
    dq0, dq1, q0, q1, do0, do1, k, v, k_strides, v_strides, base, delta, i0, b, h, hk, head, slope, steps, Tq, Tk, begin, end,
    D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = i0 + tl.arange(0, BLOCK_M)[:, None]
    for j in range(begin, end, BLOCK_N):
        j = tl.multiple_of(j, BLOCK_N)
        k0, k1 = load_parts(k, k_strides, b, hk, j, Tk, D, D0, D1, BLOCK_N, MASKED, TMA)
        s = product(q0, q1, k0, k1, D1 > 0, PRECISION)
        v0, v1 = load_parts(v, v_strides, b, hk, j, Tk, Dv, V0, V1, BLOCK_N, MASKED, TMA)
        dp = product(do0, do1, v0, v1, V1 > 0, PRECISION)
        _, ds = score_gradient(
            s, dp, base[:, None], delta[:, None], i0, j, row, j + tl.arange(0, BLOCK_N)[None, :], b, h, head, slope, steps, Tq,
            Tk, MASKED, False, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        ds = ds.to(k0.dtype)
        dq0 = add_product(dq0, ds, k0, PRECISION)
        if D1:
            dq1 = add_product(dq1, ds, k1, PRECISION)
    return dq0, dq1


@triton.jit
def attention_bwd_dq_kernel(
    dq, do, q, k, v, do_tail, q_tail, k_tail, v_tail, base, delta, dq_strides, do_strides, q_strides, k_strides, v_strides,
    steps, scale, H, GROUP, Tq, Tk, padded, blocks, heads, SECTION,
    D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, head = tile_of(tl.program_id(0), blocks, heads, SECTION)
    i0 = (blocks - 1 - block) * BLOCK_M  # the rows that see most keys first
    b, h = head // H, head % H
    hk = h // GROUP
    slope = slope_of(steps, b, h)

    row = i0 + tl.arange(0, BLOCK_M)
    base, delta = tl.load(base + head.to(tl.int64) * padded + row), tl.load(delta + head.to(tl.int64) * padded + row)
    k, v = (k, k_tail), (v, v_tail)
    q0, q1 = load_parts((q, q_tail), q_strides, b, h, i0, Tq, D, D0, D1, BLOCK_M, True, TMA)
    do0, do1 = load_parts((do, do_tail), do_strides, b, h, i0, Tq, Dv, V0, V1, BLOCK_M, True, TMA)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32) if D1 else dq0
    edges = ranges(i0, steps.first, steps.last, Tk, BLOCK_M, BLOCK_N)
    for stage in tl.static_range(1 if steps.first is None else 0, 3):
        dq0, dq1 = dq_stage(
            dq0, dq1, q0, q1, do0, do1, k, v, k_strides, v_strides, base, delta, i0, b, h, hk, head, slope, steps, Tq, Tk,
            edges[stage], edges[stage + 1], D, Dv, D0, D1, V0, V1, PRECISION, TMA, BLOCK_M, BLOCK_N, stage != 1,
        )  # fmt: skip
    store_parts(dq, dq_strides, b, h, i0, Tq, dq0 * scale, dq1 * scale, D, D0, D1)


# ---- dbias ----


@triton.jit
def attention_bwd_dbias_kernel(
    dbias, do, q, k, v, do_tail, q_tail, k_tail, v_tail, base, delta, dbias_strides, do_strides, q_strides, k_strides,
    v_strides, steps, B, H, GROUP, Tq, Tk, padded, bias_heads, row_blocks, column_blocks, SUM_BATCH: tl.constexpr,
    SUM_HEADS: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
    D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of ds, summed over the batches and heads that share the bias, and over its own rows or columns where they do:
    the launcher sums the tiles' sums."""
    pid = tl.program_id(0)
    row_block, column_block = pid % row_blocks, pid // row_blocks % column_blocks
    bias_head = pid // row_blocks // column_blocks
    bb, bh = bias_head // bias_heads, bias_head % bias_heads
    i0, j0 = row_block * BLOCK_M, column_block * BLOCK_N
    row, column = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin, _, _, end = ranges(i0, steps.first, steps.last, Tk, BLOCK_M, BLOCK_N)
    turns = (B if SUM_BATCH else 1) * (H if SUM_HEADS else 1)
    for n in range(tl.where((j0 < end) & (j0 + BLOCK_N > begin), turns, 0)):
        b, h = bb, bh  # 0 where summed
        if SUM_HEADS:
            h += n % H
        if SUM_BATCH:
            b += n // H if SUM_HEADS else n
        head = b * H + h
        hk = h // GROUP
        q0, q1 = load_parts((q, q_tail), q_strides, b, h, i0, Tq, D, D0, D1, BLOCK_M, True, TMA)
        k0, k1 = load_parts((k, k_tail), k_strides, b, hk, j0, Tk, D, D0, D1, BLOCK_N, True, TMA)
        do0, do1 = load_parts((do, do_tail), do_strides, b, h, i0, Tq, Dv, V0, V1, BLOCK_M, True, TMA)
        v0, v1 = load_parts((v, v_tail), v_strides, b, hk, j0, Tk, Dv, V0, V1, BLOCK_N, True, TMA)
        at = head.to(tl.int64) * padded + row
        p, ds = score_gradient(
            product(q0, q1, k0, k1, D1 > 0, PRECISION), product(do0, do1, v0, v1, V1 > 0, PRECISION),
            tl.load(base + at)[:, None], tl.load(delta + at)[:, None], i0, j0, row[:, None], column[None, :], b, h, head,
            slope_of(steps, b, h), steps, Tq, Tk, True, True, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        total += ds
    out_row, out_column, rows, columns = row[:, None], column[None, :], Tq, Tk
    if SUM_ROWS:
        total = tl.sum(total, 0, keep_dims=True)
        out_row, rows = row_block + tl.zeros([1, 1], tl.int32), row_blocks
    if SUM_COLUMNS:
        total = tl.sum(total, 1, keep_dims=True)
        out_column, columns = column_block + tl.zeros([1, 1], tl.int32), column_blocks
    dbias += bb.to(tl.int64) * dbias_strides[0] + bh.to(tl.int64) * dbias_strides[1]
    at = out_row.to(tl.int64) * dbias_strides[2] + out_column.to(tl.int64) * dbias_strides[3]
    tl.store(dbias + at, total.to(dbias.dtype.element_ty), (out_row < rows) & (out_column < columns))


# ---- launcher ----


# as in attention.py
DKV: Table = {
    "fp32": {64: [(32, 32, 8, 1)], 256: [(16, 16, 8, 1)]},
    "unaligned": {128: [(32, 64, 4, 1)], 256: [(32, 32, 4, 1)]},
    "sm_80": {64: [(64, 64, 4, 2), (32, 64, 8, 2)], 128: [(64, 64, 4, 2), (32, 32, 4, 2)], 256: [(32, 32, 4, 1)]},
    "sm_86": {64: [(32, 64, 4, 2), (32, 64, 8, 2)], 128: [(32, 64, 4, 2), (32, 32, 4, 2)], 256: [(32, 32, 4, 1)]},
    "sm_90": {64: [(64, 64, 4, 2)], 128: [(32, 64, 4, 2)], 256: [(32, 64, 8, 2)]},
    "sm_100": {64: [(64, 64, 4, 2), (32, 64, 4, 2)], 128: [(64, 64, 4, 2), (32, 64, 8, 2)], 256: [(32, 64, 8, 2)]},
    "sm_120": {
        64: [(32, 64, 4, 2), (32, 32, 4, 2)],
        96: [(32, 32, 4, 2)],
        128: [(32, 64, 4, 2), (32, 32, 4, 2)],
        256: [(32, 32, 4, 1)],
    },
    "gfx942": {128: [(32, 64, 4, 1)], 256: [(32, 32, 4, 1)]},
}
DQ: Table = {
    "fp32": {64: [(32, 32, 8, 1)], 256: [(16, 16, 8, 1)]},
    "unaligned": {128: [(64, 32, 4, 1)], 256: [(32, 32, 4, 1)]},
    "sm_80": {96: [(128, 32, 4, 2), (64, 64, 4, 2)], 128: [(64, 64, 4, 2)], 256: [(32, 32, 4, 1)]},
    "sm_90": {128: [(64, 64, 4, 2)], 256: [(64, 32, 4, 1)]},
    "sm_120": {64: [(64, 64, 4, 2), (64, 32, 4, 2)], 128: [(64, 32, 4, 2)], 256: [(32, 32, 4, 1)]},
    "gfx942": {128: [(64, 32, 4, 1)], 256: [(32, 32, 4, 1)]},
}
DKV |= {"sm_89": DKV["sm_86"]} | dict.fromkeys(("gfx90a", "gfx1100", "gfx1201"), DKV["gfx942"])
DQ |= dict.fromkeys(("sm_86", "sm_89"), DQ["sm_80"]) | {"sm_100": DQ["sm_90"]}
DQ |= dict.fromkeys(("gfx90a", "gfx1100", "gfx1201"), DQ["gfx942"])


def _tunable(name: str, table: Table) -> Tunable:
    def default(arch: str, **key) -> Parameters:
        return chosen(table, arch, **key)

    def candidates(arch: str, **key) -> list[Parameters]:
        return neighbours(default(arch, **key))

    return Tunable(name, default, candidates, _problem)


def _problem(device, **key):
    (q, k, v), options = made_up(device, **key)
    lse = torch.zeros(q.shape[:3], device=device)
    return lambda: attention_bwd(q, q, k, v, q, lse, *options, False)


ATTENTION_BWD_DKV = _tunable("attention_bwd_dkv", DKV)
ATTENTION_BWD_DQ = _tunable("attention_bwd_dq", DQ)


def attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None,
    rng_state: Tensor | None, scale: float, softcap: float, dropout_p: float, causal_offset: int, window_left: int,
    window_right: int, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    op = "attention_bwd"
    call = check_call(
        op, q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset, window_left, window_right
    )
    B, H, Hk, Tq, Tk, steps = call.B, call.H, call.Hk, call.Tq, call.Tk, call.steps
    for name, t in (("do", do), ("o", o)):
        check_heads(op, name, t, q)
        if t.shape != (B, H, Tq, v.shape[3]):
            fail(op, f"{name} must have shape {(B, H, Tq, v.shape[3])}, got {tuple(t.shape)}")
    check_device(op, "lse", lse, q)
    check_dtype(op, "lse", lse, torch.float32)
    check_contiguous(op, "lse", lse)
    if lse.numel() != B * H * Tq:
        fail(op, f"lse must have shape {(B, H, Tq)}, got {tuple(lse.shape)}")
    if need_dbias and (bias is None or bias.dtype == torch.bool):
        fail(op, "need_dbias without an additive bias")

    dq, dk, dv = (_empty_as(t, t.shape) for t in (q, k, v))
    padded, group = cdiv(Tq, ROWS) * ROWS, H // max(Hk, 1)
    base, delta = q.new_empty(2, B * H, padded, dtype=torch.float32)
    threads = 256 if v.shape[3] <= 128 else 512
    warps = threads // wave_of(arch(q.device))
    launch(
        attention_bwd_delta_kernel, (padded // ROWS * B * H,), q, base, delta, lse, do, o, strides(do), strides(o), steps, H,
        Tq, padded, **{name: call.widths[name] for name in ("Dv", "V0", "V1")}, BLOCK_M=ROWS, num_warps=warps,
    )  # fmt: skip
    all_strides = strides(do), strides(q), strides(k), strides(v)

    def tiles(p: Parameters):
        rows, columns = p["BLOCK_M"], p["BLOCK_N"]
        return descriptors(arch(q.device), call, do=(do, rows), q=(q, rows), k=(k, columns), v=(v, columns))

    key = tile_key(call, q, do, k, v)

    def dkv(p: Parameters) -> None:
        tma, inputs = tiles(p)
        blocks, heads = cdiv(Tk, p["BLOCK_N"]), B * Hk
        launch(
            attention_bwd_dkv_kernel, (blocks * heads,), q, dk, dv, *inputs, base, delta, strides(dk), strides(dv),
            *all_strides, steps, scale, Hk, Tq, Tk, padded, blocks, heads, section(heads, q, do), GROUP=group, **call.widths,
            TMA=tma, **p,
        )  # fmt: skip

    def dq_(p: Parameters) -> None:
        tma, inputs = tiles(p)
        blocks, heads = cdiv(Tq, p["BLOCK_M"]), B * H
        launch(
            attention_bwd_dq_kernel, (blocks * heads,), q, dq, *inputs, base, delta, strides(dq), *all_strides, steps, scale,
            H, group, Tq, Tk, padded, blocks, heads, section(heads, k, v), **call.widths, TMA=tma, **p,
        )  # fmt: skip

    fitted(ATTENTION_BWD_DKV, q.device, key, dkv)
    p = fitted(ATTENTION_BWD_DQ, q.device, key, dq_)
    if bias is None or not need_dbias:
        return dq, dk, dv, q.new_empty(0)

    p = p | {"BLOCK_N": max(16, p["BLOCK_N"] // 2), "num_stages": 1}  # the sum over heads takes registers, too
    tma, inputs = tiles(p)
    row_blocks, column_blocks = cdiv(Tq, p["BLOCK_M"]), cdiv(Tk, p["BLOCK_N"])
    shared = [n == 1 and n != whole for n, whole in zip(bias.shape, (B, H, Tq, Tk), strict=True)]
    shape = (*bias.shape[:2], row_blocks if shared[2] else Tq, column_blocks if shared[3] else Tk)
    partial = bias.new_empty(shape, dtype=torch.float32 if shared[2] or shared[3] else bias.dtype)
    launch(
        attention_bwd_dbias_kernel, (shape[0] * shape[1] * row_blocks * column_blocks,), q, partial, *inputs, base, delta,
        partial.stride(), *all_strides, steps, B, H, group, Tq, Tk, padded, shape[1], row_blocks, column_blocks, *shared,
        **call.widths, TMA=tma, **p,
    )  # fmt: skip
    if shared[2] or shared[3]:
        partial = partial.sum([d for d in (2, 3) if shared[d]], keepdim=True).to(bias.dtype)
    return dq, dk, dv, partial
