"""rms_norm against torch.nn.functional.rms_norm, with a weight."""

import torch
import torch.nn.functional as F
from harness import Case, run

import gpt_kernels
from gpt_kernels.ops.rms_norm import rms_norm_cost

SHAPES = ((1, 64), (64, 768), (8192, 768), (4096, 2048))
QUICK = ((1, 64), (8192, 768))


def eager(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def cases(quick):
    for M, N in QUICK if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x, weight = (torch.randn(*s).to(dtype).requires_grad_() for s in ((M, N), (N,)))

            def cost(backward, x=x):
                return rms_norm_cost(x, backward)

            yield Case("rms_norm", f"{M}x{N}", (x, weight), eager, gpt_kernels.rms_norm, cost)


if __name__ == "__main__":
    run(cases, __doc__)
