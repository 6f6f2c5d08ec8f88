"""swiglu's and geglu's calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bench.measure import Case, grid
from ..bench.settings import Settings
from ..ops.glu import GELU, GELU_TANH, SILU, geglu, glu_cost, swiglu
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
from ._huge import MANY, large_rows, last_row_of, pair_up

TAKES = "two tensors, or one that holds both; gelu by tanh or erf"


def silu(x):
    return x * torch.sigmoid(x)


gelu_tanh = functools.partial(F.gelu, approximate="tanh")
geglu_tanh = functools.partial(geglu, approximate="tanh")
# (ours, the activation)
FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (swiglu, silu), "tanh": (geglu_tanh, gelu_tanh), "erf": (geglu, F.gelu)
}  # fmt: skip


def form(name: str):
    """(ours, eager) of (gate, up)"""
    ours, act = FORMS[name]
    return ours, lambda gate, up: act(gate) * up


def packed(name: str, up_first: bool = False):
    """(ours, eager) of one tensor that holds both"""
    ours, act = FORMS[name]

    def eager(x):
        gate, up = x.chunk(2, -1)[:: -1 if up_first else 1]
        return act(gate) * up

    return functools.partial(ours, up_first=up_first), eager


def sliced(name: str):
    """(ours, eager) of gate and up as slices of one tensor: rows by stride"""
    ours, act = FORMS[name]

    def eager(x):
        gate, up = x.chunk(2, -1)
        return act(gate) * up

    return (lambda x: ours(*x.chunk(2, -1))), eager


def inputs(*shape, dtype=torch.float32, count=2):
    return tuple((torch.randn(shape) * (2 - i)).to(dtype) for i in range(count))


def two(name: str, what: str, *args, **more) -> Example:
    ours, eager = form(name)
    return Example(f"{name} {what}", ours, eager, args, **more)


def one(how, what: str, x, **more) -> Example:
    ours, eager = how
    return Example(what, ours, eager, (x,), **more)


def small(dtype):
    for name in FORMS:
        yield two(name, "two", *inputs(2, 3, 33, dtype=dtype), again=inputs(7, 2, 12, dtype=dtype), layouts=(0, 1))
    x, again = inputs(2, 3, 34, dtype=dtype)[0], inputs(7, 2, 12, dtype=dtype)[:1]
    yield one(packed("silu"), "packed", x, again=again)
    yield one(packed("tanh", True), "packed, up first", x, again=again)
    yield one(sliced("silu"), "slices", x, again=again)


def odd(dtype, slow):
    for name in FORMS:
        for shape in boundary_rows(slow)[:: 3 if dtype == torch.float64 else 2]:
            yield two(name, f"{shape}", *inputs(*shape, dtype=dtype))
        for M, N in boundary_rows(slow)[1 :: 3 if dtype == torch.float64 else 2]:
            yield one(packed(name, M % 2 == 1), f"{name} packed {M}x{N}", inputs(M, 2 * N, dtype=dtype)[0])
        # 3 x 4097 elements: more than one of the kernel's flat rows, the last one short
        for shape in ((), (5,), (3, 5, 65), (3, 4097)):
            yield two(name, f"{shape}", *inputs(*shape, dtype=dtype))
    for shape in ((10,), (3, 5, 130), (4, 3, 2048)):
        yield one(packed("silu"), f"packed {shape}", inputs(*shape, dtype=dtype)[0])
        yield one(sliced("silu"), f"slices {shape}", inputs(*shape, dtype=dtype)[0])


def threaded(slow):
    yield two("silu", "two", *inputs(100, 1025))
    yield two("tanh", "two", *inputs(100, 1025))
    yield one(packed("silu"), "packed", *inputs(700, 258)[:1])


def empty():
    for shape in EMPTY_ROWS:
        yield two("silu", f"{shape}", *inputs(*shape))
        if shape[-1] % 2 == 0:
            yield one(packed("erf"), f"packed {shape}", inputs(*shape)[0])


def special(dtype):
    gate, up = inputs(4, 33)
    # 6e4 is finite in every dtype: of +inf, some machines' eager erf makes NaN and others' inf
    gate[1, 3], gate[3, 5], gate[0, 6:10] = torch.nan, -torch.inf, torch.tensor([6e4, -6e4, 1e-40, 0.0])
    gate[2, 4:6], up[2, 4:6], up[0, 6:10] = 1.0, torch.tensor([torch.inf, torch.nan]), 1.0
    for name in FORMS:
        yield two(name, "rows", gate.to(dtype), up.to(dtype))


def exact():
    """Far right each activation is the identity, far left zero: integers are multiplied without a rounding."""
    gate, up = torch.tensor([128.0, -128.0, 256.0, -256.0, 0.0]).repeat(3, 21), torch.randint(-8, 9, (3, 105)).float()
    dy = torch.randint(-8, 9, gate.shape).float()

    def expected(gate, up):
        return torch.where(gate > 0, 1.0, torch.where(gate < 0, 0.0, 0.5)) * gate * up

    for name in FORMS:
        yield Example(name, form(name)[0], expected, (gate, up), dy=dy)


def derivatives():
    for name in FORMS:
        yield Function(name, *form(name), ((3, 4), (3, 4)))
    yield Function("packed", *packed("silu", True), ((3, 8),))


def magnitudes():
    for name in FORMS:
        yield Function(name, *form(name), ((3, 13), (3, 13)))


def streamed(dtype):
    for x in streamed_rows(dtype):
        yield Streamed("swiglu", swiglu, (x, torch.randn(x.shape).to(dtype)))
        yield Streamed("geglu of one tensor", lambda x: geglu(x).repeat(1, 1, 2), (x,))


def watched():
    yield Watched("two", swiglu, tuple(((M, N),) * 2 for M, N in ((9, 768), (5, 33))))
    yield Watched("packed", geglu_tanh, tuple(((M, N),) for M, N in ((9, 1536), (5, 66))))


# ---- the kernels' ----


def step(sizes, new):
    M, N = sizes.batch * sizes.context, 4 * sizes.width
    for act in (SILU, GELU_TANH, GELU):
        gate, up, dy = new(M, N), new(M, N), new(M, N)
        yield "glu_fwd", (gate, up, act, False)
        yield "glu_bwd", (dy, gate, up, act, False)
        yield "glu_fwd", (new(M, 2 * N), None, act, False)
        yield "glu_bwd", (dy, new(M, 2 * N), None, act, False)


def calls(new):
    for M, N in ODD_ROWS:
        both, dy = new(M, 2 * N), new(M, N)
        for what, gate, up in (("two", new(M, N), new(M, N)), ("slices", *both.chunk(2, -1)), ("packed", both, None)):
            args = gate, up, M % 3, up is None and M == 3
            yield from forward_backward(f"{what} {M}x{N}", "glu", args, lambda _, dy=dy, args=args: (dy, *args))


def bounds(name):
    def forward():
        for i, (what, x) in enumerate(edge_rows()):
            yield what, (x, like(x), i % 3, False), x
            yield f"{what} packed", (torch.cat((x, like(x)), -1), None, i % 3, i % 2 == 1), x

    for what, args, x in forward():
        yield what, args if name == "glu_fwd" else (like(x), *args)


def huge(name):
    two, one = large_rows(*MANY, count=2), large_rows(MANY[0] // 2, 2 * MANY[1])
    dy, half = large_rows(*MANY), large_rows(MANY[0] // 2, MANY[1])
    first = name == "glu_fwd"
    yield pair_up("flat", [*([] if first else dy), *two, SILU, False])
    meet = last_row_of(MANY[1] if first else 2 * MANY[1])
    yield pair_up("packed", [*([] if first else half), *one, None, SILU, False], meet)


def compiled():
    def problem(M, N, act=SILU, both=False, **more):
        def launch(new):
            gate, up = (new(M, 2 * N), None) if both else (new(M, N), new(M, N))
            launcher("glu_bwd")(launcher("glu_fwd")(gate, up, act, False), gate, up, act, False)

        name = f"{M}x{N}-{('silu', 'tanh', 'erf')[act]}" + "-packed" * both
        return Compiled(name, launch, columns=N * both, **more)

    yield problem(8192, 1408, both=True, main=True)
    yield problem(8192, 1408)
    yield problem(8192, 1408, GELU_TANH)
    yield problem(8192, 1408, GELU, both=True)
    yield problem(8191, 1407, both=True, aligned=False)


# ---- the benchmark's: of a Llama's MLP, against the two of torch's functions that models write ----

SIZES = {"tiny": (1, 64), "small": (64, 1408), "main": (8192, 1408), "huge": (65536, 4096)}


def torchs(gate, up):
    return F.silu(gate) * up


def torchs_packed(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def torchs_geglu(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def cost(inputs, backward):
    return glu_cost(*inputs, backward=backward)


def bench(settings: Settings) -> Iterator[Case]:
    kinds: dict[str, tuple[Callable, Callable, int]] = {
        "swiglu": (torchs, swiglu, 1),
        "swiglu packed": (torchs_packed, swiglu, 2),
        "geglu tanh": (torchs_geglu, geglu_tanh, 1),
    }
    for M, N, dtype, main in grid(settings, SIZES):
        for what in kinds if main and not settings.quick else list(kinds)[:1]:
            theirs, ours, halves = kinds[what]

            def inputs(M=M, N=N, dtype=dtype, halves=halves):
                return [torch.randn(M, N * halves).to(dtype).requires_grad_() for _ in range(3 - halves)]

            yield Case("glu", f"{M}x{N} {what}", dtype, inputs, theirs, ours, cost, main=main and what == "swiglu")
