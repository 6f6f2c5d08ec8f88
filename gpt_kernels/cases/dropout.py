"""dropout's calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..bench.measure import Case, grid
from ..bench.settings import Settings
from ..ops.dropout import dropout, dropout_cost
from ..ops.philox import dropout_factor, dropout_threshold, philox_uint16
from ..triton.slots import launcher
from . import EMPTY_ROWS, ODD_ROWS, Compiled, Example, Function, Streamed, Watched, columns, edge_rows, like, streamed_rows
from ._huge import MANY, large_rows, pair_up

TAKES = "residual added in the same pass; no stored mask"
RNG = torch.tensor([-987654321987654321, 3])


def ours(x, residual=None):
    return dropout(x, 0.3, residual=residual, rng_state=RNG.to(x.device))


def eager(x, residual=None):
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])
    kept = philox_uint16(RNG.to(x.device), 1, 1, *rows.shape).view(x.shape) >= dropout_threshold(0.3)
    # not times 0: what is dropped is gone, NaN and infinities too
    y = torch.where(kept, x / (1 - dropout_threshold(0.3) / 65536), 0)
    return y if residual is None else y + residual


def example(what: str, *args, **more) -> Example:
    return Example(what, ours, eager, args, **more)


def inputs(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def small(dtype):
    x, residual = inputs(2, 3, 33, dtype=dtype)
    yield example("residual", x, residual, again=inputs(7, 2, 12, dtype=dtype), layouts=(0, 1))
    yield example("x alone", x, again=inputs(7, 2, 12, dtype=dtype)[:1])


def odd(dtype, slow):
    for n in columns(slow):
        x, residual = inputs(2, 3, n, dtype=dtype)
        yield example(f"{n}", x)
        yield example(f"{n} with residual", x, residual)


def threaded(slow):
    yield example("rows", torch.randn(300, 200))


def empty():
    for shape in EMPTY_ROWS:
        yield example(f"{shape}", inputs(*shape)[0])
        yield example(f"{shape} residual", *inputs(*shape))


def special(dtype):
    x, residual = inputs(8, 33)
    x[1, 3], x[2, 4], x[3, 5], x[6], residual[4, :9] = torch.nan, torch.inf, -torch.inf, 1e-40, torch.nan
    yield example("rows", x.to(dtype), residual.to(dtype))


def exact():
    """p = 1/2: what is kept doubles, and integers are added without a rounding"""
    x, residual, dy = torch.randint(-8, 9, (3, 5, 130)).float()
    factor = dropout_factor(RNG, 0.5, torch.empty(1, 1, 5, 130))[0, 0]
    call = lambda x, residual: dropout(x, 0.5, residual=residual, rng_state=RNG)  # noqa: E731
    yield Example("integers", call, lambda x, residual: x * factor + residual, (x, residual), dy=dy)


def derivatives():
    rng = torch.tensor([5, 7])

    def plain(x, residual=0.0):
        return x * dropout_factor(rng, 0.4, torch.empty(1, 1, *x.shape, dtype=x.dtype))[0, 0] + residual

    yield Function("", lambda x: dropout(x, 0.4, rng_state=rng), plain, ((3, 4),))
    yield Function("residual", lambda x, r: dropout(x, 0.4, residual=r, rng_state=rng), plain, ((3, 4), (3, 4)))


def magnitudes():
    yield Function("", ours, eager, ((3, 13), (3, 13)))


def streamed(dtype):
    rng = torch.tensor([3, 5])
    for x in streamed_rows(dtype):
        # a row's mask depends on its place, so that the first part alone has the whole's
        yield Streamed(
            "dropout", lambda x, r: dropout(x, 0.1, residual=r, rng_state=rng), (x, torch.randn_like(x)), all_parts=False
        )


def watched():
    rng = torch.tensor([7, 0])
    yield Watched("", lambda x, r: dropout(x, 0.3, residual=r, rng_state=rng), (((9, 768),) * 2, ((5, 33),) * 2))


# ---- the kernels' ----


def step(sizes, new):
    M, N = sizes.batch * sizes.context, sizes.width
    yield "dropout_fwd", (new(M, N), new(M, N), new.rng_state(), 0.1)


def calls(new):
    for M, N in ODD_ROWS:
        yield f"{M}x{N}", "dropout_fwd", (new(M, N), None, new.rng_state(), 0.5)


def bounds(name):
    rng = torch.tensor([5, 1])
    for what, x in edge_rows():
        yield what, (x, None, rng, 0.3)
        yield f"{what} residual", (x, like(x), rng, 0.3)


def huge(name):
    x, residual = large_rows(*MANY, count=2)
    yield pair_up("rows", [x, residual, torch.tensor([5, 1]), 0.0])


def compiled():
    def problem(M, N, residual, **more):
        def launch(new):
            x = new(M, N)
            launcher("dropout_fwd")(x, new(M, N) if residual else None, new(2, dtype=torch.int64), 0.1)

        return Compiled(f"{M}x{N}" + "-residual" * residual, launch, columns=N, **more)

    yield problem(8192, 768, True, main=True)
    yield problem(8192, 1600, False)
    yield problem(8191, 767, True, aligned=False)


# ---- the benchmark's: with a residual added, against torch.nn.functional.dropout and an addition ----

SIZES = {"tiny": (1, 64), "small": (2048, 384), "main": (8192, 768), "more": (4096, 3072), "huge": (65536, 4096)}


def torchs(x, residual):
    return residual + F.dropout(x, 0.1)


def drawn(x, residual):
    return dropout(x, 0.1, residual=residual)


def cost(inputs, backward):
    x, residual = inputs
    return dropout_cost(x, None if backward else residual)


def bench(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(M=M, N=N, dtype=dtype):
            return [torch.randn(M, N).to(dtype).requires_grad_() for _ in range(2)]

        yield Case("dropout", f"{M}x{N}", dtype, inputs, torchs, drawn, cost, random=True, main=main)
