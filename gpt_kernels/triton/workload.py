"""The kernel calls of a GPT's training step: what `tune` measures and the GPU kit runs.

Tensors may be on "meta", where a call has shapes and no numbers, or fake.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dispatch
from . import OPS


@dataclass(frozen=True)
class Sizes:
    batch: int
    context: int
    width: int
    heads: int
    vocab: int = 50257


SIZES = {
    "gpt2": Sizes(8, 1024, 768, 12),
    "gpt2-medium": Sizes(8, 1024, 1024, 16),
    "gpt2-large": Sizes(8, 1024, 1280, 20),
    "gpt2-xl": Sizes(8, 1024, 1600, 25),
}


def launcher(op: str) -> Callable:
    """The Triton launcher of an op, not by way of the dispatcher: it takes "meta" tensors while launches are recorded."""
    return getattr(importlib.import_module(f"{__package__}.{OPS[op]}"), op)


def calls(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple[str, tuple]]:
    """(op, arguments) of every op, forward before backward; what a backward has saved comes from the dispatcher's forward."""
    B, T, N, H, V = sizes.batch, sizes.context, sizes.width, sizes.heads, sizes.vocab
    M = B * T

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def run(op: str, *args):
        return getattr(getattr(torch.ops, dispatch.NAMESPACE), op).default(*args)

    rng_state = torch.arange(1, 3, device=device)
    x, dy, weight, bias = randn(M, N), randn(M, N), randn(N), randn(N)

    yield "layer_norm_fwd", (x, weight, bias, 1e-5)
    _, mean, rstd = run("layer_norm_fwd", x, weight, bias, 1e-5)
    yield "layer_norm_bwd", (dy, x, weight, mean, rstd, True)
    yield "rms_norm_fwd", (x, weight, 1e-6)
    yield "rms_norm_bwd", (dy, x, weight, run("rms_norm_fwd", x, weight, 1e-6)[1])
    yield "dropout_fwd", (x, dy, rng_state, 0.1)

    wide, bias = randn(M, 4 * N), randn(4 * N)
    for tanh in (True, False):
        yield "gelu_fwd", (wide, bias, tanh)
        yield "gelu_bwd", (wide, wide, bias, tanh)

    # as a model has them: views of one (B, T, 3, H, D)
    q, k, v = (t.transpose(1, 2) for t in randn(B, T, 3, H, N // H).unbind(2))
    do = randn(B, T, H, N // H).transpose(1, 2)
    for dropout_p in (0.0, 0.1):
        options = (None, None, rng_state, (N // H) ** -0.5, 0.0, dropout_p, 0, -1, 0)  # causal
        yield "attention_fwd", (q, k, v, *options)
        o, lse = run("attention_fwd", q, k, v, *options)
        yield "attention_bwd", (do, q, k, v, o, lse, *options, False)

    scores = randn(B, H, T, T)
    yield "softmax_fwd", (scores, None, 0.125, True)
    yield "softmax_bwd", (scores, run("softmax_fwd", scores, None, 0.125, True), 0.125, True)

    logits, target = randn(M, V), torch.randint(V, (M,), device=device)
    mean_of_all = (-100, 1, 0.0, 0.0, 0.0)  # ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap
    for with_grad in (False, True):
        yield "cross_entropy_fwd", (logits, target, *mean_of_all, with_grad)
    lse = run("cross_entropy_fwd", logits, target, *mean_of_all, False)[2]
    dloss = torch.ones((), device=device)
    yield "cross_entropy_bwd", (dloss, logits, target, lse, *mean_of_all)
    yield "cross_entropy_bwd_out", (dloss, logits, target, lse, *mean_of_all, False, logits)
