"""transformers' GPT-J: attention that it writes out in a method of its own."""

from __future__ import annotations

from typing import Any

from transformers.models.gptj.modeling_gptj import GPTJAttention as Own

from ..patch import register
from .transformers_models import WrittenOut, weights_asked_for


@register(Own, ("attention",), "attention in one pass", serves=weights_asked_for)
class GPTJAttention(WrittenOut):
    def attention_options(self: Any, query, key) -> dict[str, Any] | None:
        return {"scale": 1 / self.scale_attn}
