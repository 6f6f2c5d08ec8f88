"""layer_norm against torch.nn.functional.layer_norm, with weight and bias."""

import torch
import torch.nn.functional as F
from harness import Case, run

import gpt_kernels
from gpt_kernels.ops.layer_norm import layer_norm_cost

SHAPES = ((1, 64), (64, 768), (8192, 768), (4096, 1600))
QUICK = ((1, 64), (8192, 768))


def eager(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def cases(quick):
    for M, N in QUICK if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x, weight, bias = (torch.randn(*s).to(dtype).requires_grad_() for s in ((M, N), (N,), (N,)))

            def cost(backward, x=x):
                return layer_norm_cost(x, backward)

            yield Case("layer_norm", f"{M}x{N}", (x, weight, bias), eager, gpt_kernels.layer_norm, cost)


if __name__ == "__main__":
    run(cases, __doc__)
