"""python -m streamed_rows: outputs so large that their rows are written past the cache (csrc/cpu/launch.h: output_streams) have
the bits of the same rows in small outputs. In a process of its own: memory fresh from the system is written otherwise, and
only reuse_memory() keeps it from coming."""

import resource

import torch
from grids import DTYPES, ISAS
from op_checks import assert_same, forward_backward

import gpt_kernels

gpt_kernels.reuse_memory()
# bytes of an output: two are beyond the 32 MB from which on a call's rows are streamed, those of a part are not
SIZE, PARTS = 17 * 2**20, 7
RNG = torch.tensor([3, 5])


def calls(x):
    """(name, op, arguments after x, how many of the parts to compare): a row of dropout's mask depends on its place."""
    w, b = torch.randn(2, x.shape[-1]).to(x.dtype)
    yield "layer_norm", gpt_kernels.layer_norm, (w, b), PARTS
    yield "rms_norm", gpt_kernels.rms_norm, (w,), PARTS
    yield "softmax", gpt_kernels.softmax, (), PARTS
    yield "causal softmax", lambda x: gpt_kernels.softmax(x, causal=True), (), PARTS
    yield "gelu", lambda x: gpt_kernels.gelu(x, approximate="tanh"), (), PARTS
    yield "gelu of a biased x", gpt_kernels.gelu, (b,), PARTS
    yield "dropout", lambda x, r: gpt_kernels.dropout(x, 0.1, residual=r, rng_state=RNG), (torch.randn_like(x),), 1


def gradient(logits):
    """Of a sum, each row's is its own; rows of 50257 begin inside a line."""
    loss = gpt_kernels.cross_entropy(logits.requires_grad_(), torch.arange(len(logits)) % 25, reduction="sum")
    return torch.autograd.grad(loss, logits)


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def check(name: str, call, args: list, compared: int = PARTS) -> None:
    """call(*args) gives tensors in the rows of args[0]: bit for bit those of its parts."""
    for isa in ISAS:
        with gpt_kernels.use_isa(isa):
            for _ in range(6):  # until the memory of what went before serves
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


for dtype in DTYPES:
    for rows, columns in ((32, 768), (33, 1000)):  # 1000 of 16 bits are no whole lines: written as ever
        x = torch.randn(-(-SIZE // (rows * columns * dtype.itemsize * PARTS)) * PARTS, rows, columns).to(dtype)
        for name, op, rest, compared in calls(x):
            check(name, lambda *args, op=op: forward_backward(op, args, args[0])[:2], [x, *rest], compared)
    rows = 50 * PARTS if dtype.itemsize == 2 else 25 * PARTS
    check("cross_entropy", gradient, [torch.randn(rows, 50257).to(dtype)])
