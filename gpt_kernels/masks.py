"""What an attention mask does, seen in its values: asked once of each mask, which all layers of a model share."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

_looked_at: dict[tuple, tuple[weakref.ref, int, bool]] = {}


def hides_all(mask: Tensor, window: int = 0, by_number: bool = False) -> bool:
    """Does it hide every key from some query? mask: (..., Tq|1, Tk|1), boolean (True = visible) or additive, where what lies
    below half the lowest number of its dtype hides. window: where it is not 0, a query sees no more than the last `window` keys
    up to its own, the last query's being the last. by_number: of an additive mask, a row of nothing but -inf does not count.
    The mask's values are waited for."""
    return _once(mask, (window, by_number), lambda: _hidden(mask, window, by_number))


def is_uniform_or_causal(mask: Tensor) -> bool:
    """Of a table (..., L, L): is it one number everywhere, or one up to the diagonal and others beyond it?"""
    return mask.is_meta or _once(mask, (), lambda: _of_diagonal(mask))


def _once(mask: Tensor, question: tuple, answer: Callable[[], bool]) -> bool:
    if mask.is_inference():  # its changes are not counted
        return answer()
    key = id(mask), *question
    known = _looked_at.get(key)
    if known is not None and known[0]() is mask and known[1] == mask._version:
        return known[2]
    found = answer()
    if len(_looked_at) > 64:
        _looked_at.clear()
    _looked_at[key] = weakref.ref(mask), mask._version, found
    return found


@torch.no_grad()
def _of_diagonal(mask: Tensor) -> bool:
    if mask.numel() != mask.shape[-1] * mask.shape[-2] or mask.shape[-1] != mask.shape[-2] or not mask.numel():
        return False
    table = mask.reshape(mask.shape[-2:])
    alike = table == table[0, 0]
    return bool(alike.all()) or torch.equal(alike, torch.ones_like(alike).tril())


@torch.no_grad()
def _hidden(mask: Tensor, window: int, by_number: bool) -> bool:
    visible = mask if mask.dtype == torch.bool else mask >= torch.finfo(mask.dtype).min / 2
    if window:
        rows, columns = mask.shape[-2:]
        band = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).tril(columns - rows)
        visible = visible & band.triu(columns - rows - window + 1)
    seen = visible.any(-1)
    if by_number and mask.dtype != torch.bool:
        seen |= (mask == float("-inf")).all(-1)
    return not bool(seen.all())
