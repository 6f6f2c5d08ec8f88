"""layer_norm against torch.nn.functional.layer_norm, with weight and bias."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gpt_kernels

from ..ops.layer_norm import layer_norm_cost
from .measure import Case, Settings, grid

SIZES = {"tiny": (1, 64), "small": (64, 768), "main": (8192, 768), "more": (4096, 1600), "huge": (65536, 4096)}


def eager(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def cost(inputs, backward):
    return layer_norm_cost(inputs[0], backward)


def cases(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(M=M, N=N, dtype=dtype):
            return [torch.randn(*s).to(dtype).requires_grad_() for s in ((M, N), (N,), (N,))]

        yield Case("layer_norm", f"{M}x{N}", dtype, inputs, eager, gpt_kernels.layer_norm, cost, main=main)
