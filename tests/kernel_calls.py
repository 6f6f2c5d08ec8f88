"""What a caller sees of a kernel's results, and which of gpt_kernels.cases.calls() a backend has kernels for."""

import torch

from gpt_kernels import dispatch


def tensors(result):
    return [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]


def form(result):
    """What a caller can see of results without their values."""
    return [(t.shape, t.dtype, t.stride()) for t in tensors(result)]


def with_kernel(backend, given):
    """Those of the calls for whose op `backend` has a kernel."""
    return ((what, name, args) for what, name, args in given if dispatch.kernel_of(name, backend))
