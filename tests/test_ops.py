"""What holds for every op, on the backend under test, over each op's calls (gpt_kernels/cases); nothing here is of one op.

tests/test_<op>.py has what is special about one. Every test here runs with NaN in fresh memory (conftest.py).
"""

import collections
import contextlib

import pytest
import torch
from grids import BACKEND, DEVICE, DTYPES, ISAS, SLOW
from op_checks import (
    assert_same,
    check_compile,
    check_empty,
    check_gradcheck,
    check_layouts,
    check_opcheck,
    check_raises,
    check_second_derivative,
    check_specials,
    check_threads,
    check_truth,
    every_dtype,
    forward_backward,
    is_float,
)

import gpt_kernels
from gpt_kernels import cases
from gpt_kernels.cases import op

ON_THE_BACKEND_UNDER_TEST = True
every_op = pytest.mark.parametrize("family", cases.families())
# an instruction set, or the reference; beside other backends these say nothing
SERVERS = (*ISAS, "reference") if BACKEND == "cpu" else ISAS
NARROW = [d for d in DTYPES if d != torch.float64]


@pytest.fixture(autouse=True)
def small_tiles(request):
    """An op's own launch parameters for the interpreter, where it has such."""
    family = request.node.callspec.params["family"]
    own = getattr(cases.of(family), "interpreted", None) if BACKEND == "triton" else None
    with own() if own else contextlib.nullcontext():
        yield


def served_by(server):
    return gpt_kernels.use_backend("reference") if server == "reference" else gpt_kernels.use_isa(server)


@pytest.mark.parametrize("server", SERVERS)
@every_dtype
@every_op
def test_truth(family, dtype, server):
    with served_by(server):
        for example in cases.of(family).odd(dtype, SLOW):
            if DEVICE != "cpu" and "norm" in family and example.args[0].shape[-1] == 1:
                continue  # g rstd less itself: a GPU fuses one of the products, and rounds the other
            check_truth(example.ours, example.eager, example.args, example.dy, f"{family} {example.what}", example.factors)


@pytest.mark.parametrize("server", SERVERS)
@every_op
def test_exact(family, server):
    """Integers whose results have no rounding come out bit for bit."""
    with served_by(server):
        for example in cases.of(family).exact():
            given, expected = (forward_backward(f, example.args, example.dy) for f in (example.ours, example.eager))
            for i in range(len(given)) if example.said is None else example.said:
                assert torch.equal(given[i], expected[i]), f"{family} {example.what}: result {i}"


@every_op
def test_layouts(family):
    for dtype in (torch.float32, torch.bfloat16)[: 1 if SLOW == 2 else 2]:
        for example in list(cases.of(family).small(dtype))[: 1 if SLOW == 2 else None]:
            for which in example.layouts[: 1 if SLOW == 2 else None]:
                check_layouts(example.ours, example.args, which)


@every_op
def test_threads(family):
    for example in cases.of(family).threaded(SLOW):
        check_threads(example.ours, example.args)


@every_op
def test_gradcheck(family):
    for example in cases.of(family).small(torch.float64 if torch.float64 in DTYPES else torch.float32):
        check_gradcheck(example.ours, example.args)


@every_op
def test_second_derivative(family):
    example = next(iter(cases.of(family).small(torch.float32)))
    check_second_derivative(example.ours, example.args)


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """The kernel calls that a public function makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gpt_kernels":
            # as they are: the op may write over one of them
            self.calls.append((func, [a.clone() if isinstance(a, torch.Tensor) else a for a in args]))
        return func(*args, **(kwargs or {}))


@every_op
def test_opcheck(family):
    """Schema, fake tensors and dynamic shapes of every kernel that the op's calls come to, with and without elements."""
    seen = collections.Counter()
    for example in (
        *cases.of(family).small(torch.float32),
        *list(cases.of(family).small(torch.bfloat16))[:1],
        *list(cases.of(family).empty())[:2],
    ):
        with Recorded() as recorded:
            forward_backward(example.ours, example.args)
        for func, args in recorded.calls:
            check_opcheck(func, args)
            seen[func._schema.name.partition("::")[2]] += 1
    for name, args in cases.of(family).step(cases.Sizes(1, 4, 8, 1, vocab=9), cases.New(torch.float32, "cpu")):
        if not seen[name]:  # those that no small call comes to
            check_opcheck(op(name), args)


@every_op
def test_compile(family):
    for example in cases.of(family).small(torch.float32):
        check_compile(example.ours, example.args, *([example.again] if example.again else []))


@every_op
def test_empty(family):
    for example in cases.of(family).empty():
        check_empty(example.ours, example.eager, example.args, f"{family} {example.what}")


@pytest.mark.parametrize("dtype", NARROW, ids=lambda d: str(d).removeprefix("torch."))
@every_op
def test_specials(family, dtype):
    for example in cases.of(family).special(dtype):
        check_specials(example.ours, example.eager, example.args, example.said)


# ---- bad input: of any op, an error that names it; nothing is computed ----


def replaced(args, i, by):
    return [by if j == i else a for j, a in enumerate(args)]


@every_op
def test_integers_are_refused(family):
    for example in cases.of(family).small(torch.float32):
        for i in [i for i, a in enumerate(example.args) if is_float(a)]:
            given = replaced(example.args, i, example.args[i].int())
            check_raises(lambda e=example, given=given: e.ours(*given), RuntimeError, f"{family}.* must be .*, got int32")


def kernel_calls(family):
    """(name, call, arguments, place of a tensor that is not the first): every kernel, one argument after the other."""
    for name, args in cases.of(family).step(cases.Sizes(2, 3, 8, 2, vocab=9), cases.New(torch.float32, "cpu")):
        for i, a in enumerate(args):
            if i and isinstance(a, torch.Tensor):
                yield name.removesuffix("_out"), op(name), args, i


@every_op
def test_another_dtype_is_refused(family):
    """float64 beside float32: never cast in silence."""
    for name, call, args, i in kernel_calls(family):
        given = replaced(args, i, args[i].double())
        check_raises(lambda call=call, given=given: call(*given), RuntimeError, f"{name}.*float64")


@every_op
def test_another_device_is_refused(family):
    for name, call, args, i in kernel_calls(family):
        given = replaced(args, i, args[i].to("meta"))
        check_raises(lambda call=call, given=given: call(*given), RuntimeError, f"{name}.* on one device, got cpu and meta")


@every_op
def test_another_shape_is_refused(family):
    """One element less in the first dimension: out of bounds, were it read."""
    for name, call, args, i in kernel_calls(family):
        if args[i].dim():
            given = replaced(args, i, args[i][:-1].contiguous())
            check_raises(lambda call=call, given=given: call(*given), RuntimeError, name)


@every_op
def test_same_bits_again(family):
    for example in cases.of(family).small(torch.float32):
        dy = torch.randn_like(example.ours(*example.args))
        first, second = (forward_backward(example.ours, example.args, dy) for _ in range(2))
        assert_same(first, second, f"{family} {example.what}")
