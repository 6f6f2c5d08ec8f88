"""Other people's kernels for the same ops, called as their documentation has it. One that is not there has a reason.

An adapter takes the case's options and gives a function of its inputs; it imports when it is made. Those of Liger are executed
by our tests under Triton's interpreter; the others need a GPU and were not executed by us.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class Absent(Exception):
    """Why a variant has no numbers."""


@dataclass(frozen=True)
class Peer:
    module: str
    install: str
    ops: dict[str, Callable[..., Callable]]  # op -> (**options) -> its function of the inputs; may raise Absent

    def absence(self) -> str | None:
        """Why none of it can run on torch's default device."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: {self.install}"
        if torch.get_default_device().type != "cuda":
            return "its kernels need a GPU"
        return None

    def function(self, op: str, options: dict[str, Any]) -> Callable:
        if reason := self.absence():
            raise Absent(reason)
        if op not in self.ops:
            raise Absent(f"it has no {op} like ours")
        return self.ops[op](**options)


# ---- Liger ----


def liger_layer_norm():
    from liger_kernel.ops import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def liger_rms_norm():
    from liger_kernel.ops import LigerRMSNormFunction

    # not in place: the gradient would be written over one that is used again
    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)


def liger_softmax(causal: bool = False):
    from liger_kernel.ops import LigerSoftmaxFunction

    if causal:
        raise Absent("its softmax takes no scale and mask")
    return LigerSoftmaxFunction.apply


def liger_cross_entropy(inplace: bool = False):
    from liger_kernel.transformers.functional import liger_cross_entropy

    if not inplace:
        raise Absent("it writes the gradient over the logits: see the case in place")
    return lambda logits, target: liger_cross_entropy(logits.clone(), target)


# ---- flash-attn ----


def flash_attention(causal: bool, dropout_p: float):
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, dropout_p=dropout_p, causal=causal).transpose(1, 2)


def flash_layer_norm():
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return lambda x, weight, bias: layer_norm_fn(x, weight, bias, eps=1e-5)


def flash_rms_norm():
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return lambda x, weight: rms_norm_fn(x, weight, None, eps=1e-6)


def flash_cross_entropy(inplace: bool = False):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def mean(logits, target):
        logits = logits.clone() if inplace else logits
        return cross_entropy_loss(logits, target, inplace_backward=inplace)[0].mean()

    return mean


# ---- xformers, apex ----


def xformers_attention(causal: bool, dropout_p: float):
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    mask = LowerTriangularMask() if causal else None
    return lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=mask, p=dropout_p).transpose(1, 2)


def apex_layer_norm():
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, x.shape[-1:], eps=1e-5)


def apex_rms_norm():
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return lambda x, weight: fused_rms_norm_affine(x, weight, x.shape[-1:], eps=1e-6)


def apex_cross_entropy(inplace: bool = False):
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    if inplace:
        raise Absent("its cross entropy has no form in place")
    return lambda logits, target: SoftmaxCrossEntropyLoss.apply(logits, target, 0.0, -100, True).mean().to(logits.dtype)


PEERS = {
    "liger": Peer(
        "liger_kernel",
        "pip install liger-kernel",
        {
            "layer_norm": liger_layer_norm,
            "rms_norm": liger_rms_norm,
            "softmax": liger_softmax,
            "cross_entropy": liger_cross_entropy,
        },
    ),
    "flash_attn": Peer(
        "flash_attn",
        "pip install flash-attn",
        {
            "attention": flash_attention,
            "layer_norm": flash_layer_norm,
            "rms_norm": flash_rms_norm,
            "cross_entropy": flash_cross_entropy,
        },
    ),
    "xformers": Peer("xformers", "pip install xformers", {"attention": xformers_attention}),
    "apex": Peer(
        "apex",
        "build it from its repository",
        {"layer_norm": apex_layer_norm, "rms_norm": apex_rms_norm, "cross_entropy": apex_cross_entropy},
    ),
}


def functions(names: Sequence[str], op: str, options: dict[str, Any]) -> dict[str, Callable[[], Callable]]:
    """name -> what makes its function of the inputs, or raises Absent."""
    return {name: functools.partial(PEERS[name].function, op, options) for name in names}
