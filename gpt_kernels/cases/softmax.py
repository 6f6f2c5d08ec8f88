"""softmax's calls."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..bench.measure import Case, grid
from ..bench.settings import Settings
from ..ops.softmax import softmax, softmax_cost
from ..triton.slots import launcher
from . import (
    EMPTY_ROWS,
    ODD_ROWS,
    Compiled,
    Example,
    Function,
    Streamed,
    Watched,
    boundary_rows,
    edge_rows,
    forward_backward,
    like,
    op,
    streamed_rows,
)
from ._huge import LONG, MANY, large_rows, pair_up

TAKES = "scale, causal, boolean or additive mask"
INF = float("inf")
MASKS = ((6, 65), (1, 65), (65,), (2, 1, 6, 65), (3, 1, 1), (2, 3, 6, 1), (1, 3, 6, 65), (1,), (), (2, 3, 6, 65))


def eager(x, mask=None, scale=1.0, causal=False):
    """plain PyTorch; every row must see a column"""
    z = x * scale
    if mask is not None:
        z = z.masked_fill(~mask, -INF) if mask.dtype == torch.bool else z + mask
    if causal:
        z = z.masked_fill(~causal_keep(*x.shape[-2:]), -INF)
    return torch.softmax(z, -1)


def causal_keep(T, S):
    """written out, not with triu: row t sees columns 0 ... t + S - T"""
    return torch.tensor([[s <= t + S - T for s in range(S)] for t in range(T)], dtype=torch.bool).view(T, S)


def scores(*shape, dtype=torch.float32):
    return (torch.randn(shape) * 3).to(dtype)


def example(what: str, *args, **more) -> Example:
    return Example(what, softmax, eager, args, **more)


def small(dtype):
    x, keep = scores(4, 6, 33, dtype=dtype), (torch.rand(6, 33) < 0.8) | (torch.arange(33) == 0)
    other = scores(3, 5, 12, dtype=dtype)
    yield example("x alone", x, again=(other,))
    yield example("boolean mask", x, keep, 0.5, again=(other, keep[:5, :12], 0.5))
    yield example("added mask, causal", x, torch.randn(4, 6, 33).to(dtype), 0.5, True, layouts=(0, 1))
    yield example(
        "added to rows", x, torch.randn(4, 1, 33).to(dtype), -0.7, again=(other, torch.randn(3, 1, 12).to(dtype), -0.7)
    )


def odd(dtype, slow):
    for shape in boundary_rows(slow):
        yield example(f"{shape}", scores(*shape, dtype=dtype))
    yield example("a row longer than the kernel's buffer", scores(2, 5000, dtype=dtype), None, -0.3)
    for T, S in ((1, 1), (1, 33), (7, 7), (31, 65), (64, 64), (5, 300)):
        yield example(f"causal {T} {S}", scores(2, 3, T, S, dtype=dtype), None, 0.125, True)
    if dtype in (torch.float32, torch.bfloat16):
        for n in (100, 1000, 5000):
            yield example(f"maximum late in {n}", late_maximum(n, dtype))
    yield from masked(dtype)


def late_maximum(n, dtype):
    """above what the row begins with by little, by much and by more than exp can hold; and behind nothing but -inf"""
    x = scores(6, n, dtype=dtype)
    for row, above in enumerate((5, 12, 60, 1000)):
        x[row, -1 - 70 * (row % 2)] = x[row].max() + above
    x[4, :90], x[5, : n // 2] = -INF, -1000
    return x


def masked(dtype):
    """every way to broadcast; bool and added in x's dtype; with and without causal"""
    x = scores(2, 3, 6, 65, dtype=dtype)
    for shape in MASKS:
        keep = torch.rand(shape) < 0.7
        # the first column stays, and so does a mask that covers a whole row with one element
        keep = keep | (torch.arange(shape[-1]) == 0) if shape and shape[-1] > 1 else torch.ones_like(keep)
        for causal in (False, True):
            yield example(f"bool {shape} causal {causal}", x, keep, 0.5, causal)
            added, what = torch.randn(shape).to(dtype), f"added {shape} causal {causal}"
            if shape[-1:] in ((), (1,)):  # moves a row as a whole: its gradient is 0, and a sum of roundings at that
                ours, theirs = (lambda x, f=f, rest=(added, 0.5, causal): f(x, *rest) for f in (softmax, eager))
                yield Example(what, ours, theirs, (x,))
            else:
                yield example(what, x, added, 0.5, causal)


def threaded(slow):
    yield example("rows", scores(700, 129))
    yield example("causal, masked", scores(8, 33, 1025), torch.randn(33, 1025), 0.5, True)


def empty():
    for shape in EMPTY_ROWS:
        yield example(f"{shape}", scores(*shape))
    yield example("masked", scores(2, 0, 4), torch.randn(1, 4), 1.0, True)


def special(dtype):
    x = scores(8, 33)
    x[1, 3], x[2, 4], x[3, 5], x[4], x[5], x[6] = math.nan, INF, -INF, 0.0, 3e38 * torch.rand(33), 1e-40
    x[7, 0] = 3e38
    yield example("rows", x.to(dtype))


def exact():
    """n visible equal scores, n a power of 2: 1/n each without a rounding, whatever their size"""
    for n in (1, 2, 32, 64, 1024):
        keep = torch.zeros(1029, dtype=torch.bool)
        keep[torch.randperm(1029)[:n]] = True
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = (keep / n).to(dtype).expand(3, -1)
            yield Example(
                f"{n} of {dtype}",
                lambda x, keep=keep: softmax(x, keep),
                lambda x, expected=expected: expected + 0 * x,
                (torch.full((3, 1029), 77.0, dtype=dtype),),
                dy=torch.zeros(3, 1029),
            )


def derivatives():
    """Not by torch.softmax: torch cannot take the reverse derivative of its forward derivative."""

    def plain(x, mask=None, scale=1.0, causal=False):
        z = x * scale
        if mask is not None:
            z = z.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else z + mask
        if causal:
            T, S = x.shape[-2:]
            z = z.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)
        e = torch.exp(z - z.detach().amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    keep = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])  # the second row sees nothing

    def hidden_row(x):
        return torch.cat((plain(x, keep)[:1], x[1:2] * 0, plain(x, keep)[2:])).nan_to_num()

    yield Function("", softmax, plain, ((3, 4),))
    yield Function(
        "bias, causal", lambda x, m: softmax(x, m, 0.7, True), lambda x, m: plain(x, m, 0.7, True), ((2, 3, 4), (3, 4))
    )
    yield Function("mask", lambda x: softmax(x, keep[::2], 0.7), lambda x: plain(x, keep[::2], 0.7), ((2, 4),))
    yield Function("hidden row", lambda x: softmax(x, keep), hidden_row, ((3, 4),))


def magnitudes():
    yield Function("", softmax, eager, ((3, 13), (3, 13)))
    yield Function(
        "scaled and causal", lambda x: softmax(x, None, 0.125, True), lambda x: eager(x, None, 0.125, True), ((3, 13),)
    )


def streamed(dtype):
    for x in streamed_rows(dtype):
        yield Streamed("softmax", softmax, (x,))
        yield Streamed("causal softmax", lambda x: softmax(x, causal=True), (x,))


def watched():
    # by warps; by a block, masked and causal; in shared memory; in parts
    yield Watched("", softmax, (((5, 33),), ((4, 17001),), ((1, 40001),)))
    yield Watched("masked", lambda x, m: softmax(x, m, 0.5, True), (((2, 9, 40), (9, 40)), ((3, 9, 1100), (9, 1))))


# ---- the kernels' ----


def step(sizes, new):
    x = new(sizes.batch, sizes.heads, sizes.context, sizes.context)
    yield "softmax_fwd", (x, None, 0.125, True)
    yield "softmax_bwd", (x, op("softmax_fwd")(x, None, 0.125, True), 0.125, True)


def calls(new):
    for M, N in ODD_ROWS:
        x, dy = new(M, N), new(M, N)
        keep = torch.ones(N, dtype=torch.bool, device=new.device)
        for mask in (None, keep, new(M, N), new(M, 1, dtype=torch.float32)):
            yield from forward_backward(
                f"{M}x{N}, mask {mask is not None and mask.dtype}",
                "softmax",
                (x, mask, 0.3, mask is None),
                lambda y, dy=dy, mask=mask: (dy, y, 0.3, mask is None),
            )


def bounds(name):
    def forward():
        for what, x in edge_rows((2, 20011)):
            yield what, (x, None, 0.5, False)
            yield f"{what} mask", (x, torch.rand(x.shape) > 0.2, 1.0, False)
        x = torch.randn(2, 3, 5, 33).bfloat16()
        yield "causal", (x, None, 1.0, True)
        yield "mask of a row", (x, torch.randn(33), 1.0, True)
        yield "mask of heads", (x, torch.randn(2, 1, 1, 33).bfloat16(), 1.0, False)

    for what, (x, mask, scale, causal) in forward():
        if name == "softmax_fwd":
            yield what, (x, mask, scale, causal)
        else:
            yield what, (like(x), op("softmax_fwd")(x, mask, scale, causal), scale, causal)


def huge(name):
    for m, n in (MANY, LONG):
        forward = name == "softmax_fwd"
        rows, rest = large_rows(m, n, count=1 if forward else 2), [None, 1.0, False] if forward else [1.0, False]
        yield pair_up(f"rows of {n}", [*rows, *rest])


def compiled():
    def problem(*shape, mask=False, causal=False, **more):
        def launch(new):
            x = new(*shape)
            y = launcher("softmax_fwd")(x, new(1, *shape[1:]) if mask else None, 0.125, causal)
            launcher("softmax_bwd")(x, y, 0.125, causal)

        name = "x".join(map(str, shape)) + "-mask" * mask + "-causal" * causal
        return Compiled(name, launch, columns=shape[-1], plain=() if mask or causal else shape, **more)

    yield problem(8192, 1024, main=True)
    yield problem(8192, 50257)
    yield problem(16, 262144)
    yield problem(512, 262144)
    yield problem(12, 1024, 1024, causal=True)
    yield problem(12, 1024, 1024, mask=True)
    yield problem(8191, 1023, aligned=False)


# ---- the benchmark's: against torch.softmax, alone, and scaled and causal as in attention ----

SIZES = {"tiny": (1, 64), "small": (64, 1024), "main": (12288, 1024), "huge": (65536, 4096)}
SCALE = 0.125


def torchs(x):
    return torch.softmax(x, -1)


def causal(x):
    return softmax(x, None, SCALE, True)


def cost(inputs, backward):
    return softmax_cost(inputs[0], backward)


def bench(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(*shape, dtype=dtype):
            return [torch.randn(shape).to(dtype).requires_grad_()]

        def flat(M=M, N=N, inputs=inputs):
            return inputs(M, N)

        yield Case("softmax", f"{M}x{N}", dtype, flat, torchs, softmax, cost, main=main)
        if M % N == 0:

            def square(M=M, N=N, inputs=inputs):
                return inputs(M // N, N, N)

            hidden: list[torch.Tensor] = []  # made at the first call, as a model has it

            def hiding(x, N=N, hidden=hidden):
                if not hidden:
                    hidden.append(torch.ones(N, N, dtype=torch.bool).triu(1))
                return torch.softmax((x * SCALE).masked_fill(hidden[0], -torch.inf), -1)

            shape, options = f"{M // N}x{N}x{N} causal", {"causal": True}
            yield Case("softmax", shape, dtype, square, hiding, causal, cost, options=options, main=main)
