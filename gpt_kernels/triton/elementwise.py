"""Elementwise passes over rows in 16-byte accesses: which elements a program takes, and its loads and stores.

A mask costs the compiler its knowledge that neighbours go together. So a program whose tile lies inside the tensor loads
and stores without one; at an edge whole vectors are masked as such, and only a vector cut in two goes by elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def corner(slab, chunk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows slab * BLOCK_M.., first of the columns chunk * BLOCK_N..)"""
    row = slab.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    start = chunk.to(tl.int64) * BLOCK_N
    return row, start


@triton.jit
def strided(slab, chunk, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VEC: tl.constexpr):
    """offsets of these rows and columns where rows lie `stride` apart, a multiple of VEC where there is a second one: written
    so that the compiler sees it"""
    row, start = corner(slab, chunk, BLOCK_M, BLOCK_N)
    return row * (stride // VEC * VEC) + start + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def tile(slab, chunk, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VEC: tl.constexpr):
    """(offsets, inside, whole, interior) of these rows and columns of a contiguous (M, N)

    whole: the VEC elements around are all inside; interior, of the whole tile: all are.
    """
    row, start = corner(slab, chunk, BLOCK_M, BLOCK_N)
    lane = tl.arange(0, BLOCK_N)[None, :]
    left = tl.minimum(N - start, BLOCK_N).to(tl.int32)
    inside = (row < M) & (lane < left)
    whole = (row < M) & (lane // VEC * VEC + VEC <= left)
    interior = (left == BLOCK_N) & ((slab.to(tl.int64) + 1) * BLOCK_M <= M)
    return strided(slab, chunk, N, BLOCK_M, BLOCK_N, VEC), inside, whole, interior


@triton.jit
def load(p, at, inside, whole, EDGE: tl.constexpr, VEC: tl.constexpr):
    """p[at] in float32, 0 outside."""
    if not EDGE:
        v = tl.load(p + at)
    else:
        v = tl.load(p + at, whole, 0.0)
        if VEC > 1:
            v = tl.where(whole, v, tl.load(p + at, inside & (whole == 0), 0.0))
    return v.to(tl.float32)


@triton.jit
def store(p, at, v, inside, whole, EDGE: tl.constexpr, VEC: tl.constexpr):
    v = v.to(p.dtype.element_ty)
    if not EDGE:
        tl.store(p + at, v)
    else:
        tl.store(p + at, v, whole)
        if VEC > 1:
            tl.store(p + at, v, inside & (whole == 0))


def vector(N: int, itemsize: int) -> int:
    """Elements of an access: 16 bytes where every row begins at a multiple of them."""
    return 16 // itemsize if N * itemsize % 16 == 0 else 1


def columns(N: int, largest: int) -> int:
    """Columns of a tile: the most, from `largest` halved down to 128, that leave at most an eighth as many lanes idle as N."""
    block = largest
    while block > 128 and -N % block > N // 8:
        block //= 2
    return block
