"""Calls of every op with every kind of argument, on any device: "meta" and fake tensors, the interpreter, a GPU."""

import torch

from gpt_kernels import dispatch
from gpt_kernels.triton.workload import Sizes, calls

SMALL = Sizes(2, 48, 96, 2, vocab=257)
# B, H, Hk, Tq, Tk, D, Dv: one query, grouped heads, odd head dims, the largest
ATTENTION = ((1, 2, 2, 1, 70, 64, 64), (2, 4, 2, 33, 65, 80, 80), (1, 3, 1, 17, 17, 40, 24), (1, 1, 1, 5, 9, 256, 256))


def op(name):
    return getattr(torch.ops.gpt_kernels, name).default


def tensors(result):
    return [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]


def form(result):
    """What a caller can see of results without their values."""
    return [(t.shape, t.dtype, t.stride()) for t in tensors(result)]


def every_call(dtype, device, sizes=SMALL):
    """(name, op, arguments): the training step, then optional arguments left out or given, other layouts, odd and no sizes"""
    for name, args in calls(sizes, dtype, device):
        yield f"step {name}", name, args

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, dtype=dtype, device=device)

    def fwd_bwd(what, name, args, backward):
        """backward: forward's outputs -> the backward op's arguments"""
        yield what, f"{name}_fwd", args
        yield what, f"{name}_bwd", backward(*tensors(op(f"{name}_fwd")(*args)))

    for M, N in ((1, 1), (3, 33), (2, 1025), (0, 7), (5, 4097)):
        x, dy = randn(M, N), randn(M, N)
        for w, b in ((None, None), (randn(N), None), (None, randn(N)), (randn(N, dtype=torch.float32),) * 2):
            what = f"{M}x{N}, weight {w is not None and w.dtype}, bias {b is not None}"
            yield from fwd_bwd(
                what, "layer_norm", (x, w, b, 1e-5), lambda _, m, r, x=x, dy=dy, w=w, b=b: (dy, x, w, m, r, b is not None)
            )
            if b is None:
                yield from fwd_bwd(what, "rms_norm", (x, w, 1e-6), lambda _, r, x=x, dy=dy, w=w: (dy, x, w, r))
            if w is None:
                yield from fwd_bwd(what, "gelu", (x, b, M == 3), lambda _, x=x, dy=dy, b=b, M=M: (dy, x, b, M == 3))
        rng_state = torch.arange(2, device=device)
        yield f"{M}x{N}", "dropout_fwd", (x, None, rng_state, 0.5)
        keep = torch.ones(N, dtype=torch.bool, device=device)
        for mask in (None, keep, randn(M, N), randn(M, 1, dtype=torch.float32)):
            yield from fwd_bwd(f"{M}x{N}, mask {mask is not None and mask.dtype}", "softmax", (x, mask, 0.3, mask is None),
                               lambda y, dy=dy, mask=mask: (dy, y, 0.3, mask is None))  # fmt: skip

    for M, V in ((1, 1), (3, 33), (4, 2049)):
        logits, target = randn(M, V + 3).narrow(1, 0, V), torch.zeros(M, dtype=torch.int64, device=device)
        for reduction in (0, 1, 2):
            options = (-100, reduction, 0.1, 1e-3, 15.0)
            yield f"{M}x{V}, reduction {reduction}", "cross_entropy_fwd", (logits, target, *options, reduction > 0)
            _, _, lse, _ = op("cross_entropy_fwd")(logits, target, *options, False)
            dloss = torch.ones((M,) if reduction == 0 else (), device=device)
            yield f"{M}x{V}, reduction {reduction}", "cross_entropy_bwd", (dloss, logits, target, lse, *options)

    rng_state = torch.arange(2, device=device)
    for B, H, Hk, Tq, Tk, D, Dv in ATTENTION:
        q, k, v = randn(B, H, Tq, D), randn(B, Hk, Tk, D), randn(B, Hk, Tk, Dv)
        masks = {
            "plain": (None, None, 0.0, 0.0, 0, -1, -1),
            "causal, dropout": (None, None, 0.0, 0.2, Tk - Tq, -1, 0),
            "window, softcap": (None, None, 20.0, 0.0, 0, 7, 3),
            "alibi": (None, randn(H, dtype=torch.float32), 0.0, 0.0, 0, -1, 0),
            "boolean mask": (torch.ones(1, 1, Tq, Tk, dtype=torch.bool, device=device), None, 0.0, 0.0, 0, -1, -1),
            "bias": (randn(1, H, Tq, Tk), None, 0.0, 0.1, 0, -1, -1),
            "bias of a row": (randn(B, 1, 1, Tk), None, 0.0, 0.0, 0, -1, -1),
        }
        for what, (bias, slopes, softcap, dropout_p, offset, left, right) in masks.items():
            options = (bias, slopes, rng_state, D**-0.5, softcap, dropout_p, offset, left, right)
            need_dbias = bias is not None and bias.dtype != torch.bool
            yield from fwd_bwd(
                f"{what} {(B, H, Hk, Tq, Tk, D, Dv)}", "attention", (q, k, v, *options),
                lambda o, lse, q=q, k=k, v=v, options=options, need=need_dbias: (o, q, k, v, o, lse, *options, need),
            )  # fmt: skip


def with_kernel(backend, given):
    """Those of every_call's for whose op `backend` has a kernel."""
    return ((what, name, args) for what, name, args in given if backend in dispatch._ops[name].kernels)
