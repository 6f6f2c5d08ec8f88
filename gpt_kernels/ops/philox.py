"""Philox4x32-7: the random numbers of every dropout here, a function of (seed, offset) and an element's place alone.

Counter (column // 8, row, plane, offset), key = seed. One call gives four 32-bit words, that is eight 16-bit values, to
eight neighbouring columns, low half first; a value below round(p * 65536) is dropped. The same bits on every backend, in
forward and backward, so that no mask is ever stored. Source: Salmon, Moraes, Dror, Shaw, SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

# FlashAttention's dropout has 7, too. They pass BigCrush with no margin; Random123, the authors' library, takes 10 and tells of
# p-values near 1e-7 with 7 in runs longer than BigCrush's, which even longer ones did not confirm. A mask asks for less.
ROUNDS = 7


def draw_rng_state(device: torch.device) -> Tensor:
    """A fresh int64 (seed, offset) from torch's generator: follows torch.manual_seed and checkpointing's RNG restore."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of a counter under a key, all of them 32 bits in int64."""
    low = 0xFFFFFFFF
    for _ in range(ROUNDS):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, but all 64 bits are right
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def philox_uint16(rng_state: Tensor, B: int, H: int, Tq: int, Tk: int) -> Tensor:
    """(B, H, Tq, Tk) int64 in [0, 65536), plane = batch * H + head."""
    low, device = 0xFFFFFFFF, rng_state.device
    seed, offset = rng_state[0], rng_state[1]
    groups = (Tk + 7) // 8
    c0 = torch.arange(groups, device=device).view(1, 1, -1).expand(B * H, Tq, groups)
    c1 = torch.arange(Tq, device=device).view(1, -1, 1).expand(B * H, Tq, groups)
    c2 = torch.arange(B * H, device=device).view(-1, 1, 1).expand(B * H, Tq, groups)
    c3 = (offset & low).expand(B * H, Tq, groups)
    words = torch.stack(philox(c0, c1, c2, c3, seed & low, (seed >> 32) & low), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)
    return halves.reshape(B, H, Tq, groups * 8)[..., :Tk]


def dropout_threshold(dropout_p: float) -> int:
    """A value below it is dropped; dropout_p is thereby rounded to a multiple of 1 / 65536."""
    return min(int(dropout_p * 65536 + 0.5), 65535)


def dropout_factor(rng_state, dropout_p, s):
    """0 where dropped, 1 / (1 - p) where kept, like s (B, H, Tq, Tk); 1 without dropout."""
    if dropout_p == 0.0:
        return 1.0
    threshold = dropout_threshold(dropout_p)
    return (philox_uint16(rng_state, *s.shape) >= threshold).to(s.dtype) / (1.0 - threshold / 65536.0)
