"""attention's calls: of the core op and of its two public faces."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..accuracy import BIAS_GRADIENT, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from ..bench.measure import Case
from ..bench.settings import Settings
from ..ops.attention import (
    attention,
    attention_cost,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    scaled_dot_product_attention,
)
from ..ops.philox import dropout_factor, dropout_threshold, philox_uint16
from ..triton.slots import launcher
from . import Compiled, Example, Function, Watched, forward_backward, op
from ._huge import pair_up

TAKES = "head dim to 256; MHA, GQA, MQA; other key length; causal, window, softcap, ALiBi, bias or mask, dropout; strides"
RNG = torch.tensor([-1234567890123456789, 42])
INF = float("inf")
# o, dq, dk, dv, dbias
FACTORS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, WEIGHT_GRADIENT, BIAS_GRADIENT)
# B, H, Hk, Tq, Tk, D: both sides of every tile edge (6 rows, 64 keys, 96 queries, 2 "few" queries), odd head dims, GQA, MQA
SHAPES = (
    (1, 1, 1, 1, 1, 1), (2, 1, 1, 1, 63, 16), (1, 2, 1, 2, 64, 40), (1, 2, 2, 3, 65, 64), (1, 1, 1, 5, 5, 7),
    (1, 2, 2, 6, 63, 32), (2, 3, 1, 7, 129, 33), (1, 2, 2, 63, 64, 16), (1, 1, 1, 64, 65, 80),
    (1, 2, 1, 65, 65, 64), (1, 1, 1, 95, 127, 96), (1, 4, 2, 96, 96, 59), (1, 1, 1, 97, 97, 128),
    (1, 2, 2, 129, 33, 64), (1, 1, 1, 257, 257, 64), (1, 1, 1, 33, 31, 256),
)  # fmt: skip
FEW_SHAPES = (
    (1, 1, 1, 1, 1, 1), (1, 2, 1, 2, 64, 40), (2, 3, 1, 7, 49, 33), (1, 1, 1, 64, 65, 80), (1, 2, 2, 33, 31, 96),
    (1, 1, 1, 5, 5, 256),
)  # fmt: skip


def eager(q, k, v, bias=None, *, slopes=None, rng=None, scale=None, softcap=0.0, dropout_p=0.0, offset=0, left=-1, right=-1):
    """The formula of the op's docstring in plain PyTorch, in the dtype of its arguments; shares no code with it."""
    scale = 1 / math.sqrt(q.shape[-1] or 1) if scale is None else scale
    k, v = (t.repeat_interleave(q.shape[1] // (t.shape[1] or 1), 1) for t in (k, v))
    s = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap:
        s = softcap * (s / softcap).tanh()
    i, j = torch.arange(s.shape[2]).view(-1, 1) + offset, torch.arange(s.shape[3])
    if slopes is not None:
        s = s - (slopes.view(-1, s.shape[1], 1, 1) * (i - j).abs()).to(s.dtype)
    hidden = torch.zeros(s.shape, dtype=torch.bool)
    if right >= 0:
        hidden = hidden | (j > i + right)
    if left >= 0:
        hidden = hidden | (j < i - left)
    if bias is not None and bias.dtype == torch.bool:
        hidden = hidden | ~bias
    elif bias is not None:
        s = s + bias
    blind = hidden.all(-1, keepdim=True)
    p = s.masked_fill(hidden & ~blind, -INF).softmax(-1).masked_fill(blind, 0)
    if dropout_p:
        kept = philox_uint16(rng, *s.shape) >= dropout_threshold(dropout_p)
        p = p * kept / (1 - dropout_threshold(dropout_p) / 65536)
    return torch.einsum("bhij,bhjd->bhid", p, v)


def ours(**options):
    """The same arguments for our op, as a function of the differentiable ones; returns o alone."""

    def call(q, k, v, bias=None):
        o = dict(options)
        slopes = o.pop("slopes", None)
        if slopes is not None:
            slopes = slopes.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        scale = o.pop("scale", None)
        return attention(
            q,
            k,
            v,
            bias,
            slopes,
            o.pop("rng", None),
            scale=scale,
            causal_offset=o.pop("offset", 0),
            window_left=o.pop("left", -1),
            window_right=o.pop("right", -1),
            **o,
        )[0]

    return call


def qkv(B, H, Hk, Tq, Tk, D, dtype=torch.float32, Dv=None):
    return (
        torch.randn(B, H, Tq, D).to(dtype),
        torch.randn(B, Hk, Tk, D).to(dtype),
        torch.randn(B, Hk, Tk, Dv or D).to(dtype),
    )


def example(what: str, args, again=(), layouts=(0, 1, 2), **options) -> Example:
    theirs = functools.partial(eager, **options)
    shown = {name: value for name, value in options.items() if not isinstance(value, torch.Tensor)}
    return Example(f"{what} {shown or ''}", ours(**options), theirs, args, again, layouts, FACTORS)


def small(dtype):
    yield example("causal", qkv(2, 2, 1, 7, 9, 16, dtype), qkv(1, 4, 2, 12, 21, 16, dtype), right=0, offset=2)
    bias = torch.randn(2, 2, 7, 9).to(dtype)
    everything = {"softcap": 2.0, "slopes": torch.tensor([0.3, 0.1]), "dropout_p": 0.2, "rng": RNG, "right": 1, "left": 5}
    yield example("bias", (*qkv(2, 2, 2, 7, 9, 5, dtype, Dv=3), bias), layouts=(), **everything)
    yield example("boolean mask", (*qkv(2, 2, 1, 7, 9, 4, dtype), torch.rand(1, 1, 7, 9) > 0.4), layouts=())


def odd(dtype, slow):
    """Interpreted kernels take every third in 16 bits, where nothing but roundings is different."""
    thin = slow and dtype != torch.float32
    for shape in (FEW_SHAPES if slow == 2 else SHAPES)[:: 2 if thin else 1]:
        Tq, Tk = shape[3:5]
        # a lone query that sees a lone key has gradient 0: exactly so in eager, to a rounding in ours; no ratio tells
        top_left = [{"right": 0}] if Tq > 1 else []
        for options in ({}, *top_left, {"right": 0, "offset": Tk - Tq}):
            yield example(f"{shape}", qkv(*shape, dtype), **options)
    tokens, few = ((50, 57), []) if slow == 2 else ((70, 81), [(2, 70)])
    for options, (Tq, Tk) in list(itertools.product(score_steps(), [tokens, *few]))[:: 3 if thin else 1]:
        yield example(f"{Tq}x{Tk}", qkv(2, 2, 1, Tq, Tk, 24, dtype), **options)
    Tq, Tk = (34, 30) if slow == 2 else (70, 81)
    shapes = (2, 2, Tq, Tk), (1, 2, Tq, Tk), (2, 1, 1, Tk), (1, 1, Tq, 1), (1, 2, 1, 1)
    steps = {}, {"softcap": 2.0, "right": 0, "offset": 11}, {"dropout_p": 0.3, "rng": RNG}
    for shape, options in list(itertools.product(shapes, steps))[:: 4 if thin else 1]:
        made = example(f"bias {shape}", (*qkv(2, 2, 2, Tq, Tk, 16, dtype), torch.randn(shape).to(dtype)), **options)
        if shape[-1] > 1:
            yield made
        else:  # moves a row as a whole: its gradient is 0, and a sum of roundings at that
            fixed = ((lambda q, k, v, f=f, bias=made.args[3]: f(q, k, v, bias.to(q.dtype))) for f in (made.ours, made.eager))
            yield Example(made.what, *fixed, made.args[:3], factors=FACTORS)
    if dtype == torch.float32:
        for shape in ((2, 2, 70, 81), (1, 1, 70, 81), (2, 1, 1, 81), (1, 1, 70, 1)):
            yield example(f"mask {shape}", (*qkv(2, 2, 2, 70, 81, 16), torch.rand(shape) > 0.4))


@contextlib.contextmanager
def interpreted():
    """Triton's tiles in small: full, partly hidden and skipped ones in a few dozen tokens, in every pass."""
    from ..triton.attention import ATTENTION_FWD
    from ..triton.attention_bwd import ATTENTION_BWD_DKV, ATTENTION_BWD_DQ

    tall, wide = ({"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 2} for m, n in ((32, 16), (16, 32)))
    with ATTENTION_FWD.override(tall), ATTENTION_BWD_DKV.override(wide), ATTENTION_BWD_DQ.override(tall):
        yield


def score_steps():
    slopes, dropout = torch.tensor([0.5, 0.25]), {"dropout_p": 0.2, "rng": RNG}
    return [
        {"scale": 0.3}, {"scale": -0.3}, {"left": 5}, {"left": 1, "right": 0}, {"left": 17, "right": 3, "offset": 4},
        {"softcap": 1.5}, {"softcap": 1.5, "right": 0}, {"slopes": slopes},
        {"slopes": slopes.expand(2, 2), "right": 0, "offset": 11}, dropout,
        {**dropout, "right": 0}, {**dropout, "softcap": 2.0, "slopes": slopes, "left": 40},
    ]  # fmt: skip


def threaded(slow):
    # one head (its keys in chunks) and many
    shapes = ((1, 1, 1, 300, 600, 32), (2, 4, 2, 100, 130, 16)) if slow < 2 else ((1, 2, 1, 34, 30, 16),)
    for shape in shapes:
        Tq, Tk = shape[3:5]
        yield example(f"{shape}", (*qkv(*shape), torch.randn(1, 1, Tq, Tk)), right=0, offset=Tk - Tq)


def empty():
    for shape in ((0, 2, 2, 5, 5, 8), (1, 0, 0, 5, 5, 8), (1, 2, 2, 0, 5, 8), (1, 2, 2, 5, 0, 8), (1, 2, 2, 5, 4, 0)):
        for options in ({}, {"right": 0}, {"dropout_p": 0.1, "rng": RNG}):
            yield example(f"{shape}", qkv(*shape), **options)


def special(dtype):
    q, k, v = qkv(1, 2, 2, 33, 40, 16)
    q[0, 0, 9, 3] = torch.nan  # stays in its row; of the gradients, sums over rows, nothing is said
    yield dataclasses.replace(example("not a number", tuple(t.to(dtype) for t in (q, k, v)), right=0), said=(0,))


def exact():
    """Equal scores over 2^n visible keys: every probability is 2^-n and every sum exact, so the answer is too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k = torch.zeros(2, 1, 1, 64, 32, dtype=dtype)
        v, dy = torch.randint(-8, 9, (2, 1, 1, 64, 32)).to(dtype)

        def mean(q, k, v):
            return v.mean(2, keepdim=True, dtype=torch.float64).to(v.dtype).expand(1, 1, 64, 32) + 0 * q + 0 * k

        yield Example(f"a mean of {dtype}", ours(), mean, (q, k, v), dy=dy, said=(0,))
        # one key each: attention is a copy
        yield Example(f"a copy of {dtype}", ours(left=0, right=0), lambda q, k, v: v + 0 * q + 0 * k, (q, k, v), dy=dy)


def derivatives():
    rng, keep = torch.tensor([5, 7]), torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    heads = ((1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 1))  # of q, k, v: (B, H, T, D)
    swap = functools.partial(torch.transpose, dim0=1, dim1=2)

    def softmax(z):
        """Not torch.softmax: torch cannot take the reverse derivative of its forward derivative."""
        e = torch.exp(z - z.detach().amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    def plain(q, k, v, bias=None, slopes=None, *, scale, softcap=0.0, p=0.0, left=None, right=None, mask=None):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        s = q @ k.mT * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        distance = torch.arange(s.shape[2])[:, None] - torch.arange(s.shape[3])
        if slopes is not None:
            s = s - slopes.expand(s.shape[:2])[:, :, None, None] * distance.abs()
        if bias is not None:
            s = s + bias
        for hidden in (
            left is not None and distance > left,
            right is not None and distance < -right,
            mask is not None and ~mask,
        ):
            s = s if hidden is False else s.masked_fill(hidden, -torch.inf)
        blind = (s == -torch.inf).all(-1, keepdim=True)
        prob = softmax(s.masked_fill(blind, 0)).masked_fill(blind, 0)
        return prob * dropout_factor(rng, p, s) @ v

    sdpa = scaled_dot_product_attention
    yield Function(
        "",
        lambda q, k, v: sdpa(q, k, v, is_causal=True),
        lambda q, k, v: plain(q, k, v, scale=2**-0.5, right=0),
        ((2, 1, 3, 2),) * 3,
    )
    yield Function(
        "grouped heads, bias",
        lambda q, k, v, b: sdpa(q, k, v, b, enable_gqa=True),
        lambda q, k, v, b: plain(q, k, v, b, scale=2**-0.5),
        (*heads, (1, 2, 1, 4)),
    )
    yield Function(
        "mask",
        lambda q, k, v: sdpa(q, k, v, keep, scale=0.3, enable_gqa=True),
        lambda q, k, v: plain(q, k, v, scale=0.3, mask=keep),
        heads,
    )
    yield Function(
        "dropout",
        lambda q, k, v: attention(q, k, v, None, None, rng, scale=0.5, softcap=2.0, dropout_p=0.3)[0],
        lambda q, k, v: plain(q, k, v, scale=0.5, softcap=2.0, p=0.3),
        heads,
    )
    yield Function(
        "tokens before heads, alibi",
        lambda q, k, v, slopes: flash_attn_func(
            q, k, v, window_size=(1, 1), softcap=2.0, alibi_slopes=slopes, softmax_scale=0.4
        ),
        lambda q, k, v, slopes: swap(plain(swap(q), swap(k), swap(v), None, slopes, scale=0.4, softcap=2.0, left=1, right=1)),
        (*((1, 3, 2, 2),) * 3, (2,)),
    )
    yield Function(
        "packed",
        lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True),
        lambda qkv: swap(plain(*map(swap, qkv.unbind(2)), scale=0.5, right=0)),
        ((1, 2, 3, 1, 4),),
    )
    yield Function("one tensor for three", lambda x: sdpa(x, x, x), lambda x: plain(x, x, x, scale=0.5), ((1, 1, 3, 4),))


def magnitudes():
    heads = (1, 2, 5, 16)

    def both(**options):
        return ours(scale=0.25, **options), functools.partial(eager, scale=0.25, **options)

    yield Function("", *both(), (heads,) * 3)
    yield Function("a bias", *both(), (*(heads,) * 3, (1, 2, 5, 5)))
    yield Function("one query", *both(), ((1, 2, 1, 16), heads, heads))
    yield Function("a cap", *both(softcap=10.0), (heads,) * 3)


def streamed(dtype):
    """Its outputs are written tile by tile, as ever."""
    return iter(())


def watched():
    def heads(Tq, Tk, D):
        return (1, 2, Tq, D), (1, 1, Tk, D), (1, 1, Tk, D)

    state = torch.tensor([7, 0])
    yield Watched("", lambda *qkv: attention(*qkv, scale=0.3, window_right=0)[0], (heads(70, 70, 64), heads(33, 40, 24)))
    yield Watched(
        "dropout", lambda *qkv: attention(*qkv, None, None, state, scale=0.3, dropout_p=0.3)[0], (heads(40, 70, 128),)
    )
    yield Watched("bias", lambda *qkvb: attention(*qkvb, scale=0.3, softcap=5.0)[0], ((*heads(20, 33, 80), (1, 2, 20, 33)),))


# ---- the kernels' ----


def step(sizes, new):
    """Causal, as a model has it: views of one (B, T, 3, H, D)."""
    B, T, N, H = sizes.batch, sizes.context, sizes.width, sizes.heads
    q, k, v = (t.transpose(1, 2) for t in new(B, T, 3, H, N // H).unbind(2))
    do = new(B, T, H, N // H).transpose(1, 2)
    for dropout_p in (0.0, 0.1):
        options = (None, None, new.rng_state() if dropout_p else None, (N // H) ** -0.5, 0.0, dropout_p, 0, -1, 0)
        yield "attention_fwd", (q, k, v, *options)
        o, lse = op("attention_fwd")(q, k, v, *options)
        yield "attention_bwd", (do, q, k, v, o, lse, *options, False)


# B, H, Hk, Tq, Tk, D, Dv: one query, grouped heads, odd head dims, the largest
HEADS = ((1, 2, 2, 1, 70, 64, 64), (2, 4, 2, 33, 65, 80, 80), (1, 3, 1, 17, 17, 40, 24), (1, 1, 1, 5, 9, 256, 256))


def calls(new):
    rng_state = new.rng_state()
    for sizes in HEADS:
        B, H, Hk, Tq, Tk, D, Dv = sizes
        q, k, v = new(B, H, Tq, D), new(B, Hk, Tk, D), new(B, Hk, Tk, Dv)
        masks = {
            "plain": (None, None, 0.0, 0.0, 0, -1, -1),
            "causal, dropout": (None, None, 0.0, 0.2, Tk - Tq, -1, 0),
            "window, softcap": (None, None, 20.0, 0.0, 0, 7, 3),
            "alibi": (None, new(H, dtype=torch.float32), 0.0, 0.0, 0, -1, 0),
            "boolean mask": (torch.ones(1, 1, Tq, Tk, dtype=torch.bool, device=new.device), None, 0.0, 0.0, 0, -1, -1),
            "bias": (new(1, H, Tq, Tk), None, 0.0, 0.1, 0, -1, -1),
            "bias of a row": (new(B, 1, 1, Tk), None, 0.0, 0.0, 0, -1, -1),
        }
        for what, (bias, slopes, softcap, dropout_p, offset, left, right) in masks.items():
            options = (bias, slopes, rng_state, D**-0.5, softcap, dropout_p, offset, left, right)
            need_dbias = bias is not None and bias.dtype != torch.bool
            yield from forward_backward(
                f"{what} {sizes}",
                "attention",
                (q, k, v, *options),
                lambda o, lse, q=q, k=k, v=v, options=options, need=need_dbias: (o, q, k, v, o, lse, *options, need),
            )


def bounds(name):
    def forward():
        """(B, H, T, D) and (B, T, H, D) in memory; heads, lengths, head dimensions and score steps in turn"""
        rng = torch.tensor([5, 1])
        steps = {  # bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset, window_left, window_right
            "plain": (None, None, None, 0.125, 0.0, 0.0, 0, -1, -1),
            "causal": (None, None, None, 0.125, 0.0, 0.0, 0, -1, 0),
            "window": (None, None, None, 0.125, 0.0, 0.0, 3, 20, 5),
            "softcap": (None, None, None, 0.125, 5.0, 0.0, 0, -1, 0),
            "dropout": (None, None, rng, 0.125, 0.0, 0.2, 0, -1, 0),
            "alibi": (None, torch.rand(4), None, 0.125, 0.0, 0.0, 0, -1, 0),
        }
        sizes = (
            (1, 4, 4, 1, 1, 64),
            (2, 4, 2, 65, 65, 64),
            (1, 4, 1, 33, 130, 80),
            (1, 4, 4, 130, 17, 128),
            (1, 4, 4, 31, 33, 40),
        )
        for i, (B, H, Hk, Tq, Tk, D) in enumerate(sizes):
            for j, (what, options) in enumerate(steps.items()):
                if (i + j) % 3:
                    continue
                dtype = (torch.float16, torch.bfloat16, torch.float32)[(i + j // 3) % 3]
                q, k, v = (torch.randn(B, t, h, D).to(dtype).transpose(1, 2) for t, h in ((Tq, H), (Tk, Hk), (Tk, Hk)))
                if j % 2:
                    q, k, v = (t.contiguous() for t in (q, k, v))
                yield f"{tuple(q.shape)} {Tk} {dtype} {what}", (q, k, v, *options)
                if what == "plain" and i:
                    for bias in (torch.randn(1, H, Tq, Tk).to(dtype), torch.rand(B, 1, 1, Tk) > 0.2):
                        yield f"{tuple(q.shape)} {Tk} {dtype} bias {tuple(bias.shape)}", (q, k, v, bias, *options[1:])

    for what, (q, k, v, bias, *options) in forward():
        if name == "attention_fwd":
            yield what, (q, k, v, bias, *options)
        else:
            o, lse = op("attention_fwd")(q, k, v, bias, *options)
            need_dbias = bias is not None and bias.dtype != torch.bool
            do = torch.empty_like(q).copy_(torch.randn(q.shape))
            yield what, (do, q, k, v, o, lse, bias, *options, need_dbias)


def huge(name):
    options, backward = (None, None, None, 0.125, 0.0, 0.0, 0, -1, 0), name == "attention_bwd"

    def strided(B, H, T, D, stride):
        """(tensor of these strides, its contiguous copy)"""
        small = torch.randn(B, H, T, D).bfloat16()
        extent = 1 + sum((n - 1) * s for n, s in zip((B, H, T, D), (*stride, 1), strict=True))
        return torch.empty(extent, dtype=torch.bfloat16).as_strided(small.shape, (*stride, 1)).copy_(small), small

    for what, shape, stride in (
        ("tokens far apart", (1, 1, 17, 64), (64, 64, 2**27 + 64)),
        ("heads far apart", (1, 3, 17, 64), (64, 2**30 + 64, 64)),
        ("batches far apart", (3, 1, 17, 64), (2**30 + 64, 64, 64)),
    ):
        q, k, v = (strided(*shape, stride) for _ in range(3))
        args = [q, k, v, *options]
        if backward:
            o, lse = op("attention_fwd")(q[1], k[1], v[1], *options)
            do = torch.randn(o.shape).bfloat16()
            wide = torch.empty_strided(q[0].shape, q[0].stride(), dtype=o.dtype).copy_(do)
            args = [(wide, do), q, k, v, o, lse, *options, False]
        yield pair_up(what, args, lambda t: t)
    # as many heads as make the outputs large, too; the last one is computed
    H, T, D = 2**31 // (64 * 64) + 1, 64, 64
    pairs = []
    for length in (T, 16, 16, T, T):
        small = torch.randn(1, 1, length, D).bfloat16()
        pairs.append((torch.empty(1, H, length, D, dtype=torch.bfloat16), small))
    q, k, v, o, do = pairs
    args = [q, k, v, *options]
    if backward:
        o[1][:], lse = op("attention_fwd")(q[1], k[1], v[1], *options)
        lse = (torch.empty(1, H, T), lse)
        lse[0][:, -1:] = lse[1]
        args = [do, q, k, v, o, lse, *options, False]
    for whole, small in pairs:
        whole[:, -1:] = small
    yield pair_up("many heads", args, lambda t: t[:, -1:] if t.dim() > 1 else t)


def compiled():
    """q, k, v are (B, T, H, D) in memory, as a GPT's projections leave them."""

    def problem(B, H, T, D, Tk=None, Hk=None, causal=True, window=-1, bias=False, alibi=False, softcap=0.0, dropout_p=0.0,
                backward=True, **more):  # fmt: skip
        Tk, Hk = Tk or T, Hk or H

        def launch(new):
            q, k, v = (new(B, t, h, D).transpose(1, 2) for t, h in ((T, H), (Tk, Hk), (Tk, Hk)))
            extras = (
                new(1, H, T, Tk) if bias else None,
                new(H, dtype=torch.float32) if alibi else None,
                new(2, dtype=torch.int64) if dropout_p else None,
                D**-0.5, softcap, dropout_p, Tk - T, window, 0 if causal else -1,
            )  # fmt: skip
            o, lse = launcher("attention_fwd")(q, k, v, *extras)
            if backward:
                launcher("attention_bwd")(o, q, k, v, o, lse, *extras, bias)

        flags = {"full": not causal, f"window{window}": window >= 0, "bias": bias, "alibi": alibi, "softcap": softcap > 0,
                 "dropout": dropout_p > 0}  # fmt: skip
        name = f"B{B}H{H}" + f"k{Hk}" * (Hk != H) + f"T{T}" + f"k{Tk}" * (Tk != T) + f"D{D}"
        return Compiled("-".join([name, *(f for f, on in flags.items() if on)]), launch, **more)

    yield problem(8, 12, 1024, 64, main=True)
    yield problem(4, 16, 2048, 128, main=True)
    yield problem(4, 16, 1024, 80)
    yield problem(2, 8, 1024, 256)
    yield problem(2, 32, 4096, 128, Hk=8, window=1023, softcap=50.0)
    yield problem(8, 12, 1024, 64, dropout_p=0.1)
    yield problem(8, 12, 1024, 64, bias=True, causal=False)
    yield problem(8, 12, 1024, 64, alibi=True)
    yield problem(32, 32, 1, 128, Tk=4096, Hk=8, backward=False, matrix="HMMA")
    yield problem(3, 5, 1023, 64, aligned=False)


# ---- the benchmark's: against torch's scaled_dot_product_attention and Hugging Face's eager one, forward and backward ----

# B, H, T, D, causal, dropout. The first: every dtype, and all of --quick
BENCHED = (
    (4, 12, 1024, 64, True, 0.0),
    (4, 12, 1024, 64, False, 0.0),
    (4, 12, 1024, 64, True, 0.1),
    (4, 8, 1024, 128, True, 0.0),
    (8, 12, 128, 64, True, 0.0),
    (1, 2, 16, 32, True, 0.0),
)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
OPAQUE = "attention is one call, which it does not look into"


def attend(q, k, v, sdpa, causal, dropout_p):
    return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout_p, is_causal=causal)


def hf(T: int, causal: bool, dropout_p: float):
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    module, masks = types.SimpleNamespace(training=True), {}

    def attention(q, k, v):
        if causal and q.dtype not in masks:
            masks[q.dtype] = torch.full((T, T), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)[None, None]
        given = (x.transpose(1, 2) for x in (q, k, v))
        return eager_attention_forward(module, *given, masks.get(q.dtype), dropout=dropout_p)[0].transpose(1, 2)

    return attention


def cost(inputs, backward, causal):
    return attention_cost(*(x.transpose(1, 2) for x in inputs), causal, backward)


def case(B, H, T, D, causal, dropout_p, dtype, **more) -> Case:
    def inputs():
        # (B, H, T, D) as a model has it: views of (B, T, H, D)
        return [torch.randn(B, T, H, D, dtype=dtype).requires_grad_() for _ in "qkv"]

    options = {"causal": causal, "dropout_p": dropout_p}
    theirs, fused = (
        functools.partial(attend, sdpa=sdpa, **options)
        for sdpa in (F.scaled_dot_product_attention, scaled_dot_product_attention)
    )
    shape = f"B{B} H{H} T{T} D{D}{' causal' if causal else ''}{f' dropout {dropout_p}' if dropout_p else ''}"
    return Case(
        "attention", shape, dtype, inputs, theirs, fused, functools.partial(cost, causal=causal), ("fwd", "bwd"),
        options=options, random=dropout_p > 0, opaque=OPAQUE, **more,
    )  # fmt: skip


def bench(settings: Settings) -> Iterator[Case]:
    for n, (B, H, T, D, causal, dropout_p) in enumerate(BENCHED[:1] if settings.quick else BENCHED):
        for dtype in settings.dtypes if n == 0 else settings.dtypes[:1]:
            others = {"hf": functools.partial(hf, T, causal, dropout_p)}
            # a GPU gets a batch that fills it; with dropout the reference is the judge, which keeps all scores
            B = 8 * B if settings.device == "cuda" and T == 1024 and not dropout_p else B
            yield case(B, H, T, D, causal, dropout_p, getattr(torch, dtype), others=others, main=n == 0)


def sweep(settings: Settings) -> Iterator[Case]:
    """Over sequence lengths, with our reference beside ours: what keeps the score of every pair of query and key needs memory
    that grows with the square of the length."""
    H = 16 if settings.device == "cuda" else 2
    for T in LENGTHS[:3] if settings.quick else LENGTHS:
        yield case(1, H, T, 64, True, 0.0, getattr(torch, settings.dtypes[0]), length=T, naive=True)
