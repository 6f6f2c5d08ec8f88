"""Long rows by 16 bytes wherever they begin, and in one pass: what softmax and cross_entropy share.

A row of odd length begins anywhere between two 16-byte boundaries. It is laid over *columns* that count from the boundary
at or below its first element: element k is in column skew + k. Whole 16-byte groups, columns first ... last, are the body;
fewer than VEC elements at either end are the edge and are moved one by one. Nothing outside the row is touched. first and
last are multiples of VEC, so that a mask made of them holds for all of a group and its access stays one of 16 bytes.

A program walks over the columns in chunks and keeps accumulators per lane = column % BLOCK_N, without a reduction across
threads on the way. Another skew meets the same elements in the same order, in lanes turned by skew; unturned() undoes it
before the lanes are added up. So a row's bits do not depend on where it lies.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, processors

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; a maximum to begin with, from which -inf can be subtracted


@triton.jit
def floor_to(n, VEC: tl.constexpr):
    """n rounded down to a multiple of VEC, by a product in which the compiler sees the alignment."""
    return n // VEC * VEC


@triton.jit
def window(start, n, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """(skew, first, last) of the n elements that begin at element `start`; ALIGNED: every row begins on a boundary."""
    if ALIGNED:
        skew = tl.zeros_like(start).to(tl.int32)
    else:
        skew = (start % VEC).to(tl.int32)
    return skew, floor_to(skew + VEC - 1, VEC), floor_to(skew + n, VEC)


@triton.jit
def is_body(column, first, last):
    return (column >= first) & (column < last)


@triton.jit
def is_head(column, skew, first, n):
    return (column >= skew) & (column < first) & (column < skew + n)


@triton.jit
def is_tail(column, skew, first, last, n):
    return (column >= tl.maximum(first, last)) & (column < skew + n)


@triton.jit
def edge_columns(skew, first, last, n, VEC: tl.constexpr):
    """(2 VEC columns, which of them are in the edge): the group before the body and the one after it."""
    lane = tl.arange(0, 2 * VEC)
    column = tl.where(lane < VEC, lane, tl.maximum(first, last) + lane - VEC)
    return column, tl.where(lane < VEC, is_head(column, skew, first, n), is_tail(column, skew, first, last, n))


@triton.jit
def part_of(N, span, splits, SPLIT: tl.constexpr):
    """(row, first element, number of elements) of this program: a whole row, or with SPLIT a part of one.

    A part is a row of its own to all that follows; its skew is the row's, span being a multiple of VEC.
    """
    row, begin, n = tl.program_id(0), tl.program_id(0) * 0, N
    if SPLIT:
        row, begin = tl.program_id(0) // splits, tl.program_id(0) % splits * span
        n = tl.minimum(N - begin, span)
    return row, begin, n


@triton.jit
def unturned(lanes, skew, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    if not ALIGNED:
        lanes = tl.gather(lanes, (tl.arange(0, BLOCK_N) + skew) % BLOCK_N, 0)
    return lanes


@triton.jit
def online(top, total, z):
    """The running maximum and sum of exp(z - maximum) with z joined: one exponential, whichever of the two is larger."""
    d = (z - top) * LOG2E
    e = tl.exp2(-tl.abs(d))
    return tl.maximum(top, z), tl.where(d > 0, total * e + 1.0, total + e)


@triton.jit
def offset_of(index, sizes, strides):
    """Where a row begins: its index taken apart over joined dimensions, innermost first."""
    offset = tl.zeros([], tl.int64)
    for d in tl.static_range(len(sizes)):
        within = index % sizes[d] if d + 1 < len(sizes) else index
        offset += within.to(tl.int64) * strides[d]
        index = index // sizes[d]
    return offset


def joined(sizes, *strides) -> tuple[list[int], list[list[int]]]:
    """Dimensions joined where every tensor's strides allow it, innermost first; at least one."""
    out_sizes: list[int] = []
    out_strides: list[list[int]] = [[] for _ in strides]
    for size, *steps in reversed(list(zip(sizes, *strides, strict=True))):
        if size == 1:
            continue
        if out_sizes and all(step == out_sizes[-1] * out[-1] for step, out in zip(steps, out_strides, strict=True)):
            out_sizes[-1] *= size
        else:
            out_sizes.append(size)
            for step, out in zip(steps, out_strides, strict=True):
                out.append(step)
    return out_sizes or [1], [out or [0] for out in out_strides]


def vector(t: Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // t.element_size()


def split_rows(M: int, N: int, block_n: int, x: Tensor) -> tuple[int, int]:
    """(splits, span): parts of a row of N, each of span columns, so that M rows keep every processor busy; 1: whole rows."""
    chunks = cdiv(N, block_n)
    wanted = 2 * processors(x.device) // max(M, 1)
    span = cdiv(chunks, max(1, min(wanted, chunks, 64)))
    return cdiv(chunks, span), span * block_n
