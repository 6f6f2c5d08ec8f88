import math

import pytest
import torch
from grids import BACKEND
from op_checks import (
    assert_rounded,
    check_raises,
    check_specials,
    check_truth,
    every_dtype,
    every_isa,
    forward_backward,
)

import gpt_kernels
from gpt_kernels import softmax
from gpt_kernels.cases.softmax import eager, scores

FWD = torch.ops.gpt_kernels.softmax_fwd.default
BWD = torch.ops.gpt_kernels.softmax_bwd.default
INF = float("inf")


@every_isa
def test_float32_mask_beside_16_bit(isa):
    with gpt_kernels.use_isa(isa):
        for dtype in (torch.bfloat16, torch.float16):
            x, mask = scores(2, 3, 6, 65, dtype=dtype), torch.randn(6, 65)
            y, dx, dmask = forward_backward(softmax, (x, mask), torch.randn(x.shape))
            assert y.dtype == dx.dtype == dtype and dmask.dtype == torch.float32 and dmask.shape == mask.shape
            with torch.no_grad():
                assert_rounded(y, softmax(x.float(), mask))


def test_masks_of_any_layout():
    """a bool mask in any layout; expanded by the caller it is still read by stride"""
    x, keep = scores(4, 6, 33), torch.rand(6, 33) < 0.8
    for mask in (keep.t().contiguous().t(), keep[None].expand(4, 6, 33), keep[:, :1].expand(6, 33)):
        assert torch.equal(softmax(x, mask), softmax(x, mask.contiguous()))


def test_nan_in_a_hidden_place_stays_hidden():
    x = scores(3, 33)
    x[1, 3] = math.nan
    y = softmax(x, torch.arange(33) != 3)
    assert not y[1].isnan().any() and softmax(x, torch.arange(33) != 4)[1].isnan()[torch.arange(33) != 4].all()


@every_isa
@every_dtype
def test_rows_with_nothing_visible(dtype, isa):
    """zeros and a zero gradient, by each of the ways to see nothing; the other rows are as if alone"""
    x, dy = scores(3, 5, 33, dtype=dtype), torch.randn(3, 5, 33)
    keep = torch.rand(3, 5, 33) < 0.7
    keep[..., 0], keep[1, 2], keep[2, 0] = True, False, False
    added = torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, -INF)
    alone = keep.any(-1)
    with gpt_kernels.use_isa(isa):
        results = [forward_backward(softmax, (x, m), dy)[:2] for m in (keep, added)]
        results.append(forward_backward(softmax, (x.masked_fill(~keep, -INF),), dy))
        for y, dx in results:
            assert not y[~alone].any() and not dx[~alone].any() and not dx.isnan().any()
            expected = forward_backward(softmax, (x[alone], keep[alone]), dy[alone])
            assert torch.equal(y[alone], expected[0]) and torch.equal(dx[alone], expected[1])
        # more rows than columns: bottom-right alignment leaves the first ones nothing
        y, dx = forward_backward(softmax, (scores(2, 40, 33, dtype=dtype), None, 1.0, True), torch.randn(2, 40, 33))
        assert not y[:, :7].any() and not dx[:, :7].any() and (y[:, 7, 0] == 1).all() and not y[:, 7, 1:].any()
        # a mask of one element for the row, and one for everything
        assert not softmax(x, torch.tensor(False)).any() and not softmax(x, torch.zeros(3, 1, 1, dtype=torch.bool)).any()


@every_isa
def test_far_from_zero(isa):
    """adding a constant to a row changes nothing that the rounding of the sum does not: the maximum is taken off first"""
    x = torch.randint(-8, 9, (4, 257)).float()
    with gpt_kernels.use_isa(isa):
        assert torch.equal(softmax(x + 4096), softmax(x)) and torch.equal(softmax(x - 1e6), softmax(x))
        low = softmax(x, torch.tensor([0.0] * 256 + [torch.finfo(torch.float32).min]))
        assert not low[:, -1].any() and torch.equal(low[:, :-1], softmax(x, torch.arange(257) < 256)[:, :-1])


@pytest.mark.skipif(BACKEND != "triton", reason="launch parameters of the Triton kernels")
@pytest.mark.parametrize("M", (3, 7))  # split over several programs, whole rows
def test_long_rows_in_small(M):
    """the kernels of long rows on chunks of 64 columns: every skew, rows shorter than a chunk, edges, parts of rows"""
    from gpt_kernels.triton import softmax as kernels

    small = {"BLOCK_M": 0, "BLOCK_N": 64, "STAGES": 2, "num_warps": 1}
    lead = () if M == 3 else (2,)
    with kernels.SOFTMAX_FWD.override(small), kernels.SOFTMAX_BWD.override(small):
        for dtype, columns in ((torch.float32, (5, 71, 515)), (torch.bfloat16, (1, 8, 71, 128, 515))):
            for N in columns:
                check_truth(softmax, eager, (scores(M, N, dtype=dtype), None, -0.3), name=f"{M} {N}")
            check_truth(softmax, eager, (scores(*lead, M, 132, dtype=dtype), None, 0.125, True), name="causal")
        keep = (torch.rand(M, 71) < 0.7) | (torch.arange(71) == 0)
        for mask, causal in ((keep, False), (keep, True), (torch.randn(*lead, 1, 71).bfloat16(), True)):
            check_truth(softmax, eager, (scores(*lead, M, 71, dtype=torch.bfloat16), mask, 0.5, causal), name=f"mask {causal}")
        x = scores(9, 133)  # all four skews; a row has the same bits in any of them
        y, dx = forward_backward(softmax, (x,), x)
        for row in (0, 3, 6):
            one = forward_backward(softmax, (x[[row] * 9],), x[[row] * 9])
            assert all(torch.equal(a, b[row].expand(9, -1)) for a, b in zip(one, (y, dx), strict=True))
        x[2], x[3, 70], x[4, 1], x[5, :-1] = torch.nan, torch.nan, INF, -INF
        check_specials(softmax, eager, (x[:M],))
        assert not softmax(x, torch.zeros(9, 1, dtype=torch.bool)).any()


@pytest.mark.parametrize("shape", ((1, 50257), (7, 50257), (1, 128257), (1, 262144)), ids=str)
def test_vocabulary(shape):
    """rows of a vocabulary: split, whole, longest; odd ones begin anywhere"""
    check_truth(softmax, eager, (scores(*shape, dtype=torch.bfloat16),))
    if shape[1] == 50257:
        check_truth(softmax, eager, (scores(*shape),))


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: softmax(X, X[:3]), r"softmax_fwd: mask must broadcast to x \(4, 8\), got \(3, 8\)"),
        (lambda: softmax(X, torch.zeros(2, 4, 8)), r"mask must broadcast to x \(4, 8\), got \(2, 4, 8\)"),
        (lambda: softmax(X[:, :1], X), r"mask must broadcast to x \(4, 1\), got \(4, 8\)"),
        (lambda: softmax(X, X.double()), "mask must be bool, float32 like x or float32, got float64"),
        (lambda: softmax(X.half(), X.bfloat16()), "mask must be bool, float16 like x or float32, got bfloat16"),
        (lambda: softmax(X, X.int()), "mask must be bool, float32 like x or float32, got int32"),
        (lambda: softmax(X.long()), "x must be float32, (float64, )?bfloat16 or float16, got int64"),
        (lambda: FWD(torch.tensor(1.0), None, 1.0, False), "x must have at least 1 dimension, got a scalar"),
        (lambda: softmax(X[0], causal=True), r"causal needs x with at least 2 dimensions \(rows, columns\), got \(8,\)"),
        (lambda: softmax(X, scale=math.nan), "scale must be finite, got nan"),
        (lambda: softmax(X, scale=INF), "scale must be finite, got inf"),
        (lambda: softmax(X.view(*[1] * 20, 4, 8), X), "x must have at most 16 dimensions with a mask, got 22"),
        (lambda: softmax(X, X.to("meta")), "on one device"),
        (lambda: FWD(X.t(), None, 1.0, False), r"x must be contiguous, got shape \(8, 4\)"),
        (lambda: FWD(X, torch.zeros(8, 4).t(), 1.0, False), "mask must be contiguous in its last dimension, got stride 4"),
        (lambda: BWD(X[:3], X, 1.0, False), r"softmax_bwd: dy must have the shape of y \(4, 8\), got \(3, 8\)"),
        (lambda: BWD(X.half(), X, 1.0, False), "dy must be float32, got float16"),
        (lambda: BWD(X[0], X[0], 1.0, True), "causal needs x with at least 2 dimensions"),
    ],
)
def test_bad_input(call, message):
    check_raises(call, RuntimeError, message)
