import math

import pytest
import torch
import torch.nn.functional as F
from op_checks import (
    SHAPES,
    assert_rounded,
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
    every_isa,
    forward_backward,
)

import gpt_kernels
from gpt_kernels import gelu

FWD = torch.ops.gpt_kernels.gelu_fwd.default
BWD = torch.ops.gpt_kernels.gelu_bwd.default
FORMS = ("tanh", "none")


def form(approximate):
    """(ours, eager) of (x, bias=None)"""
    return (
        lambda x, bias=None: gelu(x, bias, approximate),
        lambda x, bias=None: F.gelu(x if bias is None else x + bias, approximate=approximate),
    )


def inputs(*shape, dtype=torch.float32):
    return (torch.randn(shape) * 2).to(dtype), torch.randn(shape[-1:]).to(dtype)


@every_isa
@every_dtype
def test_truth(dtype, isa):
    with gpt_kernels.use_isa(isa):
        for ours, eager in map(form, FORMS):
            for shape in SHAPES[:: 2 if dtype == torch.float64 else 1]:
                check_truth(ours, eager, inputs(*shape, dtype=dtype), name=f"{shape}")
            x, bias = inputs(3, 5, 65, dtype=dtype)
            # 3 x 4097 elements without a bias: more than one of the kernel's flat rows, the last one short
            # 200 rows: more than a program of the bias's gradient takes at once
            for args in ((x,), (x[0, 0], bias), (x[0, 0, 0],), (torch.randn(3, 4097).to(dtype),), inputs(200, 65, dtype=dtype)):
                check_truth(ours, eager, args, name=f"{[tuple(a.shape) for a in args]}")


@every_isa
@pytest.mark.parametrize("approximate", FORMS)
def test_accuracy_over_the_whole_range(approximate, isa):
    """absolute and relative error of every binade of both signs; far left, where erf and tanh cancel, it stays relative"""
    ours, eager = form(approximate)
    x = torch.cat([torch.linspace(-9, 9, 40001), torch.logspace(-40, 38, 400), -torch.logspace(-40, 0, 400)])
    with gpt_kernels.use_isa(isa):
        y, dx = forward_backward(ours, (x,))
    v = x.double()
    if approximate == "none":
        true = v * torch.special.erfc(-v / math.sqrt(2)) / 2
    else:
        true = v * torch.sigmoid(math.sqrt(8 / math.pi) * (v + 0.044715 * v**3))
    error = (y.double() - true).abs()
    near = x.abs() < 4
    assert (error / true.abs().clamp_min(1e-38))[near & (x != 0)].max() < 1e-4
    assert (error / x.abs().double().clamp_min(1.2e-38)).max() < 2.5e-7
    true_dx = forward_backward(eager, (v,))[1]
    assert (dx - true_dx)[x.abs() < 1e10].abs().max() < 2e-6


@every_isa
def test_float32_bias_beside_16_bit(isa):
    x, bias = inputs(17, 129)
    with gpt_kernels.use_isa(isa):
        for dtype in (torch.bfloat16, torch.float16):
            y, dx, dbias = forward_backward(gelu, (x.to(dtype), bias))
            assert y.dtype == dx.dtype == dtype and dbias.dtype == torch.float32
            with torch.no_grad():
                assert_rounded(y, gelu(x.to(dtype).float(), bias))


@every_isa
def test_exact_where_saturated(isa):
    """far right gelu is the identity, far left zero: integers come out as they are, and dbias counts them"""
    x = torch.tensor([16.0, -16.0, 100.0, -100.0, 0.0]).repeat(3, 21)
    dy = torch.randint(-8, 9, x.shape).float()
    with gpt_kernels.use_isa(isa):
        for ours, _ in map(form, FORMS):
            y, dx, dbias = forward_backward(ours, (x, torch.zeros(105)), dy)
            assert torch.equal(y, x.clamp_min(0))
            slope = torch.where(x > 0, 1.0, torch.where(x < 0, 0.0, 0.5))
            assert torch.equal(dx, dy * slope) and torch.equal(dbias, (dy * slope).sum(0))


def test_layouts():
    for dtype in (torch.float32, torch.bfloat16):
        for ours, _ in map(form, FORMS):
            check_layouts(ours, inputs(4, 6, 33, dtype=dtype))


def test_threads():
    check_threads(gelu, inputs(700, 129))
    check_threads(gelu, inputs(33, 1025))
    check_threads(gelu, inputs(100, 1025)[:1])


def test_gradcheck():
    x, bias = inputs(4, 9, dtype=torch.float64)
    for ours, _ in map(form, FORMS):
        for args in ((x,), (x, bias)):
            check_gradcheck(ours, args)

    check_second_derivative(gelu, inputs(2, 5))


def test_opcheck():
    x, bias = inputs(3, 5, 9)
    for x_, bias_ in ((x, None), (x, bias), (x.bfloat16(), bias), (x[:0], bias), (x.transpose(0, 1).contiguous(), bias)):
        for tanh in (True, False):
            check_opcheck(FWD, (x_, bias_, tanh))
            check_opcheck(BWD, (x_, x_, bias_, tanh))


def test_compile():
    for ours, _ in map(form, FORMS):
        check_compile(ours, inputs(4, 33), inputs(7, 12))
    check_compile(lambda x: gelu(x), inputs(2, 3, 33)[:1])


def test_empty():
    for shape in ((0, 5), (3, 0), (0, 0), (2, 0, 4), (0,)):
        for ours, _ in map(form, FORMS):
            check_empty(ours, inputs(*shape))
            check_empty(ours, inputs(*shape)[:1])


def test_specials():
    x, _ = inputs(4, 33)
    # 6e4 is finite in every dtype: of +inf, some machines' eager erf makes NaN and others' inf (ours: inf, below)
    x[1, 3], x[3, 5], x[0, 6:10] = float("nan"), float("-inf"), torch.tensor([6e4, -6e4, 1e-40, 0.0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for ours, eager in map(form, FORMS):
            check_specials(ours, eager, (x.to(dtype),))
            # eager's vectorised erf gives NaN here
            assert ours(torch.full((33,), float("inf"), dtype=dtype)).isposinf().all()


X, B = torch.zeros(4, 8), torch.zeros(8)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: gelu(X, approximate="erf"), RuntimeError, "gelu: approximate must be 'tanh' or 'none', got 'erf'"),
        (lambda: gelu(X, approximate=None), TypeError, "approximate must be 'tanh' or 'none', got None"),
        (lambda: gelu(X, B[:7]), RuntimeError, r"gelu_fwd: bias must have shape \(8,\), got \(7,\)"),
        (lambda: gelu(X, B.view(1, 8)), RuntimeError, r"bias must have shape \(8,\), got \(1, 8\)"),
        (lambda: gelu(X, B.double()), RuntimeError, "bias must be float32 like x or float32, got float64"),
        (lambda: gelu(X.half(), B.bfloat16()), RuntimeError, "bias must be float16 like x or float32, got bfloat16"),
        (lambda: FWD(X, torch.zeros(16)[::2], True), RuntimeError, "bias must be contiguous"),
        (lambda: gelu(X.int()), RuntimeError, "x must be float32, (float64, )?bfloat16 or float16, got int32"),
        (lambda: gelu(torch.tensor(1.0), B), RuntimeError, "x must have at least 1 dimension to add a bias, got a scalar"),
        (lambda: gelu(X, B.to("meta")), RuntimeError, "not on the expected device|[Dd]evice"),
        (lambda: FWD(X.t(), None, True), RuntimeError, r"x must be contiguous, got shape \(8, 4\)"),
        (lambda: BWD(X[:3], X, B, True), RuntimeError, r"gelu_bwd: dy must have the shape of x \(4, 8\), got \(3, 8\)"),
        (lambda: BWD(X.half(), X, B, True), RuntimeError, "dy must be float32, got float16"),
        (lambda: BWD(X, X, B[:1], True), RuntimeError, r"bias must have shape \(8,\), got \(1,\)"),
    ],
)
def test_bad_input(call, error, message):
    check_raises(call, error, message)
