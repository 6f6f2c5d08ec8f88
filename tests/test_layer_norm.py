import pytest
import torch
import torch.nn.functional as F
from grids import BACKEND, DEVICE, INTERPRETED
from op_checks import (
    NORM_SHAPES,
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
from gpt_kernels import layer_norm
from gpt_kernels.ops import layer_norm as module

BWD = torch.ops.gpt_kernels.layer_norm_bwd.default
FWD = torch.ops.gpt_kernels.layer_norm_fwd.default


def eager(x, weight=None, bias=None, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def inputs(*shape, dtype=torch.float32):
    """x with a mean well off zero, as in a real network; weight and bias"""
    return (torch.randn(shape) * 2 + 0.7).to(dtype), torch.randn(shape[-1:]).to(dtype), torch.randn(shape[-1:]).to(dtype)


@every_isa
@every_dtype
def test_truth(dtype, isa):
    with gpt_kernels.use_isa(isa):
        for shape in NORM_SHAPES:
            if DEVICE != "cpu" and shape[-1] == 1:
                continue  # g rstd less itself: a GPU fuses one of the products, and rounds the other
            check_truth(layer_norm, eager, inputs(*shape, dtype=dtype), name=f"{shape}")
        x, weight, bias = inputs(3, 5, 65, dtype=dtype)
        for args in ((x,), (x, weight), (x, None, bias), (x, weight, bias, 0.1)):
            check_truth(layer_norm, eager, args, name=f"{len(args)} arguments")
        assert torch.equal(layer_norm(x[1, 2], weight, bias), layer_norm(x, weight, bias)[1, 2])


@every_isa
def test_large_mean(isa):
    """a mean 1000 times the deviation: a variance as mean(x^2) - mean^2 would lose all its digits"""
    with gpt_kernels.use_isa(isa):
        check_truth(layer_norm, eager, (torch.randn(5, 1000) + 1000, *inputs(1000)[1:]))


@every_isa
def test_mean_is_right_to_the_last_bit(isa):
    """not only to the rounding of a sum of 50000 large numbers"""
    x = torch.randn(5, 50000) + 1e5
    with gpt_kernels.use_isa(isa):
        _, mean, _ = module.fwd(x, None, None, 1e-5)
    spacing = 2.0**-7  # of float32 numbers near 1e5
    assert (mean - x.double().mean(1)).abs().max() <= 0.51 * spacing


@every_isa
def test_float32_parameters_beside_16_bit(isa):
    x, weight, bias = inputs(17, 129)
    with gpt_kernels.use_isa(isa):
        for dtype in (torch.bfloat16, torch.float16):
            y, dx, dweight, dbias = forward_backward(layer_norm, (x.to(dtype), weight, bias))
            assert y.dtype == dx.dtype == dtype and dweight.dtype == dbias.dtype == torch.float32
            with torch.no_grad():
                assert torch.equal(y, layer_norm(x.to(dtype).float(), weight, bias).to(dtype))


@every_isa
def test_exact_on_integers(isa):
    """rows of +-1 with as many of each: mean 0, variance 1, so y = x weight + bias without a rounding"""
    x = torch.tensor([1.0, -1.0]).repeat(5, 36)
    weight, bias = torch.randint(-8, 9, (2, 72)).float()
    dy = torch.randint(-8, 9, (5, 72)).float()
    with gpt_kernels.use_isa(isa):
        y, _, dweight, dbias = forward_backward(lambda *a: layer_norm(*a, eps=0.0), (x, weight, bias), dy)
    assert torch.equal(y, x * weight + bias)
    assert torch.equal(dweight, (dy * x).sum(0)) and torch.equal(dbias, dy.sum(0))


def test_layouts():
    for dtype in (torch.float32, torch.bfloat16):
        check_layouts(layer_norm, inputs(*((2, 3) if INTERPRETED else (4, 6)), 33, dtype=dtype))


def test_threads():
    few = BACKEND != "cpu"  # no threads there
    check_threads(layer_norm, inputs(20 if few else 700, 129))
    check_threads(layer_norm, inputs(5 if few else 33, 1025))


def test_gradcheck():
    x, weight, bias = inputs(4, 9, dtype=torch.float64)
    for args in ((x,), (x, weight), (x, None, bias), (x, weight, bias)):
        check_gradcheck(layer_norm, args)

    check_second_derivative(layer_norm, inputs(2, 5))


def test_opcheck():
    x, weight, bias = inputs(3, 5, 9)
    for args in (
        (x, None, None, 1e-5),
        (x, weight, bias, 1e-5),
        (x.bfloat16(), weight, None, 1e-5),
        (x[:0], weight, bias, 1e-5),
    ):
        check_opcheck(FWD, args)
        _, mean, rstd = FWD(*args)
        check_opcheck(BWD, (args[0], args[0], args[1], mean, rstd, args[2] is not None))


def test_compile():
    check_compile(layer_norm, inputs(4, 33), inputs(7, 12))
    check_compile(lambda x: layer_norm(x), inputs(2, 3, 33)[:1])


def test_empty():
    for shape in ((0, 5), (3, 0), (0, 0), (2, 0, 4), (0,)):
        check_empty(layer_norm, inputs(*shape))


def test_specials():
    x, weight, bias = inputs(8, 33)
    x[1, 3], x[2, 4], x[3, 5], x[4], x[5], x[6] = float("nan"), float("inf"), float("-inf"), 0.0, 1e15 * torch.randn(33), 1e-40
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_specials(layer_norm, eager, (x.to(dtype), weight.to(dtype), bias.to(dtype)))


X, W, STAT = torch.zeros(4, 8), torch.zeros(8), torch.zeros(4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer_norm(X, W[:7]), r"layer_norm_fwd: weight must have shape \(8,\), got \(7,\)"),
        (lambda: layer_norm(X, W.view(1, 8)), r"weight must have shape \(8,\), got \(1, 8\)"),
        (lambda: layer_norm(X, W, W[:1]), r"bias must have shape \(8,\), got \(1,\)"),
        (lambda: layer_norm(X, W.double()), "weight must be float32 like x or float32, got float64"),
        (lambda: layer_norm(X, W, W.half()), "bias must be float32 like x or float32, got float16"),
        (lambda: layer_norm(X.half(), W, W.half()), "bias must be float32 like weight, got float16"),
        (lambda: layer_norm(X.int()), "x must be float32, (float64, )?bfloat16 or float16, got int32"),
        (lambda: layer_norm(X.cfloat()), "x must be float32, (float64, )?bfloat16 or float16, got (another dtype|complex64)"),
        (lambda: layer_norm(torch.tensor(1.0)), "x must have at least 1 dimension, got a scalar"),
        (lambda: layer_norm(X, eps=-1e-5), "eps must be finite and not negative, got -1e-05"),
        (lambda: layer_norm(X, eps=float("nan")), "eps must be finite and not negative, got nan"),
        (lambda: FWD(X, torch.zeros(16)[::2], None, 1e-5), "weight must be contiguous"),
        (lambda: FWD(X.t(), None, None, 1e-5), r"x must be contiguous, got shape \(8, 4\)"),
        (lambda: BWD(X[:3], X, W, STAT, STAT, True), r"layer_norm_bwd: dy must have the shape of x \(4, 8\), got \(3, 8\)"),
        (lambda: BWD(X.half(), X, W, STAT, STAT, True), "dy must be float32, got float16"),
        (lambda: BWD(X, X, W, STAT[:3], STAT, True), "mean must have 4 elements, one per row of x, got 3"),
        (lambda: BWD(X, X, W, STAT, STAT.double(), True), "rstd must be float32, got float64"),
        (lambda: layer_norm(X, W.to("meta")), "not on the expected device"),
    ],
)
def test_bad_input(call, message):
    check_raises(call, RuntimeError, message)
