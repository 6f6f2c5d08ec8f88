"""torch's own hook for another flash attention: torch.nn.attention.register_flash_attention_impl, where the version has it
(2.11).

    gpt_kernels.register_flash_attention()
    torch.nn.attention.activate_flash_attention_impl("gpt_kernels")     # every scaled_dot_product_attention that takes flash
    torch.nn.attention.restore_flash_attention_impl()                   # the kernels that stood there, themselves

Ours stand then in ATen's slots of flash attention, forward and backward, and torch's own autograd nodes call them: on a CPU the
kernel that scaled_dot_product_attention chooses for most calls, masks and key heads for groups of query heads included; on a
GPU that without a mask. What ours do not serve goes to the kernel that stood there: on a CPU head dims above 256, another head
dim of the values, empty tensors, dropout (which torch itself takes to its own formula), scales that are not positive; on a
GPU, where there is no other flash kernel to fall back to in the middle of a step, what the slot is asked for that ours have
not is an error: debug masks.

A row that sees no key is 0 with lse -inf. torch.compile traces what torch says of these ops, whose shapes are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import MAX_HEAD_DIM, bwd, fwd
from ..ops.philox import draw_rng_state

NAME = "gpt_kernels"


def register_flash_attention() -> str:
    """Register our attention with torch.nn.attention, as "gpt_kernels", for its activate_flash_attention_impl; returns that
    name.

    Nothing is activated by it. Raises RuntimeError for a torch that cannot register one, or not take it out again (before
    2.11).
    """
    for name in ("register_flash_attention_impl", "restore_flash_attention_impl"):
        if not hasattr(torch.nn.attention, name):
            raise RuntimeError(f"torch {torch.__version__} has no torch.nn.attention.{name}")
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_activate)
    return NAME


class _Active:
    """What torch keeps, and asks to remove() when another implementation is to stand there."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL")

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
            self.library = None


def _activate() -> _Active:
    active = _Active()
    _put(active, "_scaled_dot_product_flash_attention_for_cpu", "CPU", _cpu_forward)
    _put(active, "_scaled_dot_product_flash_attention_for_cpu_backward", "CPU", _cpu_backward)
    if torch.cuda.is_available():
        _put(active, "_scaled_dot_product_flash_attention", "CUDA", _cuda_forward)
        _put(active, "_scaled_dot_product_flash_attention_backward", "CUDA", _cuda_backward)
    return active


def _put(active: _Active, op: str, key: str, function: Callable) -> None:
    handle = torch.library.get_kernel(f"aten::{op}", key)
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def before(*args: Any, **options: Any) -> Any:
        return handle.call_boxed(keyset, *args, **options)

    with warnings.catch_warnings():
        # that a kernel is being overridden is what was asked for
        warnings.simplefilter("ignore")
        assert active.library is not None
        active.library.impl(op, function(before), key, allow_override=True)


# ---- CPU ----


def _serves(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor | None, scale: float | None) -> bool:
    H, Hk = q.shape[1], k.shape[1]
    return (
        dropout_p == 0.0
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and q.shape[-1] == k.shape[-1] == v.shape[-1] <= MAX_HEAD_DIM
        and v.shape == k.shape
        and Hk > 0
        and H % Hk == 0
        and min(q.numel(), k.numel()) > 0
        # torch's answers NaN
        and (scale is None or scale > 0.0)
        and (mask is None or mask.dtype in (torch.bool, q.dtype, torch.float32))
    )


def _options(q: Tensor, scale: float | None, dropout_p: float, is_causal: bool) -> tuple:
    # scale, softcap, dropout, and causal from the top-left corner
    return (q.shape[-1] ** -0.5 if scale is None else scale), 0.0, dropout_p, 0, -1, 0 if is_causal else -1


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _mask(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.ndim == 4 else mask.view((1,) * (4 - mask.ndim) + mask.shape)


def _in_order(q: Tensor) -> bool:
    """Is q laid out as our results are: (B, H, T, D), or (B, T, H, D), or slices of it? torch's are laid out like q."""
    return q.stride(0) >= max(q.stride(1), q.stride(2)) and min(q.stride()) > 0


def _by_token(t: Tensor) -> Tensor:
    """(B, H, T, ...) as torch's kernels leave it in memory, and as a compiler relies on: (B, T, H, ...)."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_forward(before: Callable) -> Callable:
    def _scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None
    ):
        if not _serves(query, key, value, dropout_p, attn_mask, scale):
            return before(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        o, lse = fwd(*_rows(query, key, value), _mask(attn_mask), None, None, *_options(query, scale, 0.0, is_causal))
        return (o if _in_order(query) else torch.empty_like(query).copy_(o)), _by_token(lse)

    return _scaled_dot_product_flash_attention_for_cpu


def _cpu_backward(before: Callable) -> Callable:
    def _scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
    ):
        if not _serves(query, key, value, dropout_p, attn_mask, scale):
            return before(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        tensors = _rows(grad_out, query, key, value, out)
        options = _options(query, scale, 0.0, is_causal)
        dq, dk, dv, _ = bwd(*tensors, logsumexp.contiguous(), _mask(attn_mask), None, None, *options, False)
        return _by_token(dq), _by_token(dk), _by_token(dv)

    return _scaled_dot_product_flash_attention_for_cpu_backward


# ---- GPU ----


def _cuda_forward(before: Callable) -> Callable:
    def _scaled_dot_product_flash_attention(
        query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
    ):
        if return_debug_mask:
            raise RuntimeError("gpt_kernels flash attention: return_debug_mask: there is no such mask")
        rng_state = draw_rng_state(query.device) if dropout_p > 0.0 else torch.zeros(2, dtype=torch.int64, device=query.device)
        options = _options(query, scale, dropout_p, is_causal)
        o, lse = fwd(*_rows(query, key, value), None, None, rng_state if dropout_p > 0.0 else None, *options)
        unused = torch.zeros((), dtype=torch.uint64, device=query.device)
        debug = query.new_empty(0)
        return o, lse, None, None, query.shape[2], key.shape[2], rng_state.view(torch.uint64), unused, debug

    return _scaled_dot_product_flash_attention


def _cuda_backward(before: Callable) -> Callable:
    def _scaled_dot_product_flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
        philox_offset, *, scale=None,
    ):  # fmt: skip
        rng_state = philox_seed.view(torch.int64) if dropout_p > 0.0 else None
        options = _options(query, scale, dropout_p, is_causal)
        return bwd(*_rows(grad_out, query, key, value, out), logsumexp, None, None, rng_state, *options, False)[:3]

    return _scaled_dot_product_flash_attention_backward
