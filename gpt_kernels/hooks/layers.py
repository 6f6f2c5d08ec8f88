"""Layers for `kernelize` of the package kernels: each has a forward that stands in for that of the modules of its name.

As kernels asks of a layer: no state, no other members, the forward's arguments those of the classes that carry the name in
transformers (@use_kernel_forward_from_hub). The module keeps its class; a call that our kernels do not serve runs the forward
of that.

A name is a promise that is not always kept: of two dozen models' `rotary_pos_emb` one turns the other way, two take tables of
half the width. So the first call of each class compares ours with the class's own on a few random rows, and what is another
formula is left to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..accuracy import SAME_FORMULA
from ..ops.common import stat_dtype
from ..ops.gelu import gelu
from ..ops.glu import swiglu
from ..ops.rms_norm import rms_norm
from ..ops.rotary import apply_rotary_pos_emb
from ..serving import dense, unhooked

# ---- is it that formula? ----

_agreed: dict[type, bool] = {}


def _own(module: nn.Module, *args: Any) -> Any:
    return type(module).forward(module, *args)


def _is(module: nn.Module, ours: Callable[..., Any], like: Tensor, *shapes: tuple[int, ...]) -> bool:
    """Does the module's class compute `ours`, of tensors of these shapes, in the dtype and on the device of `like`?"""
    known = _agreed.get(type(module))
    if known is None:
        # a compiler cannot run it; after one call outside of it, the answer is there
        if torch.compiler.is_compiling():
            return False
        known = _agreed[type(module)] = _compared(module, ours, like, shapes)
    return known


def _compared(module: nn.Module, ours: Callable[..., Any], like: Tensor, shapes: tuple[tuple[int, ...], ...]) -> bool:
    generator, device = torch.Generator().manual_seed(0), like.device
    tensors = [torch.randn(shape, generator=generator).to(like) for shape in shapes]
    with torch.no_grad(), torch.random.fork_rng([device] if like.is_cuda else []), torch.autocast(device.type, enabled=False):
        found = [f if isinstance(f, tuple) else (f,) for f in (ours(*tensors), _own(module, *tensors))]
    return len(found[0]) == len(found[1]) and all(_alike(a, b) for a, b in zip(*found, strict=True))


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool((a - b).abs().max() <= SAME_FORMULA[a.dtype] * max(1.0, b.abs().max().item()))


# ---- norms ----


def _normed(module: nn.Module, x: Any, eps: Any, ours: Callable[..., Any]) -> Tensor:
    weight = module._parameters.get("weight")
    served = (
        type(eps) is float
        and eps >= 0.0
        and weight is not None
        and dense(x, weight)
        and x.ndim > 0
        and x.numel() > 0
        and weight.shape == x.shape[-1:]
        and _is(module, lambda rows: ours(rows, weight, eps), x, (2, x.shape[-1]))
    )
    return ours(x, weight, eps) if served else _own(module, x)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + variance_epsilon), in float32, rounded once."""

    has_backward = can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normed(self, hidden_states, getattr(self, "variance_epsilon", None), rms_norm)


def _zero_centered(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # 1 + weight in float32 also beside 16 bits, as the class has it
    return rms_norm(x, 1.0 + weight.to(stat_dtype(x.dtype)), eps)


class RMSNormZeroCentered(nn.Module):
    """(1 + weight) * x / sqrt(mean(x^2) + eps)"""

    has_backward = can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _normed(self, x, getattr(self, "eps", None), _zero_centered)


# ---- activations ----


def _gelu(module: nn.Module, x: Any, approximate: str) -> Tensor:
    served = dense(x) and x.ndim > 0 and x.numel() > 0 and _is(module, lambda rows: gelu(rows, None, approximate), x, (2, 64))
    return gelu(x, None, approximate) if served else _own(module, x)


class GeLU(nn.Module):
    has_backward = can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _gelu(self, input, "none")


class GeluTanh(nn.Module):
    has_backward = can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _gelu(self, input, "tanh")


# ---- rotary embedding: a function, which kernels makes a module of ----


class RotaryPosEmb(nn.Module):
    """(q * cos) + (rotate_half(q) * sin), and of k; tables as wide as the heads."""

    has_backward = can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        served = (
            unsqueeze_dim in (1, 2)
            and dense(q, k)
            and dense(cos, sin)
            and cos.dtype == q.dtype
            and q.ndim == k.ndim == 4
            and cos.ndim == 3
            and cos.shape == sin.shape
            and q.shape[-1] == k.shape[-1] == cos.shape[-1]
            and q.numel() > 0
            and k.numel() > 0
            and _is(self, apply_rotary_pos_emb, q, (1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
        )
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim) if served else _own(self, q, k, cos, sin, unsqueeze_dim)


# ---- gated MLP ----


class MLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)). No class of transformers carries this name: replace_kernel_forward_from_hub
    of kernels gives it to one."""

    has_backward = can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        children = self._modules
        gate, up, down, act = (children.get(name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
        if gate is None or up is None or down is None or act is None or type(act).__name__ not in ("SiLU", "SiLUActivation"):
            return _own(self, x)

        def ours(x: Tensor) -> Tensor:
            return down(swiglu(gate(x), up(x)))

        served = unhooked(act) and dense(x) and x.ndim > 1 and x.numel() > 0 and _is(self, ours, x, (2, x.shape[-1]))
        return ours(x) if served else _own(self, x)


# {the name that classes carry: the layer, the op that it runs}
LAYERS: dict[str, tuple[type[nn.Module], str]] = {
    "RMSNorm": (RMSNorm, "rms_norm"),
    "RMSNormZeroCentered": (RMSNormZeroCentered, "rms_norm"),
    "GeLU": (GeLU, "gelu"),
    "GeluTanh": (GeluTanh, "gelu"),
    # two more ways to write that formula
    "NewGELU": (GeluTanh, "gelu"),
    "FastGELU": (GeluTanh, "gelu"),
    "rotary_pos_emb": (RotaryPosEmb, "rotary"),
    "MLP": (MLP, "glu"),
}
