"""Philox4x32-7 in kernels: the specification is ops/philox.py, the bits are the same."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from ..ops.philox import ROUNDS, dropout_threshold
from .common import check_device, check_dtype, fail

PHILOX_ROUNDS = tl.constexpr(ROUNDS)


def check_dropout(op: str, rng_state: Tensor | None, dropout_p: float, like: Tensor) -> tuple[int, float]:
    """(threshold, 1 / (1 - p)) of a valid dropout_p; the state may be missing only where nothing is dropped."""
    if not 0.0 <= dropout_p < 1.0:
        fail(op, f"dropout_p must be in [0, 1), got {dropout_p:g}")
    if dropout_p > 0.0:
        if rng_state is None:
            fail(op, "rng_state is needed where dropout_p is positive")
        check_device(op, "rng_state", rng_state, like)
        check_dtype(op, "rng_state", rng_state, torch.int64)
        if rng_state.shape != (2,):
            fail(op, f"rng_state must have shape (2,), got {tuple(rng_state.shape)}")
    threshold = dropout_threshold(dropout_p)
    return threshold, 1.0 / (1.0 - threshold / 65536.0)


@triton.jit
def philox_words(rng_state, group, row, plane):
    """The four 32-bit words of 8 neighbouring columns (group = column // 8), each in the broadcast shape of group and row."""
    seed = tl.load(rng_state).to(tl.uint64, bitcast=True)
    offset = tl.load(rng_state + 1).to(tl.uint32)
    zero = (group * 0 + row * 0).to(tl.uint32)
    return philox_impl(
        zero + group.to(tl.uint32),
        zero + row.to(tl.uint32),
        zero + plane.to(tl.uint32),
        zero + offset,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
        n_rounds=PHILOX_ROUNDS,
    )


@triton.jit
def philox_uint16(rng_state, group, row, plane):
    """16-bit values in column order: (..., G) groups of 8 columns become (..., 8 G)."""
    w0, w1, w2, w3 = philox_words(rng_state, group, row, plane)
    low = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(low, high)


@triton.jit
def philox_kept(rng_state, group, row, plane, threshold):
    """Bit c: column c of the group of 8 is kept, its 16-bit value being at least the threshold. group and row: 2 dimensions."""
    words = philox_words(rng_state, group, row, plane)
    bits = tl.zeros_like(words[0])
    for n in tl.static_range(4):
        bits |= ((words[n] & 0xFFFF) >= threshold).to(tl.uint32) << (2 * n)
        bits |= ((words[n] >> 16) >= threshold).to(tl.uint32) << (2 * n + 1)
    # A sum over one term. Triton gives what a tile of another layout asks for its layout as far back as it can, so that each
    # thread that holds one of the 8 columns would make all words; it stops at a sum over a leading dimension.
    return tl.sum(bits[None, :, :], 0)
