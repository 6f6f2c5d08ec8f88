"""What only the simulator can say of the CUDA attention kernels: bank conflicts, tiles visited, adversarial schedules. The
op's own tests run on them with GPT_KERNELS_TEST_BACKEND=cuda_sim, as these do."""

import grids
import pytest
import torch
from test_attention import RNG, ours, qkv

from gpt_kernels import use_backend
from gpt_kernels.ops import attention as module

if grids.BACKEND != "cuda_sim":
    pytest.skip("needs GPT_KERNELS_TEST_BACKEND=cuda_sim", allow_module_level=True)
from csrc import sim

DIMS = (64, 80, 96, 128)


def run(q, k, v, **options):
    """o, dq, dk, dv on the simulator, for an output gradient of integers"""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    with use_backend("cuda_sim", "attention_fwd", "attention_bwd"):
        o = ours(**options)(q, k, v)
        return o.detach(), *torch.autograd.grad(
            o, (q, k, v), torch.arange(o.numel()).remainder(7).view(o.shape).to(o.dtype) - 3
        )


def counted(*args, **options):
    """name of a kernel without its template arguments -> counters"""
    with sim.counting() as counters:
        run(*args, **options)
    return {name.partition("<")[0]: c for name, c in counters.items()}


@pytest.mark.parametrize("D", (32, *DIMS, 256))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_cuda_sim_no_bank_conflicts(D, dtype):
    for name, c in counted(*qkv(1, 1, 1, 130, 130, D, dtype), right=0).items():
        assert c.shared_wavefronts == c.shared_ideal, f"{name}: {c}"
        # rows of whole chunks are read and written by 16 bytes, but for the statistics
        assert c.global_bytes_16 > 0.97 * c.global_bytes, f"{name}: {c}"


@pytest.mark.parametrize("D", DIMS)
def test_cuda_sim_tiles_outside_the_range_are_not_visited(D):
    """Matrix instructions are those of the tiles that hold a visible score, no more, and five products per tile backward."""
    T, padded = 512, 96 if D == 80 else D
    keys, rows = (128, 64) if D == 64 else (64, 128)  # of a block forward, of queries backward
    for options, sees in (
        ({}, lambda i, j: True),
        ({"right": 0}, lambda i, j: j <= i),
        ({"left": 100, "right": 0}, lambda i, j: i - 100 <= j <= i),
    ):

        def tiles(rows, columns, sees=sees):
            ranges = ((range(i, i + rows), range(j, j + columns)) for i in range(0, T, rows) for j in range(0, T, columns))
            return sum(
                any(sees(i, j) for i in (r[0], r[-1]) for j in (c[0], c[-1])) or any(sees(i, i) for i in r if i in c)
                for r, c in ranges
            )

        counters = counted(*qkv(1, 1, 1, T, T, D, torch.bfloat16), **options)
        assert counters["attention_fwd"].mma == tiles(128, keys) * 2 * 128 * keys * D // 2048
        assert counters["attention_bwd"].mma == tiles(rows, 128) * 5 * rows * 128 * padded // 2048


@pytest.mark.parametrize(
    "shape, dtype, options",
    (
        ((1, 2, 1, 150, 140, 64), torch.bfloat16, {"right": 0}),
        ((1, 1, 1, 140, 270, 128), torch.bfloat16, {"left": 130}),
        ((1, 1, 1, 70, 200, 96), torch.float16, {}),
        ((1, 2, 1, 70, 81, 72), torch.bfloat16, {"softcap": 2.0, "dropout_p": 0.3, "rng": RNG}),
        ((1, 1, 1, 40, 70, 130), torch.float16, {"right": 3}),
        ((1, 1, 1, 40, 70, 65), torch.float32, {"right": 3}),
    ),
)
def test_cuda_sim_schedules_agree(shape, dtype, options):
    """Bit for bit, whichever warp and lane comes first, whichever block; asynchronous copies land as late as they may."""
    args, results = qkv(*shape, dtype), []
    for seed in sim.SEEDS:
        with sim.configured(seed=seed):
            results.append(run(*args, **options))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("D", (64, 80, 96, 128, 200))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_cuda_sim_integers_are_exact(D, dtype):
    """Equal scores over 2^n keys: o and dv are sums of integers over 2^n; one visible key each: o, dv copies, dq, dk 0."""
    T = 256
    zero, v = torch.zeros(1, 1, T, D, dtype=dtype), torch.randint(-8, 9, (1, 1, T, D)).to(dtype)
    do = (torch.arange(v.numel()).remainder(7).view(v.shape) - 3).double()
    o, _, _, dv = run(zero, zero, v)
    assert torch.equal(o, v.double().mean(2, keepdim=True).to(dtype).expand_as(v))
    assert torch.equal(dv, do.mean(2, keepdim=True).to(dtype).expand_as(v))
    q, k = (torch.randint(-2, 3, v.shape).to(dtype) for _ in range(2))
    for shift in (0, 17):  # query i sees key i + shift alone
        o, dq, dk, dv = run(q, k, v, left=0, right=0, offset=shift)
        assert torch.equal(o[:, :, : T - shift], v[:, :, shift:]) and (o[:, :, T - shift :] == 0).all()
        assert torch.equal(dv[:, :, shift:].double(), do[:, :, : T - shift]) and (dv[:, :, :shift] == 0).all()
        assert (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("options", [{side: size} for side in ("left", "right") for size in (30, 62, 94)], ids=str)
def test_cuda_sim_edges_of_a_warp(options):
    """One score of a corner hidden, at every place of a warp's tile: lse counts visible keys, dv the queries that see a key."""
    T = 160
    zero, v = (torch.zeros(1, 1, T, 64, dtype=torch.bfloat16) for _ in range(2))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (j >= i - options.get("left", T)) & (j <= i + options.get("right", T))
    window = options.get("left", -1), options.get("right", -1)
    with use_backend("cuda_sim", "attention_fwd"):
        lse = module.fwd(zero, zero, v, None, None, None, 1.0, 0.0, 0.0, 0, *window)[1]
    torch.testing.assert_close(lse[0, 0], seen.sum(1).log(), rtol=1e-5, atol=1e-5)
    dv = run(zero, zero, v, **options)[3]
    do = torch.arange(v.numel()).remainder(7).view(T, 64).double() - 3
    expected = (seen / seen.sum(1, keepdim=True)).double().t() @ do
    torch.testing.assert_close(dv[0, 0].double(), expected, rtol=1e-2, atol=2e-3)


@pytest.fixture
def tf32():
    """A switch; off again after the test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda: setattr(matmul, "fp32_precision", "tf32")
    matmul.fp32_precision = before


@pytest.mark.parametrize("D", (40, 128, 200))
def test_cuda_sim_tf32(D, tf32):
    """Where torch is told so, float32 is multiplied on the tensor cores: exact for few bits, near for all; otherwise not."""
    args = qkv(1, 2, 1, 70, 90, D, torch.float32)
    expected = run(*args, right=3)
    assert all(c.mma == 0 for c in counted(*args, right=3).values())
    tf32()
    counters = counted(*args, right=3)
    assert counters["attention_fwd"].mma > 0 and counters["attention_bwd"].mma > 0
    for a, e in zip(run(*args, right=3), expected, strict=True):
        assert 1e-5 < (a - e).norm() / e.norm() < 1e-3
    zero, v = torch.zeros(1, 1, 64, D), torch.randint(-8, 9, (1, 1, 64, D)).float()
    assert torch.equal(run(zero, zero, v)[0], v.mean(2, keepdim=True).expand_as(v))


@pytest.mark.parametrize("processors", (1, 2, 7))
def test_cuda_sim_splits(processors):
    """However many blocks share a head's keys, dq is the same sum; the same bits each time."""
    args = qkv(1, 1, 1, 130, 500, 64, torch.float32)
    expected = run(*args, right=0, offset=370)
    with sim.configured(processors=processors):
        first, second = (run(*args, right=0, offset=370) for _ in range(2))
    for a, b, e in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_cuda_sim_small_shared_memory():
    """On sm_86 and its like, with 99 KB for a block, smaller tiles: the model refuses what does not fit."""
    for D in (*DIMS, 256):
        for dtype in (torch.bfloat16, torch.float32):
            args, within = qkv(1, 1, 1, 70, 70, D, dtype), 2e-2 if dtype == torch.bfloat16 else 1e-5
            with sim.configured(arch=86):
                small = run(*args, right=0)
            for a, e in zip(small, run(*args, right=0), strict=True):
                torch.testing.assert_close(a, e, rtol=within, atol=within)


def test_cuda_sim_tuned_and_general_kernels_agree():
    """The same numbers off a 16-byte boundary go through the general kernel."""
    q, k, v = qkv(1, 2, 1, 130, 200, 64, torch.bfloat16)
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    for a, e in zip(run(shifted, k, v, right=0), run(q, k, v, right=0), strict=True):
        torch.testing.assert_close(a.float(), e.float(), rtol=2e-2, atol=2e-2)


def test_cuda_sim_refuses_float64():
    q, k, v = qkv(1, 1, 1, 4, 4, 8, torch.float64)
    with (
        use_backend("cuda_sim", "attention_fwd"),
        pytest.raises(RuntimeError, match="attention_fwd: q must be float32, bfloat16 or float16, got"),
    ):
        module.fwd(q, k, v, None, None, None, 1.0, 0.0, 0.0, 0, -1, -1)


@pytest.mark.parametrize("shift", (0, 1))
def test_cuda_sim_strides_beyond_32_bits(shift):
    """Rows 2^31 elements apart, on a 16-byte boundary and off it; only the pages that are used take memory."""
    far = 2**31 + 64
    torch.use_deterministic_algorithms(False)  # or the whole allocation would be filled with NaN
    k = torch.empty(far + 64, dtype=torch.float16).as_strided((1, 1, 2, 16), (0, 0, far, 1), shift)
    k.copy_(torch.randn(1, 1, 2, 16))
    q, _, v = qkv(1, 1, 1, 6, 2, 16, torch.float16)
    with use_backend("cuda_sim", "attention_fwd"):
        torch.testing.assert_close(ours()(q, k, v), ours()(q, k.clone(), v), rtol=1e-3, atol=1e-3)
