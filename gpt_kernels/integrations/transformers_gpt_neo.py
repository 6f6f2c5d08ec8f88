"""transformers' GPT-Neo: attention that it writes out in a method of its own, unscaled; of every other layer a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention as Own

from ..patch import register
from .transformers_models import WrittenOut, weights_asked_for


def _window(module: Any) -> int:
    """The keys that a query sees; 0: all up to its own."""
    return module.config.window_size if module.attention_type == "local" else 0


def _other_mask(module: Any) -> str | None:
    if module.bias.is_meta:
        return None
    expected = torch.ones(module.bias.shape[-2:], dtype=torch.bool, device=module.bias.device).tril()
    if window := _window(module):
        expected = expected.triu(1 - window)
    return None if torch.equal(module.bias[0, 0].bool(), expected) else "its mask is not what its config says"


@register(Own, ("attention",), "attention in one pass", unless=_other_mask, serves=weights_asked_for)
class GPTNeoSelfAttention(WrittenOut):
    def attention_options(self: Any, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        Tq, Tk = query.shape[-2], key.shape[-2]
        if not Tq <= Tk <= self.bias.shape[-1]:
            return None
        return {"scale": 1.0, "causal_offset": Tk - Tq, "window_right": 0, "window_left": _window(self) - 1}
