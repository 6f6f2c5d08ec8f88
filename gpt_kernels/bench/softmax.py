"""softmax against torch.softmax: alone, and scaled and causal as in attention."""

from collections.abc import Iterator

import torch

import gpt_kernels

from ..ops.softmax import softmax_cost
from .measure import Case, Settings, grid

SIZES = {"tiny": (1, 64), "small": (64, 1024), "main": (12288, 1024), "huge": (65536, 4096)}
SCALE = 0.125


def eager(x):
    return torch.softmax(x, -1)


def causal(x):
    return gpt_kernels.softmax(x, None, SCALE, True)


def cost(inputs, backward):
    return softmax_cost(inputs[0], backward)


def cases(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(*shape, dtype=dtype):
            return [torch.randn(shape).to(dtype).requires_grad_()]

        def flat(M=M, N=N, inputs=inputs):
            return inputs(M, N)

        yield Case("softmax", f"{M}x{N}", dtype, flat, eager, gpt_kernels.softmax, cost, main=main)
        if M % N == 0:

            def square(M=M, N=N, inputs=inputs):
                return inputs(M // N, N, N)

            hidden: list[torch.Tensor] = []  # made at the first call, as a model has it

            def masked(x, N=N, hidden=hidden):
                if not hidden:
                    hidden.append(torch.ones(N, N, dtype=torch.bool).triu(1))
                return torch.softmax((x * SCALE).masked_fill(hidden[0], -torch.inf), -1)

            shape, options = f"{M // N}x{N}x{N} causal", {"causal": True}
            yield Case("softmax", shape, dtype, square, masked, causal, cost, options=options, main=main)
