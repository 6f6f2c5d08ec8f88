"""gelu's calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..bench.measure import Case, grid
from ..bench.settings import Settings
from ..ops.gelu import gelu, gelu_cost
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
    streamed_rows,
)
from ._huge import MANY, large_rows, last_row_of_a_matrix, pair_up

TAKES = "bias; tanh or erf"
FORMS = ("tanh", "none")


def form(approximate):
    """(ours, eager) of (x, bias=None)"""
    return (
        lambda x, bias=None: gelu(x, bias, approximate),
        lambda x, bias=None: F.gelu(x if bias is None else x + bias, approximate=approximate),
    )


def inputs(*shape, dtype=torch.float32):
    return (torch.randn(shape) * 2).to(dtype), torch.randn(shape[-1:]).to(dtype)


def example(approximate: str, what: str, *args, **more) -> Example:
    ours, theirs = form(approximate)
    return Example(f"{approximate} {what}", ours, theirs, args, **more)


def small(dtype):
    for approximate in FORMS:
        yield example(approximate, "bias", *inputs(2, 3, 33, dtype=dtype), again=inputs(7, 2, 12, dtype=dtype))
    yield example("tanh", "x alone", *inputs(2, 3, 33, dtype=dtype)[:1], again=inputs(7, 2, 12, dtype=dtype)[:1])


def odd(dtype, slow):
    for approximate in FORMS:
        for shape in boundary_rows(slow)[:: 2 if dtype == torch.float64 else 1]:
            yield example(approximate, f"{shape}", *inputs(*shape, dtype=dtype))
        x, bias = inputs(3, 5, 65, dtype=dtype)
        # 3 x 4097 elements without a bias: more than one of the kernel's flat rows, the last one short
        # 200 rows: more than a program of the bias's gradient takes at once
        for args in ((x,), (x[0, 0], bias), (x[0, 0, 0],), (torch.randn(3, 4097).to(dtype),), inputs(200, 65, dtype=dtype)):
            yield example(approximate, f"{[tuple(a.shape) for a in args]}", *args)


def threaded(slow):
    yield example("tanh", "rows", *inputs(700, 129))
    yield example("none", "long rows", *inputs(33, 1025))
    yield example("tanh", "without a bias", *inputs(100, 1025)[:1])


def empty():
    for shape in EMPTY_ROWS:
        for approximate in FORMS:
            yield example(approximate, f"{shape}", *inputs(*shape))
            yield example(approximate, f"{shape} without a bias", *inputs(*shape)[:1])


def special(dtype):
    x, _ = inputs(4, 33)
    # 6e4 is finite in every dtype: of +inf, some machines' eager erf makes NaN and others' inf (ours: tests/test_gelu.py)
    x[1, 3], x[3, 5], x[0, 6:10] = torch.nan, -torch.inf, torch.tensor([6e4, -6e4, 1e-40, 0.0])
    for approximate in FORMS:
        yield example(approximate, "rows", x.to(dtype))


def exact():
    """Far right gelu is the identity, far left zero: integers come out as they are, and dbias counts them."""
    x = torch.tensor([16.0, -16.0, 100.0, -100.0, 0.0]).repeat(3, 21)
    dy = torch.randint(-8, 9, x.shape).float()

    def expected(x, bias):
        return torch.where(x > 0, 1.0, torch.where(x < 0, 0.0, 0.5)) * (x + bias)

    for approximate in FORMS:
        yield Example(approximate, form(approximate)[0], expected, (x, torch.zeros(105)), dy=dy)


def derivatives():
    yield Function("tanh", gelu, lambda x, b: F.gelu(x + b, approximate="tanh"), ((3, 4), (4,)))
    yield Function("erf", lambda x: gelu(x, None, "none"), F.gelu, ((3, 4),))


def magnitudes():
    for approximate in FORMS:
        yield Function(approximate, *form(approximate), ((3, 13), (13,)))


def streamed(dtype):
    for x in streamed_rows(dtype):
        yield Streamed("gelu", lambda x: gelu(x, approximate="tanh"), (x,))
        yield Streamed("gelu of a biased x", gelu, (x, torch.randn(x.shape[-1]).to(dtype)))


def watched():
    yield Watched("", gelu, tuple(((M, N), (N,)) for M, N in ((9, 768), (5, 33), (3, 2056))))


# ---- the kernels' ----


def step(sizes, new):
    M, N = sizes.batch * sizes.context, 4 * sizes.width
    x, bias = new(M, N), new(N)
    for tanh in (True, False):
        yield "gelu_fwd", (x, bias, tanh)
        yield "gelu_bwd", (x, x, bias, tanh)


def calls(new):
    for M, N in ODD_ROWS:
        x, dy = new(M, N), new(M, N)
        for b in (None, new(N), new(N, dtype=torch.float32)):
            what, tanh = f"{M}x{N}, bias {b is not None and b.dtype}", M == 3
            yield from forward_backward(what, "gelu", (x, b, tanh), lambda _, x=x, dy=dy, b=b, tanh=tanh: (dy, x, b, tanh))


def bounds(name):
    def forward():
        for what, x in edge_rows():
            yield what, (x, None, True)
            yield f"{what} bias", (x, like(x, x.shape[1]), False)
        yield "rows in turn", (torch.randn(200, 65), torch.randn(65), True)

    for what, args in forward():
        yield what, args if name == "gelu_fwd" else (like(args[0]), *args)


def huge(name):
    for what, bias in (("flat", None), ("rows", torch.randn(MANY[1]))):
        if name == "gelu_fwd":
            yield pair_up(what, [*large_rows(*MANY), bias, True])
        else:
            yield pair_up(what, [*large_rows(*MANY, count=2), bias, True], last_row_of_a_matrix)


def compiled():
    def problem(M, N, bias=True, tanh=True, **more):
        def launch(new):
            x, b = new(M, N), new(N) if bias else None
            launcher("gelu_bwd")(launcher("gelu_fwd")(x, b, tanh), x, b, tanh)

        return Compiled(f"{M}x{N}" + "-bias" * bias + "-erf" * (not tanh), launch, columns=N * bias, **more)

    yield problem(8192, 3072, main=True)
    yield problem(8192, 3072, bias=False, tanh=False)
    yield problem(8191, 3071, aligned=False)


# ---- the benchmark's: bias and GELU in one pass against F.gelu(x + bias), in both forms, and Hugging Face's GPT-2 ----

SIZES = {"tiny": (1, 64), "small": (64, 3072), "main": (8192, 3072), "huge": (65536, 4096)}


def hf():
    from transformers.activations import NewGELUActivation

    activation = NewGELUActivation()
    return lambda x, bias: activation(x + bias)


def torchs(x, bias, approximate):
    return F.gelu(x + bias, approximate=approximate)


def cost(inputs, backward):
    return gelu_cost(inputs[0], backward)


def bench(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(M=M, N=N, dtype=dtype):
            return [torch.randn(*s).to(dtype).requires_grad_() for s in ((M, N), (N,))]

        for approximate in FORMS if main and not settings.quick else FORMS[:1]:
            theirs, ours = (functools.partial(f, approximate=approximate) for f in (torchs, gelu))
            # Hugging Face's form, with all it keeps for backward, ran out of 24 GB at the huge size
            others = {"hf": hf} if approximate == "tanh" and M * N < 2**28 else {}
            shape, headline = f"{M}x{N} bias {approximate}", main and approximate == "tanh"
            yield Case("gelu", shape, dtype, inputs, theirs, ours, cost, others=others, main=headline)
