"""layer_norm and rms_norm over rows of N columns: kernels, geometry, and the reduction of the parameters' gradients.

A row in registers is a tuple of CHUNKS tiles of CHUNK columns. A chunk is a whole number of warps with 16 bytes per lane, so
that 768 columns of bfloat16 are three chunks of 256: a warp per row, no lane idle, sums by shuffles alone. Longer rows
take more warps each, and rows that registers cannot hold the *_long kernels, which read a row twice. `mean` None means RMS
norm, a missing parameter is None: Triton compiles what is there.

The backward is one launch of as many programs as the GPU holds at once. Each walks over its rows with the parameters' partial
sums in float32 registers, and whoever arrives last adds them up (partial_sums.py).
"""

# mypy: disable-error-code=assignment
# (a kernel's tuples grow)

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.common import rows_of
from .common import (
    arch,
    cdiv,
    check_column,
    check_contiguous,
    check_device,
    check_dtype,
    check_like,
    dtype_name,
    fail,
    launch,
    processors,
    wave_of,
)
from .partial_sums import MOST_PROGRAMS, add_groups, add_slots, arrivals_for
from .tuning import Parameters, Tunable

SHRUNK = tl.constexpr(2.0**-80)  # LOG L154

# ---- rows ----


@triton.jit
def load_chunk(at, live, start, N: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK columns from `start` on of the live rows that begin at `at` (BLOCK_M, 1), 0 elsewhere."""
    column = start + tl.arange(0, CHUNK)[None, :]
    return tl.load(at + column, live & (column < N), 0.0)


@triton.jit
def store_chunk(at, live, start, v, N: tl.constexpr, CHUNK: tl.constexpr):
    column = start + tl.arange(0, CHUNK)[None, :]
    tl.store(at + column, v.to(at.dtype.element_ty), live & (column < N))


@triton.jit
def load_row(at, live, N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(CHUNKS):
        tiles += (load_chunk(at, live, i * CHUNK, N, CHUNK),)
    return tiles


@triton.jit
def zero_row(BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(CHUNKS):
        tiles += (tl.zeros([BLOCK_M, CHUNK], tl.float32),)
    return tiles


@triton.jit
def centred(v, mean, start, N: tl.constexpr, CHUNK: tl.constexpr):
    """v - mean in float32, 0 in the columns past N."""
    return tl.where(start + tl.arange(0, CHUNK)[None, :] < N, v.to(tl.float32) - mean, 0.0)


@triton.jit
def sum_pair(a, b):
    """Row sums (BLOCK_M, 1) of two tiles in one exchange between warps."""
    sum_a, sum_b = tl.split(tl.sum(tl.join(a, b), 1))
    return sum_a[:, None], sum_b[:, None]


# ---- forward ----


@triton.jit
def shrunk_square(v):
    """For a row whose squares are infinite, as those of elements from 1e19 on are."""
    v = v * SHRUNK
    return v * v


@triton.jit
def rstd_of(var, shrunk_var, eps):
    return tl.where(var < float("inf"), tl.math.rsqrt(tl.where(var < 0, 0.0, var) + eps), SHRUNK * tl.math.rsqrt(shrunk_var))


@triton.jit
def statistics(near, rest, squares, shrunk, eps, N: tl.constexpr):
    """(mean, rstd) of rows from the sums of x - near and of its squares: what `near` is off by goes to both.

    So a mean far from 0 is right to the last bit, and the variance loses no digits.
    """
    off, var = sum_pair(rest, squares)
    off = tl.div_rn(off, N * 1.0)
    var = tl.div_rn(var, N * 1.0) - off * off
    shrunk_var = tl.sum(shrunk, 1, keep_dims=True) * (1.0 / N) - shrunk_square(off)
    return near + off, rstd_of(var, shrunk_var, eps)


@triton.jit
def rms_statistics(squares, shrunk, eps, N: tl.constexpr):
    squares, shrunk = sum_pair(squares, shrunk)
    return 0.0, rstd_of(tl.div_rn(squares, N * 1.0), shrunk * (1.0 / N), eps)


@triton.jit
def scaled(v, mu, scale, weight, bias, lane, start, N: tl.constexpr, CHUNK: tl.constexpr):
    """(v - mu) scale weight + bias. Every row loads the parameters, from L1, in x's layout: no exchange between threads."""
    v = (v.to(tl.float32) - mu) * scale
    if weight is not None:
        v *= load_chunk(weight + lane * 0, lane >= 0, start, N, CHUNK).to(tl.float32)
    if bias is not None:
        v += load_chunk(bias + lane * 0, lane >= 0, start, N, CHUNK).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["M"])
def norm_fwd_kernel(
    y, mean, rstd, x, weight, bias, M, eps, N: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    lane = tl.arange(0, BLOCK_M)[:, None]
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + lane
    live = row < M
    xs = load_row(x + row * N, live, N, CHUNK, CHUNKS)
    total, squares = tl.zeros([BLOCK_M, CHUNK], tl.float32), tl.zeros([BLOCK_M, CHUNK], tl.float32)
    shrunk = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    if mean is not None:
        for i in tl.static_range(CHUNKS):
            total += xs[i].to(tl.float32)
        near = tl.div_rn(tl.sum(total, 1, keep_dims=True), N * 1.0)
        rest = tl.zeros([BLOCK_M, CHUNK], tl.float32)
        for i in tl.static_range(CHUNKS):
            v = centred(xs[i], near, i * CHUNK, N, CHUNK)
            rest += v
            squares += v * v
            shrunk += shrunk_square(v)
        mu, scale = statistics(near, rest, squares, shrunk, eps, N)
        tl.store(mean + row, mu, live)
    else:
        for i in tl.static_range(CHUNKS):
            v = xs[i].to(tl.float32)
            squares += v * v
            shrunk += shrunk_square(v)
        mu, scale = rms_statistics(squares, shrunk, eps, N)
    tl.store(rstd + row, scale, live)
    for i in tl.static_range(CHUNKS):
        store_chunk(y + row * N, live, i * CHUNK, scaled(xs[i], mu, scale, weight, bias, lane, i * CHUNK, N, CHUNK), N, CHUNK)


@triton.jit(do_not_specialize=["M"])
def norm_fwd_long_kernel(
    y, mean, rstd, x, weight, bias, M, eps, N: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    lane = tl.arange(0, BLOCK_M)[:, None]
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + lane
    live = row < M
    at = x + row * N
    rest, squares = tl.zeros([BLOCK_M, CHUNK], tl.float32), tl.zeros([BLOCK_M, CHUNK], tl.float32)
    shrunk = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    if mean is not None:
        # the first chunk's mean is near enough: (near - mean)^2 <= N / CHUNK var, because its columns are part of var
        near = tl.sum(load_chunk(at, live, 0, N, CHUNK).to(tl.float32), 1, keep_dims=True) * (1.0 / CHUNK)
        for start in range(0, N, CHUNK):
            v = centred(load_chunk(at, live, start, N, CHUNK), near, start, N, CHUNK)
            rest += v
            squares += v * v
            shrunk += shrunk_square(v)
        mu, scale = statistics(near, rest, squares, shrunk, eps, N)
        tl.store(mean + row, mu, live)
    else:
        for start in range(0, N, CHUNK):
            v = load_chunk(at, live, start, N, CHUNK).to(tl.float32)
            squares += v * v
            shrunk += shrunk_square(v)
        mu, scale = rms_statistics(squares, shrunk, eps, N)
    tl.store(rstd + row, scale, live)
    for start in range(0, N, CHUNK):
        v = load_chunk(at, live, start, N, CHUNK)
        store_chunk(y + row * N, live, start, scaled(v, mu, scale, weight, bias, lane, start, N, CHUNK), N, CHUNK)


# ---- the parameters' gradients from partial sums ----


@triton.jit
def store_partials(dweight, dbias, partials, start, dw, db, N: tl.constexpr, PLANES: tl.constexpr, CHUNK: tl.constexpr):
    """This program's sums over its rows of CHUNK columns from `start` on."""
    own, column = partials + tl.program_id(0).to(tl.int64) * (PLANES * N), start + tl.arange(0, CHUNK)
    if dweight is not None:
        tl.store(own + column, tl.sum(dw, 0), column < N)
    if dbias is not None:
        tl.store(own + (PLANES - 1) * N + column, tl.sum(db, 0), column < N)


@triton.jit
def add_partials(dweight, dbias, partials, arrivals, N: tl.constexpr, PLANES: tl.constexpr, SPAN: tl.constexpr):
    """dweight, dbias from every program's PLANES * N sums in partials[program], by those who arrive last."""
    WIDTH: tl.constexpr = PLANES * N
    last, step, groups = add_groups(partials, arrivals, tl.program_id(0), tl.num_programs(0), WIDTH, WIDTH, SPAN)
    if last:
        if dweight is not None:
            add_slots(dweight, partials, step, groups, N, SPAN)
        if dbias is not None:
            add_slots(dbias, partials + (PLANES - 1) * N, step, groups, N, SPAN)


# ---- backward ----


@triton.jit
def row_means(sum_gx, sum_g, mean, scale, N: tl.constexpr):
    """(mean(g x_hat), mean(g)) of rows, times rstd; RMS norm has no use for the second."""
    if mean is not None:
        c1, c2 = sum_pair(sum_gx, sum_g)
        return c1 * (scale / N), c2 * (scale / N)
    else:
        return tl.sum(sum_gx, 1, keep_dims=True) * (scale / N), tl.zeros_like(scale)


@triton.jit
def load_operands(dy, x, weight, mean, rstd, row, lane, M, N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    live = row < M
    scale = tl.load(rstd + row, live, 0.0)
    mu = tl.zeros_like(scale)
    if mean is not None:
        mu = tl.load(mean + row, live, 0.0)
    dys, xs = load_row(dy + row * N, live, N, CHUNK, CHUNKS), load_row(x + row * N, live, N, CHUNK, CHUNKS)
    ws = ()
    if weight is not None:
        ws = load_row(weight + lane * 0, lane >= 0, N, CHUNK, CHUNKS)
    return dys, xs, ws, mu, scale


@triton.jit(do_not_specialize=["M"])
def norm_bwd_kernel(
    dx, dweight, dbias, partials, arrivals, dy, x, weight, mean, rstd, M, N: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PREFETCH: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = (dweight is not None) + (dbias is not None)
    lane = tl.arange(0, BLOCK_M)[:, None]
    dw, db = zero_row(BLOCK_M, CHUNK, CHUNKS), zero_row(BLOCK_M, CHUNK, CHUNKS)
    step = tl.num_programs(0) * BLOCK_M
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + lane
    if PREFETCH:
        ahead = load_operands(dy, x, weight, mean, rstd, row, lane, M, N, CHUNK, CHUNKS)
    for _ in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        if PREFETCH:  # the next rows are on their way while these are summed; the weight with them, to stay 16 bits wide
            dys, xs, ws, mu, scale = ahead
            ahead = load_operands(dy, x, weight, mean, rstd, row + step, lane, M, N, CHUNK, CHUNKS)
        else:
            dys, xs, ws, mu, scale = load_operands(dy, x, weight, mean, rstd, row, lane, M, N, CHUNK, CHUNKS)
        sum_gx, sum_g = tl.zeros([BLOCK_M, CHUNK], tl.float32), tl.zeros([BLOCK_M, CHUNK], tl.float32)
        gs, x_hats, dw_next, db_next = (), (), (), ()
        for i in tl.static_range(CHUNKS):
            d, x_hat = dys[i].to(tl.float32), (xs[i].to(tl.float32) - mu) * scale
            g = d
            if weight is not None:
                g = d * ws[i].to(tl.float32)
            sum_gx += g * x_hat
            sum_g += g
            gs, x_hats = gs + (g,), x_hats + (x_hat,)
            dw_next, db_next = dw_next + (dw[i] + d * x_hat,), db_next + (db[i] + d,)
        dw, db = dw_next, db_next
        # dx = (g - mean(g) - x_hat mean(g x_hat)) rstd
        c1, c2 = row_means(sum_gx, sum_g, mean, scale, N)
        for i in tl.static_range(CHUNKS):
            store_chunk(dx + row * N, row < M, i * CHUNK, gs[i] * scale - (c2 + x_hats[i] * c1), N, CHUNK)
        row += step
    if PLANES > 0:
        for i in tl.static_range(CHUNKS):
            store_partials(dweight, dbias, partials, i * CHUNK, dw[i], db[i], N, PLANES, CHUNK)
        add_partials(dweight, dbias, partials, arrivals, N, PLANES, SPAN)


@triton.jit
def load_gradient(dy, x, weight, mean, rstd, row, lane, M, start, N: tl.constexpr, CHUNK: tl.constexpr):
    """(dy, x_hat, dy weight, rstd) of CHUNK columns from `start` on."""
    live = row < M
    d = load_chunk(dy + row * N, live, start, N, CHUNK).to(tl.float32)
    scale = tl.load(rstd + row, live, 0.0)
    x_hat = load_chunk(x + row * N, live, start, N, CHUNK).to(tl.float32)
    if mean is not None:
        x_hat -= tl.load(mean + row, live, 0.0)
    g = d
    if weight is not None:
        g = d * load_chunk(weight + lane * 0, lane >= 0, start, N, CHUNK).to(tl.float32)
    return d, x_hat * scale, g, scale


@triton.jit(do_not_specialize=["M"])
def norm_bwd_long_kernel(
    dx, dweight, dbias, partials, arrivals, dy, x, weight, mean, rstd, M, N: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Rows inside columns, so that a chunk's partial sums fit in registers; before that, all rows' means go through memory."""
    PLANES: tl.constexpr = (dweight is not None) + (dbias is not None)
    lane = tl.arange(0, BLOCK_M)[:, None]
    blocks, programs = tl.cdiv(M, BLOCK_M), tl.num_programs(0)
    means = partials + programs.to(tl.int64) * (PLANES * N)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M + lane
    row = first
    for _ in range(tl.program_id(0), blocks, programs):
        sum_gx, sum_g = tl.zeros([BLOCK_M, CHUNK], tl.float32), tl.zeros([BLOCK_M, CHUNK], tl.float32)
        scale = tl.load(rstd + row, row < M, 0.0)
        for start in range(0, N, CHUNK):
            d, x_hat, g, scale = load_gradient(dy, x, weight, mean, rstd, row, lane, M, start, N, CHUNK)
            sum_gx += g * x_hat
            sum_g += g
        c1, c2 = row_means(sum_gx, sum_g, mean, scale, N)
        tl.store(means + row, c1, row < M)
        tl.store(means + M + row, c2, row < M)
        row += programs * BLOCK_M
    tl.debug_barrier()  # other threads of this program read them
    for start in range(0, N, CHUNK):
        dw, db = tl.zeros([BLOCK_M, CHUNK], tl.float32), tl.zeros([BLOCK_M, CHUNK], tl.float32)
        row = first
        for _ in range(tl.program_id(0), blocks, programs):
            d, x_hat, g, scale = load_gradient(dy, x, weight, mean, rstd, row, lane, M, start, N, CHUNK)
            dw += d * x_hat
            db += d
            c1, c2 = tl.load(means + row, row < M, 0.0), tl.load(means + M + row, row < M, 0.0)
            store_chunk(dx + row * N, row < M, start, g * scale - (c2 + x_hat * c1), N, CHUNK)
            row += programs * BLOCK_M
        store_partials(dweight, dbias, partials, start, dw, db, N, PLANES, CHUNK)
    if PLANES > 0:
        add_partials(dweight, dbias, partials, arrivals, N, PLANES, SPAN)


# ---- launch parameters ----


def _lanes(arch: str, dtype) -> int:
    """Columns that a warp covers with 16 bytes per lane."""
    return wave_of(arch) * 16 // dtype.itemsize


def _row(N: int, lanes: int, chunks: int, num_warps: int) -> Parameters:
    """At most `chunks` chunks: the fewest warps per row (or a part of one) for that, in programs of num_warps or more.

    No CHUNKS where more than 16 warps were needed: then the row goes through registers in pieces.
    """
    if N <= lanes:
        block_n = max(16, triton.next_power_of_2(N))
        return {"BLOCK_M": num_warps * lanes // block_n, "CHUNK": block_n, "CHUNKS": 1, "num_warps": num_warps}
    warps = triton.next_power_of_2(cdiv(N, chunks * lanes))
    if warps > 16:
        return {"BLOCK_M": 1, "CHUNK": 2 * 16 * lanes, "num_warps": 16}
    num_warps = max(warps, num_warps)
    return {"BLOCK_M": num_warps // warps, "CHUNK": warps * lanes, "CHUNKS": cdiv(N, warps * lanes), "num_warps": num_warps}


def _fwd(arch: str, N: int, dtype, chunks: int = 5, num_warps: int = 4) -> Parameters:
    return _row(N, _lanes(arch, dtype), chunks, num_warps)


# there ptxas has no registers for a row ahead, nor for three chunks in a program of 8 warps
SPILLS_FIRST = ("sm_80", torch.float16)


# 16 warps per processor: two chunks of a row and of the next one, or three chunks without the next row, beside the partial
# sums, of which RMS norm has half as many
def _bwd(arch: str, N: int, dtype, chunks: int, num_warps: int, registers: int) -> Parameters:
    """chunks: 0 for the table's."""
    lanes = _lanes(arch, dtype)
    odd = N * dtype.itemsize % 16 != 0  # rows begin anywhere: an access and a mask for each element, which take registers
    # nor has it on sm_120 for a row ahead beside layer norm's two partial sums, by Triton 3.7's code
    ahead = not odd and (arch, dtype) != SPILLS_FIRST and (registers < 128 or not arch.startswith("sm_12"))
    # three chunks for a warp, or two for two warps, idle in part, that load the next row meanwhile; sm_100 has no time to idle
    pairs = ahead and N <= 3 * lanes and arch.startswith("sm_") and arch != "sm_100"
    p = _row(N, lanes, chunks or (2 if odd or pairs else 3), num_warps)
    if "CHUNKS" in p:
        p["PREFETCH"] = ahead and p["CHUNKS"] < 3
    if arch.startswith("sm_"):
        p["maxnreg"] = registers if "CHUNKS" in p else 128
    return p | {"SPAN": 32 * p["num_warps"]}


def _layer_norm_bwd(arch: str, N: int, dtype, chunks: int = 0, num_warps: int = 0) -> Parameters:
    p = _bwd(arch, N, dtype, chunks, num_warps or (4 if (arch, dtype) == SPILLS_FIRST else 8), registers=128)
    # in a program of 8 warps three chunks spill, by Triton 3.7's code
    return p if num_warps or p.get("CHUNKS") != 3 else _bwd(arch, N, dtype, chunks, 4, registers=128)


def _rms_norm_bwd(arch: str, N: int, dtype, chunks: int = 0, num_warps: int = 4) -> Parameters:
    return _bwd(arch, N, dtype, chunks, num_warps, registers=104)


def _candidates(default: Callable[..., Parameters], chunks: tuple[int, ...], num_warps: tuple[int, ...]):
    def candidates(arch: str, N: int, dtype) -> list[Parameters]:
        found = [default(arch, N, dtype), *(default(arch, N, dtype, c, w) for c in chunks for w in num_warps)]
        return [p for i, p in enumerate(found) if p not in found[:i]]

    return candidates


def _problem(op: str):
    centre, fwd = op.startswith("layer_norm"), op.endswith("fwd")

    def problem(device, N: int, dtype):
        x, weight = torch.randn(max(1, 2**24 // N), N, device=device, dtype=dtype), torch.ones(N, device=device, dtype=dtype)
        rstd = torch.ones(x.shape[0], device=device)
        if fwd:
            return lambda: forward(op, x, weight, weight if centre else None, 1e-5)
        return lambda: backward(op, x, x, weight, rstd if centre else None, rstd, centre)

    return problem


TUNABLES = {
    op: Tunable(op, default, _candidates(default, *choices), _problem(op))
    for op, default, choices in (
        ("layer_norm_fwd", _fwd, ((5, 3, 2), (4, 8))),
        ("layer_norm_bwd", _layer_norm_bwd, ((3, 2), (8, 4, 16))),
        ("rms_norm_fwd", _fwd, ((5, 3, 2), (4, 8))),
        ("rms_norm_bwd", _rms_norm_bwd, ((3, 2), (8, 4, 16))),
    )
}


# ---- launchers ----


def check_stat(op: str, name: str, stat: Tensor, x: Tensor, M: int) -> None:
    check_device(op, name, stat, x)
    check_dtype(op, name, stat, torch.float32)
    check_contiguous(op, name, stat)
    if stat.numel() != M:
        fail(op, f"{name} must have {M} elements, one per row of x, got {stat.numel()}")


def forward(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of checked arguments; op "rms_norm_fwd" leaves mean empty."""
    if not (eps >= 0 and math.isfinite(eps)):
        fail(op, f"eps must be finite and not negative, got {eps:g}")
    M, N = rows_of(x).shape
    if weight is not None:
        check_column(op, "weight", weight, N, x)
    if bias is not None:
        check_column(op, "bias", bias, N, x)
        if weight is not None and bias.dtype != weight.dtype:
            fail(op, f"bias must be {dtype_name(weight.dtype)} like weight, got {dtype_name(bias.dtype)}")
    centre = op == "layer_norm_fwd"
    y = x.new_empty(x.shape)
    mean, rstd = x.new_empty(M if centre else 0, dtype=torch.float32), x.new_empty(M, dtype=torch.float32)
    if N == 0:
        return y, mean.fill_(math.nan), rstd.fill_(math.nan)
    p = TUNABLES[op](arch(x.device), N=N, dtype=x.dtype)
    launch(
        norm_fwd_kernel if "CHUNKS" in p else norm_fwd_long_kernel, (cdiv(M, p["BLOCK_M"]),), x,
        y, mean if centre else None, rstd, x, weight, bias, M, eps, N=N, **p,
    )  # fmt: skip
    return y, mean, rstd


def backward(
    op: str, dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); a missing parameter's gradient is empty."""
    check_like(op, "dy", dy, "x", x)
    M, N = rows_of(x).shape
    if weight is not None:
        check_column(op, "weight", weight, N, x)
    if mean is not None:
        check_stat(op, "mean", mean, x, M)
    check_stat(op, "rstd", rstd, x, M)
    param, has_weight = x if weight is None else weight, weight is not None
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx, param.new_zeros(N if has_weight else 0), param.new_zeros(N if has_bias else 0)
    dweight, dbias = param.new_empty(N if has_weight else 0), param.new_empty(N if has_bias else 0)
    p = TUNABLES[op](arch(x.device), N=N, dtype=x.dtype)
    long = "CHUNKS" not in p
    programs = min(cdiv(M, p["BLOCK_M"]), processors(x.device) * (16 // p["num_warps"]), MOST_PROGRAMS)
    partials = x.new_empty(programs * (has_weight + has_bias) * N + 2 * M * long, dtype=torch.float32)
    launch(
        norm_bwd_long_kernel if long else norm_bwd_kernel, (programs,), x, dx, dweight if has_weight else None,
        dbias if has_bias else None, partials, arrivals_for(x), dy, x, weight, mean, rstd, M, N=N, **p,
    )  # fmt: skip
    return dx, dweight, dbias
