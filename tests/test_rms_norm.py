import pytest
import torch
import torch.nn.functional as F
from op_checks import (
    assert_rounded,
    check_raises,
    every_isa,
    forward_backward,
)

import gpt_kernels
from gpt_kernels import rms_norm
from gpt_kernels.cases.rms_norm import inputs

FWD = torch.ops.gpt_kernels.rms_norm_fwd.default
BWD = torch.ops.gpt_kernels.rms_norm_bwd.default


@every_isa
def test_a_row_alone(isa):
    x, weight = inputs(3, 5, 65)
    with gpt_kernels.use_isa(isa):
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
        (lambda: rms_norm(X, W.to("meta")), "on one device"),
    ],
)
def test_bad_input(call, message):
    check_raises(call, RuntimeError, message)
