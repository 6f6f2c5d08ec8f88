"""torch.nn.functional's functions over our kernels where both mean the same; every other call is torch's own.

patch puts them in the place of torch's inside the methods of a class (substitute.py), by whatever name they are called there:
F.gelu, torch.nn.functional.gelu, torch.softmax, or a function imported by itself. There is nothing to probe: it is torch's
function that is named, and tests/test_functional.py holds ours to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .masks import hides_all
from .ops.attention import MAX_HEAD_DIM
from .ops.attention import scaled_dot_product_attention as our_attention
from .ops.cross_entropy import REDUCTIONS
from .ops.cross_entropy import cross_entropy as our_cross_entropy
from .ops.dropout import dropout as our_dropout
from .ops.gelu import gelu as our_gelu
from .ops.layer_norm import layer_norm as our_layer_norm
from .ops.rms_norm import rms_norm as our_rms_norm
from .ops.softmax import softmax as our_softmax
from .reading import dotted, globals_read, rebuilt
from .serving import attended, dense, droppable, plain

# ---- the functions, in torch's signatures ----


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    served = (
        attended(query, key, value)
        and droppable(dropout_p)
        and (scale is None or type(scale) in (float, int) and scale > 0)
        and _shapes_serve(query, key, value, enable_gqa)
        and (attn_mask is None or not is_causal and _mask_serves(attn_mask, query, key))
        # else somebody has asked for products
        and (torch.compiler.is_dynamo_compiling() or torch.backends.cuda.flash_sdp_enabled())
    )
    function: Any = our_attention if served else F.scaled_dot_product_attention
    return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _shapes_serve(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> bool:
    """Heads as they come, nothing broadcast."""
    if not 3 <= q.ndim == k.ndim == v.ndim <= 4 or not (q.numel() and k.numel() and v.numel()):
        return False
    heads, key_heads = q.shape[-3], k.shape[-3]
    return (
        q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
        and k.shape[-3:-1] == v.shape[-3:-1]
        and q.shape[-1] == k.shape[-1] <= MAX_HEAD_DIM
        and v.shape[-1] <= MAX_HEAD_DIM
        and (heads == key_heads or enable_gqa and heads % key_heads == 0)
    )


def _mask_serves(mask: Any, q: Tensor, k: Tensor) -> bool:
    if not plain(mask) and type(mask) is not torch.nn.Parameter or mask.layout is not torch.strided or mask.device != q.device:
        return False
    scores = (*q.shape[:-1], k.shape[-2])
    if not 2 <= mask.ndim <= len(scores) or any(m not in (1, n) for m, n in zip(mask.shape[::-1], scores[::-1], strict=False)):
        return False
    if mask.dtype != torch.bool and mask.requires_grad:
        # then torch writes its attention out, and a row that is hidden by numbers is the mean of all values, whose gradient
        # our kernels lose (ops/attention.py), as torch's own do
        return mask.dtype == q.dtype and not torch.compiler.is_compiling() and not hides_all(mask)
    return mask.dtype in (torch.bool, q.dtype)


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
):
    if (
        weight is size_average is reduce is None
        and reduction in REDUCTIONS
        and type(ignore_index) is int
        and type(label_smoothing) in (float, int)
        and 0.0 <= label_smoothing <= 1.0
        and dense(input)
        and plain(target)
        and target.dtype is torch.int64
        and target.device == input.device
        and input.ndim == 2
        and target.shape == input.shape[:1]
        and input.numel() > 0
    ):
        return our_cross_entropy(input, target, ignore_index, reduction, label_smoothing)
    return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Made inside a forward, as many of transformers' do."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy_of(self, input, target)


def cross_entropy_of(loss: Any, input: Tensor, target: Tensor) -> Tensor:
    """What torch.nn.CrossEntropyLoss does in its forward."""
    more = {"ignore_index": loss.ignore_index, "reduction": loss.reduction, "label_smoothing": loss.label_smoothing}
    return cross_entropy(input, target, loss.weight, **more)


def gelu(input, *, approximate="none"):
    if dense(input) and input.is_contiguous() and input.ndim > 0 and approximate in ("none", "tanh"):
        return our_gelu(input, None, approximate)
    return F.gelu(input, approximate=approximate)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    if _norm_serves(input, normalized_shape, weight, bias, eps):
        return our_layer_norm(input, weight, bias, eps)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(input, normalized_shape, weight=None, eps=None):
    given = eps
    if eps is None and type(input) is Tensor and input.dtype in (torch.float32, torch.float64):
        given = torch.finfo(input.dtype).eps  # in 16 bits versions of torch take different ones
    if _norm_serves(input, normalized_shape, weight, None, given):
        return our_rms_norm(input, weight, given)
    return F.rms_norm(input, normalized_shape, weight, eps)


def _norm_serves(x: Any, shape: Any, weight: Any, bias: Any, eps: Any) -> bool:
    return (
        type(eps) is float
        and eps >= 0.0
        and dense(x, weight, bias)
        and isinstance(shape, tuple | list)
        and tuple(shape) == x.shape[-1:] != ()
        and x.is_contiguous()
        and x.numel() > 0
        and (weight is None or weight.shape == x.shape[-1:] and weight.is_contiguous())
        and (bias is None or bias.shape == x.shape[-1:] and bias.is_contiguous())
    )


def softmax(input, dim=None, _stacklevel=3, dtype=None):
    return last_softmax(input) if _softmax_serves(input, dim, dtype) else F.softmax(input, dim, _stacklevel + 1, dtype)


def torch_softmax(input, dim, *args, **kwargs):
    """torch.softmax, which has other arguments: dtype, out."""
    if not (args or kwargs) and _softmax_serves(input, dim, None):
        return last_softmax(input)
    return torch.softmax(input, dim, *args, **kwargs)


def _softmax_serves(x: Any, dim: Any, dtype: Any) -> bool:
    return type(dim) is int and (dtype is None or dtype is getattr(x, "dtype", None)) and softmax_serves(x, dim)


def softmax_serves(x: Any, dim: int = -1) -> bool:
    # a GPU would wait for the question in last_softmax, and a compiler cannot ask it
    return (
        dense(x)
        and x.is_cpu
        and x.ndim > 0
        and dim in (-1, x.ndim - 1)
        and x.is_contiguous()
        and x.numel() > 0
        and not torch.compiler.is_compiling()
    )


def last_softmax(x: Tensor) -> Tensor:
    """Over the last dimension. A row of -inf is NaN, as torch has it; our op's is 0."""
    y = our_softmax(x)
    first = y.detach().select(-1, 0)
    if bool((first == 0).any()):
        hidden = (x.detach() == float("-inf")).all(-1, keepdim=True)
        if bool(hidden.any()):
            return y * torch.where(hidden, float("nan"), 1.0).to(y.dtype)
    return y


def dropout(input, p=0.5, training=True, inplace=False):
    if type(training) is bool and inplace is False and droppable(p) and dense(input) and input.numel() > 0:
        return our_dropout(input, p, training)
    return F.dropout(input, p, training, inplace)


# torch's own code over ours, and the globals that it reads; None where another library's stands there
_whole: Any = getattr(F, "multi_head_attention_forward", None)
_written = isinstance(_whole, FunctionType)
_over_ours = rebuilt(_whole, {"scaled_dot_product_attention": scaled_dot_product_attention}) if _written else None
_read = tuple(globals_read(_whole).items()) if _written else ()


def multi_head_attention_forward(*args, **kwargs):
    if torch.compiler.is_dynamo_compiling() or all(_whole.__globals__.get(name) is value for name, value in _read):
        return _over_ours(*args, **kwargs)  # type: ignore[misc]
    return F.multi_head_attention_forward(*args, **kwargs)


# torch's -> (the op, ours)
OURS: dict[Any, tuple[str, Callable[..., Any]]] = {
    F.scaled_dot_product_attention: ("attention", scaled_dot_product_attention),
    F.cross_entropy: ("cross_entropy", cross_entropy),
    F.gelu: ("gelu", gelu),
    F.layer_norm: ("layer_norm", layer_norm),
    F.rms_norm: ("rms_norm", rms_norm),
    F.softmax: ("softmax", softmax),
    torch.softmax: ("softmax", torch_softmax),
    F.dropout: ("dropout", dropout),
    torch.nn.CrossEntropyLoss: ("cross_entropy", CrossEntropyLoss),
}
if _over_ours is not None:
    OURS[_whole] = ("attention", multi_head_attention_forward)


# ---- in the place of torch's ----


def named(function: FunctionType) -> dict[tuple[str, ...], str]:
    """What of torch's that is above a function's code names: ("torch", "softmax") -> "softmax", our op."""
    found = {}
    for name, *attributes in dotted(function):
        value = function.__globals__.get(name)
        for count, attribute in enumerate((None, *attributes)):
            if attribute is not None:
                value = getattr(value, attribute, None) if isinstance(value, ModuleType) else None
            try:
                known = OURS.get(value)
            except TypeError:  # no hash
                known = None
            if known is not None:
                found[(name, *attributes[:count])] = known[0]
    return found


class _Over(ModuleType):
    """A module with some of its names replaced."""

    def __init__(self, own: ModuleType, replaced: dict[str, Any]):
        super().__init__(own.__name__)
        self.__dict__.update(replaced, _own=own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_own"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_own"], name, value)


def over(own: Any, *paths: tuple[str, ...]) -> Any:
    """`own`, a function or module of torch's, with ours in the places that `paths` name in it; () is itself.

    Where something else has come to stand in such a place since, it stays."""
    if paths == ((),):
        return OURS[own][1] if own in OURS else own
    replaced = {}
    for name in dict.fromkeys(path[0] for path in paths):
        inner = getattr(own, name)
        replaced[name] = over(inner, *(path[1:] for path in paths if path[0] == name))
    return _Over(own, replaced)


def unchanged(own: Any, paths: Iterable[tuple[str, ...]]) -> bool:
    """Are torch's functions still what stands in these places?"""
    for path in paths:
        value = own
        for name in path:
            value = getattr(value, name, None)
        if value not in OURS:
            return False
    return True
