"""Bias and GELU in one pass against F.gelu(x + bias), in both forms."""

import torch
import torch.nn.functional as F
from harness import Case, run

import gpt_kernels
from gpt_kernels.ops.gelu import gelu_cost

SHAPES = ((1, 64), (64, 3072), (8192, 3072))
QUICK = ((1, 64), (8192, 3072))


def cases(quick):
    for M, N in QUICK if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for form in ("tanh", "none"):
                torch.manual_seed(0)
                x, bias = (torch.randn(*s).to(dtype).requires_grad_() for s in ((M, N), (N,)))

                def eager(x, bias, form=form):
                    return F.gelu(x + bias, approximate=form)

                def ours(x, bias, form=form):
                    return gpt_kernels.gelu(x, bias, form)

                def cost(backward, x=x):
                    return gelu_cost(x, backward)

                yield Case("gelu", f"{M}x{N} bias {form}", (x, bias), eager, ours, cost)


if __name__ == "__main__":
    run(cases, __doc__)
