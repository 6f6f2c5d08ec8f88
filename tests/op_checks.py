"""The checks that tests/test_ops.py runs on every op, and the ops' own test files on what is special, each in one call.

`fn` is the public function under test, `eager` plain PyTorch with the same arguments. `args` are its positional arguments:
every floating tensor among them is differentiated, anything else is passed on as it is.
"""

from __future__ import annotations

import pytest
import torch
from grids import DTYPES, ISAS
from torch import Tensor

from gpt_kernels.accuracy import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, assert_close_to_truth

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_isa = pytest.mark.parametrize("isa", ISAS)


def is_float(arg) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point()


def leaves(args, dtype: torch.dtype | None = None) -> list:
    """args with every floating tensor as a fresh leaf that wants a gradient, in `dtype` where given; strides are kept."""
    return [a.detach().to(dtype or a.dtype).requires_grad_() if is_float(a) else a for a in args]


def forward_backward(fn, args, dy: Tensor | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
    """[fn(*args), the gradient of every floating arg] for the output gradient dy (all ones where none is given)."""
    args = leaves(args, dtype)
    y = fn(*args)
    dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
    grads = torch.autograd.grad(y, [a for a in args if is_float(a)], dy, allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Bit for bit (NaN equal to NaN) over two results of forward_backward."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), f"{what}: result {i} is {a.dtype} {a.shape}, not {e.dtype} {e.shape}"
        assert torch.allclose(a, e, rtol=0, atol=0, equal_nan=True), f"{what}: result {i} differs by {(a - e).abs().max():.3e}"


FACTORS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)


def check_truth(fn, eager, args, dy: Tensor | None = None, name: str = "", factors=FACTORS) -> None:
    """Output and gradients against eager in float64, within accuracy.py's multiple of eager's own error in args' dtype.

    factors: for the output and each gradient; the last one serves the rest.
    """
    if dy is None:
        with torch.no_grad():
            dy = torch.randn(fn(*args).shape)
    dy = dy.to(next(a.dtype for a in args if is_float(a)))
    actual, same_dtype, truth = (
        forward_backward(f, args, dy, dtype) for f, dtype in ((fn, None), (eager, None), (eager, torch.float64))
    )
    assert actual[0].dtype == dy.dtype, f"{name}: output dtype {actual[0].dtype}, expected {dy.dtype}"
    for i, (a, e, t) in enumerate(zip(actual, same_dtype, truth, strict=True)):
        what = f"{name} {f'gradient {i - 1}' if i else 'output'}"
        assert_close_to_truth(a, t, e, factors[min(i, len(factors) - 1)], what)


def assert_rounded(y: Tensor, exact: Tensor) -> None:
    """y, of 16 bits, is `exact` in float32 rounded once; a short polynomial may err where that lies between two numbers."""
    kind = torch.finfo(y.dtype)
    unit = kind.eps * torch.exp2(torch.frexp(exact).exponent - 1.0).clamp(min=kind.tiny)  # of the last place
    assert kind.bits == 16 and exact.dtype == torch.float32
    assert ((y.float() - exact).abs() <= 0.52 * unit).all(), "more than a rounding"


def check_opcheck(op, args) -> None:
    """Of torch.ops.gpt_kernels.<op>.default: the schema tells of no alias or mutation that is not there, fake tensors have
    the outputs' shapes, dtypes and strides, aot dispatch with dynamic shapes agrees."""
    torch.library.opcheck(op, tuple(args))


def check_compile(fn, args, *more) -> None:
    """One graph, forward and backward, gives bit for bit what the uncompiled call gives; `more`: args of other sizes for it."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for each in (args, *more):
        assert_same(forward_backward(compiled, each), forward_backward(fn, each), "compiled")


def check_gradcheck(fn, args) -> None:
    """Against numerical derivatives, in float64 on the kernels themselves; nothing for a backend without float64."""
    if torch.float64 not in DTYPES:
        return
    assert torch.autograd.gradcheck(fn, tuple(leaves(args, torch.float64)), eps=1e-6, atol=1e-6, rtol=1e-4)


def check_second_derivative(fn, args) -> None:
    """A product with the Hessian, through the kernels' backward, against torch.func's of the reference in float64, and against
    numerical derivatives."""
    places = [i for i, a in enumerate(args) if is_float(a)]

    def loss(*floats):
        given = dict(zip(places, floats, strict=True))
        return fn(*(given.get(i, a) for i, a in enumerate(args))).square().sum()

    def product(gradients, v):
        return sum((g * each).sum() for g, each in zip(gradients, v, strict=True))

    floats = [args[i].detach().requires_grad_() for i in places]
    v = [torch.randn_like(a) for a in floats]
    gradients = torch.autograd.grad(loss(*floats), floats, create_graph=True)
    actual = torch.autograd.grad(product(gradients, v), floats)
    doubles, v = ([a.detach().double() for a in each] for each in (floats, v))
    of_each = tuple(range(len(places)))
    truth = torch.func.grad(lambda *x: product(torch.func.grad(loss, of_each)(*x), v), of_each)(*doubles)
    for i, (a, t) in enumerate(zip(actual, truth, strict=True)):
        assert (a - t).norm() <= 1e-5 * t.norm(), f"input {i}: {a}, expected {t}"
    if torch.float64 in DTYPES:
        assert torch.autograd.gradgradcheck(fn, tuple(leaves(args, torch.float64)), eps=1e-6, atol=1e-5, rtol=1e-4)


def check_threads(fn, args) -> None:
    """The same bits for 1, 2 and 4 threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(forward_backward(fn, args))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0], "threads")


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x (two or more dimensions) in memory of every kind; the expanded ones repeat its first row or column instead."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype)
    wide[..., 2:-3] = x
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return {
        "contiguous": x.contiguous(),
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": wide[..., 2:-3],
        "offset by one element": shifted.copy_(x),
        "every other row": x.repeat_interleave(2, 0)[::2],
        "expanded rows": x[:1].expand(x.shape),
        "expanded columns": x[..., :1].expand(x.shape),
    }


def check_layouts(fn, args, which: int = 0) -> None:
    """args[which] in every layout gives the bits of its contiguous copy; so does an output gradient of stride 0 (a sum's)."""
    for name, x in layouts(args[which]).items():
        given, copied = list(args), list(args)
        given[which], copied[which] = x, x.contiguous().clone()
        expected = forward_backward(fn, copied)
        assert_same(forward_backward(fn, given), expected, name)
        given = leaves(given)
        gradients = torch.autograd.grad(fn(*given).sum(), [a for a in given if is_float(a)])
        assert_same([*gradients], expected[1:], f"{name}, sum()")


def check_empty(fn, eager, args, name: str = "") -> None:
    """No elements in args[0]: a result of eager's shape without elements or of zeros, and zero gradients (not NaN)."""
    y, *grads = forward_backward(fn, args)
    expected = eager(*args)
    assert y.shape == expected.shape and not y.any(), name
    for a, g in zip(filter(is_float, args), grads, strict=True):
        assert g.shape == a.shape and torch.equal(g, torch.zeros_like(a)), name


def check_specials(fn, eager, args, said: tuple[int, ...] | None = None) -> None:
    """NaN, +inf and -inf stand where eager has them, in the output and in every gradient, or in the results `said`."""
    for i, (a, e) in enumerate(zip(forward_backward(fn, args), forward_backward(eager, args), strict=True)):
        if said is not None and i not in said:
            continue
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(a), kind(e)), f"result {i}: {kind.__name__} in other places than eager has it"


def check_raises(call, error: type[Exception], message: str) -> None:
    """Exactly this exception type, with a message that matches and names no file or address."""
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
    assert ".cpp" not in str(caught.value) and "0x" not in str(caught.value)
