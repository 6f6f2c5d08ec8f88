"""Each public function against the function that it is named for, and the table of what differs: docs/differences.md.

A call is a line of Python in which f is torch's function, then ours: names, places, ranks, broadcasts, dtypes, layouts, sizes
of zero, contexts. Compared are error, shape, dtype, strides, values, whether the input itself came back, and the dtype, values
and absence of every gradient. `python tests/namesakes.py` writes the table; tests/test_namesakes.py holds it and REASONS
against what is found, so that a difference is mended or explained, and an explanation does not outlive its difference.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import gpt_kernels
from gpt_kernels.accuracy import SAME_FORMULA

TABLE = pathlib.Path(__file__).parent.parent / "docs" / "differences.md"
NAMESAKES: dict[str, Any] = {
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "softmax": torch.softmax,
    "gelu": F.gelu,
    "dropout": F.dropout,
    "layer_norm": F.layer_norm,
    "rms_norm": F.rms_norm,
    "cross_entropy": F.cross_entropy,
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
CONTEXTS: dict[str, Any] = {
    "": contextlib.nullcontext,
    "bf16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "f16 autocast": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
SHORT = {dtype: name for name, dtype in DTYPES.items()}


class Call(NamedTuple):
    function: str
    code: str
    context: str = ""

    def __str__(self) -> str:
        return self.code.replace("f(", f"{self.function}(", 1) + (f" in {self.context}" if self.context else "")


# ---- the calls ----

LAYOUTS = (
    "t(2, 5, 8).transpose(1, 2)", "t(2, 5, 16)[..., 2:10]", "t(2, 5, 16)[..., 2:10].transpose(0, 1)", "t(1, 8).expand(4, 8)",
    "t(4, 1).expand(4, 8)", "t(2, 3, 4, 5).to(memory_format=torch.channels_last)", "t(8, 6)[::2]",
    "t(3, 4, 5).permute(2, 0, 1)",
    "t(8, 8).T", "t(0, 4).T", "t(2, 0, 4).transpose(0, 2)",
)  # fmt: skip
ELEMENTWISE = (
    "f(t(3, 8){})", "f(input=t(3, 8){})", "f(t(0, 8){})", "f(t(3, 0){})", "f(t(0){})", "f(t(){})", "f(t(8){})",
    "f(t(2, 1, 3, 1, 8){})", "f(Sub(t(3, 8)){})", "f(torch.nn.Parameter(t(3, 8)){})", "f(i(3){})", "f([1.0]{})", "f(None{})",
    *(f"f({layout}{{}})" for layout in LAYOUTS), *(f"f(t(3, 8, dtype={d}){{}})" for d in DTYPES),
)  # fmt: skip


def _contexts(*codes: str) -> list[tuple[str, str]]:
    return [(code, context) for code in codes for context in CONTEXTS if context]


def _softmax():
    yield from (code.format(", -1") for code in ELEMENTWISE)
    yield from ("f(t(3, 8), dim=-1)", "f(input=t(3, 8), dim=1)", "f(t(3, 8), 0)", "f(t(3, 4, 5), 1)", "f(t(3, 4, 5), -3)")
    yield from (
        "f(t(), 0)",
        "f(t(), 1)",
        "f(t(3, 8), 2)",
        "f(t(3, 8), -3)",
        "f(t(3, 8), 1.5)",
        "f(t(3, 8), None)",
        "f(t(3, 8))",
    )
    yield from ("f(t(3, 8, dtype=f16), -1, f32)", "f(t(3, 8), -1, dtype=bf16)", "f(i(3), -1, dtype=f32)", "f(t(0, 3), 0)")
    yield from ("f(t(3, 0), 0)", "f(t(3, 8), 0, dtype=f64)", "f(t(3, 8), -1, dtype=torch.int64)", "f(inf(2, 3), -1)")
    yield from _contexts("f(t(3, 8), -1)", "f(t(3, 8, dtype=bf16), -1)")


def _gelu():
    for approximate in ("", ", approximate='none'", ", approximate='tanh'"):
        yield from (code.format(approximate) for code in ELEMENTWISE[: 2 if not approximate else None])
    yield from ("f(t(3), approximate='x')", "f(t(3), 'tanh')", "f(t(3), approximate=None)")
    yield from _contexts("f(t(3, 8), approximate='tanh')", "f(t(3, 8, dtype=bf16), approximate='none')")


def _dropout():
    for more in ("", ", 0.0", ", 1.0", ", 0.3, False"):
        yield from (code.format(more) for code in ELEMENTWISE)
    yield from (f"f(t(3), {p}, {training})" for p in (1.5, -0.5, "float('nan')") for training in (True, False))
    yield from ("f(t(3), '0.1')", "f(t(3), p=0.5, training=True, inplace=False)", "f(t(3) + 1, 0.5, True, True)")
    yield from ("f(t(3) + 1, inplace=True)", "f(t(3) + 1, 1.0, inplace=True)", "f(t(3) + 1, 0.5, False, True)")
    yield from (
        "f(t(3), inplace=True)",
        "f((t(4, 3) + 1).T, inplace=True)",
        "f(t(3), 0.5, True, False)",
        "f(t(3), 1)",
        "f(t(3), 0)",
    )
    yield from ("f(nan(3), 1.0)",)
    yield from _contexts("f(t(3, 8))", "f(t(3, 8, dtype=bf16))")


def _norm(weight: str, params: str):
    shapes = ("(8,)", "[8]", "torch.Size([8])", "(3, 8)", "(2, 3, 8)", "8", "()", "(3,)", "(8, 8)")
    for shape in shapes:
        yield f"f(t(2, 3, 8), {shape})"
        yield f"f(input=t(2, 3, 8), normalized_shape={shape})"
        if shape not in ("8", "()"):
            inner = shape.strip("()").rstrip(",") if "(" in shape else "8"
            yield f"f(t(2, 3, 8), {shape}, {params.replace('8', inner)})"
    yield from (f"f(t({x}), ({x.split(', ')[-1]},))" for x in ("0, 8", "3, 0", "0", "8", "2, 0, 8"))
    yield from ("f(t(), ())", "f(t(), (1,))", "f(i(8), (8,))", "f([1.0], (1,))", "f(None, (8,))", "f(Sub(t(3, 8)), (8,))")
    yield from (f"f({layout}, ({n},))" for layout, n in zip(LAYOUTS, (5, 8, 8, 8, 8, 5, 6, 4, 8, 0, 2), strict=True))
    yield from (f"f(t(3, 8), (8,), {params}, {eps})" for eps in (0.1, 0.0, -1.0))
    yield from ("f(t(3, 8), (8,), eps=0.1)", f"f(t(3, 8), (8,), {weight})", f"f(t(3, 8), (8,), weight={weight})")
    yield from ("f(t(3, 8), (8,), None)", f"f(t(3, 0), (0,), {params.replace('8', '0')})", "f(t(3, 8), (8,), t(5))")
    yield from (f"f(t(0, 8), (8,), {params})", f"f(t(3, 8), (8,), {params.replace('t(8)', 't(16)[::2]')})")
    yield f"f(t(3, 2, 4), (2, 4), {params.replace('t(8)', 't(4, 2).T')})"
    yield f"f(input=t(3, 8), normalized_shape=(8,), weight={weight}, eps=0.1)"
    for x, w in itertools.product(DTYPES, DTYPES):
        yield f"f(t(3, 8, dtype={x}), (8,), {params.replace('t(8)', f't(8, dtype={w})')})"
    yield from _contexts(f"f(t(3, 8), (8,), {params})", f"f(t(3, 8, dtype=bf16), (8,), {params})")


def _layer_norm():
    yield from _norm("t(8)", "t(8), t(8)")
    yield from ("f(t(3, 8), (8,), None, t(8))", "f(t(3, 8), (8,), t(8), None)", "f(t(3, 8), (8,), t(8), bias=t(8))")
    yield from (
        "f(t(3, 8), (8,), bias=t(8))",
        "f(t(3, 8), normalized_shape=(8,), bias=t(8))",
        "f(t(3, 8), (8,), t(8), None, 0.1)",
    )
    yield from (
        f"f(t(3, 8, dtype=bf16), (8,), t(8, dtype={w}), t(8, dtype={b}))" for w in ("f32", "bf16") for b in ("f32", "bf16")
    )
    yield from ("f(t(3, 8), (8,), t(8), t(8), 0.1, True)", "f(t(3, 8), (8,), t(8), t(5))")


def _rms_norm():
    yield from _norm("t(8)", "t(8)")
    yield from ("f(t(3, 8), (8,), None, 0.1)", "f(t(3, 8), (8,), t(8), None)", "f(t(3, 8), (8,), eps=None)")
    yield from (f"f(t(3, 8, dtype={d}) * 0.001, (8,))" for d in DTYPES)


def _cross_entropy():
    c3 = "c([0, 4, 2])"
    yield from (f"f(t(3, 5), {c3})", f"f(input=t(3, 5), target={c3})", "f(t(5), c(2))", "f(t(5), c([2]))", "f(t(0, 5), c([]))")
    for reduction in ("mean", "sum", "none"):
        for d in DTYPES:
            yield f"f(t(3, 5, dtype={d}), {c3}, reduction={reduction!r})"
            yield f"f(t(3, 5, dtype={d}), c([0, 1, -1]), ignore_index=-1, label_smoothing=0.1, reduction={reduction!r})"
        yield from (f"f(t(0, 5), c([]), reduction={reduction!r})", f"f(t(3, 5), c([-100] * 3), reduction={reduction!r})")
        yield from (f"f(t(5), c(2), reduction={reduction!r})", f"f(t(5), c([2]), reduction={reduction!r})")
        yield f"f(t(3, 0), c([-100] * 3), reduction={reduction!r})"
        yield from _contexts(
            f"f(t(3, 5), {c3}, reduction={reduction!r})", f"f(t(3, 5, dtype=bf16), {c3}, reduction={reduction!r})"
        )
        yield from (f"f(t(3, 5), c([0, 1, {bad}]), reduction={reduction!r})" for bad in (5, -1, 2**40))
    yield from (
        f"f(t(3, 5), {c3}, None)",
        f"f(t(3, 5), {c3}, weight=None)",
        f"f(t(3, 5), {c3}, weight=torch.ones(5))",
        f"f(t(3, 5), {c3}, torch.ones(5))",
    )
    yield from (
        f"f(t(3, 5), {c3}.int())",
        f"f(t(3, 5), {c3}.byte())",
        "f(t(3, 5), torch.softmax(t(3, 5), -1))",
        "f(t(3, 5), c([0, 1]))",
    )
    yield from (
        f"f(t(3, 5), {c3}[None])",
        "f(t(), c(0))",
        "f(t(5), c([0, 1]))",
        "f(t(3, 0), c([0, 0, 0]))",
        "f(i(3, 5), c([0, 1, 2]))",
    )
    yield from (
        f"f([1.0], {c3})",
        "f(t(3, 5), [0, 1, 2])",
        f"f(None, {c3})",
        f"f(t(3, 5), {c3}, reduction='avg')",
        f"f(Sub(t(3, 5)), {c3})",
    )
    yield from (f"f(t(3, 5), {c3}, label_smoothing={e})" for e in (1.5, -0.1, 0.0, 1.0))
    yield from (f"f(t(5, 3).T, {c3})", f"f(t(3, 10)[:, ::2], {c3})", f"f(t(1, 5).expand(3, 5), {c3})", f"f(inf(3, 5), {c3})")
    yield from (
        "f(t(2, 5, 3), c([[0, 1, 2], [4, 3, 2]]))",
        f"f(t(3, 5), {c3}, ignore_index=1.5)",
        f"f(t(3, 5), {c3}, size_average=False)",
    )


def _attention():
    qkv = "t(2, 3, 4, 8), t(2, 3, 5, 8), t(2, 3, 5, 8)"
    yield from (f"f({qkv})", "f(query=t(2, 3, 4, 8), key=t(2, 3, 5, 8), value=t(2, 3, 5, 6))", f"f({qkv}, is_causal=True)")
    yield from (
        f"f({qkv}, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)",
        f"f({qkv}, None, 0.0, True)",
    )
    yield from (f"f({qkv}, None, 0.0, False, 0.5)", f"f({qkv}, scale=0.5)", f"f({qkv}, scale=-1.0)", f"f({qkv}, scale=0.0)")
    # ranks and broadcasts; of keys and values that differ in number, torch's kernel for four dimensions writes out of bounds
    for q, k, v in (
        ("4, 8", "5, 8", "5, 6"), ("3, 4, 8", "3, 5, 8", "3, 5, 6"), ("2, 2, 3, 4, 8", "2, 2, 3, 5, 8", "2, 2, 3, 5, 8"),
        ("2, 2, 1, 3, 4, 8", "2, 1, 2, 3, 5, 8", "1, 2, 2, 3, 5, 8"), ("8", "8", "8"), ("2, 3, 4, 8", "1, 3, 5, 8",
        "1, 3, 5, 8"),
        ("1, 3, 4, 8", "2, 3, 5, 8", "2, 3, 5, 8"), ("2, 3, 4, 8", "2, 1, 5, 8", "2, 1, 5, 8"), ("2, 1, 4, 8", "2, 3, 5, 8",
        "2, 3, 5, 8"),
        ("2, 3, 4, 8", "2, 1, 5, 8", "2, 3, 5, 8"), ("2, 3, 4, 8", "2, 3, 5, 8", "2, 1, 5, 8"), ("2, 3, 4, 8", "3, 5, 8",
        "5, 8"),
        ("4, 8", "3, 5, 8", "2, 3, 5, 8"), ("2, 4, 4, 8", "2, 2, 5, 8", "2, 2, 5, 8"), ("2, 3, 4, 8", "3, 3, 5, 8",
        "2, 3, 5, 8"),
        ("2, 3, 4, 8", "2, 3, 5, 7", "2, 3, 5, 7"), ("3, 4, 8", "3, 5, 8", "3, 6, 8"), ("1, 1, 2, 300", "1, 1, 3, 300",
        "1, 1, 3, 300"),
    ):  # fmt: skip
        yield f"f(t({q}), t({k}), t({v}))"
    for q, k, v in (
        ("2, 4, 4, 8", "2, 2, 5, 8", "2, 2, 5, 8"), ("2, 4, 4, 8", "2, 1, 5, 8", "2, 1, 5, 8"), ("2, 4, 4, 8", "2, 2, 5, 8",
        "2, 4, 5, 8"),
        ("2, 3, 4, 8", "2, 2, 5, 8", "2, 2, 5, 8"), ("2, 2, 4, 8", "2, 4, 5, 8", "2, 4, 5, 8"), ("4, 4, 8", "2, 5, 8",
        "2, 5, 8"),
        ("4, 8", "5, 8", "5, 8"), ("2, 2, 4, 4, 8", "2, 2, 2, 5, 8", "2, 2, 2, 5, 8"), ("3, 4, 4, 8", "1, 2, 5, 8",
        "1, 2, 5, 8"),
    ):  # fmt: skip
        yield f"f(t({q}), t({k}), t({v}), enable_gqa=True)"
    # masks: shapes, kinds, gradients
    masks = (
        "5",
        "4, 1",
        "1, 5",
        "4, 5",
        "3, 4, 5",
        "2, 1, 4, 5",
        "1, 3, 4, 5",
        "2, 3, 1, 1",
        "2, 3, 4, 5",
        "7, 4, 5",
        "4, 6",
        "1, 1, 1, 4, 5",
    )
    for mask in (*masks, ""):
        yield from (f"f({qkv}, t({mask}))", f"f({qkv}, b({mask}))")
    for q, k, mask in (
        ("1, 3, 4, 8", "1, 3, 5, 8", "2, 1, 4, 5"), ("1, 1, 4, 8", "1, 1, 5, 8", "1, 3, 4, 5"), ("4, 8", "5, 8", "3, 4, 5"),
        ("1, 8", "5, 8", "4, 5"),
        ("3, 4, 8", "3, 5, 8", "3, 4, 5"), ("3, 4, 8", "3, 5, 8", "4, 5"), ("4, 8", "5, 8", "4, 5"), ("4, 8", "5, 8", "4, 1"),
        ("2, 2, 3, 4, 8", "2, 2, 3, 5, 8", "2, 1, 3, 4, 5"), ("2, 2, 3, 4, 8", "2, 2, 3, 5, 8", "1, 1, 1, 4, 5"),
        ("2, 2, 3, 4, 8", "2, 2, 3, 5, 8", "3, 1, 5"),
        ("2, 2, 3, 4, 8", "2, 2, 3, 5, 8", "2, 3, 4, 5"),
    ):  # fmt: skip
        yield f"f(t({q}), t({k}), t({k}), t({mask}))"
    yield from (f"f({qkv}, t(2, 3, 5, 4).mT)", f"f({qkv}, t(4, 5).expand(2, 3, 4, 5))", f"f({qkv}, t(4, 10)[:, ::2])")
    for q, m in itertools.product(DTYPES, (*DTYPES, "torch.int64")):
        tensors = ", ".join(f"t(2, 3, {T}, 8, dtype={q})" for T in (4, 5, 5))
        yield f"f({tensors}, torch.ones(4, 5, dtype={m}))" if m == "torch.int64" else f"f({tensors}, t(4, 5, dtype={m}))"
    hidden = ("torch.zeros(4, 5, dtype=torch.bool)", "inf(4, 5)", "inf(4, 5).index_fill(0, torch.tensor([1]), 0)")
    for mask, q in itertools.product(hidden, ("2, 3, ", "3, ", "")):
        yield f"f(t({q}4, 8), t({q}5, 8), t({q}5, 8), {mask})"
    yield from (f"f({qkv}, t(4, 5), is_causal=True)", f"f({qkv}, b(4, 5), is_causal=True)")
    yield "f(t(3, 4, 8), t(3, 5, 8), t(3, 5, 8), b(4, 5), is_causal=True)"
    # dropout
    yield from (f"f({qkv}, dropout_p={p})" for p in (0.0, 1.0, 1, 1.5, -0.5))
    # zero sizes
    sizes = dict(B=2, H=3, Q=4, K=5, D=8, V=6)
    for zero in (*sizes, "DV"):
        B, H, Q, K, D, V = (0 if name in zero else n for name, n in sizes.items())
        for more in ("", ", is_causal=True", f", t({Q}, {K})", f", b({B}, 1, {Q}, {K})"):
            yield f"f(t({B}, {H}, {Q}, {D}), t({B}, {H}, {K}, {D}), t({B}, {H}, {K}, {V}){more})"
        yield f"f(t({H}, {Q}, {D}), t({H}, {K}, {D}), t({H}, {K}, {V}))"
    # dtypes, kinds, layouts, contexts
    for q, k, v in itertools.product(("f32", "bf16"), ("f32", "bf16", "f64"), ("f32", "bf16")):
        yield f"f(t(1, 2, 4, 8, dtype={q}), t(1, 2, 5, 8, dtype={k}), t(1, 2, 5, 8, dtype={v}))"
    mixed = "f(t(1, 2, 4, 8, dtype={}), t(1, 2, 5, 8, dtype={}), t(1, 2, 5, 8, dtype={}){})"
    for q, k, v, more in (
        ("f32", "f32", "f32", ""), ("bf16", "f32", "f32", ""), ("f32", "bf16", "f32", ", is_causal=True"), ("f64", "f64",
        "f64", ""),
        ("f64", "f32", "f32", ""), ("f32", "f32", "f32", ", t(4, 5)"), ("bf16", "f32", "bf16", ", b(4, 5)"), ("f16", "f32",
        "f32", ""),
        ("f32", "f32", "f32", ", torch.full((4, 5), torch.finfo(f32).min)"), ("f32", "f32", "f32", ", t(4, 5, dtype=f16)"),
    ):  # fmt: skip
        yield from _contexts(mixed.format(q, k, v, more))
    yield from ("f(i(1, 1, 2, 8), i(1, 1, 2, 8), i(1, 1, 2, 8))", "f([1.0], t(1, 8), t(1, 8))", "f(t(1, 8), None, t(1, 8))")
    yield from (f"f({qkv}, [True])", f"f(Sub(t(2, 3, 4, 8)), {', '.join(qkv.split(', t')[1:]).replace('(', 't(')})")
    swapped = "t(2, 4, 3, 8).transpose(1, 2)"
    yield from (
        f"f({swapped}, {swapped}, {swapped})",
        f"f({swapped}, {swapped}, {swapped}, b(4, 4))",
        "f(t(2, 3, 8, 4).mT, t(2, 3, 8, 5).mT, t(2, 3, 8, 5).mT)",
    )
    yield from (
        f"f({swapped}, t(2, 3, 5, 8), t(2, 3, 5, 8))",
        f"f(t(2, 3, 4, 8), {swapped}, {swapped})",
        "f(t(1, 3, 4, 8).expand(2, 3, 4, 8), t(2, 3, 4, 8), t(2, 3, 4, 8))",
    )


_CALLS = dict(zip(NAMESAKES, (_attention, _softmax, _gelu, _dropout, _layer_norm, _rms_norm, _cross_entropy), strict=True))


def calls() -> list[Call]:
    found = [Call(f, *((c,) if isinstance(c, str) else c)) for f, make in _CALLS.items() for c in make()]
    return list(dict.fromkeys(found))


# ---- one call of both ----


class Sub(Tensor):
    """A subclass, as torch's own functions return one where they are given one."""


class Answer(NamedTuple):
    error: type | None = None
    what: str = ""  # what came back, in words: type, dtype, shape, strides of dimensions with more than one element
    values: Tensor | None = None
    same: bool = False  # the input itself
    gradients: tuple[tuple[str, Tensor | None], ...] = ()

    def __str__(self) -> str:
        return self.error.__name__ if self.error else self.what


def _strides(t: Tensor) -> tuple[int, ...]:
    return tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1) if t.numel() else ()


def answer(function, call: Call) -> Answer:
    torch.manual_seed(0)
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.requires_grad_())
        return x

    names = {
        "f": function, "torch": torch, "Sub": lambda x: x.as_subclass(Sub), "float": float, **DTYPES,
        "t": lambda *shape, dtype=torch.float32: leaf(torch.randn(shape).to(dtype)),
        "inf": lambda *shape: torch.full(shape, -torch.inf), "nan": lambda *shape: torch.full(shape, torch.nan),
        "i": lambda *shape: torch.ones(shape, dtype=torch.int64), "b": lambda *shape: torch.rand(shape) < 0.7,
        "c": lambda targets: torch.tensor(targets, dtype=torch.int64),
    }  # fmt: skip
    try:
        with CONTEXTS[call.context](), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of mixed dtypes and of nan where everything is ignored
            given: list[Any] = []
            names["f"] = lambda *args, **kwargs: given.extend((*args, *kwargs.values())) or function(*args, **kwargs)
            y = eval(call.code, {"__builtins__": {}}, names)  # noqa: S307
    except Exception as error:
        return Answer(error=type(error))
    if not isinstance(y, Tensor):
        return Answer(what=type(y).__name__)
    kind = "" if type(y) is Tensor else f"{type(y).__name__} "
    what = (
        f"{kind}{SHORT.get(y.dtype, y.dtype)} {tuple(y.shape)}, strides {_strides(y)}, {'' if y.requires_grad else 'no '}grad"
    )
    gradients: list[tuple[str, Tensor | None]] = []
    if y.requires_grad and leaves:
        try:
            found = torch.autograd.grad(y.sum() + (y * y).sum() / 2, leaves, allow_unused=True)
        except Exception as error:
            return Answer(error=type(error))
        gradients = [("none", None) if g is None else (f"{SHORT[g.dtype]} {tuple(g.shape)}", g.detach()) for g in found]
    return Answer(None, what, y.detach(), any(y is x for x in given), tuple(gradients))


def _far(a: Tensor | None, b: Tensor | None, result: torch.dtype) -> bool:
    """By more than a few roundings of the result's dtype, of the largest element: this looks for other formulas."""
    if a is None or b is None or not a.numel():
        return a is not b and (a is None or b is None)
    tolerance = SAME_FORMULA.get(result, 0)
    largest = torch.nan_to_num(b.double(), 0, 0, 0).abs().max().item()
    return not torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance * (1 + largest), equal_nan=True)


def difference(call: Call, of: Any = gpt_kernels) -> tuple[str, str] | None:
    """(torch's answer, ours) in words, where they differ. of: where ours are."""
    theirs, ours = (answer(f, call) for f in (NAMESAKES[call.function], getattr(of, call.function)))
    if theirs.error or ours.error:
        return None if theirs.error is ours.error else (str(theirs), str(ours))
    y = theirs.values.dtype if theirs.values is not None else torch.float32
    if theirs.what != ours.what or theirs.same != ours.same:
        same = [" (the input itself)" * a.same for a in (theirs, ours)]
        return theirs.what + same[0], ours.what + same[1]
    random = call.function == "dropout" and "1.0" not in call.code and not call.code.endswith(", 1)")
    if not random and _far(theirs.values, ours.values, y):
        return "values", "other values"
    for i, ((t, tg), (o, og)) in enumerate(zip(theirs.gradients, ours.gradients, strict=True)):
        if t != o or (not random and _far(tg, og, y)):
            return f"gradient {i}: {t}", o if t != o else "other values"
    return None


# ---- what differs, and why ----


class Reason(NamedTuple):
    function: str
    what: str  # in words, for the table
    because: str
    codes: tuple[str, ...]  # of the calls


Q345 = "t(2, 3, 4, 8), t(2, 3, 5, 8), t(2, 3, 5, 8)"
REASONS = [
    Reason("scaled_dot_product_attention", "a head dim above 256", "the kernels' tiles end there",
           ("f(t(1, 1, 2, 300), t(1, 1, 3, 300), t(1, 1, 3, 300))",)),
    Reason("scaled_dot_product_attention", "a mask of fewer than 2 dimensions",
        "it is broadcast; torch takes it only where it wants a gradient",
           (f"f({Q345}, b(5))", f"f({Q345}, b())")),
    Reason("scaled_dot_product_attention", "attn_mask and is_causal",
        "both apply, as in one of torch's kernels; its others raise",
           (f"f({Q345}, t(4, 5), is_causal=True)", "f(t(3, 4, 8), t(3, 5, 8), t(3, 5, 8), b(4, 5), is_causal=True)")),
    Reason("scaled_dot_product_attention", "the gradient of a mask where there are no elements",
        "zeros, as for every other argument",
           tuple(f"f(t({B}, {H}, {Q}, {D}), t({B}, {H}, {K}, {D}), t({B}, {H}, {K}, {V}), t({Q}, {K}))"
                 for B, H, Q, K, D, V in ((0, 3, 4, 5, 8, 6), (2, 0, 4, 5, 8, 6),
                                           (2, 3, 0, 5, 8, 6), (2, 3, 4, 0, 8, 6), (2, 3, 4, 5, 8, 0),
                                          (2, 3, 4, 5, 0, 0)))),
    Reason("softmax", "integers", "RuntimeError, of which torch's is a kind", ("f(i(3), -1)",
        "f(t(3, 8), -1, dtype=torch.int64)")),
    Reason("softmax", "no dim", "the last dimension", ("f(t(3, 8))", "f(t(3, 8), None)")),
    Reason("softmax", "rows of -inf", "zeros, as in attention: such a row is one that sees nothing", ("f(inf(2, 3), -1)",)),
    Reason("gelu", "no `approximate`", "the default is GPT-2's tanh; torch's is approximate='none'", ("f(t(3, 8))",
        "f(input=t(3, 8))")),
    Reason("gelu", "integers", "RuntimeError, of which torch's is a kind",
           ("f(i(3), approximate='none')", "f(i(3), approximate='tanh')")),
    Reason("dropout", "p that is NaN", "one error for every p outside [0, 1]", ("f(t(3), float('nan'), True)",
        "f(t(3), float('nan'), False)")),
    Reason("layer_norm", "integers", "RuntimeError, of which torch's is a kind", ("f(i(8), (8,))",)),
    Reason("layer_norm", "a negative eps",
        "refused: it makes NaN of rows of small variance", ("f(t(3, 8), (8,), t(8), t(8), -1.0)",)),
    Reason("layer_norm", "normalized_shape by place, and weight or bias alone, or by name",
           "ours is layer_norm(x, weight, bias, eps): what one place holds could be either",
           ("f(t(3, 8), (8,), t(8))", "f(t(3, 8), (8,), t(5))", "f(t(3, 8), (8,), weight=t(8))", "f(t(3, 8), (8,), bias=t(8))",
            "f(t(3, 8), (8,), t(8), bias=t(8))")),
    Reason("rms_norm", "more normalised dimensions than x has", "RuntimeError, as layer_norm's", ("f(t(), (1,))",)),
    Reason("rms_norm", "integers", "RuntimeError, of which torch's is a kind", ("f(i(8), (8,))",)),
    Reason("rms_norm", "x in channels_last", "the result is contiguous, as layer_norm's",
           ("f(t(2, 3, 4, 5).to(memory_format=torch.channels_last), (5,))",)),
    Reason("rms_norm", "a negative eps", "refused: it makes NaN of rows of small squares", ("f(t(3, 8), (8,), t(8), -1.0)",)),
    Reason("rms_norm", "normalized_shape by place and weight by name",
        "ours is rms_norm(x, weight, eps): weight is given twice",
           ("f(t(3, 8), (8,), weight=t(8))",)),
    Reason("cross_entropy", "logits (V,) and target (1,)", "the gradient, too; torch takes them forward only",
           ("f(t(5), c([2]))", *(f"f(t(5), c([2]), reduction={r!r})" for r in ("mean", "sum", "none")))),
    Reason("cross_entropy", "class weights", "no kernel", ("f(t(3, 5), c([0, 4, 2]), weight=torch.ones(5))",
        "f(t(3, 5), c([0, 4, 2]), torch.ones(5))")),
    Reason("cross_entropy", "class probabilities", "no kernel", ("f(t(3, 5), torch.softmax(t(3, 5), -1))",)),
    Reason("cross_entropy", "integers", "RuntimeError, of which torch's is a kind", ("f(i(3, 5), c([0, 1, 2]))",)),
    Reason("cross_entropy", "negative label_smoothing",
        "refused; torch takes it for 0", ("f(t(3, 5), c([0, 4, 2]), label_smoothing=-0.1)",)),
    Reason("cross_entropy", "classes in the second dimension of (N, C, d1)",
        "the classes are in the last dimension: logits.movedim(1, -1)",
           ("f(t(2, 5, 3), c([[0, 1, 2], [4, 3, 2]]))",)),
    Reason("cross_entropy", "size_average, reduce",
        "deprecated in torch: reduction", ("f(t(3, 5), c([0, 4, 2]), size_average=False)",)),
]  # fmt: skip


def found() -> dict[Call, tuple[str, str]]:
    return {call: d for call in calls() if (d := difference(call)) is not None}


def reason_of(call: Call) -> Reason | None:
    return next((r for r in REASONS if r.function == call.function and call.code in r.codes), None)


HEAD = """# Where our functions differ from those they are named for

Found by calling both in {n} ways on a CPU (`python tests/namesakes.py`): names and places of arguments, ranks, broadcasts,
mixed dtypes, autocast, layouts, sizes of zero, subclasses; compared in error, shape, dtype, strides, values and gradients. What
is not listed is the same. In an example f is the function, `t(2, 3)` wants a gradient, `b` is boolean, `i` and `c` are int64.

flash-attn's functions need a GPU and are not called: names, order and defaults of arguments are theirs. Ours also take float32
and float64, return probabilities without dropout, too, and under autocast cast to its dtype.
"""


def table(differ: dict[Call, tuple[str, str]]) -> str:
    lines = [HEAD.format(n=len(calls())), "| function | called with | for example | torch | ours | because |", "|---" * 6 + "|"]
    for reason in REASONS:
        call, (theirs, ours) = next((c, d) for c, d in differ.items() if reason_of(c) is reason)
        cells = (f"`{reason.function}`", reason.what, f"`{call.code}`", theirs, ours, reason.because)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    differ = found()
    for call, (theirs, ours) in differ.items():
        if reason_of(call) is None:
            print(f"{call}\n    torch: {theirs}\n    ours:  {ours}")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(differ))
