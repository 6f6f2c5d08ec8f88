"""More than 2^31 elements, of which few pages are touched: pairs of (large, the same in small) where they meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# rows that a program keeps, and rows that it goes over by pieces; M divides by all numbers of programs that loop over rows
MANY, LONG = ((2**31 // n + more, n) for n, more in ((4096, 2**14), (2**17, 2**9)))


@dataclass(frozen=True)
class Huge:
    """Large arguments, the same in small, the part of a result where the two meet, how many of the last programs are run."""

    what: str
    large: tuple[Any, ...]
    small: tuple[Any, ...]
    meet: Callable[[Tensor], Tensor]
    programs: int


def tail(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])[-1] if t.dim() > 1 else t[-1:]


def last_row_of_a_matrix(t: Tensor) -> Tensor:
    """not the gradients of parameters, which are sums over all rows"""
    return tail(t) if t.dim() > 1 else t[:0]


def last_row_of(columns: int) -> Callable[[Tensor], Tensor]:
    """nothing of results that have other columns"""
    return lambda t: t[-1] if t.shape[-1:] == (columns,) else t.reshape(-1)[:0]


def large_rows(*shape: int, count: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[tuple[Tensor, Tensor]]:
    """count times (tensor, copy of its last rows): more than 2^31 elements, or a statistic of each row"""
    pairs = []
    for _ in range(count):
        t = torch.empty(shape, dtype=dtype)
        t[-16:] = torch.randn(16, *shape[1:])
        pairs.append((t, t[-16:].clone()))
    return pairs


def pair_up(what: str, args: list, meet: Callable[[Tensor], Tensor] = tail, programs: int = 8) -> Huge:
    """args: pairs (large, small), or one value for both"""
    large, small = (tuple(a[i] if isinstance(a, tuple) else a for a in args) for i in (0, 1))
    return Huge(what, large, small, meet, programs)
