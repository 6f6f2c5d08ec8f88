"""dropout with a residual added, against torch.nn.functional.dropout and an addition."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gpt_kernels

from ..ops.dropout import dropout_cost
from .measure import Case, Settings, grid

SIZES = {"tiny": (1, 64), "small": (2048, 384), "main": (8192, 768), "more": (4096, 3072), "huge": (65536, 4096)}


def eager(x, residual):
    return residual + F.dropout(x, 0.1)


def ours(x, residual):
    return gpt_kernels.dropout(x, 0.1, residual=residual)


def cost(inputs, backward):
    x, residual = inputs
    return dropout_cost(x, None if backward else residual)


def cases(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(M=M, N=N, dtype=dtype):
            return [torch.randn(M, N).to(dtype).requires_grad_() for _ in range(2)]

        yield Case("dropout", f"{M}x{N}", dtype, inputs, eager, ours, cost, random=True, main=main)
