"""attention against torch's scaled_dot_product_attention and Hugging Face's eager attention, forward and backward apart.

`sweep` goes over sequence lengths, with our reference beside it, which keeps the score of every pair of query and key: what it
needs grows with the square of the length.
"""

import functools
import types
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gpt_kernels

from ..ops.attention import attention_cost
from .measure import Case, Settings

# B, H, T, D, causal, dropout. The first: every dtype, and all of --quick
SHAPES = (
    (4, 12, 1024, 64, True, 0.0),
    (4, 12, 1024, 64, False, 0.0),
    (4, 12, 1024, 64, True, 0.1),
    (4, 8, 1024, 128, True, 0.0),
    (8, 12, 128, 64, True, 0.0),
    (1, 2, 16, 32, True, 0.0),
)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
OPAQUE = "attention is one call, which it does not look into"


def attend(q, k, v, sdpa, causal, dropout_p):
    return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout_p, is_causal=causal)


def hf(T: int, causal: bool, dropout_p: float):
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    module, masks = types.SimpleNamespace(training=True), {}

    def attention(q, k, v):
        if causal and q.dtype not in masks:
            masks[q.dtype] = torch.full((T, T), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)[None, None]
        given = (x.transpose(1, 2) for x in (q, k, v))
        return eager_attention_forward(module, *given, masks.get(q.dtype), dropout=dropout_p)[0].transpose(1, 2)

    return attention


def cost(inputs, backward, causal):
    return attention_cost(*(x.transpose(1, 2) for x in inputs), causal, backward)


def case(B, H, T, D, causal, dropout_p, dtype, **more) -> Case:
    def inputs():
        # (B, H, T, D) as a model has it: views of (B, T, H, D)
        return [torch.randn(B, T, H, D, dtype=dtype).requires_grad_() for _ in "qkv"]

    options = {"causal": causal, "dropout_p": dropout_p}
    eager, ours = (
        functools.partial(attend, sdpa=sdpa, **options)
        for sdpa in (F.scaled_dot_product_attention, gpt_kernels.scaled_dot_product_attention)
    )
    shape = f"B{B} H{H} T{T} D{D}{' causal' if causal else ''}{f' dropout {dropout_p}' if dropout_p else ''}"
    return Case(
        "attention", shape, dtype, inputs, eager, ours, functools.partial(cost, causal=causal), ("fwd", "bwd"),
        options=options, random=dropout_p > 0, opaque=OPAQUE, **more,
    )  # fmt: skip


def cases(settings: Settings) -> Iterator[Case]:
    for n, (B, H, T, D, causal, dropout_p) in enumerate(SHAPES[:1] if settings.quick else SHAPES):
        for dtype in settings.dtypes if n == 0 else settings.dtypes[:1]:
            others = {"hf": functools.partial(hf, T, causal, dropout_p)}
            # a GPU gets a batch that fills it; with dropout the reference is the judge, which keeps all scores
            B = 8 * B if settings.device == "cuda" and T == 1024 and not dropout_p else B
            yield case(B, H, T, D, causal, dropout_p, getattr(torch, dtype), others=others, main=n == 0)


def sweep(settings: Settings) -> Iterator[Case]:
    H = 16 if settings.device == "cuda" else 2
    for T in LENGTHS[:3] if settings.quick else LENGTHS:
        yield case(1, H, T, 64, True, 0.0, getattr(torch, settings.dtypes[0]), length=T, naive=True)
