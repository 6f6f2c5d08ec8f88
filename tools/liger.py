"""Liger's kernels on the same problems: what each of its ops launches, forward and backward, on one plain shape."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from gpt_kernels.architectures import ARCHITECTURES
from gpt_kernels.triton import common
from gpt_kernels.triton.common import Launch

New = Callable[..., Tensor]


def layer_norm(new: New, M: int, N: int) -> None:
    from liger_kernel.ops.layer_norm import layer_norm_backward, layer_norm_forward

    x, w = new(M, N), new(N)
    y, x, mean, rstd, *_ = layer_norm_forward(x, w, w, 1e-5)
    layer_norm_backward(y, x, w, w, mean, rstd)


def rms_norm(new: New, M: int, N: int) -> None:
    from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward

    x, w = new(M, N), new(N)
    y, x, rstd, block, warps, mode = rms_norm_forward(x, w, 1e-5, 0.0, "llama", False)
    rms_norm_backward(y, x, w, rstd, 0.0, mode, block, warps, False, False)


def softmax(new: New, *shape: int) -> None:
    from liger_kernel.ops.softmax import _softmax_backward, _softmax_forward

    x = new(*shape)
    _softmax_backward(x, *_softmax_forward(x))


def cross_entropy(new: New, M: int, V: int) -> None:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    target = torch.zeros(M, dtype=torch.int64)  # in memory: its values are looked at
    cross_entropy_forward(new(M, V).requires_grad_(), target, None, -100, 0.0, 0.0, "mean", None, False)


# the ops that it has like ours
OPS: dict[str, Callable[..., None]] = {f.__name__: f for f in (layer_norm, rms_norm, softmax, cross_entropy)}


def launches(op: str, new: New, shape: tuple[int, ...], arch: str) -> list[Launch]:
    """What it would launch on `arch`."""
    with _recording(arch) as recorded:
        OPS[op](new, *shape)
    # its backwards launch one program per processor, and know none where the tensors are not on a GPU
    programs = ARCHITECTURES[arch].processors
    for n, launch in enumerate(recorded):
        if launch.grid == (1,):
            rows = {k: common.cdiv(v, programs) for k, v in launch.parameters.items() if k == "rows_per_program"}
            recorded[n] = dataclasses.replace(launch, grid=(programs,), parameters={**launch.parameters, **rows})
    return recorded


@contextlib.contextmanager
def _recording(arch: str) -> Iterator[list[Launch]]:
    from liger_kernel.ops import cross_entropy, utils
    from triton.runtime.jit import JITFunction

    recorded: list[Launch] = []

    def record(kernel, *args, grid, warmup, **parameters):
        bound = kernel.signature.bind_partial(
            *args, **{k: v for k, v in parameters.items() if k in kernel.signature.parameters}
        )
        options = {k: v for k, v in parameters.items() if k not in kernel.signature.parameters}
        recorded.append(Launch(kernel, grid, (), {**bound.arguments, **options}))

    generation = {"sm_100": "blackwell", "sm_120": "blackwell_consumer"}.get(arch, "")
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(cross_entropy, "infer_device_arch", lambda: generation),
        mock.patch.object(cross_entropy, "is_hip", lambda: arch.startswith("gfx")),
        mock.patch.object(utils, "is_hip", lambda: arch.startswith("gfx")),
    ):
        yield recorded
