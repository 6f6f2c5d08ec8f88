"""rms_norm against torch.nn.functional.rms_norm and the module of Hugging Face's Llama, with a weight."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gpt_kernels

from ..ops.rms_norm import rms_norm_cost
from .measure import Case, Settings, grid

SIZES = {"tiny": (1, 64), "small": (64, 768), "main": (8192, 768), "more": (4096, 2048), "huge": (65536, 4096)}


def eager(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def hf():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(1, eps=1e-6)

    def norm(x, weight):
        module._parameters["weight"] = weight
        return module(x)

    return norm


def cost(inputs, backward):
    return rms_norm_cost(inputs[0], backward)


def cases(settings: Settings) -> Iterator[Case]:
    for M, N, dtype, main in grid(settings, SIZES):

        def inputs(M=M, N=N, dtype=dtype):
            return [torch.randn(*s).to(dtype).requires_grad_() for s in ((M, N), (N,))]

        yield Case(
            "rms_norm", f"{M}x{N}", dtype, inputs, eager, gpt_kernels.rms_norm, cost, others={"hf": hf}, main=main
        )  # fmt: skip
