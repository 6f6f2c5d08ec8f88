import pytest
import torch
import torch.nn.functional as F
from grids import BACKEND, INTERPRETED
from op_checks import (
    NORM_SHAPES,
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
from gpt_kernels import rms_norm

FWD = torch.ops.gpt_kernels.rms_norm_fwd.default
BWD = torch.ops.gpt_kernels.rms_norm_bwd.default


def eager(x, weight=None, eps=1e-6):
    """spelled out: F.rms_norm in 16 bits rounds before it multiplies by the weight, which is not the formula"""
    xf = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    y = xf * (xf.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y if weight is None else y * weight).to(x.dtype)


def inputs(*shape, dtype=torch.float32):
    return (torch.randn(shape) * 2 + 0.7).to(dtype), torch.randn(shape[-1:]).to(dtype)


@every_isa
@every_dtype
def test_truth(dtype, isa):
    with gpt_kernels.use_isa(isa):
        for shape in NORM_SHAPES:
            check_truth(rms_norm, eager, inputs(*shape, dtype=dtype), name=f"{shape}")
        x, weight = inputs(3, 5, 65, dtype=dtype)
        for args in ((x,), (x, weight, 0.1)):
            check_truth(rms_norm, eager, args, name=f"{len(args)} arguments")
        assert torch.equal(rms_norm(x[1, 2], weight), rms_norm(x, weight)[1, 2])


def test_is_what_torch_calls_rms_norm():
    x, weight = inputs(5, 33)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (33,), weight, 1e-5))


@every_isa
def test_float32_weight_beside_16_bit(isa):
    x, weight = inputs(17, 129)
    with gpt_kernels.use_isa(isa):
        for dtype in (torch.bfloat16, torch.float16):
            y, dx, dweight = forward_backward(rms_norm, (x.to(dtype), weight))
            assert y.dtype == dx.dtype == dtype and dweight.dtype == torch.float32
            with torch.no_grad():
                assert_rounded(y, rms_norm(x.to(dtype).float(), weight))


@every_isa
def test_exact_on_integers(isa):
    """rows of +-2: the mean square is 4, so y = x weight / 2 without a rounding, and so are the weight's gradients"""
    x = torch.tensor([2.0, -2.0, 2.0]).repeat(5, 23)
    weight, dy = torch.randint(-8, 9, (69,)).float(), torch.randint(-8, 9, (5, 69)).float()
    with gpt_kernels.use_isa(isa):
        y, _, dweight = forward_backward(lambda *a: rms_norm(*a, eps=0.0), (x, weight), dy)
    assert torch.equal(y, x * weight / 2) and torch.equal(dweight, (dy * x).sum(0) / 2)


def test_layouts():
    for dtype in (torch.float32, torch.bfloat16):
        check_layouts(rms_norm, inputs(*((2, 3) if INTERPRETED else (4, 6)), 33, dtype=dtype))


def test_threads():
    few = BACKEND != "cpu"  # no threads there
    check_threads(rms_norm, inputs(20 if few else 700, 129))
    check_threads(rms_norm, inputs(5 if few else 33, 1025))


def test_gradcheck():
    x, weight = inputs(4, 9, dtype=torch.float64)
    for args in ((x,), (x, weight)):
        check_gradcheck(rms_norm, args)

    check_second_derivative(rms_norm, inputs(2, 5))


def test_opcheck():
    x, weight = inputs(3, 5, 9)
    for args in ((x, None, 1e-6), (x, weight, 1e-6), (x.bfloat16(), weight, 0.1), (x[:0], weight, 0.1)):
        check_opcheck(FWD, args)
        check_opcheck(BWD, (args[0], *args[:2], FWD(*args)[1]))


def test_compile():
    check_compile(rms_norm, inputs(4, 33), inputs(7, 12))
    check_compile(lambda x: rms_norm(x), inputs(2, 3, 33)[:1])


def test_empty():
    for shape in ((0, 5), (3, 0), (0, 0), (2, 0, 4), (0,)):
        check_empty(rms_norm, inputs(*shape))


def test_specials():
    x, weight = inputs(8, 33)
    x[1, 3], x[2, 4], x[3, 5], x[4], x[5], x[6] = float("nan"), float("inf"), float("-inf"), 0.0, 1e15 * torch.randn(33), 1e-40
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_specials(rms_norm, eager, (x.to(dtype), weight.to(dtype)))


X, W, STAT = torch.zeros(4, 8), torch.zeros(8), torch.zeros(4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rms_norm(X, W[:7]), r"rms_norm_fwd: weight must have shape \(8,\), got \(7,\)"),
        (lambda: rms_norm(X, W.view(8, 1)), r"weight must have shape \(8,\), got \(8, 1\)"),
        (lambda: FWD(X, W.double(), 1e-6), "weight must be float32 like x or float32, got float64"),
        (lambda: FWD(X.bfloat16(), W.half(), 1e-6), "weight must be bfloat16 like x or float32, got float16"),
        (lambda: rms_norm(X.long()), "x must be float32, (float64, )?bfloat16 or float16, got int64"),
        (lambda: rms_norm(torch.tensor(1.0)), "x must have at least 1 dimension, got a scalar"),
        (lambda: rms_norm(X, eps=-1.0), "eps must be finite and not negative, got -1"),
        (lambda: rms_norm(X, eps=float("inf")), "eps must be finite and not negative, got inf"),
        (lambda: FWD(X, torch.zeros(16)[::2], 1e-6), "weight must be contiguous"),
        (lambda: FWD(X.t(), None, 1e-6), r"x must be contiguous, got shape \(8, 4\)"),
        (lambda: BWD(X[:3], X, W, STAT), r"rms_norm_bwd: dy must have the shape of x \(4, 8\), got \(3, 8\)"),
        (lambda: BWD(X.half(), X, W, STAT), "dy must be float32, got float16"),
        (lambda: BWD(X, X, W[:5], STAT), r"weight must have shape \(8,\), got \(5,\)"),
        (lambda: BWD(X, X, W, STAT[:3]), "rstd must have 4 elements, one per row of x, got 3"),
        (lambda: BWD(X, X, W, STAT.double()), "rstd must be float32, got float64"),
        (lambda: rms_norm(X, W.to("meta")), "not on the expected device"),
    ],
)
def test_bad_input(call, message):
    check_raises(call, RuntimeError, message)
