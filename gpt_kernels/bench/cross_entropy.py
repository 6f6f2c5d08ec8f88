"""cross_entropy against torch.nn.functional.cross_entropy and Hugging Face's loss (in float32), mean over all rows."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gpt_kernels

from ..ops.cross_entropy import cross_entropy_cost
from .measure import Case, Settings, grid

SIZES = {
    "tiny": (4, 64), "small": (64, 1000), "one row": (1, 50257), "main": (1024, 50257), "more": (8192, 8192),
    "huge": (8192, 50257),
}  # fmt: skip


def ours_inplace(logits, target):
    return gpt_kernels.cross_entropy(logits.clone(), target, inplace_backward=True)


def eager_after_clone(logits, target):
    return F.cross_entropy(logits.clone(), target)


def hf():
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss(logits, target):
        return ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=target).to(logits.dtype)

    return loss


def cost(inputs, backward):
    return cross_entropy_cost(inputs[0], backward)


def cost_after_clone(inputs, backward):
    moved, flops = cost(inputs, backward)
    return moved + (0 if backward else 2 * inputs[0].nbytes), flops


def cases(settings: Settings) -> Iterator[Case]:
    for M, V, dtype, main in grid(settings, SIZES):

        def inputs(M=M, V=V, dtype=dtype):
            return [torch.randn(M, V).mul_(2).to(dtype).requires_grad_(), torch.randint(0, V, (M,))]

        yield Case(
            "cross_entropy", f"{M}x{V}", dtype, inputs, F.cross_entropy, gpt_kernels.cross_entropy, cost, others={"hf": hf},
            main=main,
        )  # fmt: skip
        if main:
            # logits as a model has them, no leaf, so that the gradient may be written over them
            yield Case(
                "cross_entropy", f"{M}x{V} in place, after a clone", dtype, inputs, eager_after_clone, ours_inplace,
                cost_after_clone, ("fwd+bwd",), options={"inplace": True},
            )  # fmt: skip
