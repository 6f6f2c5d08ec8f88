"""Cross-entropy of logits and class indices, with label smoothing, z-loss and a cap on the logits, in one pass each way.

    x = logits, or c tanh(logits / c) with logit_softcap c;    lse = log sum_v exp(x_v);    e = label_smoothing
    loss = lse - (1 - e) x_target - e mean_v(x_v) + lse_square_scale lse^2,   0 where target == ignore_index
    dx_v = (exp(x_v - lse) (1 + 2 lse_square_scale lse) - e / V - (1 - e) [v == target]) dloss

logits: (..., V) in float32, bfloat16, float16 or float64, last dimension contiguous, the others of any stride.
target: (...) int64. loss, z_loss: (...) for "none", () else, in float32 (float64 for float64 logits). lse: (2, rows), the
row's maximum and log sum_v exp(x_v - maximum): one float would lose the last bits of the probabilities of large logits.
Beyond the gradient nothing of logits' size is made. Where autograd is on, forward makes the gradient for dloss = 1 while a
row is in cache, which saves one reading of the logits; backward hands it out, or for another dloss fills the same memory
anew from lse. Sources: label smoothing arXiv 1512.00567, z-loss 2204.02311,
soft cap 2408.00118; flash-attn's cross_entropy_loss for the names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .. import sharding
from ..dispatch import define
from .calls import autocast_dtype, handle_torch_function, has_torch_function_variadic, in_any_autocast, one_input
from .common import REVERSE, TRANSFORMED, count_of, derivative_of, rederived, stat_dtype

__all__ = ["cross_entropy"]  # the public functions

REDUCTIONS = ("none", "mean", "sum")  # the number of each is its place, as in torch


def _rows(op, logits, target, ignore_index, softcap):
    """The capped logits (M, V), the targets (M,), and which rows count (M,)."""
    _check_target(op, target, ignore_index, logits.shape[-1])
    rows = logits.reshape(count_of(logits.shape[:-1]), logits.shape[-1])  # of no classes, too
    x, t = rows.to(stat_dtype(logits.dtype)), target.reshape(-1)
    keep = t != ignore_index
    # zero times an infinite logit of an ignored row would be NaN in the derivative of this
    x = x.masked_fill(~keep[:, None], 0)
    return softcap * torch.tanh(x / softcap) if softcap else x, t, keep


def _check_target(op, target, ignore_index, V):
    if target.is_meta or torch.compiler.is_compiling() or get_proxy_mode() is not None:
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(target):  # vmap lets nobody look at values
        target = torch._C._functorch.get_unwrapped(target)
    flat = target.reshape(-1)
    bad = ((flat < 0) | (flat >= V)) & (flat != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise RuntimeError(
            f"{op}: target {int(flat[row])} of row {row} is out of range, expected 0 to {V - 1} or ignore_index {ignore_index}"
        )


def reference_fwd(logits, target, ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap, with_grad):
    V = logits.shape[-1]
    x, t, keep = _rows("cross_entropy_fwd", logits, target, ignore_index, logit_softcap)
    top = x.max(1)[0] if V else x.new_full((x.shape[0],), -math.inf)
    log_sum = (x - top[:, None]).exp().sum(1).log()
    x_target = x.gather(1, torch.where(keep, t, 0)[:, None])[:, 0] if V else top
    loss = (1 - label_smoothing) * (top - x_target + log_sum)
    if label_smoothing:
        loss = loss + label_smoothing * (log_sum - (x - top[:, None]).mean(1))
    # without the option not even 0 times a square that may be infinite
    z_loss = torch.where(keep & (lse_square_scale > 0), lse_square_scale * (top + log_sum).square(), 0)
    loss = torch.where(keep, loss, 0) + z_loss
    lse = torch.where(keep, torch.stack((top, log_sum)), 0)  # (2, M)
    if reduction == 0:
        return loss.reshape(target.shape), z_loss.reshape(target.shape), lse, logits.new_empty(0)
    count = keep.sum() if reduction == 1 else 1
    options = (ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap)
    dlogits = reference_bwd(loss.new_ones(()), logits, target, lse, *options) if with_grad else logits.new_empty(0)
    return loss.sum() / count, z_loss.sum() / count, lse, dlogits


def reference_bwd(dloss, logits, target, lse, ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap):
    V = logits.shape[-1]
    x, t, keep = _rows("cross_entropy_bwd", logits, target, ignore_index, logit_softcap)
    scale = dloss.reshape(-1, 1) / (keep.sum() if reduction == 1 else 1)  # (M, 1) or (1, 1)
    log_p = (x - lse[0][:, None]) - lse[1][:, None]  # (M, V)
    z_slope = 2 * lse_square_scale * lse.sum(0)[:, None]
    dx = log_p.exp() * (1 + z_slope) - label_smoothing / max(V, 1)
    if V:
        # the target's element: p - 1 as expm1, or a well-predicted row would lose its digits
        at = torch.where(keep, t, 0)[:, None]
        here = log_p.gather(1, at).expm1() * (1 + z_slope) + z_slope + (label_smoothing - label_smoothing / V)
        dx = dx.scatter(1, at, here)
    dx = dx * scale
    if logit_softcap:
        dx = dx * (1 - (x / logit_softcap).square())
    return torch.where(keep[:, None], dx, 0).to(logits.dtype).reshape(logits.shape)


def reference_bwd_out(*args):
    *saved, made, dlogits = args
    dlogits.copy_(torch.where(saved[0] == 1, dlogits, reference_bwd(*saved)) if made else reference_bwd(*saved))


_options = "int ignore_index, int reduction, float label_smoothing, float lse_square_scale, float logit_softcap"
_saved = "Tensor dloss, Tensor logits, Tensor target, Tensor lse"
# with_grad: dlogits for dloss = 1 comes in the same sweep (not for reduction "none"), else it is empty
fwd = define(
    f"cross_entropy_fwd(Tensor logits, Tensor target, {_options}, bool with_grad)"
    " -> (Tensor loss, Tensor z_loss, Tensor lse, Tensor dlogits)",
    reference_fwd,
)
bwd = define(f"cross_entropy_bwd({_saved}, {_options}) -> Tensor dlogits", reference_bwd)
# into a tensor that is there, which may be the logits; or, if it was made in forward, only where dloss is not 1
bwd_out = define(f"cross_entropy_bwd_out({_saved}, {_options}, bool made, Tensor(a!) dlogits) -> ()", reference_bwd_out)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, options, inplace_backward):
        # a compiled graph reuses buffers by itself and may not change its inputs in backward
        ctx.inplace_backward = inplace_backward and not torch.compiler.is_compiling()
        with_grad = not inplace_backward and not torch.compiler.is_compiling()
        loss, z_loss, lse, dlogits = fwd(logits, target, *options, with_grad)
        ctx.save_for_backward(logits, target, lse)
        ctx.options, ctx.dlogits = options, dlogits if with_grad and options[1] else None
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    def backward(ctx, dloss, _):
        logits, target, lse = ctx.saved_tensors
        if rederived(dloss):
            ctx.inplace_backward = False  # the derivative's own graph needs the logits from now on
            lse = reference_fwd(logits, target, *ctx.options, False)[2]
            return reference_bwd(dloss, logits, target, lse, *ctx.options), None, None, None
        saved = (dloss.contiguous(), logits, target, lse, *ctx.options)
        # several gradients (is_grads_batched) do not fit in the memory of one
        if torch.compiler.is_compiling() or torch._C._functorch.is_legacy_batchedtensor(dloss):
            return bwd(*saved), None, None, None
        if ctx.inplace_backward:
            dlogits = logits.detach()
            bwd_out(*saved, False, dlogits)
            torch.autograd.graph.increment_version(dlogits)  # whoever still needs the logits gets autograd's error
            return dlogits, None, None, None
        # the gradient made in forward is handed out once; a second backward (retain_graph) makes its own
        dlogits, ctx.dlogits = ctx.dlogits, None
        if dlogits is None:
            return bwd(*saved), None, None, None
        bwd_out(*saved, True, dlogits)
        return dlogits, None, None, None


def cross_entropy(
    logits: Tensor = None,  # type: ignore[assignment]
    target: Tensor = None,  # type: ignore[assignment]
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    logit_softcap: float = 0.0,
    inplace_backward: bool = False,
    return_z_loss: bool = False,
    *,
    dtype: torch.dtype | None = None,
    input: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As torch.nn.functional.cross_entropy with class indices, classes in the last dimension.

    logits (also by torch's name, `input`): (..., V). target: (...) int64 or uint8, each in [0, V) or ignore_index. torch has
    the classes of (N, C, d1, ...) in the second dimension: movedim(1, -1) is what is taken here. weight: None, there is no
    kernel for class weights, nor for class probabilities. reduction: "mean" (over the rows that are not ignored; nan if there
    is none), "sum" or "none". label_smoothing: in [0, 1]. lse_square_scale: weight of the z-loss,
    lse^2 per row, which is part of the loss and with return_z_loss returned beside it (no gradient flows through that
    one). logit_softcap: c > 0 puts c tanh(logits / c) in the place of the logits. dtype: of the loss; None is
    the logits', or float32 under autocast, as torch's. It is computed in float32 (float64 for float64 logits), which flash-attn
    and Hugging Face return: dtype=torch.float32. The gradient has the logits' dtype and is exactly zero in ignored rows.

    inplace_backward=True writes the gradient over the logits, which saves their size in memory: the logits are garbage
    after backward, a second backward or another use of their values there raises autograd's error about in-place
    modification, and logits that are leaves requiring grad (or views of one) raise RuntimeError at once. Values changed
    under no_grad or through detach are not seen by autograd. Inside torch.compile it has no effect.

    On a CPU, IndexError for a target out of range, naming it and its row. On a GPU, where the host would have to wait to look,
    its loss and the gradient of its row are NaN, and nothing out of bounds is read. Raises ValueError for an unknown reduction
    and for another number of rows in target than in logits (N, V); RuntimeError for a target of another dtype, shape or
    device, for class weights, and for options out of their range.
    """
    options = (ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap, inplace_backward)
    if type(logits) is not Tensor or input is not None or has_torch_function_variadic(logits, target):
        if has_torch_function_variadic(logits, target, input):
            more: dict = dict(dtype=dtype, input=input, weight=weight)
            return handle_torch_function(
                cross_entropy, (logits, target, input), logits, target, *options, return_z_loss, **more
            )
        logits = one_input("cross_entropy", logits, input, "logits")
    if type(ignore_index) is not int or not isinstance(target, Tensor):
        if ignore_index is None or isinstance(ignore_index, Tensor):  # torch has the weight in this place
            weight, options = ignore_index, (-100, *options[1:])
        elif not isinstance(ignore_index, int):
            raise TypeError(f"cross_entropy: ignore_index must be an int, got {type(ignore_index).__name__}")
        if not isinstance(target, Tensor):
            raise TypeError(f"cross_entropy: target must be a Tensor, got {type(target).__name__}")
    if weight is not None:
        raise RuntimeError("cross_entropy: class weights have no kernel, weight must be None")
    try:
        loss, z_loss = _cross_entropy(logits, target, *options)
    except RuntimeError as error:
        logits, target = _mended(logits, target, error)
        loss, z_loss = _cross_entropy(logits, target, *options)
    if dtype is not None or logits.dtype is not torch.float32:
        if dtype is None:
            wide = logits.dtype != torch.float64 and in_any_autocast() and autocast_dtype("cross_entropy", logits)
            dtype = wide or logits.dtype
        loss, z_loss = loss.to(dtype), z_loss.to(dtype)
    return (loss, z_loss) if return_z_loss else loss


def _mended(logits, target, error):
    """(logits, target) as the kernels take them, where torch takes those that they refused; else raises as torch."""
    if " of row " in str(error):
        raise IndexError(str(error)) from None
    if target.dtype == torch.uint8:  # torch's other dtype of class indices
        return logits, target.long()
    if target.dtype == torch.int64 and logits.dim() in (1, 2) and target.shape != logits.shape[:-1]:
        if logits.dim() == 1 and target.shape == (1,):
            return logits[None], target
        raise ValueError(str(error)) from None
    raise error


def _cross_entropy(logits, target, ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap, inplace_backward):
    """The loss and the z-loss in the statistics' dtype."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"cross_entropy: unknown reduction {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    derivative = derivative_of(logits)
    if inplace_backward and derivative == REVERSE and (logits if logits._base is None else logits._base).is_leaf:
        raise RuntimeError("cross_entropy: inplace_backward would overwrite a leaf that requires grad, or a view of one")
    if sharding.spread(logits, target):
        # not in place: the version counter of the part is not the whole's
        more = (label_smoothing, lse_square_scale, logit_softcap, False)
        return sharding.cross_entropy(
            lambda x, t, how: _cross_entropy(x, t, ignore_index, how, *more), logits, target, ignore_index, reduction
        )
    if logits.dim() and logits.stride(-1) != 1:
        logits = logits.contiguous()
    options = (ignore_index, REDUCTIONS.index(reduction), label_smoothing, lse_square_scale, logit_softcap)
    if derivative == TRANSFORMED:
        loss, z_loss, _, _ = reference_fwd(logits, target, *options, False)
        z_loss = z_loss.detach()
    elif derivative:
        loss, z_loss = _CrossEntropy.apply(logits, target.contiguous(), options, inplace_backward)
    else:
        loss, z_loss, _, _ = fwd(logits, target.contiguous(), *options, False)
    return loss, z_loss


def cross_entropy_cost(logits: Tensor, backward: bool = False) -> tuple[int, int]:
    """(bytes that must move, flops): forward reads the logits; backward reads them and writes the gradient."""
    n = logits.numel()
    return (2 if backward else 1) * n * logits.element_size(), (16 if backward else 15) * n
