"""A language model's continuation of a text: with a cache of keys and values, and sampled as asked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: Any,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """idx (B, T) continued by up to max_new_tokens; see GPT.generate.

    model: has config (n_layer, n_head, n_embd, block_size), lm_head and hidden(idx, cache, start) as GPT has.
    """
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(f"generate: idx must be (B, T) with T >= 1, got shape {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must not be negative, got {max_new_tokens}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    config, (B, T) = model.config, idx.shape
    out = torch.cat((idx.long(), idx.new_empty(B, max_new_tokens, dtype=torch.int64)), 1)
    done = torch.zeros(B, dtype=torch.bool, device=idx.device)
    weight = model.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    length = min(config.block_size, T + max_new_tokens)
    cache = weight.new_empty(config.n_layer, 2, B, length, config.n_head, config.n_embd // config.n_head, dtype=dtype)
    with evaluating(model):
        for end in range(T, T + max_new_tokens):
            if end > config.block_size:
                x = model.hidden(out[:, end - config.block_size : end])
            else:
                start = 0 if end == T else end - 1
                x = model.hidden(out[:, start:end], cache, start)
            token = _sample(model.lm_head(x[:, -1]).float(), temperature, top_k, top_p, generator)  # (B,)
            if eos_token_id is not None:
                token = token.masked_fill(done, eos_token_id)
                done |= token == eos_token_id
            out[:, end] = token
            if eos_token_id is not None and bool(done.all()):
                return out[:, : end + 1]
    return out


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() inside the block; afterwards every module's own training flag is back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """(B, V) -> (B,)"""
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1.0:
        ordered, index = p.sort(-1, descending=True)
        # a token stays while the likelier ones before it hold less than top_p: the first always does
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
        p = torch.zeros_like(p).scatter_(-1, index, ordered)
    return torch.multinomial(p, 1, generator=generator)[:, 0]
