"""Bias and GELU in one pass against F.gelu(x + bias), in both forms, and the tanh form as Hugging Face's GPT-2 writes it."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gpt_kernels

from ..ops.gelu import gelu_cost
from .measure import Case, Settings, grid

SIZES = {"tiny": (1, 64), "small": (64, 3072), "main": (8192, 3072), "huge": (65536, 4096)}


def eager(x, bias, approximate):
    return F.gelu(x + bias, approximate=approximate)


def hf():
    from transformers.activations import NewGELUActivation

    gelu = NewGELUActivation()
    return lambda x, bias: gelu(x + bias)


def cost(inputs, backward):
    return gelu_cost(inputs[0], backward)


def cases(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(M=M, N=N, dtype=dtype):
            return [torch.randn(*s).to(dtype).requires_grad_() for s in ((M, N), (N,))]

        for form in ("tanh", "none") if main and not settings.quick else ("tanh",):
            theirs, ours = (functools.partial(f, approximate=form) for f in (eager, gpt_kernels.gelu))
            # Hugging Face's form, with all it keeps for backward, ran out of 24 GB at the huge size
            others = {"hf": hf} if form == "tanh" and M * N < 2**28 else {}
            shape, headline = f"{M}x{N} bias {form}", main and form == "tanh"
            yield Case("gelu", shape, dtype, inputs, theirs, ours, cost, others=others, main=headline)
