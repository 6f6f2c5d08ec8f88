import math

import pytest
import torch
from op_checks import (
    assert_rounded,
    check_raises,
    every_isa,
    forward_backward,
)

import gpt_kernels
from gpt_kernels import gelu
from gpt_kernels.cases.gelu import FORMS, form, inputs

FWD = torch.ops.gpt_kernels.gelu_fwd.default
BWD = torch.ops.gpt_kernels.gelu_bwd.default


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


def test_infinity():
    """eager's vectorised erf gives NaN here"""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for ours, _ in map(form, FORMS):
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
        (lambda: gelu(X, B.to("meta")), RuntimeError, "on one device"),
        (lambda: FWD(X.t(), None, True), RuntimeError, r"x must be contiguous, got shape \(8, 4\)"),
        (lambda: BWD(X[:3], X, B, True), RuntimeError, r"gelu_bwd: dy must have the shape of x \(4, 8\), got \(3, 8\)"),
        (lambda: BWD(X.half(), X, B, True), RuntimeError, "dy must be float32, got float16"),
        (lambda: BWD(X, X, B[:1], True), RuntimeError, r"bias must have shape \(8,\), got \(1,\)"),
    ],
)
def test_bad_input(call, error, message):
    check_raises(call, error, message)
