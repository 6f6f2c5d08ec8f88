"""transformers' `attn_implementation="gpt_kernels"`: our attention in every model that asks its AttentionInterface.

    gpt_kernels.register_transformers()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="gpt_kernels")    # or from_config
    model.set_attn_implementation("gpt_kernels")                                             # or of a model that is there

It means what "sdpa" means there, and beside that serves what "sdpa" refuses or leaves out: soft capping (Gemma 2) and attention
sinks (gpt-oss' s_aux). Key heads for groups of query heads are read in place. Masks are the boolean ones of "sdpa"; of one
that is a band (causal, a sliding window, either behind a cache, no padding), which the mask function finds out once for all
layers, the kernel is told the band and skips what lies outside. Attention weights are None, as under "sdpa".

A call that our kernels do not serve is done by the function of "sdpa": paged caches, head dims above 256, tensors that are not
what they seem (subclasses, torch.func), masks of another rank, additive masks that hide every key of a row without being -inf.
Where that function cannot do it either, since there is a softcap or a sink, RuntimeError says what there is no kernel for; and
so for an argument that is the model's own eager attention's and nobody else's. An additive mask then counts as -inf from half
the lowest number of its dtype on. A row that sees no key is 0.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import hides_all
from ..ops.attention import MAX_HEAD_DIM, attention
from ..serving import attended, dense, droppable, plain
from .sinks import attention_with_sinks

NAME = "gpt_kernels"
# what attention functions are given and "sdpa" does not read either: its mask says it, or there is nothing to be done
_WITHOUT_MEANING = frozenset(
    ("sliding_window", "output_attentions", "position_ids", "deterministic", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
     "max_length_k", "layer_idx", "use_cache")
)  # fmt: skip


def register_transformers() -> str:
    """Register our attention and its masks with transformers' AttentionInterface and AttentionMaskInterface, as "gpt_kernels".

    Returns that name. Registering twice is registering once; no model changes by it. Raises ImportError without transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


# ---- the mask ----


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of "sdpa", (B, 1, Tq, Tk) boolean, or None where causal or nothing says it all; a band is marked as one."""
    from transformers import AttentionMaskInterface

    mask = AttentionMaskInterface()["sdpa"](*args, **kwargs)
    if mask is not None and not torch.compiler.is_compiling() and (band := _band(mask)) is not None:
        mask._gpt_kernels_band = (mask._version, *band)
    return mask


def _band(mask: Tensor) -> tuple[int, int] | None:
    """(offset, left): is row i's every visible column j one with i + offset - left <= j <= i + offset? left -1: no limit.

    None for any other mask, and for one that is not the same in the whole batch.
    """
    # of one row there is nothing to skip, and what a mask was before it was written to is known of those with a version alone
    if type(mask) is not Tensor or mask.dtype is not torch.bool or mask.ndim != 4 or mask.is_inference() or mask.shape[2] < 2:
        return None
    if any(size != 1 and stride != 0 for size, stride in zip(mask.shape[:2], mask.stride()[:2], strict=True)):
        return None
    one = mask[0, 0]
    rows, columns = one.shape
    (first, last), column = one[[0, -1]], torch.arange(columns, device=mask.device)
    if not (bool(first.any()) and bool(last.any())):
        return None
    offset, seen = int(column[first].max()), int(last.sum())
    right = torch.arange(rows, device=mask.device)[:, None] + offset
    left = -1 if seen == min(offset + rows, columns) else seen - 1
    inside = column <= right
    if left >= 0:
        inside &= column >= right - left
    return (offset, left) if torch.equal(one, inside) else None


def _marked(mask: Tensor) -> tuple[int, int] | None:
    if torch.compiler.is_compiling():
        return None
    version, *band = getattr(mask, "_gpt_kernels_band", (None,))
    return (band[0], band[1]) if version is not None and version == mask._version else None


# ---- the function ----


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: (B, H, Tq, D); key, value: (B, Hk, Tk, D); attention_mask: (B|1, H|1, Tq, Tk) boolean or additive; position_bias:
    added to the scores, gradient included; s_aux: (H,). Returns o (B, Tq, H, Dv), contiguous, and None for the weights."""
    _refuse_unknown(module, s_aux, kwargs)
    o = attend(module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, cache, softcap, s_aux)
    if not isinstance(o, str):
        return o, None
    if softcap is not None or s_aux is not None:
        what = " and ".join(["softcap"] * (softcap is not None) + ["sinks (s_aux)"] * (s_aux is not None))
        raise RuntimeError(f"gpt_kernels attention with {what}: no kernel for {o}; use attn_implementation='eager'")
    sdpa = _sdpa()
    for name, given in (("position_bias", position_bias), ("cache", cache)):
        if given is None:
            continue
        if name not in inspect.signature(sdpa).parameters:
            raise RuntimeError(
                f'gpt_kernels attention: no kernel for {o}, and "sdpa" of this transformers reads no {name}; '
                "use attn_implementation='eager'"
            )
        kwargs[name] = given
    return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)


def attend(module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, cache, softcap=None,
           s_aux=None, exact=False) -> Tensor | str:  # fmt: skip
    """o as attention_forward's, or of what there is no kernel for, in words. exact: a row that sees no key is to be what "sdpa"
    makes of it under a position bias, the mean of all values, also where a compiler hides whether there is one."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    alone = softcap is not None or s_aux is not None
    why = _not_served(query, key, value, attention_mask, dropout, scale, causal, position_bias, cache, softcap, s_aux)
    if why is None and not alone:
        why = _hides_all(attention_mask, position_bias is not None, exact)
    if why is not None:
        return why
    offset, left, right, bias = 0, -1, 0 if causal else -1, attention_mask
    if bias is not None and (band := _marked(bias)) is not None:
        (offset, left), right, bias = band, 0, None
    elif bias is not None and bias.dtype != torch.bool and alone:
        bias = bias.masked_fill(bias < torch.finfo(bias.dtype).min / 2, float("-inf"))
    if position_bias is not None:
        bias = _with_positions(bias, position_bias, key.shape[2])
    options: dict[str, Any] = {"scale": float(scale), "softcap": float(softcap or 0.0), "dropout_p": float(dropout)}
    options |= {"causal_offset": offset, "window_left": left, "window_right": right}
    if s_aux is not None:
        o = attention_with_sinks(query, key, value, s_aux.reshape(-1), bias, **options)
    else:
        o, _ = attention(query, key, value, bias, **options)
    return o.transpose(1, 2).contiguous()  # (B, T, H, D)


@functools.cache
def _sdpa() -> Any:
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"]


def _refuse_unknown(module: nn.Module, s_aux: Any, kwargs: dict) -> None:
    """Raises RuntimeError for an argument, or sinks of the module, that its own eager attention reads and we do not."""
    cls: Any = type(module)
    for name in kwargs.keys() - _WITHOUT_MEANING:
        if kwargs[name] is not None and name in _read_by_eager(cls):
            raise RuntimeError(
                f"gpt_kernels attention: {type(module).__name__} passes {name}, which its eager attention reads and for which "
                "there is no kernel; use attn_implementation='eager'"
            )
    if s_aux is None and module._parameters.get("sinks") is not None:
        raise RuntimeError(
            f"gpt_kernels attention: {type(module).__name__} has sinks and passes no s_aux; use attn_implementation='eager'"
        )


@functools.cache
def _read_by_eager(cls: Any) -> frozenset[str]:
    """The names of the arguments of the eager attention beside the class."""
    eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
    return frozenset(inspect.signature(eager).parameters) if eager is not None else frozenset()


def _not_served(q, k, v, mask, p, scale, causal, position_bias, cache, softcap, sinks) -> str | None:
    """What of a call there is no kernel for, in words; None where there is one."""
    if cache is not None:
        return f"a {type(cache).__name__}"
    if not (dense(q) and dense(k) and dense(v)):
        return "tensors of these types, dtypes or devices"
    if not attended(q, k, v):
        return f"query, key and value in {q.dtype}, {k.dtype} and {v.dtype}"
    if torch.is_autocast_enabled(q.device.type) and sinks is not None:
        return "sinks under autocast"
    if not q.ndim == k.ndim == v.ndim == 4 or not (q.numel() and k.numel() and v.numel()):
        return f"query, key and value of shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    (B, H, Tq, D), (Bk, Hk, Tk, Dk) = q.shape, k.shape
    if (Bk, Dk) != (B, D) or v.shape[:3] != k.shape[:3] or H % Hk:
        return f"query, key and value of shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    if max(D, v.shape[3]) > MAX_HEAD_DIM:
        return f"head dim {max(D, v.shape[3])}, above {MAX_HEAD_DIM}"
    # torch's own kernels for a CPU answer NaN to a scale of 0 or less
    if type(scale) not in (float, int) or not scale > 0:
        return f"a scale of {scale!r}"
    if type(causal) is not bool:
        return f"is_causal of {causal!r}"
    if not droppable(p):
        return f"dropout {p!r}"
    if softcap is not None and not (type(softcap) in (float, int) and softcap > 0):
        return f"a softcap of {softcap!r}"
    if sinks is not None and (not isinstance(sinks, Tensor) or sinks.numel() != H):
        return f"sinks of shape {tuple(getattr(sinks, 'shape', ()))}, where there are {H} heads"
    for name, bias in (("mask", mask), ("position bias", position_bias)):
        if bias is None:
            continue
        if not plain(bias) and type(bias) is not nn.Parameter or bias.layout is not torch.strided or bias.ndim != 4:
            return f"a {name} that is no tensor of 4 dimensions"
        if any(m not in (1, n) for m, n in zip(bias.shape, (B, H, Tq, Tk), strict=True)):
            return f"a {name} of shape {tuple(bias.shape)}, where the scores have {(B, H, Tq, Tk)}"
        if not (bias.dtype == q.dtype or name == "mask" and bias.dtype == torch.bool):
            return f"a {name} in {bias.dtype}, where query is in {q.dtype}"
    return None


def _hides_all(mask: Tensor | None, positions: bool, exact: bool) -> str | None:
    """May some row's keys be all hidden, not by -inf, and the result the mean of the values?"""
    if mask is None or mask.dtype == torch.bool and not positions:
        return None
    if torch.compiler.is_compiling():
        known = mask.dtype == torch.bool and not exact
        return None if known else "a mask whose values cannot be looked at"
    return "a mask that hides every key of a row" if hides_all(mask, by_number=not positions) else None


def _with_positions(mask: Tensor | None, position_bias: Tensor, Tk: int) -> Tensor:
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask
