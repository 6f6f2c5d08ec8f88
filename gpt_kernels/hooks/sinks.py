"""Attention with a sink in each head: a score of its own (gpt-oss' s_aux) that takes part in the softmax and has no value.

    p_j = exp(s_j) / (exp(sink) + sum_j exp(s_j)),  o = dropout(p) v

From the attention op as it is: with its (o, lse), the output is o * sigmoid(lse - sink), and the probabilities are exp(s -
lse2) of lse2 = log(exp(lse) + exp(sink)). The op's backward knows the probabilities by the lse that it is given and rowsum(p
dp) by the output: given lse2 and the output it is the backward of this. The sink's own gradient is -exp(sink - lse2) *
rowsum(do o).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.attention import bwd, fwd
from ..ops.common import rederived
from ..ops.philox import draw_rng_state


class _AttentionWithSinks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, rng_state, *options):
        o, lse = fwd(q, k, v, bias, None, rng_state, *options)  # lse: (B, H, Tq)
        sink = sinks.to(lse.dtype)[:, None]
        o = (o * torch.sigmoid(lse - sink)[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, o, torch.logaddexp(lse, sink), bias, sinks, rng_state)
        ctx.options = options
        return o

    @staticmethod
    def backward(ctx, do):
        if rederived(do):
            raise RuntimeError(
                "attention with sinks: its gradient cannot be differentiated again; use attn_implementation='eager'"
            )
        q, k, v, o, lse, bias, sinks, rng_state = ctx.saved_tensors
        need_dbias, need_dsinks = ctx.needs_input_grad[3:5]
        do = do if do.stride(-1) == 1 else do.contiguous()
        dq, dk, dv, dbias = bwd(do, q, k, v, o, lse, bias, None, rng_state, *ctx.options, need_dbias)
        dsinks = None
        if need_dsinks:
            delta = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)
            dsinks = -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, dbias if need_dbias else None, dsinks, *(None,) * 8


def attention_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor | None = None, *, scale: float, softcap: float = 0.0,
    dropout_p: float = 0.0, causal_offset: int = 0, window_left: int = -1, window_right: int = -1,
) -> Tensor:  # fmt: skip
    """o (B, H, Tq, Dv). sinks: (H,), of any floating dtype; the rest as of ops/attention.py's attention, without autocast.

    Its gradient cannot be differentiated again: RuntimeError.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    rng_state = draw_rng_state(q.device) if dropout_p > 0.0 else None
    return _AttentionWithSinks.apply(
        q, k, v, bias, sinks, rng_state, scale, softcap, dropout_p, causal_offset, window_left, window_right
    )
