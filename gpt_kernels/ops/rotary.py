"""Rotary position embedding: pairs of a head's dimensions turned by an angle that grows with the position.

    y1 = x1 cos1 - x2 sin1,   y2 = x2 cos2 + x1 sin2

x, y: (B, S, H, D) of any strides, the last dimension contiguous, in float32, bfloat16, float16 or float64. The first rotary_dim
of the D dimensions are turned, the rest is copied: dimension i with i + rotary_dim / 2 (Llama, GPT-NeoX), or 2i with 2i + 1
(interleaved: GPT-J). cos, sin: (B or 1, S, rotary_dim / 2), one of each for a pair, or (B or 1, S, rotary_dim), one for each
of a pair's two as Hugging Face has them; any strides with a contiguous last dimension; in x's dtype or in float32 beside a
16-bit x. Arithmetic is in float32 (float64 for float64). The gradient is turned by the transposed, which needs nothing but cos
and sin: x1' = y1 cos1 + y2 sin2, x2' = y2 cos2 - y1 sin1. Source: Su et al., arXiv 2104.09864; names and meaning of
flash-attn's apply_rotary_emb and of transformers' apply_rotary_pos_emb.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import sharding
from ..dispatch import define
from .calls import handle_torch_function, has_torch_function_variadic
from .common import TRANSFORMED, derivative_of, rederived, stat_dtype

__all__ = ["apply_rotary_emb", "apply_rotary_pos_emb"]  # the public functions


def _pairs(t, interleaved):
    """Of the last dimension the first of each pair, and the second."""
    return (t[..., 0::2], t[..., 1::2]) if interleaved else t.chunk(2, -1)


def _heads_outside(x):
    """Do whole sequences lie in a head, as in a contiguous (B, H, S, D), and not heads in a position?"""
    return x.stride(2) > x.stride(1)


def _rotated(x, cos, sin, rotary_dim, interleaved, transposed):
    wide = stat_dtype(x.dtype)
    cos, sin = cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)  # (B or 1, S, 1, one or two for a pair)
    if cos.shape[-1] == rotary_dim:
        (cos1, cos2), (sin1, sin2) = _pairs(cos, interleaved), _pairs(sin, interleaved)
    else:
        cos1, cos2, sin1, sin2 = cos, cos, sin, sin
    if transposed:
        sin1, sin2 = -sin2, -sin1
    all_of_it = rotary_dim == x.shape[-1]  # a slice of everything is an alias, which cannot be batched
    x1, x2 = _pairs((x if all_of_it else x[..., :rotary_dim]).to(wide), interleaved)
    y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    y = torch.stack((y1, y2), -1).reshape(*x.shape[:-1], rotary_dim) if interleaved else torch.cat((y1, y2), -1)
    y = y.to(x.dtype)
    return y if all_of_it else torch.cat((y, x[..., rotary_dim:]), -1)


def reference_fwd(x, cos, sin, rotary_dim, interleaved, transposed):
    y = _rotated(x, cos, sin, rotary_dim, interleaved, transposed)
    return y.transpose(1, 2).contiguous().transpose(1, 2) if _heads_outside(x) else y.contiguous()


def reference_out(x, cos, sin, rotary_dim, interleaved, transposed, y):
    y.copy_(_rotated(x, cos, sin, rotary_dim, interleaved, transposed))


_options = "Tensor cos, Tensor sin, int rotary_dim, bool interleaved, bool transposed"
# y in memory as a contiguous (B, S, H, D), or as a contiguous (B, H, S, D) where x's heads lie outside its positions
fwd = define(f"rotary_fwd(Tensor x, {_options}) -> Tensor", reference_fwd)
# into a tensor that is there, which may be x
out = define(f"rotary_fwd_out(Tensor x, {_options}, Tensor(a!) y) -> ()", reference_out)


def _in_rows(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Rotary(torch.autograd.Function):
    """Of q, and k where there is one."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, *options):
        ctx.save_for_backward(cos, sin)
        ctx.options = options
        ctx.set_materialize_grads(False)
        y = fwd(q, cos, sin, *options, False)
        return y if k is None else (y, fwd(k, cos, sin, *options, False))

    @staticmethod
    def backward(ctx, *dys):
        return *_gradients(ctx, dys), *[None] * (6 - len(dys))


class _RotaryInplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, *options):
        ctx.save_for_backward(cos, sin)
        ctx.options = options
        ctx.mark_dirty(x)
        out(x, cos, sin, *options, False, x)
        return x

    @staticmethod
    def backward(ctx, dy):
        return *_gradients(ctx, (dy,)), None, None, None, None


def _gradients(ctx, dys):
    # no generator, which the compiler of torch 2.10 does not go into
    cos, sin = ctx.saved_tensors
    found = []
    for dy in dys:
        if dy is None:
            found.append(None)
        elif rederived(dy):
            found.append(reference_fwd(dy, cos, sin, *ctx.options, True))
        else:
            found.append(fwd(_in_rows(dy), cos, sin, *ctx.options, True))
    return found


def _rotary(q, k, cos, sin, rotary_dim, interleaved, inplace):
    """(q, k) turned, each (B, S, H, D); k may be None. cos and sin have three dimensions."""
    if sharding.spread(q, k, cos, sin):

        def turned_part(x, cos, sin):
            return _rotary(x, None, cos, sin, rotary_dim, interleaved, False)[0]

        turned = [None if x is None else sharding.rotary(turned_part, x, cos, sin) for x in (q, k)]
        return [x if x is None else x.copy_(y) for x, y in zip((q, k), turned, strict=True)] if inplace else turned
    options = rotary_dim, interleaved
    derivative = derivative_of(q, k, cos, sin)
    # of cos and sin there is no gradient in a kernel: plain PyTorch has it
    if derivative == TRANSFORMED or (derivative and (cos.requires_grad or sin.requires_grad)):
        turned = [None if x is None else reference_fwd(x, cos, sin, *options, False) for x in (q, k)]
        return [x if x is None else x.copy_(y) for x, y in zip((q, k), turned, strict=True)] if inplace else turned
    cos, sin = _in_rows(cos), _in_rows(sin)
    if inplace:
        return [None if x is None else _written(x, cos, sin, options, derivative) for x in (q, k)]
    q, k = _in_rows(q), None if k is None else _in_rows(k)
    if derivative:
        turned = _Rotary.apply(q, k, cos, sin, *options)
        return (turned, None) if k is None else turned
    return fwd(q, cos, sin, *options, False), None if k is None else fwd(k, cos, sin, *options, False)


def _written(x, cos, sin, options, derivative):
    if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        raise RuntimeError(f"rotary: x of shape {tuple(x.shape)} cannot be written in place, some of its elements share memory")
    if torch.compiler.is_compiling() or (x.stride(-1) != 1 and x.shape[-1] != 1):
        return x.copy_(_rotary(x, None, cos, sin, *options, False)[0])
    if derivative:
        return _RotaryInplace.apply(x, cos, sin, *options)
    out(x, cos, sin, *options, False, x)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # whoever has saved it gets autograd's error
    return x


def _check(op, name, x, cos, sin, dims):
    for what, t in ((name, x), ("cos", cos), ("sin", sin)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {what} must be a Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise RuntimeError(f"{op}: {what} must be float32, float64, bfloat16 or float16, got {_name(t.dtype)}")
    if x.dim() != dims:
        raise RuntimeError(f"{op}: {name} must have {dims} dimensions, got shape {tuple(x.shape)}")


def _positions(op, x, cos, seqlen_offsets, cu_seqlens):
    """Which row of cos each position of x has, (B or 1, S); None where they are the first S in order."""
    if cu_seqlens is None:
        if not isinstance(seqlen_offsets, Tensor):
            return None
        return seqlen_offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    token = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
    offset = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    return (token - cu_seqlens[sequence] + offset)[None]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """As flash-attn's function of the name.

    x: (B, S, H, D), or (total, H, D) with cu_seqlens, int32 or int64 (sequences + 1,), where each sequence begins. cos, sin:
    (at least S, rotary_dim / 2) with rotary_dim <= D, or (B or 1, S, rotary_dim / 2), a row for every position. Not
    interleaved: dimension i is turned with i + rotary_dim / 2 (GPT-NeoX, Llama); interleaved: 2i with 2i + 1 (GPT-J).
    seqlen_offsets: an int, or (B,) of a tensor, the row of cos that a sequence begins at. max_seqlen is not needed. Returns a
    tensor like x, or x itself, written in place. Any strides are taken; x is copied only where its last dimension is not
    contiguous. Gradients of cos and sin are plain PyTorch's. Raises RuntimeError for shapes and dtypes that do not go together.
    """
    op = "apply_rotary_emb"
    if has_torch_function_variadic(x, cos, sin):
        more: dict = dict(seqlen_offsets=seqlen_offsets, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return handle_torch_function(apply_rotary_emb, (x, cos, sin), x, cos, sin, interleaved, inplace, **more)
    _check(op, "x", x, cos, sin, 4 if cu_seqlens is None else 3)
    if cos.shape != sin.shape:
        raise RuntimeError(f"{op}: sin must have the shape of cos {tuple(cos.shape)}, got {tuple(sin.shape)}")
    given, x = x, x if cu_seqlens is None else x[None]
    S, R = x.shape[1], 2 * cos.shape[-1]
    if cos.dim() == 2:
        rows = _positions(op, x, cos, seqlen_offsets, cu_seqlens)
        if rows is None:
            if not 0 <= seqlen_offsets <= cos.shape[0] - S:
                raise RuntimeError(
                    f"{op}: cos has {cos.shape[0]} rows, x of {S} positions from seqlen_offsets {seqlen_offsets} needs others"
                )
            cos, sin = (t[None, seqlen_offsets : seqlen_offsets + S] for t in (cos, sin))
        else:
            cos, sin = cos[rows], sin[rows]
    elif isinstance(seqlen_offsets, Tensor) or seqlen_offsets or cu_seqlens is not None:
        raise RuntimeError(f"{op}: seqlen_offsets and cu_seqlens go with cos of 2 dimensions, got shape {tuple(cos.shape)}")
    if x.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    _check_table(op, x, cos, sin, R)
    y, _ = _rotary(x, None, cos, sin, R, interleaved, inplace)
    return given if inplace else y if cu_seqlens is None else y[0]


def _check_table(op, x, cos, sin, rotary_dim):
    B, S, _, D = x.shape
    if cos.dim() != 3 or cos.shape[1] != S or cos.shape[0] not in (1, B):
        raise RuntimeError(f"{op}: cos must have shape ({B} or 1, {S}, ...), got {tuple(cos.shape)}")
    if rotary_dim > D or rotary_dim % 2:
        raise RuntimeError(f"{op}: the rotary dimension must be even and at most {D}, x's last, got {rotary_dim}")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype not in (x.dtype, stat_dtype(x.dtype)):
            raise RuntimeError(f"{op}: {name} must be {_name(x.dtype)} like x or float32, got {_name(t.dtype)}")


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def apply_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """As the function of the name in transformers' models, of q and k in one call.

    q, k: (B, H, S, D), each with its own number of heads, or (B, S, H, D) with unsqueeze_dim=2; any strides, copied only where
    the last dimension is not contiguous. cos, sin: (B or 1, S, rotary_dim), of which all columns are used, rotary_dim <= D;
    what is beyond rotary_dim is copied. Not interleaved: (q * cos) + (rotate_half(q) * sin); interleaved: with neighbours
    turned (Cohere's). A table of another dtype than q widens the result as PyTorch's products do. Returns (q, k) turned, in the
    order of memory that they have; inplace: they themselves. Gradients of cos and sin are plain PyTorch's. Raises RuntimeError
    for shapes and dtypes that do not go together, ValueError for another unsqueeze_dim.
    """
    op = "apply_rotary_pos_emb"
    if has_torch_function_variadic(q, k, cos, sin):
        more: dict = dict(interleaved=interleaved, inplace=inplace)
        return handle_torch_function(apply_rotary_pos_emb, (q, k, cos, sin), q, k, cos, sin, unsqueeze_dim, **more)
    _check(op, "q", q, cos, sin, 4), _check(op, "k", k, cos, sin, 4)
    if cos.shape != sin.shape:
        raise RuntimeError(f"{op}: sin must have the shape of cos {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"{op}: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim!r}")
    given = q, k
    if cos.dtype != q.dtype or k.dtype != q.dtype or sin.dtype != q.dtype:
        dtype = torch.promote_types(torch.promote_types(q.dtype, cos.dtype), torch.promote_types(k.dtype, sin.dtype))
        if inplace and (q.dtype, k.dtype) != (dtype, dtype):
            raise RuntimeError(f"{op}: q and k cannot be written in place, cos and sin make {_name(dtype)} of them")
        q, k, cos, sin = q.to(dtype), k.to(dtype), cos.to(dtype), sin.to(dtype)
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    _check_table(op, q, cos, sin, cos.shape[-1]), _check_table(op, k, cos, sin, cos.shape[-1])
    q, k = _rotary(q, k, cos, sin, cos.shape[-1], interleaved, inplace)
    if inplace:
        return given
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


def rotary_cost(x: Tensor, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops): reads x, writes y; cos and sin are small beside them."""
    n = x.numel()
    return 2 * n * x.element_size(), 3 * n
