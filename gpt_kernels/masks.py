"""What an attention mask does, seen in its values: asked once of each mask, which all layers of a model share."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_looked_at: dict[tuple[int, int], tuple[weakref.ref, int, bool]] = {}


def hides_all(mask: Tensor, window: int = 0) -> bool:
    """Does it hide every key from some query? mask: (..., Tq|1, Tk|1), boolean (True = visible) or additive, where what lies
    below half the lowest number of its dtype hides. window: where it is not 0, a query sees no more than the last `window` keys
    up to its own, the last query's being the last. The mask's values are waited for."""
    if mask.is_inference():  # its changes are not counted
        return _answer(mask, window)
    key = id(mask), window
    known = _looked_at.get(key)
    if known is not None and known[0]() is mask and known[1] == mask._version:
        return known[2]
    answer = _answer(mask, window)
    if len(_looked_at) > 64:
        _looked_at.clear()
    _looked_at[key] = weakref.ref(mask), mask._version, answer
    return answer


def _answer(mask: Tensor, window: int) -> bool:
    with torch.no_grad():
        if window:
            seen = mask if mask.dtype == torch.bool else mask >= torch.finfo(mask.dtype).min / 2
            rows, columns = mask.shape[-2:]
            band = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).tril(columns - rows)
            seen = (seen & band.triu(columns - rows - window + 1)).any(-1)
        else:
            seen = mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1) >= torch.finfo(mask.dtype).min / 2
        return not bool(seen.all())
