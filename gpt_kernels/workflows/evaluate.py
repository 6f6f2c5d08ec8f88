"""How good a model is on text that it was not trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .models import autocast, next_token_loss


def held_out_loss(
    model: nn.Module, tokens: Tensor, batch: int, context: int, most: int = 16, dtype: torch.dtype = torch.float32
) -> float:
    """Nats per token over the first `most` windows (context) of a row of tokens; the model is left in eval mode."""
    model.eval()
    count = min(most, len(tokens) // context)
    windows = tokens[: count * context].long().view(count, context).to(next(model.parameters()).device)
    with torch.no_grad(), autocast(windows, dtype):
        losses = [next_token_loss(model, w).item() * len(w) for w in windows.split(batch)]
    return sum(losses) / count


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; finite."""
    return math.exp(min(loss, 700))
