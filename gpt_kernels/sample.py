"""A model on a batch, and the model afterwards as it was: what verify, explain and a measured patch share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .models.gpt import GPT
from .probe import random_state_kept


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter; the CPU where there is none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards the classes and modes of the modules, buffers with their values, and the random state are as before."""
    modules = list(model.modules())
    classes = [(module, module.__class__, module.training) for module in modules]
    buffers = [(module, name, b) for module in modules for name, b in module._buffers.items()]
    values = {b: b.clone() for _, _, b in buffers if b is not None}
    with random_state_kept(device_of(model)):
        try:
            yield
        finally:
            for module, cls, training in classes:
                module.__class__ = cls
                module.training = training
            with torch.no_grad():
                for module, name, buffer in buffers:
                    module._buffers[name] = buffer
                for buffer, value in values.items():
                    # what nobody wrote to is not written to: its version would tell
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def arguments_of(model: nn.Module, batch: Any, caller: str) -> tuple[tuple, dict]:
    """(args, kwargs) of a batch: a dict of the model's arguments, a tuple of them, or token ids (B, T), which then are their
    own labels. Raises TypeError, in the caller's name, for anything else."""
    if isinstance(batch, Mapping):
        batch = dict(batch)
        if "input_ids" in batch and "labels" not in batch and hasattr(model, "loss_function") and hasattr(model, "lm_head"):
            batch["labels"] = batch["input_ids"]
        return (), batch
    if isinstance(batch, Tensor):
        if isinstance(model, GPT):
            return (batch, nn.functional.pad(batch[:, 1:], (0, 1), value=-1)), {}
        return arguments_of(model, {"input_ids": batch}, caller) if hasattr(model, "config") else ((batch,), {})
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise TypeError(f"{caller}: batch must be a dict, a tuple or a tensor, got {type(batch).__name__}")


def outputs_of(result: Any) -> dict[str, Tensor]:
    """The floating tensors that a model returned, by name."""
    if isinstance(result, Tensor):
        result = {"output": result}
    items = result.items() if isinstance(result, Mapping) else zip(("logits", "loss"), result, strict=False)
    return {name: t for name, t in items if isinstance(t, Tensor) and t.is_floating_point()}


def loss_of(outputs: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The loss among the outputs, or a fixed sum of them all, whose weights are rounded to dtype, the same for every run."""
    if (loss := outputs.get("loss")) is not None:
        return loss
    weights = (torch.cos(torch.arange(t.numel(), device=t.device)).to(dtype).to(t.dtype) for t in outputs.values())
    return torch.stack([(t.flatten() * w).sum() for t, w in zip(outputs.values(), weights, strict=True)]).sum()
