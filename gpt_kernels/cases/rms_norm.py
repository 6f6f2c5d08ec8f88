"""rms_norm's calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..bench.measure import Case, grid
from ..bench.settings import Settings
from ..ops.rms_norm import rms_norm, rms_norm_cost
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

TAKES = "weight, optional"


def eager(x, weight=None, eps=1e-6):
    """spelled out: F.rms_norm in 16 bits rounds before it multiplies by the weight, which is not the formula"""
    xf = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    y = xf * (xf.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y if weight is None else y * weight).to(x.dtype)


def inputs(*shape, dtype=torch.float32):
    return (torch.randn(shape) * 2 + 0.7).to(dtype), torch.randn(shape[-1:]).to(dtype)


def example(what: str, *args, **more) -> Example:
    return Example(what, rms_norm, eager, args, **more)


def small(dtype):
    x, weight = inputs(2, 3, 33, dtype=dtype)
    yield example("weight", x, weight, again=inputs(7, 2, 12, dtype=dtype))
    yield example("x alone", x, again=inputs(7, 2, 12, dtype=dtype)[:1])
    yield example("eps", x, weight, 0.1)


def odd(dtype, slow):
    for shape in norm_rows(slow):
        yield example(f"{shape}", *inputs(*shape, dtype=dtype))
    x, weight = inputs(3, 5, 65, dtype=dtype)
    for args in ((x,), (x, weight, 0.1), (x[1, 2], weight)):
        yield example(f"{len(args)} arguments of {tuple(args[0].shape)}", *args)


def threaded(slow):
    for shape in ((20, 129), (5, 1025)) if slow else ((700, 129), (33, 1025)):
        yield example(f"{shape}", *inputs(*shape))


def empty():
    for shape in EMPTY_ROWS:
        yield example(f"{shape}", *inputs(*shape))


def special(dtype):
    x, weight = inputs(8, 33)
    x[1, 3], x[2, 4], x[3, 5], x[4], x[5], x[6] = torch.nan, torch.inf, -torch.inf, 0.0, 1e15 * torch.randn(33), 1e-40
    yield example("rows", x.to(dtype), weight.to(dtype))


def exact():
    """Rows of +-2: the mean square is 4, so y = x weight / 2 without a rounding, and so are the weight's gradients."""
    x = torch.tensor([2.0, -2.0, 2.0]).repeat(5, 23)
    weight, dy = torch.randint(-8, 9, (69,)).float(), torch.randint(-8, 9, (5, 69)).float()
    yield Example("+-2", lambda x, w: rms_norm(x, w, eps=0.0), lambda x, w: x * w / 2, (x, weight), dy=dy, said=(0, 2))


def derivatives():
    def plain(x, weight=1.0, eps=1e-6):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    yield Function("", rms_norm, plain, ((3, 4),))
    yield Function("weight", lambda x, w: rms_norm(x, w, 0.1), lambda x, w: plain(x, w, 0.1), ((2, 3, 4), (4,)))


def magnitudes():
    yield Function("", rms_norm, eager, ((3, 13), (13,)))
    yield Function("without eps", lambda x: rms_norm(x, eps=0.0), lambda x: eager(x, eps=0.0), ((3, 13),))


def streamed(dtype):
    for x in streamed_rows(dtype):
        yield Streamed("rms_norm", rms_norm, (x, torch.randn(x.shape[-1]).to(dtype)))


def watched():
    yield Watched("", rms_norm, tuple(((M, N), (N,)) for M, N in ((9, 768), (5, 33), (3, 2056))))


# ---- the kernels' ----


def step(sizes, new):
    M, N = sizes.batch * sizes.context, sizes.width
    x, dy, weight = new(M, N), new(M, N), new(N)
    yield "rms_norm_fwd", (x, weight, 1e-6)
    yield "rms_norm_bwd", (dy, x, weight, op("rms_norm_fwd")(x, weight, 1e-6)[1])


def calls(new):
    for M, N in ODD_ROWS:
        x, dy = new(M, N), new(M, N)
        for w in (None, new(N), new(N, dtype=torch.float32)):
            yield from forward_backward(
                f"{M}x{N}, weight {w is not None and w.dtype}",
                "rms_norm",
                (x, w, 1e-6),
                lambda _, rstd, x=x, dy=dy, w=w: (dy, x, w, rstd),
            )


def bounds(name):
    for what, x in edge_rows((200, 65), (3, 20011)):
        for more, weight in (("", None), (" weight", like(x, x.shape[1]))):
            if name == "rms_norm_fwd":
                yield what + more, (x, weight, 1e-5)
            else:
                yield what + more, (like(x), x, weight, op("rms_norm_fwd")(x, weight, 1e-5)[1])


def huge(name):
    for m, n in (MANY, LONG):
        if name == "rms_norm_fwd":
            yield pair_up(f"rows of {n}", [*large_rows(m, n), torch.randn(n), 1e-5])
        else:
            saved = large_rows(m, dtype=torch.float32)
            args = [*large_rows(m, n, count=2), torch.randn(n), *saved]
            yield pair_up(f"rows of {n}", args, last_row_of_a_matrix, programs=1)


def compiled():
    def problem(M, N, **more):
        def launch(new):
            x, w = new(M, N), new(N)
            y, rstd = launcher("rms_norm_fwd")(x, w, 1e-5)
            launcher("rms_norm_bwd")(y, x, w, rstd)

        return Compiled(f"{M}x{N}", launch, columns=N, plain=(M, N), **more)

    yield problem(8192, 768, main=True)
    for M, N in ((8192, 1024), (8192, 1280), (4096, 4096), (2048, 12288), (512, 32768)):
        yield problem(M, N)
    yield problem(8191, 767, aligned=False)


# ---- the benchmark's: against torch.nn.functional.rms_norm and the module of Hugging Face's Llama, with a weight ----

SIZES = {"tiny": (1, 64), "small": (64, 768), "main": (8192, 768), "more": (4096, 2048), "huge": (65536, 4096)}


def torchs(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def hf():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(1, eps=1e-6)

    def norm(x, weight):
        module._parameters["weight"] = weight
        return module(x)

    return norm


def cost(inputs, backward):
    return rms_norm_cost(inputs[0], backward)


def bench(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(M=M, N=N, dtype=dtype):
            return [torch.randn(*s).to(dtype).requires_grad_() for s in ((M, N), (N,))]

        yield Case("rms_norm", f"{M}x{N}", dtype, inputs, torchs, rms_norm, cost, others={"hf": hf}, main=main)
