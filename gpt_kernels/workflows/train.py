"""The training loop: AdamW with warm-up and cosine, gradients clipped, 16 bit by autocast."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .models import autocast, next_token_loss


def batches(tokens: Tensor, batch: int, context: int, seed: int = 0) -> Iterator[Tensor]:
    """Windows (batch, context) from random places in a row of tokens, without end; a seed's are the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - context, (batch,), generator=generator)
        yield torch.stack([tokens[s : s + context] for s in starts]).long()


def optimizer_for(
    model: nn.Module, steps: int, lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW; lr is reached in a tenth of the steps and falls to a tenth of it, as a cosine does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, fused=True)
    warm = max(1, steps // 10)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(1, s / steps)))
    )


def train(
    model: nn.Module, data: Iterable[Tensor], steps: int, lr: float, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[float, float]]:
    """Trains the model in place, and yields (loss, seconds) of each step when it is done.

    data: token ids (B, T), at least `steps` of them, on any device. dtype: of the products, torch.float32 or a 16-bit one,
    beside weights in float32.
    """
    optimizer, schedule = optimizer_for(model, steps, lr)
    parameters = list(model.parameters())
    device = parameters[0].device
    for _, ids in zip(range(steps), data, strict=False):
        ids = ids.to(device)
        started = time.perf_counter()
        with autocast(ids, dtype):
            loss = next_token_loss(model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        value = loss.item()  # waits for the GPU as well
        yield value, time.perf_counter() - started


class Progress:
    """Of a run, inside a `with`: a bar on a terminal, elsewhere a line at the first step and at each fifth of them all."""

    def __init__(self, title: str, steps: int, tokens: int):
        """tokens: of a step"""
        from tqdm import tqdm

        self.title, self.steps, self.tokens, self.done = title, steps, tokens, 0
        self.bar: Any = tqdm(total=steps, desc=f"{title:>13}", unit="step", disable=None, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def step(self, loss: float, seconds: float) -> None:
        self.done += 1
        line = f"loss {loss:.3f}, {self.tokens / seconds:,.0f} tokens/s"
        self.bar.set_postfix_str(line)
        self.bar.update()
        if self.bar.disable and (self.done == 1 or self.done * 5 % self.steps < 5):
            print(f"{self.title:>13} step {self.done}/{self.steps}: {line}", flush=True)

    def doing(self, what: str) -> None:
        """After the last step."""
        self.bar.set_postfix_str(what)
