"""How kernels are launched on a GPU: captured in a graph, on another stream, on another device, many times over."""

import concurrent.futures
import copy
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from kernel_calls import tensors, with_kernel
from torch._dynamo.backends.common import aot_autograd

import gpt_kernels
from gpt_kernels import dispatch
from gpt_kernels.cases import SMALL, Sizes, calls, op, step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_op = pytest.mark.parametrize("name", dispatch.ops())
BACKEND = os.environ.get("GPT_KERNELS_TEST_BACKEND") or "triton"
ROOT = pathlib.Path(__file__).parents[2]
TIMES = int(os.environ.get("GPT_KERNELS_RACE_LOOPS", "250"))
LARGE, TINY = Sizes(4, 512, 768, 12), Sizes(1, 16, 16, 1, vocab=40)  # TINY: for the interpreter


def calls_of(name, dtype, device, sizes=SMALL):
    """(what, arguments) of one op; an op that writes into an argument gets one of its own to write into"""
    found = [(what, args) for what, n, args in with_kernel(BACKEND, calls(dtype, device, sizes)) if n == name]
    assert found, f"no call of {name}"
    return found


def results(name, args):
    """What a call leaves behind; an op without results has written into its last argument"""
    if name == "cross_entropy_bwd_out":
        args = (*args[:-1], torch.full_like(args[-1], float("nan")))
    return [t.clone() for t in tensors(op(name)(*args)) or [args[-1]]]


def same(a, b):
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(a, b, strict=True))


@every_dtype
@every_op
def test_graph_capture_and_replay(cuda, name, dtype):
    """Captured once, replayed twice: the bits of the ordinary call; with other values in the same memory, theirs."""
    for what, args in calls_of(name, dtype, cuda):
        expected = results(name, args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = results(name, args)
        for _ in range(2):
            for t in out:
                t.zero_()
            graph.replay()
            assert same(out, expected), f"{what}: replay"
        floats = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
        for t in {t.data_ptr(): t for t in floats}.values():
            t.mul_(0.5)
        graph.replay()
        assert same(out, results(name, args)), f"{what}: replay with other values"


CAPTURED_FIRST = """
import sys
sys.path[:0] = [".", "tests"]
import torch
from gpt_kernels.cases import calls, op, step
from kernel_calls import tensors, with_kernel
import gpt_kernels
backend, name = sys.argv[1:]
made = [a for _, n, a in with_kernel(backend, calls(torch.bfloat16, "cuda")) if n == name][:1]
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with gpt_kernels.use_backend(backend):
    for args in made:
        if name == "cross_entropy_bwd_out":
            args = (*args[:-1], torch.zeros_like(args[-1]))
        with torch.cuda.graph(graph):
            out = tensors(op(name)(*args)) or [args[-1]]
        graph.replay()
        torch.cuda.synchronize()
        captured = [t.clone() for t in out]
        expected = tensors(op(name)(*args)) or [args[-1]]
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(captured, expected, strict=True)), name
"""


@every_op
def test_captured_without_a_warm_up(cuda, name):
    """The first call of its kernel in the process is the one that is captured: nothing may be loaded or asked for in a way that
    a capture forbids. calls() has run forwards of other ops by then, which do not load this one's."""
    done = subprocess.run([sys.executable, "-c", CAPTURED_FIRST, BACKEND, name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_threads_with_different_sizes(cuda):
    """One kernel asked for different amounts of shared memory at once: no thread takes back what the other asked for."""
    rows = {n: torch.randn(3, n, device=cuda).bfloat16() for n in (9000, 24400, 40000, 60000)}
    expected = {n: gpt_kernels.softmax(x) for n, x in rows.items()}

    def work(n):
        with torch.cuda.stream(torch.cuda.Stream()):
            ok = all(torch.equal(gpt_kernels.softmax(rows[n]), expected[n]) for _ in range(200))
            torch.cuda.current_stream().synchronize()
        return ok

    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, rows))


@every_dtype
def test_columns_swept(cuda, dtype):
    """Rows of 6 to 25 thousand columns: every way a kernel takes by their length, and where shared memory runs out."""
    for n in (*range(6000, 25600, 509), *range(24186, 24576, 97), *range(12122, 12288, 41)):
        x = torch.randn(3, n, device=cuda).to(dtype).requires_grad_()
        target, dy = torch.randint(n, (3,), device=cuda), torch.randn(3, n, device=cuda).to(dtype)
        for ours, eager in (
            (gpt_kernels.softmax, lambda x: torch.softmax(x, -1)),
            (lambda x, n=n: gpt_kernels.layer_norm(x), lambda x, n=n: torch.nn.functional.layer_norm(x, (n,))),
        ):
            for got, want in zip(*(((y := f(x)), *torch.autograd.grad(y, x, dy)) for f in (ours, eager)), strict=True):
                torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4)
        got = gpt_kernels.cross_entropy(x, target, dtype=torch.float32)
        torch.testing.assert_close(got, torch.nn.functional.cross_entropy(x.float(), target), rtol=1e-3, atol=1e-3)


@every_dtype
@every_op
def test_launches_do_not_synchronise(cuda, name, dtype):
    given = calls_of(name, dtype, cuda)
    for _, args in given:
        results(name, args)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _, args in given:
            results(name, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_side_stream(cuda, name):
    """Inputs that are only ready on the current stream: a launch on another one would read zeros."""
    for what, args in calls_of(name, torch.float32, cuda):
        expected = results(name, args)
        late = [torch.zeros_like(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for to, source in zip(late, args, strict=True):
                if to is not source:
                    to.copy_(source)
            out = results(name, late)
        stream.synchronize()
        assert same(out, expected), what


@every_op
def test_wrong_current_device(two_gpus, name):
    """Tensors on the second GPU while the first is the current one; the current one stays."""
    first, second = two_gpus
    for what, args in calls_of(name, torch.bfloat16, second):
        with torch.cuda.device(second):
            expected = results(name, args)
        with torch.cuda.device(first):
            out = results(name, args)
            assert torch.cuda.current_device() == 0
        assert same(out, expected) and all(t.device == second for t in out), what


def test_arguments_on_two_gpus_are_refused(two_gpus):
    first, second = two_gpus
    with pytest.raises(RuntimeError, match="weight must be on cuda:0"):
        gpt_kernels.layer_norm(torch.randn(3, 8, device=first), torch.randn(8, device=second))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
@every_op
def test_same_bits_every_time(device, name, dtype):
    """A race shows as another result, sooner or later; what runs beside it shifts the timing."""
    given = [args for n, args in step(LARGE if device.type == "cuda" else TINY, dtype, device) if n == name]
    assert given, f"no call of {name}"
    for args in given:
        expected = results(name, args)
        for i in range(TIMES):
            assert same(results(name, args), expected), f"run {i} of {TIMES} differs"
            if device.type == "cuda" and i % 10 == 0:
                torch.cuda._sleep(1000 * (i % 70))


@every_op
def test_memory_is_given_back(cuda, name):
    """Outputs gone, the allocator holds what it held: nothing is kept per call, and captures do not pile up."""
    given = calls_of(name, torch.bfloat16, cuda)
    for _, args in given:
        results(name, args)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        for _, args in given:
            results(name, args)
    assert torch.cuda.memory_allocated() == before


def train(model, ids, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        _, loss = model(ids, targets=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())  # a replay of the graph writes over it
    return losses


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    config = gpt_kernels.GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=64, dropout=0.0)
    return gpt_kernels.GPT(config).to(device), torch.randint(257, (2, 64), device=device)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_compiled(cuda, model, mode):
    """One graph without breaks; "reduce-overhead" captures it in CUDA graphs."""
    model, ids = model
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for ours, eager in zip(train(compiled, ids), train(twin, ids), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_ops_are_opaque_nodes(model):
    model, ids = model
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend))
    compiled(ids, targets=ids)[1].backward()
    for name in ("layer_norm", "attention", "gelu", "cross_entropy"):
        assert {f"gpt_kernels.{name}_{way}.default" for way in ("fwd", "bwd")} <= set(seen), name


def test_attention_memory_is_linear(cuda):
    """T = 32768 would need a 4 GiB matrix of scores."""
    q, k, v = (torch.randn(1, 1, 32768, 64, device=cuda, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gpt_kernels.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * q.numel() * 4


@pytest.mark.skipif(BACKEND != "triton", reason="the Triton kernels are tuned")
def test_autotune_on_this_gpu(cuda, tmp_path, monkeypatch):
    """The whole way: measured, stored, read; a captured launch measures nothing."""
    from gpt_kernels.triton import tuned, tuning
    from gpt_kernels.triton.dropout import DROPOUT

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "_tuned", {})
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    DROPOUT.forget()
    try:
        x = torch.randn(64, 776, device=cuda)
        state = torch.cuda.get_rng_state()
        rng_state = torch.arange(2, device=cuda)
        y = gpt_kernels.dropout(x, 0.5, rng_state=rng_state)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        (store,) = tuned._tuned.values()
        assert len(store) == 1 and store.path.exists() and len(tuned.Tuned(store.machine)) == 1
        assert torch.equal(gpt_kernels.dropout(x, 0.5, rng_state=rng_state), y)
    finally:
        DROPOUT.forget()
