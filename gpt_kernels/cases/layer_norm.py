"""layer_norm's calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..bench.measure import Case, grid
from ..bench.settings import Settings
from ..ops.layer_norm import layer_norm, layer_norm_cost
from ..triton.slots import launcher
from . import (
    EMPTY_ROWS,
    ODD_ROWS,
    Compiled,
    Example,
    Function,
    Streamed,
    Watched,
    edge_rows,
    forward_backward,
    like,
    norm_rows,
    op,
    streamed_rows,
)
from ._huge import LONG, MANY, large_rows, last_row_of_a_matrix, pair_up

TAKES = "weight and bias, both optional"


def eager(x, weight=None, bias=None, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def inputs(*shape, dtype=torch.float32):
    """x with a mean well off zero, as in a real network; weight and bias"""
    return (torch.randn(shape) * 2 + 0.7).to(dtype), torch.randn(shape[-1:]).to(dtype), torch.randn(shape[-1:]).to(dtype)


def example(what: str, *args, **more) -> Example:
    return Example(what, layer_norm, eager, args, **more)


def small(dtype):
    x, weight, bias = inputs(2, 3, 33, dtype=dtype)
    y, other, _ = inputs(7, 2, 12, dtype=dtype)
    yield example("weight and bias", x, weight, bias, again=(y, other, other))
    yield example("x alone", x, again=(y,))
    yield example("weight", x, weight)
    yield example("bias", x, None, bias, 0.1)


def odd(dtype, slow):
    for shape in norm_rows(slow):
        yield example(f"{shape}", *inputs(*shape, dtype=dtype))
    x, weight, bias = inputs(3, 5, 65, dtype=dtype)
    for args in ((x,), (x, weight), (x, None, bias), (x, weight, bias, 0.1), (x[1, 2], weight, bias)):
        yield example(f"{len(args)} arguments of {tuple(args[0].shape)}", *args)
    if dtype == torch.float32:
        # a mean 1000 times the deviation: a variance as mean(x^2) - mean^2 would lose all its digits
        yield example("a large mean", torch.randn(5, 1000) + 1000, *inputs(1000)[1:])


def threaded(slow):
    for shape in ((20, 129), (5, 1025)) if slow else ((700, 129), (33, 1025)):
        yield example(f"{shape}", *inputs(*shape))


def empty():
    for shape in EMPTY_ROWS:
        yield example(f"{shape}", *inputs(*shape))


def special(dtype):
    x, weight, bias = inputs(8, 33)
    x[1, 3], x[2, 4], x[3, 5], x[4], x[5], x[6] = torch.nan, torch.inf, -torch.inf, 0.0, 1e15 * torch.randn(33), 1e-40
    yield example("rows", x.to(dtype), weight.to(dtype), bias.to(dtype))


def exact():
    """Rows of +-1 with as many of each: mean 0, variance 1, so y = x weight + bias without a rounding, and so are the
    parameters' gradients."""
    x = torch.tensor([1.0, -1.0]).repeat(5, 36)
    weight, bias = torch.randint(-8, 9, (2, 72)).float()
    dy = torch.randint(-8, 9, (5, 72)).float()

    def expected(x, weight, bias):
        return x * weight + bias

    yield Example("+-1", lambda x, w, b: layer_norm(x, w, b, eps=0.0), expected, (x, weight, bias), dy=dy, said=(0, 2, 3))


def derivatives():
    def plain(x, weight=1.0, bias=0.0, eps=1e-5):
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias

    yield Function("", layer_norm, plain, ((3, 4),))
    yield Function("affine", layer_norm, plain, ((2, 3, 4), (4,), (4,)))
    yield Function("bias", lambda x, b: layer_norm(x, None, b, 0.1), lambda x, b: plain(x, 1.0, b, 0.1), ((3, 4), (4,)))


def magnitudes():
    yield Function("", layer_norm, eager, ((3, 13), (13,), (13,)))
    yield Function("without eps", lambda x: layer_norm(x, eps=0.0), lambda x: eager(x, eps=0.0), ((3, 13),))


def streamed(dtype):
    for x in streamed_rows(dtype):
        yield Streamed("layer_norm", layer_norm, (x, *torch.randn(2, x.shape[-1]).to(dtype)))


def watched():
    yield Watched("", layer_norm, tuple(((M, N), (N,), (N,)) for M, N in ((9, 768), (5, 33), (3, 2056))))


# ---- the kernels' ----


def step(sizes, new):
    M, N = sizes.batch * sizes.context, sizes.width
    x, dy, weight, bias = new(M, N), new(M, N), new(N), new(N)
    yield "layer_norm_fwd", (x, weight, bias, 1e-5)
    _, mean, rstd = op("layer_norm_fwd")(x, weight, bias, 1e-5)
    yield "layer_norm_bwd", (dy, x, weight, mean, rstd, True)


def calls(new):
    for M, N in ODD_ROWS:
        x, dy = new(M, N), new(M, N)
        for w, b in ((None, None), (new(N), None), (None, new(N)), (new(N, dtype=torch.float32),) * 2):
            yield from forward_backward(
                f"{M}x{N}, weight {w is not None and w.dtype}, bias {b is not None}",
                "layer_norm",
                (x, w, b, 1e-5),
                lambda _, mean, rstd, x=x, dy=dy, w=w, b=b: (dy, x, w, mean, rstd, b is not None),
            )


def bounds(name):
    for what, x in edge_rows((200, 65), (3, 20011)):
        N = x.shape[1]
        for more, params in (("", (None, None)), (" weight, bias", (like(x, N), like(x, N)))):
            if name == "layer_norm_fwd":
                yield what + more, (x, *params, 1e-5)
            else:
                _, mean, rstd = op("layer_norm_fwd")(x, *params, 1e-5)
                yield what + more, (like(x), x, params[0], mean, rstd, bool(more))


def huge(name):
    for m, n in (MANY, LONG):
        if name == "layer_norm_fwd":
            yield pair_up(f"rows of {n}", [*large_rows(m, n), *torch.randn(2, n), 1e-5])
        else:
            saved = large_rows(m, count=2, dtype=torch.float32)
            args = [*large_rows(m, n, count=2), torch.randn(n), *saved, True]
            yield pair_up(f"rows of {n}", args, last_row_of_a_matrix, programs=1)


def compiled():
    def problem(M, N, **more):
        def launch(new):
            x, w = new(M, N), new(N)
            y, mean, rstd = launcher("layer_norm_fwd")(x, w, new(N), 1e-5)
            launcher("layer_norm_bwd")(y, x, w, mean, rstd, True)

        return Compiled(f"{M}x{N}", launch, columns=N, plain=(M, N), **more)

    yield problem(8192, 768, main=True)
    for M, N in ((8192, 1024), (8192, 1280), (8192, 1600), (4096, 4096), (2048, 12288), (512, 32768), (8, 1024)):
        yield problem(M, N)
    yield problem(8191, 767, aligned=False)


# ---- the benchmark's: against torch.nn.functional.layer_norm, with weight and bias ----

SIZES = {"tiny": (1, 64), "small": (64, 768), "main": (8192, 768), "more": (4096, 1600), "huge": (65536, 4096)}


def cost(inputs, backward):
    return layer_norm_cost(inputs[0], backward)


def bench(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(M=M, N=N, dtype=dtype):
            return [torch.randn(*s).to(dtype).requires_grad_() for s in ((M, N), (N,), (N,))]

        yield Case("layer_norm", f"{M}x{N}", dtype, inputs, eager, layer_norm, cost, main=main)
