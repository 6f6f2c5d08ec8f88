"""Attention: one core op behind two public faces, never holding a Tq x Tk matrix.

    s = scale * q k^T                          (B, H, Tq, Tk), in tiles
    s = softcap * tanh(s / softcap)            if softcap > 0
    s = s - slope[b, h] * |i + offset - j|     if alibi_slopes
    s = s + bias, or -inf where a boolean bias is False
    s = -inf unless  i + offset - window_left <= j <= i + offset + window_right   (a negative window is unlimited)
    lse = log sum_j exp(s),  p = exp(s - lse),  o = dropout(p) v

q: (B, H, Tq, D), k: (B, Hk, Tk, D), v: (B, Hk, Tk, Dv) by stride, the last dimension contiguous, D and Dv at most 256;
query head h reads key head h // (H / Hk). float32, bfloat16, float16, float64. bias: (B|1, H|1, Tq|1, Tk|1), boolean
(True = visible), or float in q's dtype or the statistics' dtype; alibi_slopes: (H,) or (B, H); lse: (B, H, Tq) in the
statistics' dtype. Causal is window_right = 0; `offset` aligns row i with column i + offset: 0 puts the diagonal top-left
(torch), Tk - Tq bottom-right (flash-attn). A row that sees no key has o = 0 and lse = -inf. lse is one number: in a row
whose every score is near the lowest float (a bias that hides all keys without being -inf) it loses log Tk, and the
kernels' gradient with it; a boolean mask has no such row. A product q k^T beyond the statistics' dtype is infinite
before it is scaled: -inf hides the key, +inf gives NaN.

Forward and backward have the same bits of a score, since exp(s - lse) magnifies what they differ by: on the CPU and in CUDA C++
by the order of the sums, in Triton as far as the compiler keeps it, that is in float32; of the tensor cores' products, 16 bits
and TF32, the hardware decides, within the rounding of p to that type. delta = rowsum(do o) is a sum in another order than
dp = do v^T: where a row is saturated, dq and dk keep a rounding of dp, as in every kernel of this kind.

Dropout is Philox (ops/philox.py), plane batch * H + head, row i, column j: the mask is a function of `rng_state` alone
and the same, bit for bit, in forward and backward and on every backend.

Sources: Dao et al., arXiv 2205.14135 and 2307.08691; Press et al. (ALiBi) 2108.12409.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import sharding
from ..dispatch import define
from .calls import (
    autocast_dtype,
    cast,
    check_tensors,
    handle_torch_function,
    has_torch_function_variadic,
    in_any_autocast,
)
from .common import TRANSFORMED, count_of, derivative_of, rederived, softmax_lse, stat_dtype, transforms_active
from .philox import draw_rng_state, dropout_factor, dropout_threshold, philox_uint16

# the public functions
__all__ = ["flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func", "scaled_dot_product_attention"]

MAX_HEAD_DIM = 256


# ---- reference ----


def _for_query_heads(t: Tensor, H: int) -> Tensor:
    """(B, Hk, T, D) as (B, H, T, D): each key head repeated for its group of query heads."""
    Hk = t.shape[1]
    if Hk == H:
        return t
    torch._check(Hk * (H // Hk) == H, lambda: f"attention: q's {H} heads must be a multiple of k's {Hk} heads")
    return t.repeat_interleave(H // Hk, 1)


def _places(s, causal_offset):
    """Of each row the column that its diagonal is at, (Tq, 1), and the columns, (Tk,)."""
    return torch.arange(s.shape[2], device=s.device)[:, None] + causal_offset, torch.arange(s.shape[3], device=s.device)


def _scores(q, k, bias, alibi_slopes, scale, softcap, causal_offset, window_left, window_right):
    """All score steps, (B, H, Tq, Tk), and the capped scores before bias and masks (for the derivative of softcap)."""
    acc = stat_dtype(q.dtype)
    s = (q.to(acc) @ _for_query_heads(k.to(acc), q.shape[1]).mT) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    capped = s
    diagonal, column = _places(s, causal_offset)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(acc).expand(s.shape[:2])[:, :, None, None]
        s = s - slopes * (diagonal - column).abs()
    if bias is not None:
        s = s.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else s + bias.to(acc)
    if window_right >= 0:
        s = s.masked_fill(column > diagonal + window_right, float("-inf"))
    if window_left >= 0:
        s = s.masked_fill(column < diagonal - window_left, float("-inf"))
    return s, capped


def _probabilities(s):
    """(p, lse) of scores."""
    blind = (s == float("-inf")).all(-1, keepdim=True)
    p, lse = softmax_lse(s.masked_fill(blind, 0.0))  # NaN times zero would be NaN in the derivative of this
    return p.masked_fill(blind, 0.0), lse.masked_fill(blind[..., 0], float("-inf"))


def _empty_as(t: Tensor, shape) -> Tensor:
    """Fresh (B, H, T, D) memory laid out like t: heads inside tokens (B, T, H, D) if t has it so."""
    B, H, T, D = shape
    if t.stride(1) < t.stride(2):
        return t.new_empty(B, T, H, D).transpose(1, 2)
    return t.new_empty(B, H, T, D)


def _attend(q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset, window_left, window_right):
    s, _ = _scores(q, k, bias, alibi_slopes, scale, softcap, causal_offset, window_left, window_right)
    p, lse = _probabilities(s)
    o = (p * dropout_factor(rng_state, dropout_p, s)) @ _for_query_heads(v.to(s.dtype), q.shape[1])
    return o.to(q.dtype), lse


def reference_fwd(q, *args):
    o, lse = _attend(q, *args)
    return _empty_as(q, o.shape).copy_(o), lse.contiguous()


def _gradients(
    do, q, k, v, o, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset, window_left, window_right,
):  # fmt: skip
    """dq, dk, dv, and of the scores before the masks, (B, H, Tq, Tk)."""
    s, capped = _scores(q, k, bias, alibi_slopes, scale, softcap, causal_offset, window_left, window_right)
    p, keep = _probabilities(s)[0], dropout_factor(rng_state, dropout_p, s)
    group = q.shape[1] // k.shape[1]
    dof, delta = do.to(s.dtype), (do.to(s.dtype) * o.to(s.dtype)).sum(-1, keepdim=True)
    dv = (p * keep).mT @ dof
    dp = dof @ _for_query_heads(v.to(s.dtype), q.shape[1]).mT
    ds = dmasked = p * (dp * keep - delta)
    if softcap > 0:
        ds = ds * (1 - (capped / softcap) ** 2)
    ds = ds * scale
    dq, dk = ds @ _for_query_heads(k.to(s.dtype), q.shape[1]), ds.mT @ q.to(s.dtype)
    dk, dv = (t.reshape(*k.shape[:2], group, *t.shape[2:]).sum(2) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmasked


def _slopes_gradient(ds, slopes, causal_offset):
    diagonal, column = _places(ds, causal_offset)
    return -(ds * (diagonal - column).abs()).sum((2, 3)).sum_to_size(slopes.shape).to(slopes.dtype)


def reference_bwd(do, q, k, v, o, lse, bias, *args):
    *args, need_dbias = args
    dq, dk, dv, ds = _gradients(do, q, k, v, o, bias, *args)
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if need_dbias else q.new_empty(0)
    dq, dk, dv = (_empty_as(t, t.shape).copy_(g) for t, g in ((q, dq), (k, dk), (v, dv)))
    return dq, dk, dv, dbias


_ARGUMENTS = (
    "Tensor? bias, Tensor? alibi_slopes, Tensor? rng_state, float scale, float softcap, float dropout_p, "
    "int causal_offset, int window_left, int window_right"
)
fwd = define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor o, Tensor lse)", reference_fwd)
bwd = define(
    f"attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_ARGUMENTS}, bool need_dbias)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    reference_bwd,
)


# ---- autograd ----


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, alibi_slopes, rng_state, *options):
        o, lse = fwd(q, k, v, bias, alibi_slopes, rng_state, *options)
        ctx.save_for_backward(q, k, v, o, lse, bias, alibi_slopes, rng_state)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _):
        q, k, v, o, lse, *rest = ctx.saved_tensors
        need_dbias, need_dslopes = ctx.needs_input_grad[3:5]
        if need_dslopes or rederived(do):
            dq, dk, dv, ds = _gradients(do, q, k, v, o, *rest, *ctx.options)
            bias, slopes, _ = rest
            dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if need_dbias else None
            dslopes = _slopes_gradient(ds, slopes, ctx.options[3]) if need_dslopes else None
            return dq, dk, dv, dbias, dslopes, *(None,) * 7
        do = do if do.stride(-1) == 1 else do.contiguous()
        dq, dk, dv, dbias = bwd(do, q, k, v, o, lse, *rest, *ctx.options, need_dbias)
        return dq, dk, dv, dbias if need_dbias else None, *(None,) * 8


def attention(q, k, v, bias=None, alibi_slopes=None, rng_state=None, *, scale=None, softcap=0.0, dropout_p=0.0,
              causal_offset=0, window_left=-1, window_right=-1) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The core op with autograd: (o, lse). Arguments as in this module's docstring; `rng_state` is int64 (seed, offset).

    scale defaults to 1 / sqrt(D). Under autocast q, k, v and a floating bias are cast as those of torch's attention.
    """
    if in_any_autocast():
        q, k, v, bias = cast(autocast_dtype("attention", q), q, k, v, bias)
    if not q.shape[-1]:  # every score is 0: what a column of zeros gives
        q, k, scale = torch.nn.functional.pad(q, (0, 1)), torch.nn.functional.pad(k, (0, 1)), 1.0
    elif scale is None:
        scale = q.shape[-1] ** -0.5
    if dropout_p > 0.0 and rng_state is None:
        rng_state = draw_rng_state(q.device)
    options = (float(scale), float(softcap), float(dropout_p))
    mesh = sharding.context_mesh()
    if mesh is not None or sharding.spread(q, k, v, bias, alibi_slopes):
        return _of_parts(mesh, q, k, v, bias, alibi_slopes, rng_state, causal_offset, options, (window_left, window_right))
    return _local(q, k, v, bias, alibi_slopes, rng_state, *options, causal_offset, window_left, window_right)


def _local(q, k, v, *args):
    """The core op on plain tensors."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    derivative = derivative_of(q, k, v, *args[:2])
    if derivative == TRANSFORMED:
        return _attend(q, k, v, *args)
    if not derivative:
        return fwd(q, k, v, *args)
    if torch.compiler.is_dynamo_compiling():
        # which takes no autograd.Function to which one tensor is given twice
        k, v = k.view_as(k) if k is q else k, v.view_as(v) if v is q or v is k else v
    return _Attention.apply(q, k, v, *args)


def _of_parts(mesh, q, k, v, bias, alibi_slopes, rng_state, causal_offset, options, window):
    """The core op on DTensors; or, under torch's context_parallel() over a mesh, on each process's part of the sequences."""

    def call(*tensors_and_offset):
        *tensors, offset = tensors_and_offset
        return _local(*tensors, *options, offset, *window)

    if mesh is None:
        return sharding.attention(call, q, k, v, bias, alibi_slopes, rng_state, causal_offset)
    if bias is not None or alibi_slopes is not None or causal_offset or q.shape[2] != k.shape[2]:
        raise RuntimeError(
            "attention: under context_parallel() queries and keys must have one length, and there is no mask and no ALiBi, got "
            f"{q.shape[2]} queries, {k.shape[2]} keys, mask {bias is not None}, ALiBi {alibi_slopes is not None}"
        )
    parts = sharding.in_context(mesh, q, k, v)
    o, lse = sharding.attention(call, *parts, None, None, rng_state, 0)
    return o.to_local(), lse.to_local()


# ---- the two public faces ----


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
):  # fmt: skip
    """Attention with the signature and meaning of flash-attn 2's flash_attn_func.

    q: (B, Sq, H, D); k, v: (B, Sk, Hk, D), H a multiple of Hk; taken by stride, in float32 and float64, too, and under
    autocast cast to its dtype. Causal and window are aligned to the bottom-right corner. softmax_scale defaults to
    1 / sqrt(D). alibi_slopes: (H,) or (B, H) float32; where they require grad, backward materialises the scores. Every result
    is deterministic, whatever `deterministic` says. Returns o (B, Sq, H, D); with return_attn_probs (o, lse (B, H, Sq),
    probabilities (B, H, Sq, Sk), negative where dropped), which materialises the probabilities and is for testing: under
    autograd these two require no grad.
    Raises RuntimeError for shapes, dtypes and devices that do not fit, and head dims above 256.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    offset = k.shape[2] - q.shape[2]
    rng_state = draw_rng_state(q.device) if dropout_p > 0 else None
    scale = (q.shape[-1] or 1) ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size[0], 0 if causal else window_size[1]
    o, lse = attention(q, k, v, None, alibi_slopes, rng_state, scale=scale, softcap=softcap, dropout_p=dropout_p,
                       causal_offset=offset, window_left=left, window_right=right)  # fmt: skip
    o = o.transpose(1, 2)
    if not return_attn_probs:
        return o
    if sharding.spread(q, k, v) or sharding.context_mesh() is not None:
        raise RuntimeError("flash_attn_func: return_attn_probs is for one process, there is no probabilities' part of DTensors")
    with torch.set_grad_enabled(transforms_active()):
        s, _ = _scores(q, k, None, alibi_slopes, scale, softcap, offset, left, right)
        p, _ = _probabilities(s)
        if rng_state is not None:
            p = torch.where(philox_uint16(rng_state, *s.shape) < dropout_threshold(dropout_p), -p, p)
        return o, lse, p


def flash_attn_qkvpacked_func(qkv: Tensor, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                              alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    """flash_attn_func on qkv (B, S, 3, H, D); the three are read in place."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs)  # fmt: skip


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                             softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    """flash_attn_func on q (B, Sq, H, D) and kv (B, Sk, 2, Hk, D); the two are read in place."""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs)  # fmt: skip


def _expanded(t: Tensor, lead: torch.Size, H: int) -> Tensor:
    """(..., h, T, D) or (T, D) as (B, H or h, T, D), B the product of lead; heads are repeated to H."""
    h = t.shape[-3] if t.dim() > 2 else 1
    if h != H:
        t = t.expand(*t.shape[:-3], H, *t.shape[-2:]) if h == 1 else t.repeat_interleave(H // h, -3)
    return t.expand(*lead, H, *t.shape[-2:]).reshape(count_of(lead), H, *t.shape[-2:])


def _as_core(q, k, v, mask, enable_gqa):
    """torch's shapes as the core's: q, k, v (B, heads, T, D), mask (B|1, H|1, Tq|1, Tk|1) or None, and the result's shape."""
    op, rank = "scaled_dot_product_attention", max(q.dim(), k.dim(), v.dim())
    if min(q.dim(), k.dim(), v.dim()) < 2:
        raise RuntimeError(f"{op}: query, key and value must have at least 2 dimensions, got {q.dim()}, {k.dim()}, {v.dim()}")
    if enable_gqa and min(q.dim(), k.dim(), v.dim()) < 3:
        raise IndexError(f"{op}: enable_gqa needs heads, that is 3 dimensions, got {q.dim()}, {k.dim()}, {v.dim()}")
    Hq, Hk, Hv = (t.shape[-3] if t.dim() > 2 else 1 for t in (q, k, v))
    H = Hq if enable_gqa else next((h for h in (Hq, Hk, Hv) if h != 1), 1)
    if enable_gqa:
        fit = Hk == Hv == H or (Hk and Hv and H % Hk == 0 and H % Hv == 0)
    else:
        fit = all(h in (1, H) for h in (Hq, Hk, Hv))
    if not fit:
        hint = "" if enable_gqa else "; pass enable_gqa=True"
        raise RuntimeError(f"{op}: query has {Hq} heads, key {Hk} and value {Hv}, which do not fit{hint}")
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    shape = (*lead, *((H,) if rank > 2 else ()), q.shape[-2], v.shape[-1])
    if mask is not None:
        if mask.dim() > rank:
            raise RuntimeError(f"{op}: attn_mask must broadcast to {(*shape[:-1], k.shape[-2])}, got {tuple(mask.shape)}")
        if q.dtype == torch.float64 and mask.dtype == torch.float32:
            mask = mask.double()
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
        one, inner = count_of(mask.shape[:-3]) == 1, mask.shape[-3:]
        if len(lead) > 1 and not one:
            mask = mask.expand(*lead, *inner)
        if mask.dim() > 4:
            mask = mask.reshape(1 if one else count_of(lead), *inner)
    queries = _expanded(q, lead, H)
    if queries.numel() > q.numel():
        queries = queries.contiguous()  # the result is laid out like it
    # key heads for groups of query heads are the core's own
    return queries, *(_expanded(t, lead, Hk if Hk == Hv and Hk else H) for t in (k, v)), mask, shape


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with the signature and meaning of torch.nn.functional.scaled_dot_product_attention.

    query: (..., H, Sq, D), key: (..., Hk, Sk, D), value: (..., Hk, Sk, Dv) or all without H; dimensions before Sq that are 1
    or missing are broadcast, other H != Hk only with enable_gqa. attn_mask: boolean (True = visible) or additive, in query's
    dtype or in float32, broadcastable to (..., H, Sq, Sk), gradient included. is_causal is aligned top-left, and both apply
    where both are given, as in torch's CPU kernel. Returns o (..., H, Sq, Dv), laid out like query. A row with no visible key
    is 0, as in torch 2.13's. Under autocast everything is cast to its dtype. Raises RuntimeError for shapes, dtypes and
    devices that do not fit, for head dims above 256, and for dropout_p outside [0, 1].
    """
    if has_torch_function_variadic(query, key, value, attn_mask):
        return handle_torch_function(
            scaled_dot_product_attention, (query, key, value, attn_mask), query, key, value, attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    op = "scaled_dot_product_attention"
    if not type(query) is type(key) is type(value) is Tensor:
        for name, t in (("query", query), ("key", key), ("value", value)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
    if attn_mask is not None:
        check_tensors(op, attn_mask=attn_mask)
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"{op}: dropout_p must be between 0 and 1, got {dropout_p}")
    q, k, v, mask, shape = query, key, value, attn_mask, None
    usual = q.dim() == 4 and (q.shape == k.shape == v.shape or q.shape[:2] == k.shape[:-2] == v.shape[:-2])
    if not usual or (mask is not None and (mask.dim() != 4 or q.dtype == torch.float64)):
        q, k, v, mask, shape = _as_core(query, key, value, attn_mask, enable_gqa)
    if dropout_p == 1.0:  # nothing is kept, and nothing but 0 has a gradient
        v, dropout_p = v * 0, 0.0
    o, _ = attention(q, k, v, mask, scale=scale, dropout_p=dropout_p, window_right=0 if is_causal else -1)
    return o if shape is None or o.shape == shape else o.reshape(shape)


def attention_cost(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops): two products forward, five backward, half of each when causal and square."""
    B, H, Tq, D = q.shape
    products, tensors = (5, 4) if backward else (2, 2)
    moved = tensors * (q.numel() + k.numel()) * q.element_size()
    return moved, int(products * 2 * B * H * Tq * k.shape[2] * D * (0.5 if causal else 1.0))
