"""What an attention mask does, seen in its values: asked once of each mask, which all layers of a model share."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_looked_at: dict[tuple[int, int, bool], tuple[weakref.ref, int, bool]] = {}


def hides_all(mask: Tensor, window: int = 0, by_number: bool = False) -> bool:
    """Does it hide every key from some query? mask: (..., Tq|1, Tk|1), boolean (True = visible) or additive, where what lies
    below half the lowest number of its dtype hides. window: where it is not 0, a query sees no more than the last `window` keys
    up to its own, the last query's being the last. by_number: of an additive mask, a row of nothing but -inf does not count.
    The mask's values are waited for."""
    if mask.is_inference():  # its changes are not counted
        return _answer(mask, window, by_number)
    key = id(mask), window, by_number
    known = _looked_at.get(key)
    if known is not None and known[0]() is mask and known[1] == mask._version:
        return known[2]
    answer = _answer(mask, window, by_number)
    if len(_looked_at) > 64:
        _looked_at.clear()
    _looked_at[key] = weakref.ref(mask), mask._version, answer
    return answer


@torch.no_grad()
def _answer(mask: Tensor, window: int, by_number: bool) -> bool:
    visible = mask if mask.dtype == torch.bool else mask >= torch.finfo(mask.dtype).min / 2
    if window:
        rows, columns = mask.shape[-2:]
        band = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).tril(columns - rows)
        visible = visible & band.triu(columns - rows - window + 1)
    seen = visible.any(-1)
    if by_number and mask.dtype != torch.bool:
        seen |= (mask == float("-inf")).all(-1)
    return not bool(seen.all())
