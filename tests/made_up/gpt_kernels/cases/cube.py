"""cube's calls."""

import torch

from ..bench.measure import Case, grid
from ..ops.cube import cube, cube_cost
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
    like,
    streamed_rows,
)
from ._huge import MANY, large_rows, pair_up

TAKES = "any shape"


def eager(x):
    return x**3


def example(what, *shape, dtype=torch.float32, **more):
    return Example(what, cube, eager, (torch.randn(shape).to(dtype),), **more)


def small(dtype):
    yield example("x", 2, 3, 33, dtype=dtype, again=(torch.randn(7, 2, 12).to(dtype),))


def odd(dtype, slow):
    for shape in boundary_rows(slow):
        yield example(f"{shape}", *shape, dtype=dtype)


def threaded(slow):
    yield example("rows", 300, 200)


def empty():
    for shape in EMPTY_ROWS:
        yield example(f"{shape}", *shape)


def special(dtype):
    x = torch.randn(4, 33)
    x[1, 3], x[2, 4], x[3, 5], x[0, 6] = torch.nan, torch.inf, -torch.inf, 1e-40
    yield Example("rows", cube, eager, (x.to(dtype),))


def exact():
    x = torch.randint(-8, 9, (3, 130)).float()
    yield Example("integers", cube, eager, (x,), dy=torch.ones(3, 130))


def derivatives():
    yield Function("", cube, eager, ((3, 4),))


def magnitudes():
    yield Function("", cube, lambda x: x * x * x, ((3, 13),))


def streamed(dtype):
    for x in streamed_rows(dtype):
        yield Streamed("cube", cube, (x,))


def watched():
    yield Watched("", cube, (((5, 33),),))


def step(sizes, new):
    x = new(sizes.batch * sizes.context, sizes.width)
    yield "cube_fwd", (x,)
    yield "cube_bwd", (x, x)


def calls(new):
    for shape in ODD_ROWS:
        yield f"{shape}", "cube_fwd", (new(*shape),)
        yield f"{shape}", "cube_bwd", (new(*shape), new(*shape))


def bounds(name):
    for what, x in edge_rows():
        yield what, (x,) if name == "cube_fwd" else (like(x), x)


def huge(name):
    yield pair_up("flat", large_rows(*MANY, count=1 if name == "cube_fwd" else 2))


def compiled():
    def problem(M, N, **more):
        def launch(new):
            x = new(M, N)
            launcher("cube_bwd")(launcher("cube_fwd")(x), x)

        return Compiled(f"{M}x{N}", launch, **more)

    yield problem(8192, 768, main=True)
    yield problem(8191, 767, aligned=False)


SIZES = {"tiny": (1, 64), "main": (8192, 768)}


def cost(inputs, backward):
    return cube_cost(inputs[0], backward)


def bench(settings):
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(M=M, N=N, dtype=dtype):
            return [torch.randn(M, N).to(dtype).requires_grad_()]

        yield Case("cube", f"{M}x{N}", dtype, inputs, eager, cube, cost, main=main)
