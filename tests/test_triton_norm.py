"""The paths of triton/norm.py that small shapes miss: every geometry, rows in a loop, groups of programs in any order."""

import random

import pytest
import torch
import torch.nn.functional as F
from op_checks import assert_same, check_truth, forward_backward

from gpt_kernels import dispatch, layer_norm, rms_norm
from gpt_kernels.triton import INTERPRETED

if not INTERPRETED:
    pytest.skip("the interpreter runs with TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402

from gpt_kernels.triton import norm  # noqa: E402


def rms_eager(x, weight):
    xf = x.float() if x.dtype == torch.bfloat16 else x
    return (xf * (xf.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).to(x.dtype)


OPS = {
    "layer_norm": (layer_norm, lambda x, *parameters: F.layer_norm(x, x.shape[-1:], *parameters), 2),
    "rms_norm": (rms_norm, rms_eager, 1),
}
every_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def on_triton():
    with dispatch.use_backend("triton", *(f"{op}_{way}" for op in OPS for way in ("fwd", "bwd"))):
        yield


@pytest.fixture
def programs(monkeypatch):
    """Set how many programs the backward has at most."""
    return lambda count: monkeypatch.setattr(norm, "processors", lambda device: count)


def arguments(op, M, N, dtype=torch.float32):
    x = (torch.randn(M, N) * 2 + 0.7).to(dtype)
    return x, *(torch.randn(N).to(dtype) for _ in range(OPS[op][2]))


def geometry(op, BLOCK_M, CHUNK, CHUNKS=None, PREFETCH=False):
    """Override both directions; the long kernels without CHUNKS."""
    common = {"BLOCK_M": BLOCK_M, "CHUNK": CHUNK, "num_warps": 16} | ({"CHUNKS": CHUNKS} if CHUNKS else {})
    backward = common | {"SPAN": 16} | ({"PREFETCH": PREFETCH} if CHUNKS else {})
    return norm.TUNABLES[f"{op}_fwd"].override(common), norm.TUNABLES[f"{op}_bwd"].override(backward)


GEOMETRIES = {
    "several rows per program": (4, 64, 1, True),
    "chunks, the last one in part": (2, 16, 3, False),
    "chunks, the next row on its way": (2, 16, 3, True),
    "long rows": (1, 16),
    "several long rows per program": (2, 16),
    "a long row of one chunk": (1, 64),
}


@every_op
@pytest.mark.parametrize("count", [2, 64])
@pytest.mark.parametrize("shape", GEOMETRIES)
def test_geometry(op, shape, count, programs):
    """11 rows of 40 columns on 2 and on as many programs as there are blocks of rows."""
    fn, eager, _ = OPS[op]
    programs(count)
    forward, backward = geometry(op, *GEOMETRIES[shape])
    with forward, backward:
        dtype = torch.float32 if count == 2 else torch.bfloat16
        check_truth(fn, eager, arguments(op, 11, 40, dtype), name=f"{shape}, {count} programs")


@every_op
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
@pytest.mark.parametrize("shape", ["chunks, the next row on its way", "long rows"])
def test_missing_parameters(op, shape, missing, programs):
    """one plane of partial sums or none, and it is the right one"""
    if op == "rms_norm" and missing == "bias":
        pytest.skip("RMS norm has none")
    fn, _, _ = OPS[op]
    x, *parameters = arguments(op, 7, 40)
    given = [None if missing in (name, "both") else p for name, p in zip(("weight", "bias"), parameters, strict=False)]
    neutral = [p if p is not None else torch.ones(40) if i == 0 else torch.zeros(40) for i, p in enumerate(given)]
    dy = torch.randn(7, 40)
    programs(3)
    forward, backward = geometry(op, *GEOMETRIES[shape])
    with forward, backward:
        actual, expected = forward_backward(fn, (x, *given), dy), forward_backward(fn, (x, *neutral), dy)
    present = [i for i, p in enumerate(given) if p is not None]
    assert_same(actual, [*expected[:2], *(expected[2 + i] for i in present)], missing)


@every_op
@pytest.mark.parametrize("count", [5, 17])
@pytest.mark.parametrize("shape", ["several rows per program", "long rows"])
def test_arrival_order(op, shape, count, programs, monkeypatch):
    """The same bits whichever program comes last."""
    fn, _, _ = OPS[op]
    programs(count)
    rows = 4 * count - 1 if shape == "several rows per program" else count + 1
    args, dy = arguments(op, rows, 20), torch.randn(rows, 20)
    builder = interpreter.interpreter_builder
    set_grid_idx = type(builder).set_grid_idx
    results, last = [], set()
    forward, backward = geometry(op, *GEOMETRIES[shape])
    with forward, backward:
        for seed in range(3):
            order = list(range(count))
            if seed:
                random.Random(seed).shuffle(order)

            def shuffled(self, x, y, z, order=order):
                set_grid_idx(self, order[x] if self.grid_dim[0] == count else x, y, z)

            monkeypatch.setattr(type(builder), "set_grid_idx", shuffled)
            results.append(forward_backward(fn, args, dy))
            last.add(order[-1])
    assert len(last) > 1
    for result in results[1:]:
        assert_same(result, results[0], "arrival order")
    expected = forward_backward(OPS[op][1], args, dy, torch.float64)
    for gradient, truth in zip(results[0][2:], expected[2:], strict=True):
        torch.testing.assert_close(gradient, truth.float(), rtol=1e-5, atol=1e-5)


def test_large_mean_of_long_rows():
    """the first chunk's mean need not be the row's: 16 columns at 1e5, 24 at 0"""
    x = torch.randn(5, 40) + 1e5 * (torch.arange(40) < 16)
    forward, backward = geometry("layer_norm", 1, 16)
    with forward, backward:
        check_truth(*OPS["layer_norm"][:2], (x, *arguments("layer_norm", 1, 40)[1:]))
        y, mean, rstd = torch.ops.gpt_kernels.layer_norm_fwd(torch.full((2, 40), 0.1), None, None, 0.0)
    assert torch.equal(mean, torch.full((2,), 0.1)) and not rstd.isnan().any()


def test_equal_elements():
    """a variance that rounds to less than 0 is 0"""
    x = torch.rand(16, 1).mul(100).expand(16, 40).contiguous()
    forward, backward = geometry("layer_norm", 1, 64)
    with forward, backward:
        assert not torch.ops.gpt_kernels.layer_norm_fwd(x, None, None, 0.0)[2].isnan().any()
