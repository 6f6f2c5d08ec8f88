"""The problems that tools/static.py compiles: they make every launcher launch every kernel."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

from gpt_kernels import triton as backend

from .problems import Problem


def launcher(op: str) -> Callable:
    return getattr(importlib.import_module(f"{backend.__name__}.{backend.OPS[op]}"), op)


def layer_norm(M: int, N: int, **options) -> Problem:
    def ours(new):
        x, w = new(M, N), new(N)
        y, mean, rstd = launcher("layer_norm_fwd")(x, w, new(N), 1e-5)
        launcher("layer_norm_bwd")(y, x, w, mean, rstd, True)

    def liger(new):
        from liger_kernel.ops.layer_norm import layer_norm_backward, layer_norm_forward

        x, w = new(M, N), new(N)
        y, x, mean, rstd, *_ = layer_norm_forward(x, w, w, 1e-5)
        layer_norm_backward(y, x, w, w, mean, rstd)

    return Problem("layer_norm", f"{M}x{N}", ours, liger, columns=N, **options)


def rms_norm(M: int, N: int, **options) -> Problem:
    def ours(new):
        x, w = new(M, N), new(N)
        y, rstd = launcher("rms_norm_fwd")(x, w, 1e-5)
        launcher("rms_norm_bwd")(y, x, w, rstd)

    def liger(new):
        from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward

        x, w = new(M, N), new(N)
        y, x, rstd, block, warps, mode = rms_norm_forward(x, w, 1e-5, 0.0, "llama", False)
        rms_norm_backward(y, x, w, rstd, 0.0, mode, block, warps, False, False)

    return Problem("rms_norm", f"{M}x{N}", ours, liger, columns=N, **options)


def softmax(*shape: int, mask: bool = False, causal: bool = False, **options) -> Problem:
    def ours(new):
        x = new(*shape)
        y = launcher("softmax_fwd")(x, new(1, *shape[1:]) if mask else None, 0.125, causal)
        launcher("softmax_bwd")(x, y, 0.125, causal)

    def liger(new):
        from liger_kernel.ops.softmax import _softmax_backward, _softmax_forward

        x = new(*shape)
        _softmax_backward(x, *_softmax_forward(x))

    name = "x".join(map(str, shape)) + "-mask" * mask + "-causal" * causal
    return Problem("softmax", name, ours, None if mask or causal else liger, columns=shape[-1], **options)


def gelu(M: int, N: int, bias: bool = True, tanh: bool = True, **options) -> Problem:
    def ours(new):
        x, b = new(M, N), new(N) if bias else None
        launcher("gelu_bwd")(launcher("gelu_fwd")(x, b, tanh), x, b, tanh)

    return Problem("gelu", f"{M}x{N}" + "-bias" * bias + "-erf" * (not tanh), ours, columns=N * bias, **options)


def dropout(M: int, N: int, residual: bool, **options) -> Problem:
    def ours(new):
        x = new(M, N)
        launcher("dropout_fwd")(x, new(M, N) if residual else None, new(2, dtype=torch.int64), 0.1)

    return Problem("dropout", f"{M}x{N}" + "-residual" * residual, ours, columns=N, **options)


def cross_entropy(M: int, V: int, reduction: str = "mean", smoothing: float = 0.0, softcap: float = 0.0, **options) -> Problem:
    settings = (-100, ("none", "mean", "sum").index(reduction), smoothing, 1e-4 if smoothing else 0.0, softcap)

    def ours(new):
        x, target = new(M, V), new(M, dtype=torch.int64)
        loss, _, lse, _ = launcher("cross_entropy_fwd")(x, target, *settings, reduction != "none")
        launcher("cross_entropy_fwd")(x, target, *settings, False)
        launcher("cross_entropy_bwd")(loss, x, target, lse, *settings)
        launcher("cross_entropy_bwd_out")(loss, x, target, lse, *settings, False, x)

    def liger(new):
        from liger_kernel.ops.cross_entropy import cross_entropy_forward

        target = torch.zeros(M, dtype=torch.int64)  # in memory: its values are looked at
        cross_entropy_forward(new(M, V).requires_grad_(), target, None, -100, 0.0, 0.0, reduction, None, False)

    name = f"{M}x{V}" + f"-{reduction}" * (reduction != "mean") + "-smoothing" * (smoothing > 0) + "-softcap" * (softcap > 0)
    plain = reduction == "mean" and not smoothing and not softcap
    return Problem("cross_entropy", name, ours, liger if plain else None, columns=V, **options)


def attention(
    B: int, H: int, T: int, D: int, Tk: int | None = None, Hk: int | None = None, causal: bool = True, window: int = -1,
    bias: bool = False, alibi: bool = False, softcap: float = 0.0, dropout_p: float = 0.0, backward: bool = True, **options,
) -> Problem:  # fmt: skip
    """q, k, v are (B, T, H, D) in memory, as a GPT's projections leave them."""
    Tk, Hk = Tk or T, Hk or H

    def ours(new):
        q, k, v = (new(B, t, h, D).transpose(1, 2) for t, h in ((T, H), (Tk, Hk), (Tk, Hk)))
        extras = (
            new(1, H, T, Tk) if bias else None,
            new(H, dtype=torch.float32) if alibi else None,
            new(2, dtype=torch.int64) if dropout_p else None,
            D**-0.5, softcap, dropout_p, Tk - T, window, 0 if causal else -1,
        )  # fmt: skip
        o, lse = launcher("attention_fwd")(q, k, v, *extras)
        if backward:
            launcher("attention_bwd")(o, q, k, v, o, lse, *extras, bias)

    flags = {"full": not causal, f"window{window}": window >= 0, "bias": bias, "alibi": alibi, "softcap": softcap > 0,
             "dropout": dropout_p > 0}  # fmt: skip
    name = f"B{B}H{H}" + f"k{Hk}" * (Hk != H) + f"T{T}" + f"k{Tk}" * (Tk != T) + f"D{D}"
    return Problem("attention", "-".join([name, *(f for f, on in flags.items() if on)]), ours, **options)


ALL = (
    dropout(8192, 768, True, main=True),
    dropout(8192, 1600, False),
    dropout(8191, 767, True, aligned=False),
    gelu(8192, 3072, main=True),
    gelu(8192, 3072, bias=False, tanh=False),
    gelu(8191, 3071, aligned=False),
    layer_norm(8192, 768, main=True),
    layer_norm(8192, 1024),
    layer_norm(8192, 1280),
    layer_norm(8192, 1600),
    layer_norm(4096, 4096),
    layer_norm(2048, 12288),
    layer_norm(512, 32768),
    layer_norm(8, 1024),
    layer_norm(8191, 767, aligned=False),
    rms_norm(8192, 768, main=True),
    rms_norm(8192, 1024),
    rms_norm(8192, 1280),
    rms_norm(4096, 4096),
    rms_norm(2048, 12288),
    rms_norm(512, 32768),
    rms_norm(8191, 767, aligned=False),
    softmax(8192, 1024, main=True),
    softmax(8192, 50257),
    softmax(16, 262144),
    softmax(512, 262144),
    softmax(12, 1024, 1024, causal=True),
    softmax(12, 1024, 1024, mask=True),
    softmax(8191, 1023, aligned=False),
    cross_entropy(8192, 50257, main=True),
    # a lane's 32 bytes of a row beside 26 to 42 of the row's target, loss and statistics, which every lane handles
    cross_entropy(8192, 4096, wide=0.4),
    cross_entropy(16, 128256),
    cross_entropy(8192, 50304),
    cross_entropy(2048, 128256),
    cross_entropy(1024, 262144),
    cross_entropy(8192, 50304, reduction="none", smoothing=0.1, softcap=30.0),
    cross_entropy(8191, 50257, aligned=False),
    attention(8, 12, 1024, 64, main=True),
    attention(4, 16, 2048, 128, main=True),
    attention(4, 16, 1024, 80),
    attention(2, 8, 1024, 256),
    attention(2, 32, 4096, 128, Hk=8, window=1023, softcap=50.0),
    attention(8, 12, 1024, 64, dropout_p=0.1),
    attention(8, 12, 1024, 64, bias=True, causal=False),
    attention(8, 12, 1024, 64, alibi=True),
    attention(32, 32, 1, 128, Tk=4096, Hk=8, backward=False, matrix="HMMA"),
    attention(3, 5, 1023, 64, aligned=False),
)
PROBLEMS = tuple(p for p in ALL if importlib.util.find_spec(f"{backend.__name__}.{p.op}"))
