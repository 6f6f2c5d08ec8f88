"""What only the simulator can say of the CUDA row kernels: which way a row goes on which GPU, how wide its accesses are, and
that no schedule changes a bit. The ops' own tests run on them with GPT_KERNELS_TEST_BACKEND=cuda_sim, as these do."""

import grids
import pytest
import torch
from op_checks import check_truth, forward_backward
from test_cross_entropy import check

import gpt_kernels
from gpt_kernels.cases.cross_entropy import DEFAULTS, inputs
from gpt_kernels.cases.softmax import eager, scores
from gpt_kernels.ops.cross_entropy import fwd

if grids.BACKEND != "cuda_sim":
    pytest.skip("needs GPT_KERNELS_TEST_BACKEND=cuda_sim", allow_module_level=True)
from csrc import sim


@pytest.fixture(autouse=True)
def on_the_simulator():
    with gpt_kernels.use_backend("cuda_sim"):
        yield


def ways(call):
    """kernel -> counters of the launches that call() makes"""
    with sim.counting() as counters:
        call()
    return counters


def both(x, *rest):
    return forward_backward(gpt_kernels.softmax, (x, *rest), x)


def gradients(op, x, *parameters):
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    y = getattr(gpt_kernels, op)(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, x.detach())


WIDE = {  # share of 16-byte accesses; the rest are scalars per row, the ends of odd rows and, of split ones, the parts' sums
    "softmax 50257": (0.99, lambda: both(scores(5, 50257, dtype=torch.bfloat16))),
    "softmax 50257 fp32": (0.98, lambda: both(scores(4, 50257))),
    "softmax 1000": (0.98, lambda: both(scores(9, 1000, dtype=torch.bfloat16))),
    "cross_entropy 50257": (0.99, lambda: fwd(*inputs(5, 50257, dtype=torch.bfloat16, ignored=False), *DEFAULTS, True)),
    "cross_entropy 131072": (0.97, lambda: fwd(*inputs(1, 131072, dtype=torch.bfloat16), *DEFAULTS, True)),
    "dropout 768": (0.99, lambda: gpt_kernels.dropout(torch.randn(256, 768).bfloat16(), 0.1)),
    "gelu 3072": (0.99, lambda: gradients("gelu", torch.randn(128, 3072).bfloat16())),
    "swiglu 1408": (0.99, lambda: gradients("swiglu", torch.randn(32, 1408).bfloat16(), torch.randn(32, 1408).bfloat16())),
    "swiglu of one tensor": (0.99, lambda: gpt_kernels.swiglu(torch.randn(32, 2816).bfloat16())),
    "rotary 64": (0.99, lambda: gpt_kernels.apply_rotary_emb(torch.randn(2, 5, 12, 80).bfloat16(), *torch.randn(2, 5, 32))),
    "layer_norm 768": (0.99, lambda: gpt_kernels.layer_norm(torch.randn(64, 768).bfloat16(), torch.ones(768).bfloat16())),
    "rms_norm 4096": (0.99, lambda: gpt_kernels.rms_norm(torch.randn(8, 4096).bfloat16(), torch.ones(4096).bfloat16())),
}


@pytest.mark.parametrize("case", WIDE)
def test_cuda_sim_rows_move_16_bytes_at_a_time(case):
    least, call = WIDE[case]
    for name, c in ways(call).items():
        if "count" in name or "reduce" in name:  # they read targets and sums
            continue
        assert c.global_bytes_16 >= least * c.global_bytes, f"{name}: {c['global_bytes_16'] / c['global_bytes']:.4f}"


def test_cuda_sim_rows_are_read_once():
    """From memory each byte of a row that fits comes once: x in, y out; forward and backward, on 99, 163 and 227 KB."""
    for arch, dtype, N in ((86, torch.bfloat16, 50257), (80, torch.float32, 40001), (90, torch.float32, 50257)):
        x, M = scores(7, N, dtype=dtype), 7
        with sim.configured(arch=arch):
            (c,) = ways(lambda x=x: gpt_kernels.softmax(x)).values()
        row = M * N * x.element_size()
        assert c.launches == 1 and c.cp_async > 0
        assert 2 * row <= c.global_bytes < 2.001 * row, c


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_cuda_sim_rows_around_48_kb(dtype):
    """A row that fits the memory a kernel has without asking, but not beside what the kernel declares (384 to 768 bytes)."""
    size = dtype.itemsize
    for N in range(24080 * 2 // size, 24640 * 2 // size, 128):
        gpt_kernels.softmax(scores(1, N, dtype=dtype))
        fwd(*inputs(1, N, dtype=dtype, ignored=False), *DEFAULTS, True)
        both(scores(1, N // 2, dtype=dtype))


@pytest.mark.parametrize("arch, longest", ((86, 50297), (80, 83065), (90, 115833)))
def test_cuda_sim_rows_fit_every_limit(arch, longest):
    """The longest 16-bit row that a block holds beside its sums; one column more goes in parts. The model takes no more."""
    with sim.configured(arch=arch):
        for N, launches in ((longest, 1), (longest + 1, 2)):
            x = scores(2, N, dtype=torch.bfloat16)
            half = x[:, : N // 2 - 8].contiguous()  # of which two fit
            (c,) = ways(lambda x=x: gpt_kernels.softmax(x)).values()
            (both,) = ways(lambda x=half: torch.ops.gpt_kernels.softmax_bwd(x, x, 1.0, False)).values()
            assert (c.launches, both.launches) == (launches, 1)


def test_cuda_sim_rows_beyond_32_bits():
    """Logits 2^31 elements apart; only the pages that are used take memory."""
    far = 2**31 + 64
    torch.use_deterministic_algorithms(False)  # or the whole allocation would be filled with NaN
    for N in (33, 20000):
        logits = torch.empty(far + N, dtype=torch.bfloat16).as_strided((2, N), (far, 1))
        logits.copy_(torch.randn(2, N))
        target = torch.tensor([5, 7])
        for a, b in zip(fwd(logits, target, *DEFAULTS, True), fwd(logits.clone(), target, *DEFAULTS, True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("N", (16400, 20011))
def test_cuda_sim_rows_in_shared_memory(N):
    """Block by block through rows of every skew, off the boundary of what is written, causal, ignored, and back in order."""
    dtype = torch.bfloat16
    # 11 rows by 6 blocks: of 20011 columns, row 10 has a chunk more than row 4
    check_truth(gpt_kernels.softmax, eager, (scores(11, N, dtype=dtype), None, -0.3), name="softmax")
    x = scores(7, N, dtype=dtype)
    for shift in (1, 4):  # elements: the input stands elsewhere than the output
        moved = torch.empty(x.numel() + shift, dtype=dtype)[shift:].view(x.shape).copy_(x)
        for a, b in zip(both(moved), both(x), strict=True):
            assert torch.equal(a, b)
    y = gpt_kernels.softmax(x[None], None, 1.0, True)[0]
    for t in range(7):
        seen = N - 6 + t
        assert torch.equal(y[t, :seen], gpt_kernels.softmax(x[t, :seen])) and not y[t, seen:].any()
    check((scores(8, N, dtype=dtype), inputs(8, N)[1]), label_smoothing=0.1, logit_softcap=15.0)
    # shifted logits: their gradient is contiguous, rows of both begin at different places of 16 bytes
    logits, target = scores(2, 5, N, dtype=dtype)[:, :-1], torch.randint(0, N, (2, 4))
    target[0, 1] = target[1, 3] = -100
    expected = fwd(logits.contiguous(), target, *DEFAULTS, True)
    assert all(torch.equal(a, b) for a, b in zip(fwd(logits, target, *DEFAULTS, True), expected, strict=True))


@pytest.mark.parametrize("op, parameters", (("layer_norm", 2), ("rms_norm", 1)))
def test_cuda_sim_norms_of_more_rows_than_warps(op, parameters):
    """A warp's weight gradient is of several rows, a block's of several warps."""
    inputs = (torch.randn(120, 64), *(torch.randn(64) for _ in range(parameters)))
    check_truth(getattr(gpt_kernels, op), lambda x, *p: getattr(torch.nn.functional, op)(x, (64,), *p), inputs, name=op)


@pytest.mark.parametrize("N", (770, 776))
def test_cuda_sim_dropout_of_more_elements_than_threads(N):
    """A thread goes on by steps that begin in one row and end in another: the CPU's mask."""
    x, rng_state = torch.ones(200, N), torch.tensor([5, 7])
    y = gpt_kernels.dropout(x, 0.3, rng_state=rng_state)
    with gpt_kernels.use_backend("cpu"):
        assert torch.equal(y, gpt_kernels.dropout(x, 0.3, rng_state=rng_state))


CALLS = {
    **{
        f"layer_norm {N}": lambda N=N: gradients("layer_norm", *map(torch.randn, ((9, N), (N,), (N,)))) for N in (33, 768, 2056)
    },
    "rms_norm": lambda: gradients("rms_norm", torch.randn(9, 1024), torch.randn(1024)),
    "gelu": lambda: gradients("gelu", torch.randn(17, 1030), torch.randn(1030)),
    "softmax": lambda: both(scores(5, 17001, dtype=torch.bfloat16)),
    "softmax causal": lambda: both(scores(2, 9, 513), None, 0.5, True),
    "softmax masked": lambda: both(scores(5, 1030), torch.randn(5, 1030)),
    "softmax parts": lambda: both(scores(1, 40001, dtype=torch.bfloat16)),
    "cross_entropy": lambda: fwd(*inputs(5, 17001, dtype=torch.bfloat16), *DEFAULTS, True),
    "cross_entropy parts": lambda: fwd(*inputs(1, 40001), -100, 1, 0.1, 1e-3, 15.0, True),
    "dropout": lambda: (gpt_kernels.dropout(torch.randn(5, 770), 0.3, rng_state=torch.tensor([5, 7])),),
}


@pytest.mark.parametrize("call", CALLS)
def test_cuda_sim_rows_schedules_agree(call):
    """Bit for bit, whichever warp and lane comes first, whichever block; asynchronous copies land as late as they may."""
    results = []
    for seed in sim.SEEDS:
        torch.manual_seed(0)
        with sim.configured(seed=seed):
            results.append(CALLS[call]())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
