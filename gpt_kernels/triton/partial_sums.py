"""Sums over rows that many programs have walked, in the same launch: whoever arrives last adds up what the others left.

Each program stores its partial sums in a slot of float32 memory. The last of a group adds its group's slots, the last group
all groups'. Which program that is changes nothing in the order of additions, so the bits are always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS, GROUP_LIMIT = tl.constexpr(16), tl.constexpr(32)  # of programs, when their partial sums are added up
MOST_PROGRAMS = GROUPS.value * GROUP_LIMIT.value  # that may share a sum
COUNTERS = tl.constexpr(1 + GROUPS.value)  # of a sum: of groups, and of each group's programs


@triton.jit
def add_slots(out, at, stride, slots, N, SPAN: tl.constexpr):
    """out[:N] = the sum over `slots` slots of at[slot * stride :], in slot order. `out` may be the first slot."""
    slot = tl.arange(0, GROUP_LIMIT).to(tl.int64)[:, None]
    for start in range(0, N, SPAN):
        column = start + tl.arange(0, SPAN)
        # .cg: other processors wrote these, past this one's L1
        v = tl.load(at + slot * stride + column[None, :], (slot < slots) & (column[None, :] < N), 0.0, cache_modifier=".cg")
        tl.store(out + column, tl.sum(v, 0).to(out.dtype.element_ty), column < N)


@triton.jit
def last_to_arrive(arrivals, expected):
    """Is this the last of `expected` programs to come here? Then all they wrote is visible. The counter was 0."""
    tl.debug_barrier()  # the whole program has written, not only the thread that counts
    return tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == expected - 1


@triton.jit
def add_groups(partials, arrivals, slot, slots, stride, N, SPAN: tl.constexpr):
    """(is this the last of all, stride of the groups' sums, groups) after `slot` of `slots` has its N sums in its slot."""
    size = tl.cdiv(slots, GROUPS)
    group, groups = slot // size, tl.cdiv(slots, size)
    members, step = tl.minimum(size, slots - group * size), size.to(tl.int64) * stride
    last = last_to_arrive(arrivals + 1 + group, members)
    if last:
        add_slots(partials + group * step, partials + group * step, stride, members, N, SPAN)
        last = last_to_arrive(arrivals, groups)
    return last, step, groups


def arrivals_for(like: Tensor, sums: int = 1) -> Tensor:
    """COUNTERS for each of `sums` sums of one launch.

    Made anew for every call, although that is a memset more: what a call keeps may be memory of the pool of a CUDA graph,
    which belongs to others as soon as the call is over, and two launches that share counters must not overlap.
    """
    return like.new_zeros(sums * COUNTERS.value, dtype=torch.int32)
