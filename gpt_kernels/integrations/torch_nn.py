"""torch.nn's modules over one op each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import cross_entropy_of, over, softmax, unchanged
from ..ops.dropout import dropout
from ..ops.gelu import gelu
from ..ops.layer_norm import layer_norm
from ..ops.rms_norm import rms_norm
from ..patch import dense, droppable, keep, parameter, register
from ..reading import rebuilt
from ..serving import own_class, unhooked

keep(nn.Linear, "matrix product: torch's", home=__name__)
keep(nn.Embedding, "row lookup: torch's", home=__name__)


def _several_dimensions(module: Any) -> str | None:
    shape = module.normalized_shape
    if not isinstance(shape, tuple):
        return f"its normalized_shape is {shape!r}, no tuple"
    return f"normalises over {len(shape)} dimensions" if len(shape) != 1 else None


def _keep_rms_norm(module: Any) -> str | None:
    if module.eps is None and module.weight is not None and module.weight.dtype in (torch.bfloat16, torch.float16):
        return "eps=None in 16 bits: versions of torch take different ones"
    return _several_dimensions(module)


# on a GPU autocast has 16-bit inputs normalised to float32, on a CPU it leaves them alone
_LEFT_BY_AUTOCAST = not any(
    torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", "AutocastCPU") for op in ("layer_norm", "rms_norm")
)


def _norm(x: Any, shape: Any, eps: Any, weight: Any, bias: Any) -> bool:
    return (
        type(eps) is float
        and eps >= 0.0
        and dense(x, weight, bias)
        and x.is_contiguous()
        and shape == x.shape[-1:] != ()
        and (weight is None or weight.is_contiguous())
        and (bias is None or bias.is_contiguous())
        and (x.dtype in _EPS or not torch._C._is_any_autocast_enabled() or x.is_cpu and _LEFT_BY_AUTOCAST)
    )


def _serves_layer_norm(module: Any, input: Tensor) -> bool:
    return _norm(input, module.normalized_shape, module.eps, parameter(module, "weight"), parameter(module, "bias"))


@register(nn.LayerNorm, ("layer_norm",), "fused layer norm", unless=_several_dimensions, serves=_serves_layer_norm)
class LayerNorm:
    def forward(self: Any, input: Tensor) -> Tensor:
        return layer_norm(input, parameter(self, "weight"), parameter(self, "bias"), self.eps)


# in float32 and float64 all versions of torch mean the same by eps=None
_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def _serves_rms_norm(module: Any, x: Tensor) -> bool:
    eps = module.eps
    if eps is None and isinstance(x, Tensor):
        eps = _EPS.get(x.dtype)
    return _norm(x, module.normalized_shape, eps, parameter(module, "weight"), None)


@register(nn.RMSNorm, ("rms_norm",), "fused RMS norm", unless=_keep_rms_norm, serves=_serves_rms_norm)
class RMSNorm:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, parameter(self, "weight"), _EPS[x.dtype] if self.eps is None else self.eps)


def _serves_gelu(module: Any, input: Tensor) -> bool:
    return module.approximate in ("none", "tanh") and dense(input) and input.is_contiguous() and input.ndim > 0


@register(nn.GELU, ("gelu",), "one-pass GELU", serves=_serves_gelu)
class GELU:
    def forward(self: Any, input: Tensor) -> Tensor:
        return gelu(input, None, self.approximate)


_own_attention: Any = nn.MultiheadAttention.forward
_attention_of_torch = rebuilt(
    _own_attention, {"F": over(nn.functional, ("multi_head_attention_forward",))}
)  # its own code; what it calls is ours where both mean the same


def _keep_multihead(module: Any) -> str | None:
    return "another library's function stands in it" if _attention_of_torch is None else None


def _serves_multihead(module: Any, *args: Any, **kwargs: Any) -> bool:
    return unchanged(nn.functional, (("multi_head_attention_forward",),))


@register(
    nn.MultiheadAttention, ("attention",), "attention in one pass where no weights are asked for", unless=_keep_multihead,
    serves=_serves_multihead,
)  # fmt: skip
class MultiheadAttention:
    forward = _attention_of_torch


def _gelu_form(layer: Any) -> str | None:
    """Which GELU its activation is."""
    act = layer.activation
    if act is nn.functional.gelu:
        return "none"
    return act.approximate if own_class(act) is nn.GELU and unhooked(act) and act.approximate in ("none", "tanh") else None


def _keep_layer(layer: Any) -> str | None:
    return None if _gelu_form(layer) else "its parts are looked at one by one"


class _FeedForward:
    def _ff_block(self: Any, x: Tensor) -> Tensor:
        form, linear = _gelu_form(self), self.linear1
        if (
            form is None
            or type(linear) is not nn.Linear
            or linear.bias is None
            or not unhooked(linear)
            or not dense(x, linear.weight, linear.bias)
            or not x.numel()
            or torch._C._is_any_autocast_enabled()
        ):
            return super()._ff_block(x)  # type: ignore[misc]
        x = gelu(nn.functional.linear(x, linear.weight), linear.bias, form)
        # an encoder's layer has two dropouts after its blocks, a decoder's three
        last = self.dropout3 if hasattr(self, "dropout3") else self.dropout2
        return last(self.linear2(self.dropout(x)))


@register(nn.TransformerEncoderLayer, ("gelu",), "bias and GELU in one pass", unless=_keep_layer)
class TransformerEncoderLayer(_FeedForward):
    pass


@register(nn.TransformerDecoderLayer, ("gelu",), "bias and GELU in one pass", unless=_keep_layer)
class TransformerDecoderLayer(_FeedForward):
    pass


def _serves_always(module: Any, *args: Any, **kwargs: Any) -> bool:
    return True  # the function asks


@register(nn.Softmax, ("softmax",), "one-pass softmax", serves=_serves_always)
class Softmax:
    def forward(self: Any, input: Tensor) -> Tensor:
        return softmax(input, self.dim, _stacklevel=5)


@register(nn.CrossEntropyLoss, ("cross_entropy",), "cross entropy without probabilities kept", serves=_serves_always)
class CrossEntropyLoss:
    def forward(self: Any, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy_of(self, input, target)


def _keep_dropout(module: Any) -> str | None:
    if module.inplace:
        return "drops in place"
    return None if droppable(module.p) else f"p = {module.p}"


def _serves_dropout(module: Any, input: Tensor) -> bool:
    if not droppable(module.p) or module.inplace or not dense(input) or not input.is_contiguous():
        return False
    # torch returns an empty input itself
    return input.ndim > 0 and input.numel() > 0


@register(
    nn.Dropout,
    ("dropout",),
    "dropout without a stored mask, its random numbers in parallel",
    unless=_keep_dropout,
    serves=_serves_dropout,
)
class Dropout:
    def forward(self: Any, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
