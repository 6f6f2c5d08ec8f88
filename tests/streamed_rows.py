"""python -m streamed_rows: outputs so large that their rows are written past the cache (csrc/cpu/launch.h: output_streams) have
the bits of the same rows in small outputs. In a process of its own: memory fresh from the system is written otherwise, and
only reuse_memory() keeps it from coming."""

import resource

import torch
from grids import DTYPES, ISAS
from op_checks import assert_same, forward_backward

import gpt_kernels
from gpt_kernels import cases
from gpt_kernels.cases import STREAMED_PARTS

gpt_kernels.reuse_memory()
PARTS = STREAMED_PARTS


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def check(name: str, call, args: list, compared: int = PARTS) -> None:
    """call(*args) gives tensors in the rows of args[0]: bit for bit those of its parts."""
    for isa in ISAS:
        with gpt_kernels.use_isa(isa):
            for _ in range(12):  # until the memory of what went before serves
                whole = parts = same_rows = None
                before = faults()
                whole = call(*args)
                if (fresh := faults() - before) < 64:
                    break
            assert fresh < 64, f"{name}: {fresh} page faults, its memory was not used again"
            cut = [[a.chunk(PARTS)[i] if a.dim() == args[0].dim() else a for a in args] for i in range(compared)]
            parts = [torch.cat(each) for each in zip(*(call(*part) for part in cut), strict=True)]
        same_rows = [a[: len(e)] for a, e in zip(whole, parts, strict=True)]
        assert_same(same_rows, parts, f"{name} {tuple(args[0].shape)} {args[0].dtype} {isa}")


def in_rows(streamed):
    """Its results that have rows: of an op the output and the gradient of its first argument."""
    if streamed.gradient:
        return lambda *args: forward_backward(streamed.call, args, args[0])[:2]
    return streamed.call


for dtype in DTYPES:
    for op in cases.families():
        for streamed in cases.of(op).streamed(dtype):
            check(streamed.what, in_rows(streamed), list(streamed.args), PARTS if streamed.all_parts else 1)
