"""softmax against torch.softmax: alone, and scaled and causal as in attention."""

import torch
from harness import Case, run

import gpt_kernels
from gpt_kernels.ops.softmax import softmax_cost

SHAPES = ((1, 64), (64, 1024), (12288, 1024))
QUICK = ((1, 64), (12288, 1024))


def cases(quick):
    for M, N in QUICK if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x = torch.randn(M, N).to(dtype).requires_grad_()

            def cost(backward, x=x):
                return softmax_cost(x, backward)

            yield Case("softmax", f"{M}x{N}", (x,), lambda x: torch.softmax(x, -1), gpt_kernels.softmax, cost)
            if M % N == 0:
                hidden = torch.ones(N, N, dtype=torch.bool).triu(1)

                def eager(x, hidden=hidden):
                    return torch.softmax((x * 0.125).masked_fill(hidden, -torch.inf), -1)

                def ours(x):
                    return gpt_kernels.softmax(x, None, 0.125, True)

                yield Case(
                    "softmax", f"{M // N}x{N}x{N} causal", (x.detach().view(-1, N, N).requires_grad_(),), eager, ours, cost
                )


if __name__ == "__main__":
    run(cases, __doc__)
