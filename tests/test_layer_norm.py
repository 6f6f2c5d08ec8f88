import pytest
import torch
from op_checks import (
    check_raises,
    every_isa,
    forward_backward,
)

import gpt_kernels
from gpt_kernels import layer_norm
from gpt_kernels.cases.layer_norm import inputs
from gpt_kernels.ops import layer_norm as module

BWD = torch.ops.gpt_kernels.layer_norm_bwd.default
FWD = torch.ops.gpt_kernels.layer_norm_fwd.default


@every_isa
def test_a_row_alone(isa):
    x, weight, bias = inputs(3, 5, 65)
    with gpt_kernels.use_isa(isa):
        assert torch.equal(layer_norm(x[1, 2], weight, bias), layer_norm(x, weight, bias)[1, 2])


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
        (lambda: layer_norm(X, W.to("meta")), "on one device"),
    ],
)
def test_bad_input(call, message):
    check_raises(call, RuntimeError, message)
