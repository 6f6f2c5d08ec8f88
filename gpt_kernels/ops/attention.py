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

from ..dispatch import define
from .common import once_differentiable, stat_dtype, wants_grad
from .philox import draw_rng_state, dropout_factor, dropout_threshold, philox_uint16

MAX_HEAD_DIM = 256


# ---- reference ----


def _for_query_heads(t: Tensor, H: int) -> Tensor:
    """(B, Hk, T, D) as (B, H, T, D): each key head repeated for its group of query heads."""
    Hk = t.shape[1]
    if Hk == H:
        return t
    torch._check(Hk * (H // Hk) == H, lambda: f"attention: q's {H} heads must be a multiple of k's {Hk} heads")
    return t.repeat_interleave(H // Hk, 1)


def _scores(q, k, bias, alibi_slopes, scale, softcap, causal_offset, window_left, window_right):
    """All score steps, (B, H, Tq, Tk), and the capped scores before bias and masks (for the derivative of softcap)."""
    acc = stat_dtype(q.dtype)
    s = (q.to(acc) @ _for_query_heads(k.to(acc), q.shape[1]).mT) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    capped = s
    diagonal = torch.arange(s.shape[2], device=s.device)[:, None] + causal_offset  # (Tq, 1)
    column = torch.arange(s.shape[3], device=s.device)  # (Tk,)
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
    blind = (s == float("-inf")).all(-1, keepdim=True)
    return s.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def _empty_as(t: Tensor, shape) -> Tensor:
    """Fresh (B, H, T, D) memory laid out like t: heads inside tokens (B, T, H, D) if t has it so."""
    B, H, T, D = shape
    if t.stride(1) < t.stride(2):
        return t.new_empty(B, T, H, D).transpose(1, 2)
    return t.new_empty(B, H, T, D)


def reference_fwd(q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset, window_left, window_right):
    s, _ = _scores(q, k, bias, alibi_slopes, scale, softcap, causal_offset, window_left, window_right)
    lse = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], float("-inf"))
    p = _probabilities(s) * dropout_factor(rng_state, dropout_p, s)
    o = p @ _for_query_heads(v.to(s.dtype), q.shape[1])
    return _empty_as(q, o.shape).copy_(o), lse.contiguous()


def reference_bwd(
    do, q, k, v, o, lse, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset, window_left, window_right,
    need_dbias,
):  # fmt: skip
    s, capped = _scores(q, k, bias, alibi_slopes, scale, softcap, causal_offset, window_left, window_right)
    p, keep = _probabilities(s), dropout_factor(rng_state, dropout_p, s)
    group = q.shape[1] // k.shape[1]
    dof, delta = do.to(s.dtype), (do.to(s.dtype) * o.to(s.dtype)).sum(-1, keepdim=True)
    dv = (p * keep).mT @ dof
    dp = dof @ _for_query_heads(v.to(s.dtype), q.shape[1]).mT
    ds = p * (dp * keep - delta)
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if need_dbias else q.new_empty(0)
    if softcap > 0:
        ds = ds * (1 - (capped / softcap) ** 2)
    ds = ds * scale
    dq, dk = ds @ _for_query_heads(k.to(s.dtype), q.shape[1]), ds.mT @ q.to(s.dtype)
    dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
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
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, o, lse, *rest = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        need_dbias = ctx.needs_input_grad[3]
        dq, dk, dv, dbias = bwd(do, q, k, v, o, lse, *rest, *ctx.options, need_dbias)
        return dq, dk, dv, dbias if need_dbias else None, *(None,) * 8


def attention(q, k, v, bias=None, alibi_slopes=None, rng_state=None, *, scale, softcap=0.0, dropout_p=0.0,
              causal_offset=0, window_left=-1, window_right=-1) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The core op with autograd: (o, lse). Arguments as in this module's docstring; `rng_state` is int64 (seed, offset)."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if dropout_p > 0.0 and rng_state is None:
        rng_state = draw_rng_state(q.device)
    args = (q, k, v, bias, alibi_slopes, rng_state, float(scale), float(softcap), float(dropout_p),
            causal_offset, window_left, window_right)  # fmt: skip
    return _Attention.apply(*args) if wants_grad(q, k, v, bias) else fwd(*args)


# ---- the two public faces ----


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
):  # fmt: skip
    """Attention with the signature and meaning of flash-attn 2's flash_attn_func.

    q: (B, Sq, H, D); k, v: (B, Sk, Hk, D), H a multiple of Hk; taken by stride. Causal and window are aligned to the
    bottom-right corner. softmax_scale defaults to 1 / sqrt(D). alibi_slopes: (H,) or (B, H) float32. Every result is
    deterministic, whatever `deterministic` says. Returns o (B, Sq, H, D); with return_attn_probs (o, lse (B, H, Sq),
    probabilities (B, H, Sq, Sk), negative where dropped), which materialises the probabilities and is for testing.
    Raises RuntimeError for shapes, dtypes and devices that do not fit, and head dims above 256.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    offset = k.shape[2] - q.shape[2]
    rng_state = draw_rng_state(q.device) if dropout_p > 0 else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size[0], 0 if causal else window_size[1]
    o, lse = attention(q, k, v, None, alibi_slopes, rng_state, scale=scale, softcap=softcap, dropout_p=dropout_p,
                       causal_offset=offset, window_left=left, window_right=right)  # fmt: skip
    o = o.transpose(1, 2)
    if not return_attn_probs:
        return o
    with torch.no_grad():
        s, _ = _scores(q, k, None, alibi_slopes, scale, softcap, offset, left, right)
        p = _probabilities(s)
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


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention with the signature and meaning of torch.nn.functional.scaled_dot_product_attention.

    q: (B, H, Sq, D), k: (B, Hk, Sk, D), v: (B, Hk, Sk, Dv) or all without H; H != Hk only with enable_gqa. attn_mask:
    boolean (True = visible) or additive, broadcastable to (B, H, Sq, Sk), gradient included; not together with
    is_causal, which is aligned top-left. Returns o (B, H, Sq, Dv). Unlike torch, a row with no visible key is 0, not NaN.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("scaled_dot_product_attention: attn_mask and is_causal exclude each other")
    if q.dim() == 3:
        mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa).squeeze(1)
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(f"scaled_dot_product_attention: k has {k.shape[1]} heads, q has {q.shape[1]}; pass enable_gqa=True")
    if attn_mask is not None:
        attn_mask = attn_mask.view((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention(q, k, v, attn_mask, scale=scale, dropout_p=dropout_p, window_right=0 if is_causal else -1)[0]


def attention_cost(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops): two products forward, five backward, half of each when causal and square."""
    B, H, Tq, D = q.shape
    products, tensors = (5, 4) if backward else (2, 2)
    moved = tensors * (q.numel() + k.numel()) * q.element_size()
    return moved, int(products * 2 * B * H * Tq * k.shape[2] * D * (0.5 if causal else 1.0))
