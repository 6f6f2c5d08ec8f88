"""cross_entropy against torch.nn.functional.cross_entropy, mean over all rows."""

import torch
import torch.nn.functional as F
from harness import Case, run

import gpt_kernels
from gpt_kernels.ops.cross_entropy import cross_entropy_cost

SHAPES = ((4, 64), (64, 1000), (1, 50257), (1024, 50257), (8192, 8192))
QUICK = ((4, 64), (1024, 50257))


def ours_inplace(logits, target):
    return gpt_kernels.cross_entropy(logits.clone(), target, inplace_backward=True)


def eager_after_clone(logits, target):
    return F.cross_entropy(logits.clone(), target)


def cases(quick):
    for M, V in QUICK if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            logits = torch.randn(M, V).mul_(2).to(dtype).requires_grad_()
            target = torch.randint(0, V, (M,))

            def cost(backward, logits=logits):
                return cross_entropy_cost(logits, backward)

            inputs = (logits, target)
            yield Case("cross_entropy", f"{M}x{V}", inputs, F.cross_entropy, gpt_kernels.cross_entropy, cost)
            # logits as a model has them, no leaf, so that the gradient may be written over them
            if M == 1024:
                shape = f"{M}x{V} in place, after a clone"
                yield Case("cross_entropy", shape, inputs, eager_after_clone, ours_inplace, cost, directions=("fwd+bwd",))


if __name__ == "__main__":
    run(cases, __doc__)
