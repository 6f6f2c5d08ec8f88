"""dropout with a residual added, against torch.nn.functional.dropout and an addition."""

import torch
import torch.nn.functional as F
from harness import Case, run

import gpt_kernels
from gpt_kernels.ops.dropout import dropout_cost

SHAPES = ((1, 64), (2048, 384), (8192, 768), (4096, 3072))
QUICK = ((1, 64), (8192, 768))


def eager(x, residual):
    return residual + F.dropout(x, 0.1)


def ours(x, residual):
    return gpt_kernels.dropout(x, 0.1, residual=residual)


def cases(quick):
    for M, N in QUICK if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x, residual = (torch.randn(M, N).to(dtype).requires_grad_() for _ in range(2))

            def cost(backward, x=x, residual=residual):
                return dropout_cost(x, None if backward else residual)

            yield Case("dropout", f"{M}x{N}", (x, residual), eager, ours, cost, random=True)


if __name__ == "__main__":
    run(cases, __doc__)
