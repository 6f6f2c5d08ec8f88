"""rotary's calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..bench.measure import Case, grid
from ..bench.settings import Settings
from ..ops.rotary import apply_rotary_emb, apply_rotary_pos_emb, rotary_cost
from ..triton.slots import launcher
from . import Compiled, Example, Function, Streamed, Watched, like, streamed_rows
from ._huge import MANY, large_rows, pair_up, tail

TAKES = "halves or neighbours turned, in part, in place; flash-attn's and Hugging Face's tables"


def tables(rows: tuple[int, ...], W: int, dtype: torch.dtype, device="cpu"):
    """cos and sin (*rows, W) of angles that no two elements share: not a position's usual ones, of which halves are alike."""
    angle = torch.arange(torch.Size(rows).numel() * W, device=device).reshape(*rows, W) * 0.7 + 0.3
    return angle.cos().to(dtype), angle.sin().to(dtype)


# ---- plain PyTorch, as flash-attn's tests and as transformers' models write it ----


def turned(x, interleaved):
    """x with (x1, x2) of each pair as (-x2, x1)"""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def plain(x, cos, sin, interleaved):
    """of cos and sin with as many dimensions as x, a column for each that is turned"""
    R = cos.shape[-1]
    cos, sin = (t.to(torch.promote_types(t.dtype, x.dtype)) for t in (cos, sin))
    part = x[..., :R]
    return torch.cat(((part * cos + turned(part, interleaved) * sin).to(x.dtype), x[..., R:]), -1)


def for_both(t, interleaved):
    """one of each for a pair, as one for each of its two"""
    return t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)


def flash(R: int, interleaved: bool, dtype: torch.dtype, inplace: bool = False, batch: bool = False):
    """(ours, eager) of x (B, S, H, D)"""

    def of(x):
        return tables(tuple(x.shape[:2] if batch else x.shape[1:2]), R // 2, dtype, x.device)

    def ours(x):
        return apply_rotary_emb(x * 1 if inplace else x, *of(x), interleaved, inplace)

    def eager(x):
        return plain(x, *(for_both(t, interleaved).unsqueeze(-2) for t in of(x)), interleaved)

    return ours, eager


def hf(R: int, interleaved: bool = False, unsqueeze_dim: int = 1, inplace: bool = False, batch: bool = True):
    """(ours, eager) of q and k (B, H, S, D), or (B, S, H, D): both results in one tensor"""

    def of(q):
        return tables((q.shape[0] if batch else 1, q.shape[3 - unsqueeze_dim]), R, q.dtype, q.device)

    def joined(turned_ones):
        return torch.cat([*turned_ones], unsqueeze_dim)

    def ours(q, k):
        given = (q * 1, k * 1) if inplace else (q, k)
        options = dict(interleaved=interleaved, inplace=inplace)
        return joined(apply_rotary_pos_emb(*given, *of(q), unsqueeze_dim, **options))

    def eager(q, k):
        cos, sin = (t.unsqueeze(unsqueeze_dim) for t in of(q))
        return joined(plain(x, cos, sin, interleaved) for x in (q, k))

    return ours, eager


def example(how, what: str, *shapes, dtype=torch.float32, **more) -> Example:
    ours, eager = how
    return Example(what, ours, eager, tuple(torch.randn(s).to(dtype) for s in shapes), **more)


def small(dtype):
    again = (torch.randn(1, 7, 2, 12).to(dtype),)
    yield example(flash(12, False, dtype), "halves", (2, 5, 3, 12), dtype=dtype, again=again)
    yield example(flash(8, True, torch.float32, batch=True), "neighbours, in part", (2, 5, 3, 12), dtype=dtype, again=again)
    yield example(flash(8, False, dtype, inplace=True), "in place", (2, 5, 3, 12), dtype=dtype, again=again)
    q, k = (2, 3, 5, 12), (2, 1, 5, 12)
    yield example(hf(12), "q and k", q, k, dtype=dtype, layouts=(0, 1))
    yield example(hf(8, True, 2, inplace=True, batch=False), "q and k in place", (2, 5, 3, 12), (2, 5, 2, 12), dtype=dtype)


def odd(dtype, slow):
    halves = (1, 3, 8, 33) if slow == 2 else (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 128)
    for i, half in enumerate(halves):
        for interleaved in (False, True):
            B, S, H, D = 1 + i % 2, 3 + i % 3, 1 + i % 4, 2 * half + (i * 5 % 3) * (i % 5)
            what = f"{'neighbours' if interleaved else 'halves'} {2 * half} of {D}"
            table = dtype if i % 2 else torch.promote_types(dtype, torch.float32)
            yield example(flash(2 * half, interleaved, table, batch=i % 3 == 0), what, (B, S, H, D), dtype=dtype)
            yield example(hf(2 * half, interleaved, 1 + i % 2), f"{what}, of q and k", (B, S, S, D), (B, S, S, D), dtype=dtype)
    for interleaved in (False, True):  # more heads than a block or a program has
        yield example(flash(16, interleaved, dtype), "eleven heads", (1, 3, 11, 18), dtype=dtype)


def threaded(slow):
    for how in (flash(64, False, torch.float32), flash(32, True, torch.float32)):
        yield example(how, "heads", (4, 48, 8, 64))
    yield example(hf(64), "q and k", (2, 8, 96, 64), (2, 2, 96, 64))


def empty():
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (2, 5, 2, 0)):
        yield example(flash(min(8, shape[-1]), False, torch.float32), f"{shape}", shape)
        yield example(flash(min(8, shape[-1]), True, torch.float32, inplace=True), f"{shape} in place", shape)


def special(dtype):
    x = torch.randn(2, 3, 4, 16)
    x[0, 0, 1, 3], x[1, 1, 1, 2], x[0, 1, 1, 4], x[0, 2, 0, 2:6] = torch.nan, torch.inf, -torch.inf, 1e-40
    for interleaved in (False, True):
        yield Example("one head", *flash(12, interleaved, dtype), (x.to(dtype),))


def exact():
    """Integers turned by integers."""
    x, dy = torch.randint(-8, 9, (2, 2, 3, 5, 20)).float()
    cos, sin = torch.randint(-3, 4, (2, 2, 3, 18)).float()
    for interleaved in (False, True):

        def ours(x, interleaved=interleaved):
            return apply_rotary_pos_emb(x, x[:, :, :1], cos, sin, 2, interleaved=interleaved)[0]

        def eager(x, interleaved=interleaved):
            return plain(x, cos.unsqueeze(2), sin.unsqueeze(2), interleaved)

        yield Example(f"interleaved {interleaved}", ours, eager, (x,), dy=dy)


def derivatives():
    yield Function("halves", *flash(4, False, torch.float64), ((2, 3, 2, 6),))
    yield Function("neighbours", *hf(4, True), ((1, 2, 3, 4), (1, 1, 3, 4)))

    def ours(x, cos, sin):
        return apply_rotary_emb(x, cos, sin)

    def theirs(x, cos, sin):
        return plain(x, for_both(cos, False)[None, :, None], for_both(sin, False)[None, :, None], False)

    yield Function("tables", ours, theirs, ((1, 3, 2, 4), (3, 2), (3, 2)))


def magnitudes():
    yield Function("", *flash(12, False, torch.float32), ((1, 3, 2, 13),))
    yield Function("neighbours", *flash(12, True, torch.float32), ((1, 3, 2, 13),))


def streamed(dtype):
    turn = flash(64, False, dtype)[0]
    for x in streamed_rows(dtype):
        yield Streamed("rotary", lambda x: turn(x.unflatten(-1, (4, -1))).flatten(-2), (x,))


def watched():
    yield Watched("halves", flash(64, False, torch.float32)[0], (((2, 5, 3, 64),), ((1, 3, 2, 80),)))
    yield Watched("neighbours", hf(12, True)[0], (((1, 2, 5, 13), (1, 1, 5, 13)), ((2, 2, 3, 16), (2, 1, 3, 16))))


# ---- the kernels' ----


def step(sizes, new):
    B, S, H = sizes.batch, sizes.context, sizes.heads
    D = sizes.width // H
    x, half, both = new(B, S, H, D), new(1, S, D // 2), new(1, S, D)
    for table in (half, both):
        for interleaved, transposed in ((False, False), (False, True), (True, False)):
            yield "rotary_fwd", (x, table, table, D, interleaved, transposed)
    yield "rotary_fwd_out", (x, both, both, D, False, False, new(B, S, H, D))


def variants(new):
    """(what, x, cos, sin, rotary_dim, interleaved, transposed)"""
    for i, (B, S, H, D, R) in enumerate(
        ((1, 1, 1, 2, 2), (2, 5, 3, 13, 10), (1, 7, 2, 64, 64), (2, 1, 4, 128, 32), (1, 3, 2, 90, 88))
    ):
        for interleaved in (False, True):
            W, parts = (R, R // 2)[i % 2], B if i % 3 else 1
            table = new(2 * parts, S, W, dtype=torch.float32 if i % 2 else None).chunk(2)
            x = new(B, H, S, D).transpose(1, 2) if i % 2 else new(B, S, H, D)
            yield f"{'neighbours' if interleaved else 'halves'} {(B, S, H, D)}", x, *table, R, interleaved, i % 3 == 1


def calls(new):
    for what, *args in variants(new):
        yield what, "rotary_fwd", (*args,)
        yield f"{what} out", "rotary_fwd_out", (*args, new(*args[0].shape))
    yield "packed", "rotary_fwd", (new(2, 5, 3, 3, 16).select(2, 1), new(1, 5, 8), new(1, 5, 8), 16, False, False)
    yield "none", "rotary_fwd", (new(0, 5, 3, 16), new(1, 5, 8), new(1, 5, 8), 16, False, False)


def bounds(name):
    for dtype in (torch.float32, torch.bfloat16):

        def new(*shape, dtype=None, usual=dtype):
            return torch.randn(shape).to(dtype or usual)

        for what, x, *args in variants(new):
            yield f"{what} {dtype}", (x, *args) if name == "rotary_fwd" else (x, *args, like(x))


def huge(name):
    B = MANY[0]
    x = large_rows(B, 1, MANY[1] // 64, 64, count=1 if name == "rotary_fwd" else 2)
    cos, sin = (t.bfloat16() for t in tables((1, 1), 32, torch.bfloat16))
    for interleaved in (False, True):
        yield pair_up(f"interleaved {interleaved}", [x[0], cos, sin, 64, interleaved, False, *x[1:]], tail)


def compiled():
    def problem(B, S, H, D, R=0, interleaved=False, both=True, **more):
        def launch(new):
            x, table, R_ = new(B, S, H, D), new(1, S, (R or D) // (2 - both)), R or D
            y = launcher("rotary_fwd")(x, table, table, R_, interleaved, False)
            launcher("rotary_fwd_out")(y, table, table, R_, interleaved, True, y)

        name = f"B{B}S{S}H{H}D{D}" + f"-{R}" * (R > 0) + "-interleaved" * interleaved + "-half" * (not both)
        return Compiled(name, launch, **more)

    yield problem(8, 1024, 16, 64, main=True)
    yield problem(8, 1024, 16, 128, both=False)
    yield problem(8, 1024, 16, 64, interleaved=True, both=False)
    yield problem(8, 1024, 16, 80, R=32)
    yield problem(8, 1023, 5, 63, R=62, aligned=False)


# ---- the benchmark's: Hugging Face's form, of q as its models have it ----

HEADS, HEAD_DIM = 8, 64
SIZES = {"tiny": (1, HEADS * HEAD_DIM), "small": (128, HEADS * HEAD_DIM), "main": (4096, 12 * HEAD_DIM), "huge": (65536, 4096)}


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def theirs(x, cos, sin):
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return x * cos + rotate_half(x) * sin


def ours(x, cos, sin):
    half = cos.shape[-1] // 2
    return apply_rotary_emb(x, cos[..., :half], sin[..., :half])


def cost(inputs, backward):
    return rotary_cost(inputs[0], backward)


def bench(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):
        B = 2 if M > 128 else 1
        S, H = M // B, N // HEAD_DIM

        def inputs(B=B, S=S, H=H, dtype=dtype):
            x = torch.randn(B, S, H, HEAD_DIM).to(dtype).requires_grad_()
            return [x, *(for_both(t, False).to(x.device) for t in tables((1, S), HEAD_DIM // 2, dtype))]

        yield Case("rotary", f"B{B} S{S} H{H} D{HEAD_DIM}", dtype, inputs, theirs, ours, cost, main=main)
