"""The checks that every op's test file runs, each in one call.

`fn` is the public function under test, `eager` plain PyTorch with the same arguments. `args` are its positional arguments:
every floating tensor among them is differentiated, anything else is passed on as it is.
"""

from __future__ import annotations

import pytest
import torch
from grids import COLUMNS, DTYPES, ISAS, ROWS
from tolerance import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, assert_close_to_truth
from torch import Tensor

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_isa = pytest.mark.parametrize("isa", ISAS)
# boundary rows and columns without the product of the two: every column with a few rows, every row count with odd columns
SHAPES = [(2 + i % 2, n) for i, n in enumerate(COLUMNS)] + [(m, n) for m in ROWS for n in (1, 33, 1025)]


def is_float(arg) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point()


def leaves(args, dtype: torch.dtype | None = None) -> list:
    """args with every floating tensor as a fresh leaf that wants a gradient, in `dtype` where one is given; strides are kept."""
    return [a.detach().to(dtype or a.dtype).requires_grad_() if is_float(a) else a for a in args]


def forward_backward(fn, args, dy: Tensor | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """fn(*args) and the gradients of the floating args for the output gradient dy (all ones where none is given)."""
    args = leaves(args, dtype)
    y = fn(*args)
    dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
    grads = torch.autograd.grad(y, [a for a in args if is_float(a)], dy, allow_unused=True, materialize_grads=True)
    return y.detach(), list(grads)


def assert_same(actual, expected, what: str) -> None:
    """Bit for bit, NaN equal to NaN, over (output, gradients)."""
    for name, a, e in zip(
        ["output", *(f"gradient {i}" for i in range(9))], [actual[0], *actual[1]], [expected[0], *expected[1]]
    ):
        assert a.dtype == e.dtype and a.shape == e.shape, f"{what}: {name} is {a.dtype} {a.shape}, expected {e.dtype} {e.shape}"
        assert torch.allclose(a, e, rtol=0, atol=0, equal_nan=True), f"{what}: {name} differs by {(a - e).abs().max():.3e}"


def check_truth(fn, eager, args, dy: Tensor | None = None, name: str = "") -> None:
    """Output and gradients against eager in float64, within tolerance.py's multiple of eager's own error in args' dtype."""
    with torch.no_grad():
        shape = fn(*args).shape
    dy = torch.randn(shape) if dy is None else dy
    dy = dy.to(next(a.dtype for a in args if is_float(a)))
    y, grads = forward_backward(fn, args, dy)
    eager_y, eager_grads = forward_backward(eager, args, dy)
    true_y, true_grads = forward_backward(eager, args, dy, torch.float64)
    assert y.dtype == dy.dtype, f"{name}: output dtype {y.dtype}, expected {dy.dtype}"
    if dy.dtype == torch.float64:  # no wider truth to measure eager's own error with
        for a, t in zip([y, *grads], [true_y, *true_grads]):
            torch.testing.assert_close(a, t, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m: f"{name}: {m}")
        return
    assert_close_to_truth(y, true_y, eager_y, FORWARD, f"{name} output")
    for i, (g, t, e) in enumerate(zip(grads, true_grads, eager_grads)):
        assert_close_to_truth(g, t, e, WEIGHT_GRADIENT if i else INPUT_GRADIENT, f"{name} gradient {i}")


def check_opcheck(op, args) -> None:
    """Schema (no aliasing, no mutation), fake tensors (shapes, dtypes, strides), aot dispatch. op: torch.ops.gpt_kernels.<op>.default"""
    torch.library.opcheck(op, tuple(args))


def check_compile(fn, args, *more) -> None:
    """One graph, forward and backward, gives bit for bit what the uncompiled call gives; `more`: args of other sizes for it."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for each in (args, *more):
        assert_same(forward_backward(compiled, each), forward_backward(fn, each), "compiled")


def check_gradcheck(fn, args) -> None:
    """Against numerical derivatives, in float64 on the kernels themselves."""
    assert torch.autograd.gradcheck(fn, tuple(leaves(args, torch.float64)), eps=1e-6, atol=1e-6, rtol=1e-4)


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
    """Values of x (two or more dimensions) in memory of every kind; only `expanded` and `strided` change the values."""
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
    """args[which] in every layout gives the bits of its contiguous copy; so does an output gradient of stride 0 (a sum)."""
    for name, x in layouts(args[which]).items():
        given, copy_ = list(args), list(args)
        given[which], copy_[which] = x, x.contiguous().clone()
        y, grads = forward_backward(fn, given)
        assert_same((y, grads), forward_backward(fn, copy_), name)
        args_ = leaves(given)
        summed = torch.autograd.grad(fn(*args_).sum(), [a for a in args_ if is_float(a)])
        assert_same((y, summed), (y, grads), f"{name}, sum()")


def check_empty(fn, args) -> None:
    """No elements: an empty result of the right shape and gradients without a NaN (zeros for the parameters)."""
    y, grads = forward_backward(fn, args)
    assert y.numel() == 0 and y.shape == args[0].shape
    for a, g in zip(filter(is_float, args), grads):
        assert g.shape == a.shape and torch.equal(g, torch.zeros_like(a))


def check_same_specials(fn, eager, args) -> None:
    """NaN, +inf and -inf in the places where eager has them, in the output and in every gradient."""
    ours, theirs = forward_backward(fn, args), forward_backward(eager, args)
    for i, (a, e) in enumerate(zip([ours[0], *ours[1]], [theirs[0], *theirs[1]])):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(a), kind(e)), (
                f"{kind.__name__} in other places, {'output' if i == 0 else f'gradient {i - 1}'}"
            )


def check_raises(call, error: type[Exception], message: str) -> None:
    """Exactly this exception type, with a message that matches and names no file or address."""
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
    assert ".cpp" not in str(caught.value) and "0x" not in str(caught.value)
