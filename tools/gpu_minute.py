"""What a minute on a GPU tells: attention and the row ops in bfloat16, on our backends and PyTorch, device and host apart.

python -m tools.gpu_minute. Device time is that of a CUDA graph's replays (triton.testing), without Python in it; PyTorch's
backward passes, which autograd runs, are timed by events. Host time is until a call returns, the GPU not waited for. One line
each, as it is measured: a lease that ends leaves what was read so far. `make gpu` is the whole kit, `bench` the benchmark.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from triton.testing import do_bench, do_bench_cudagraph

import gpt_kernels
from gpt_kernels import dispatch

OPS = torch.ops.gpt_kernels
SHAPES = ((8, 12, 1024, 64), (4, 16, 4096, 128), (2, 16, 4096, 64), (8, 12, 256, 64), (8, 16, 512, 128))
ROWS = (65536, 768)
DEVICE = {"device": "cuda", "dtype": torch.bfloat16}


def milliseconds(call: Callable, graph: bool = True) -> float:
    if graph:
        return do_bench_cudagraph(call, rep=30, return_mode="median")
    return do_bench(call, warmup=10, rep=40, return_mode="median")


def host_microseconds(call: Callable, loops: int = 300) -> float:
    best = float("inf")
    for _ in range(4):  # the first compiles
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(loops):
            call()
        best = min(best, (time.perf_counter() - begin) / loops * 1e6)
    torch.cuda.synchronize()
    return best


def say(what: str, whose: str, forward: float, backward: float, unit: str, work: Sequence[float]) -> None:
    """Milliseconds of both passes, and the work of each in 1e9 of the unit's."""
    passes = zip(("fwd", "bwd"), (forward, backward), work, strict=True)
    print(f"{what} {whose}:", ", ".join(f"{way} {ms * 1e3:.1f} us {w / ms:.4g} {unit}" for way, ms, w in passes), flush=True)


def attention(shape: tuple[int, int, int, int], whose: str) -> None:
    B, H, T, D = shape
    q, k, v = (torch.randn(shape, **DEVICE) for _ in "qkv")
    do, flops = torch.randn_like(q), 2 * B * H * T * T * D / 1e9  # two products, half of each
    if whose == "torch":
        leaves = [t.requires_grad_() for t in (q, k, v)]

        def call():
            return F.scaled_dot_product_attention(*leaves, is_causal=True)

        o = call()
        with torch.no_grad():
            forward = milliseconds(call)
        backward = milliseconds(lambda: torch.autograd.grad(o, leaves, do, retain_graph=True), graph=False)
    else:
        options = (None, None, None, D**-0.5, 0.0, 0.0, 0, -1, 0)  # causal
        with dispatch.use_backend(whose):
            o, lse = OPS.attention_fwd(q, k, v, *options)
            forward = milliseconds(lambda: OPS.attention_fwd(q, k, v, *options))
            backward = milliseconds(lambda: OPS.attention_bwd(do, q, k, v, o, lse, *options, False))
    say(f"attention B{B} H{H} T{T} D{D} causal", whose, forward, backward, "TFLOP/s", (flops, 2.5 * flops))


def rows(whose: str) -> None:
    M, N = ROWS
    x, w, dy = torch.randn(M, N, **DEVICE), torch.randn(N, **DEVICE), torch.randn(M, N, **DEVICE)
    moved = x.numel() * x.element_size() / 1e9
    if whose == "torch":
        x, w = x.requires_grad_(), w.requires_grad_()
        calls = {
            "layer_norm": (lambda: F.layer_norm(x, (N,), w, w), (x, w)),
            "gelu tanh": (lambda: F.gelu(x, approximate="tanh"), (x,)),
            "softmax": (lambda: torch.softmax(x, -1), (x,)),
        }

        def backward_of(y, inputs):
            return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

        passes = {name: (call, backward_of(call(), inputs)) for name, (call, inputs) in calls.items()}
    else:
        _, mean, rstd = OPS.layer_norm_fwd(x, w, w, 1e-5)
        p = OPS.softmax_fwd(x, None, 1.0, False)
        passes = {
            "layer_norm": (lambda: OPS.layer_norm_fwd(x, w, w, 1e-5), lambda: OPS.layer_norm_bwd(dy, x, w, mean, rstd, True)),
            "gelu tanh": (lambda: OPS.gelu_fwd(x, None, True), lambda: OPS.gelu_bwd(dy, x, None, True)),
            "softmax": (lambda: OPS.softmax_fwd(x, None, 1.0, False), lambda: OPS.softmax_bwd(dy, p, 1.0, False)),
        }
    for name, (forward, backward) in passes.items():
        with torch.no_grad():
            times = milliseconds(forward), milliseconds(backward, graph=whose != "torch")
        say(f"{name} {M}x{N}", whose, *times, "TB/s", (2 * moved, 3 * moved))


def host(whose: str) -> None:
    x, w, q = torch.randn(128, 768, **DEVICE), torch.randn(768, **DEVICE), torch.randn(2, 12, 64, 64, **DEVICE)
    ours = whose != "torch"
    calls = {
        "layer_norm": lambda: gpt_kernels.layer_norm(x, w, w) if ours else F.layer_norm(x, (768,), w, w),
        "gelu": lambda: gpt_kernels.gelu(x) if ours else F.gelu(x, approximate="tanh"),
        "attention": lambda: (gpt_kernels if ours else F).scaled_dot_product_attention(q, q, q, is_causal=True),
    }
    with torch.no_grad():
        print(f"host us {whose}: {', '.join(f'{n} {host_microseconds(c):.1f}' for n, c in calls.items())}", flush=True)


def main(backends: Sequence[str] = ()) -> None:
    backends = backends or [name for name in ("cuda", "triton") if dispatch.kernel_of("gelu_fwd", name)]
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "backends", *backends, flush=True)
    for shape in SHAPES:
        for whose in ("torch", *backends):
            attention(shape, whose)
    for measure in (host, rows):
        for whose in ("torch", *backends):
            with contextlib.nullcontext() if whose == "torch" else dispatch.use_backend(whose):
                measure(whose)


if __name__ == "__main__":
    main()
