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
    """Is this the last of `expected` programs to come here? Then all they wrote is visible, and the counter is 0 again."""
    tl.debug_barrier()  # the whole program has written, not only the thread that counts
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(arrivals, 0)
    return last


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


_arrivals: dict[tuple[int, int], Tensor] = {}


def arrivals_for(like: Tensor, sums: int = 1) -> Tensor:
    """COUNTERS for each of `sums` sums: zeros, which every launch leaves as zeros.

    So one tensor per device and stream serves all launches, which follow each other there, and no launch waits for a memset.
    A launch captured into a CUDA graph may be replayed on any stream: it has its own, zeroed in the graph.
    """
    count = sums * COUNTERS.value
    if like.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return like.new_zeros(count, dtype=torch.int32)
    key = (like.device.index, torch.cuda.current_stream(like.device).cuda_stream)
    if key not in _arrivals or _arrivals[key].numel() < count:
        _arrivals[key] = like.new_zeros(count, dtype=torch.int32)
    return _arrivals[key]
