"""Layers for `kernelize` of the package kernels: each has a forward that stands in for that of the modules of its name.

As kernels asks of a layer: no state, no other members, the forward's arguments those of the classes that carry the name in
transformers (@use_kernel_forward_from_hub). The module keeps its class; a call that our kernels do not serve runs the forward
of that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.common import stat_dtype
from ..ops.gelu import gelu
from ..ops.rms_norm import rms_norm
from ..patch import dense, parameter


def _own(module: nn.Module, *args: Any) -> Any:
    return type(module).forward(module, *args)


def _normed(x: Any, weight: Any, eps: Any) -> bool:
    return (
        type(eps) is float
        and eps >= 0.0
        and weight is not None
        and dense(x, weight)
        and x.ndim > 0
        and x.numel() > 0
        and weight.shape == x.shape[-1:]
    )


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + variance_epsilon), in float32, rounded once."""

    has_backward = can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, eps = parameter(self, "weight"), getattr(self, "variance_epsilon", None)
        return rms_norm(hidden_states, weight, eps) if _normed(hidden_states, weight, eps) else _own(self, hidden_states)


class RMSNormZeroCentered(nn.Module):
    """(1 + weight) * x / sqrt(mean(x^2) + eps)"""

    has_backward = can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        weight, eps = parameter(self, "weight"), getattr(self, "eps", None)
        # in float32 also beside 16 bits, as the class does
        return rms_norm(x, 1.0 + weight.to(stat_dtype(x.dtype)), eps) if _normed(x, weight, eps) else _own(self, x)


def _gelu(module: nn.Module, x: Tensor, approximate: str) -> Tensor:
    return gelu(x, None, approximate) if dense(x) and x.ndim > 0 and x.numel() > 0 else _own(module, x)


class GeLU(nn.Module):
    has_backward = can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _gelu(self, input, "none")


class GeluTanh(nn.Module):
    has_backward = can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _gelu(self, input, "tanh")


# {the name that classes carry: the layer, the op that it runs}
LAYERS: dict[str, tuple[type[nn.Module], str]] = {
    "RMSNorm": (RMSNorm, "rms_norm"),
    "RMSNormZeroCentered": (RMSNormZeroCentered, "rms_norm"),
    "GeLU": (GeLU, "gelu"),
    "GeluTanh": (GeluTanh, "gelu"),
    # two more ways to write that formula
    "NewGELU": (GeluTanh, "gelu"),
    "FastGELU": (GeluTanh, "gelu"),
}
