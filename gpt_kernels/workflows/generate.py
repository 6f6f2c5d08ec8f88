"""What a model goes on with, and how fast."""

from __future__ import annotations

import time
from typing import Any

import torch


def sample(
    model: Any, prompt: list[int], new: int, temperature: float = 0.8, top_k: int = 50, end: int = 0, seed: int = 0
) -> list[int]:
    """As many new tokens after the prompt's, drawn from the seed by a Hugging Face model. end: what it pads with."""
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    torch.manual_seed(seed)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        pad_token_id=end,
    )
    return made[0, len(prompt) :].tolist()


def tokens_per_second(model: Any, prompt: list[int], new: int, **more: Any) -> float:
    """Of sample(), with the same arguments."""
    started = time.perf_counter()
    sample(model, prompt, new, **more)
    return new / (time.perf_counter() - started)
