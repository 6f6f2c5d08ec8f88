"""What we ask of transformers by names that it calls private. Where a version has one no more, the answer is the one with which
its own code runs."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from transformers import activations


def attention_implementation(config: Any) -> str | None:
    """ "sdpa", "eager" ...; None, which is none that we serve, where it cannot be told."""
    return getattr(config, "_attn_implementation", None)


_active_collector: Any = None
with contextlib.suppress(ImportError):
    from transformers.utils.output_capturing import _active_collector  # type: ignore[no-redef]


def may_be_collected(output: str) -> bool:
    """May somebody above want this output of the modules below, such as their attention weights?"""
    if _active_collector is None:
        return True
    wanted = _active_collector.get()
    return wanted is not None and output in wanted


def is_gelu_in_python(function: Any, cls: type) -> bool:
    """Is it the method in which one of transformers' activations writes its GELU out?"""
    names = ("_gelu_python", "_gelu_tanh_python")
    return any(getattr(function, "__func__", None) is getattr(cls, name, function) for name in names)


def is_erf(act: activations.GELUActivation) -> bool:
    """Does it call torch's GELU, or its own in Python: the same function?"""
    return act.act is nn.functional.gelu or is_gelu_in_python(act.act, type(act))


def own_loss_function(model: Any, default: Any) -> Any:
    """A loss function that was set on the model; `default` where there is none, or where models have no such thing."""
    return getattr(model, "_loss_function", default)
