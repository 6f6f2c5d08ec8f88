"""Gated linear units: the activation of one half of a layer's output times the other half, in one pass.

    y = act(gate) * up,   act(v) = v / (1 + e^-v)                                     swiglu: Llama's, Mistral's, Qwen's
                                   v * cdf(v)                                         geglu, approximate="none"
                                   v * (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3))) / 2  geglu, approximate="tanh": Gemma's

gate, up, y: (..., N) in float32, bfloat16, float16 or float64; or gate (..., 2N) holds both, gate first, or up first. Rows may
lie apart at one stride, as those of a slice of such a tensor do. Nothing is kept for the backward but gate and up; arithmetic
is in float32 (float64 for float64), so that a 16-bit result is rounded once. Source: Shazeer, arXiv 2002.05202.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import sharding
from ..dispatch import define
from .calls import check_tensors, handle_torch_function, has_torch_function_variadic, is_grad_enabled
from .common import TRANSFORMED, derivative_of, rederived, stat_dtype, transforms_active

__all__ = ["geglu", "swiglu"]  # the public functions

SILU, GELU_TANH, GELU = range(3)  # the kernels' numbers of the activations


def _halves(gate, up, up_first):
    """(gate, up) in the dtype of the arithmetic."""
    if up is None:
        gate, up = gate.chunk(2, -1)[:: -1 if up_first else 1]
    return gate.to(stat_dtype(gate.dtype)), up.to(stat_dtype(up.dtype))


def reference_fwd(gate, up, act, up_first):
    g, u = _halves(gate, up, up_first)
    a = g * torch.sigmoid(g) if act == SILU else F.gelu(g, approximate="tanh" if act == GELU_TANH else "none")
    return (a * u).to(gate.dtype).contiguous()


def reference_bwd(dy, gate, up, act, up_first):
    g, u = _halves(gate, up, up_first)
    if act == GELU:
        factor, slope = torch.special.ndtr(g), torch.exp(-0.5 * g**2) / math.sqrt(2 * math.pi)
    else:  # s of an odd polynomial z, whose slope is s (1 - s) z'
        c = math.sqrt(8 / math.pi)
        factor = torch.sigmoid(g if act == SILU else c * (g + 0.044715 * g**3))
        # s (1 - s) is 0 where the square is large, and times inf it were NaN
        z_slope = 1.0 if act == SILU else c * (1 + 3 * 0.044715 * (g**2).clamp(max=1e30))
        slope = factor * (1 - factor) * z_slope
    d = dy.to(g.dtype)
    dgate, dup = ((d * u * (factor + g * slope)).to(gate.dtype), (d * (g * factor)).to(gate.dtype))
    if up is None:
        return torch.cat((dup, dgate) if up_first else (dgate, dup), -1).contiguous(), gate.new_empty(0)
    return dgate.contiguous(), dup.contiguous()


_inputs = "Tensor gate, Tensor? up, int act, bool up_first"
fwd = define(f"glu_fwd({_inputs}) -> Tensor", reference_fwd)
# without an up, both gradients in one tensor as gate has both, and none beside it
bwd = define(f"glu_bwd(Tensor dy, {_inputs}) -> (Tensor dgate, Tensor dup)", reference_bwd)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, act, up_first):
        ctx.save_for_backward(gate, up)
        ctx.options = act, up_first
        return fwd(gate, up, act, up_first)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = (reference_bwd if rederived(dy) else bwd)(dy.contiguous(), gate, up, *ctx.options)
        return dgate, None if up is None else dup, None, None


def in_rows(x: Tensor) -> bool:
    """Do x's rows lie at one stride, each contiguous?"""
    if x.is_contiguous():
        return True
    *sizes, N = x.shape
    *strides, last = x.stride()
    if last != 1 and N != 1:
        return False
    step = None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1:
            if step is not None and stride != step:
                return False
            step = size * stride
    return True


def _general(gate, up, act, up_first, approximate):
    """A call of any form."""
    op, more = ("swiglu", ()) if act == SILU else ("geglu", (approximate,))
    if has_torch_function_variadic(gate, up):
        public = swiglu if act == SILU else geglu
        return handle_torch_function(public, (gate, up), gate, up, *more, up_first=up_first)
    if not isinstance(gate, Tensor):
        raise TypeError(f"{op}: gate must be a Tensor, got {type(gate).__name__}")
    check_tensors(op, up=up)
    if approximate not in ("tanh", "none"):
        kind = RuntimeError if isinstance(approximate, str) else TypeError
        raise kind(f"geglu: approximate must be 'tanh' or 'none', got {approximate!r}")
    if up is None:
        if not gate.dim() or gate.shape[-1] % 2:
            raise RuntimeError(f"{op}: gate without an up must have an even last dimension, got shape {tuple(gate.shape)}")
    elif up_first:
        raise RuntimeError(f"{op}: up_first is of a gate that holds both, got an up beside it")
    if sharding.spread(gate, up):
        return sharding.glu(lambda g, u: _glu(g, u, act, up_first, approximate), gate, up)
    gate, up = (t if t is None or in_rows(t) else t.contiguous() for t in (gate, up))
    derivative = derivative_of(gate, up)
    if derivative == TRANSFORMED:
        return reference_fwd(gate, up, act, up_first)
    return _GLU.apply(gate, up, act, up_first) if derivative else fwd(gate, up, act, up_first)


def _glu(gate, up, act, up_first, approximate="none"):
    if (
        type(gate) is not Tensor
        or (up is not None and type(up) is not Tensor)
        or has_torch_function_variadic(gate, up)
        or transforms_active()
        or forward_ad._current_level >= 0
        or not gate.is_contiguous()
        or (not gate.dim() or gate.shape[-1] % 2 if up is None else up_first or not up.is_contiguous())
    ):
        return _general(gate, up, act, up_first, approximate)
    if is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        return _GLU.apply(gate, up, act, up_first)
    return fwd(gate, up, act, up_first)


def swiglu(gate: Tensor, up: Tensor | None = None, *, up_first: bool = False) -> Tensor:
    """silu(gate) * up.

    gate, up: (..., N) of one shape and dtype, any strides; without copies where rows lie at one stride. Or gate alone,
    (..., 2N): its first half is the gate, its second one up; with up_first the other way round. Returns (..., N) in their
    dtype, contiguous; the gradient of a gate that holds both is one tensor as it is. Raises RuntimeError for another shape,
    dtype or device of up, and for a last dimension without halves.
    """
    return _glu(gate, up, SILU, up_first)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none", *, up_first: bool = False) -> Tensor:
    """gelu(gate, approximate) * up.

    approximate: "none", as torch.nn.functional.gelu's default, or "tanh". All else as in swiglu. Raises RuntimeError for
    another `approximate`, too.
    """
    if approximate != "none" and approximate != "tanh":
        return _general(gate, up, GELU, up_first, approximate)
    return _glu(gate, up, GELU if approximate == "none" else GELU_TANH, up_first, approximate)


def glu_cost(gate: Tensor, up: Tensor | None = None, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops; an exponential is one): forward reads gate and up, writes y; backward reads dy, gate and
    up, writes dgate and dup."""
    n = gate.numel() if up is not None else gate.numel() // 2
    return (5 if backward else 3) * n * gate.element_size(), (16 if backward else 6) * n
