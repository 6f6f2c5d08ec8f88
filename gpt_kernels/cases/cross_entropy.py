"""cross_entropy's calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..bench.measure import Case, grid
from ..bench.settings import Settings
from ..ops.cross_entropy import cross_entropy, cross_entropy_cost
from ..triton.slots import launcher
from . import STREAMED_PARTS, Compiled, Example, Function, Streamed, Watched, edge_rows, op
from ._huge import MANY, large_rows, last_row_of, pair_up, tail

TAKES = "ignore_index, label smoothing, z-loss, logit softcap, gradient in place"
OPTIONS: tuple[dict, ...] = (
    {},
    {"label_smoothing": 0.1},
    {"lse_square_scale": 1e-3},
    {"logit_softcap": 15.0},
    {"reduction": "sum", "label_smoothing": 1.0},
    {"reduction": "none", "label_smoothing": 0.2, "lse_square_scale": 1e-2, "logit_softcap": 30.0},
)
DEFAULTS = (-100, 1, 0.0, 0.0, 0.0)  # ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap
CLASSES = (1, 2, 7, 31, 32, 33, 1000, 1023, 1025, 4096, 4097, 50257)
FEW_CLASSES = (1, 2, 7, 33, 1000, 1025, 4097)


def eager(logits, target, ignore_index=-100, reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, logit_softcap=0.0):
    x, t = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    x = logit_softcap * torch.tanh(x / logit_softcap) if logit_softcap else x
    loss = F.cross_entropy(x, t, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    if lse_square_scale:
        z = torch.where(t == ignore_index, 0, lse_square_scale * x.logsumexp(1).square())
        loss = loss + {"none": z, "sum": z.sum(), "mean": z.sum() / (t != ignore_index).sum()}[reduction]
    return loss.reshape(target.shape) if reduction == "none" else loss


def inputs(*shape, dtype=torch.float32, ignored=True):
    """logits and targets, about every third ignored, the first never"""
    target = torch.randint(0, shape[-1], shape[:-1])
    if ignored:
        flat = target.view(-1)
        flat[2::3] = -100
    return (torch.randn(shape) * 3).to(dtype), target


def example(what: str, args, again=(), dy=None, **options) -> Example:
    """options are the same for both"""
    ours, theirs = (lambda x, t, f=f: f(x, t, **options) for f in (cross_entropy, eager))
    return Example(f"{what} {options or ''}", ours, theirs, args, again, dy=dy)


def small(dtype):
    for i, options in enumerate(OPTIONS):
        yield example("", inputs(4, 3, 33, dtype=dtype), inputs(7, 2, 12, dtype=dtype) if i != 2 else (), **options)


def odd(dtype, slow):
    for i, V in enumerate(FEW_CLASSES if slow else CLASSES):
        # a few rows are cut into segments, many are not
        for M in (3, 17) if V <= (1024 if slow else 4097) else (3,):
            yield example(f"{M}x{V}", inputs(M, V, dtype=dtype))
            yield example(f"{M}x{V}", inputs(M, V, dtype=dtype), **OPTIONS[1 + i % (len(OPTIONS) - 1)])
    for options in OPTIONS:
        yield example("rows of rows", inputs(2, 3, 1025, dtype=dtype), **options)
    yield example("one row", inputs(33, dtype=dtype))


def threaded(slow):
    for shape in ((1, 9000), (7, 4097), (30, 129)) if slow else ((1, 50257), (5, 9000), (300, 129)):
        for options in OPTIONS[-1:] if slow else OPTIONS:
            yield example(f"{shape}", inputs(*shape), **options)


def empty():
    """The mean of nothing is NaN, as torch's; a sum is 0."""
    for shape in ((0, 5), (2, 0, 4)):
        for reduction in ("sum", "none"):
            yield example(f"{shape}", inputs(*shape), reduction=reduction)


def special(dtype):
    logits, target = inputs(12, 70, ignored=False)
    logits[1, 3], logits[2, 4], logits[3, 5] = torch.nan, torch.inf, -torch.inf
    logits[4] = -torch.inf
    logits[5, 1:] = -torch.inf  # one class left
    logits[6, :64] = -torch.inf  # whole vectors masked before the first class
    target[5], target[6], target[3], target[7] = 0, 65, 6, 2
    logits[7, 2] = -torch.inf  # at the target: the loss is inf
    logits[8], logits[9] = 1e30 * torch.randn(70), 1e-40
    if dtype == torch.float16:
        logits[8] = 6e4  # 1e30 is no number there
    for options in ({"reduction": "none"}, {"reduction": "none", "label_smoothing": 0.1}):
        yield example("rows", (logits.to(dtype), target), **options)


def exact():
    """One class is left: p is 1, the loss and the gradient are 0."""
    target = torch.tensor([0, 5, -100, 2047])
    logits = torch.full((4, 2048), -torch.inf)
    logits[torch.arange(4), target % 2048] = 7.0

    def expected(logits, target):
        return torch.where(logits.isfinite(), 0 * logits, 0).sum(1)

    yield Example("one class", lambda x, t: cross_entropy(x, t, reduction="none"), expected, (logits, target), dy=torch.ones(4))


def derivatives():
    target = torch.tensor([3, -100, 0])

    def plain(x, smoothing=0.0, z=0.0, cap=0.0, reduction="mean"):
        x = cap * torch.tanh(x / cap) if cap else x
        kept = target != -100
        top = x.detach().amax(-1)
        lse = top + (x - top[:, None]).exp().sum(-1).log()
        likely = (1 - smoothing) * x.gather(-1, (target * kept)[:, None])[:, 0] + smoothing * x.mean(-1)
        loss = (lse - likely + z * lse.square()) * kept
        return loss if reduction == "none" else loss.sum() / (kept.sum() if reduction == "mean" else 1)

    def ours(x, *options):
        return cross_entropy(x, target, -100, *options)

    yield Function("", ours, plain, ((3, 4),))
    for reduction in ("sum", "none"):
        yield Function(
            reduction,
            lambda x, r=reduction: ours(x, r, 0.1, 0.2, 2.0),
            lambda x, r=reduction: plain(x, 0.1, 0.2, 2.0, r),
            ((3, 4),),
        )
    yield Function("in place", lambda x: cross_entropy(x * 1, target, inplace_backward=True), plain, ((3, 4),))
    yield Function(
        "z_loss",
        lambda x: cross_entropy(x, target, lse_square_scale=0.2, return_z_loss=True)[0],
        lambda x: plain(x, z=0.2),
        ((3, 4),),
    )


def magnitudes():
    target = torch.tensor([3, 0, 12])
    yield Function(
        "",
        lambda x: cross_entropy(x, target, reduction="none"),
        lambda x: eager(x, target, reduction="none").to(x.dtype),
        ((3, 13),),
    )
    options = {"label_smoothing": 0.1, "logit_softcap": 15.0}
    yield Function(
        "with a cap", lambda x: cross_entropy(x, target, **options), lambda x: eager(x, target, **options), ((3, 13),)
    )


def streamed(dtype):
    def gradient(logits):
        """Of a sum, each row's is its own; rows of 50257 begin inside a line."""
        loss = cross_entropy(logits.requires_grad_(), torch.arange(len(logits)) % 25, reduction="sum")
        return torch.autograd.grad(loss, logits)

    rows = (50 if dtype.itemsize == 2 else 25) * STREAMED_PARTS
    yield Streamed("cross_entropy", gradient, (torch.randn(rows, 50257).to(dtype),), gradient=False)


def watched():
    def call(x):
        return cross_entropy(x, torch.arange(x.shape[0]) - 1, ignore_index=-1, label_smoothing=0.1)

    yield Watched("", call, (((5, 33),), ((3, 1100),), ((4, 17001),), ((1, 40001),)))


# ---- the kernels' ----


def step(sizes, new):
    M, V = sizes.batch * sizes.context, sizes.vocab
    logits, target = new(M, V), new.classes(V, M)
    for with_grad in (False, True):
        yield "cross_entropy_fwd", (logits, target, *DEFAULTS, with_grad)
    lse = op("cross_entropy_fwd")(logits, target, *DEFAULTS, False)[2]
    dloss = torch.ones((), device=new.device)
    yield "cross_entropy_bwd", (dloss, logits, target, lse, *DEFAULTS)
    yield "cross_entropy_bwd_out", (dloss, logits, target, lse, *DEFAULTS, False, logits)


def calls(new):
    for M, V in ((1, 1), (3, 33), (4, 2049)):
        logits, target = new(M, V + 3).narrow(1, 0, V), torch.zeros(M, dtype=torch.int64, device=new.device)
        for reduction in (0, 1, 2):
            options, what = (-100, reduction, 0.1, 1e-3, 15.0), f"{M}x{V}, reduction {reduction}"
            yield what, "cross_entropy_fwd", (logits, target, *options, reduction > 0)
            _, _, lse, _ = op("cross_entropy_fwd")(logits, target, *options, False)
            dloss = torch.ones((M,) if reduction == 0 else (), device=new.device)
            yield what, "cross_entropy_bwd", (dloss, logits, target, lse, *options)


def bounds(name):
    choices = (DEFAULTS, (-100, 0, 0.1, 1e-4, 0.0), (2, 2, 0.1, 0.0, 30.0))
    for i, (what, x) in enumerate(edge_rows((2, 20011))):
        target = torch.randint(0, x.shape[1], x.shape[:1])
        target[1:2] = choices[i % 3][0]
        for options, with_grad in ((choices[i % 3], choices[i % 3][1] != 0), (DEFAULTS, False)):
            if name == "cross_entropy_fwd":
                yield what, (x, target, *options, with_grad)
                continue
            loss, _, lse, _ = op("cross_entropy_fwd")(x, target, *options, False)
            out = (False, x.clone()) if name == "cross_entropy_bwd_out" else ()
            yield what, (torch.randn(loss.shape), x, target, lse, *options, *out)


def huge(name):
    for V in (MANY[1], 50257):
        rows = 2**31 // V + 17
        logits = large_rows(rows, V)[0]
        target = (torch.zeros(rows, dtype=torch.int64), torch.zeros(16, dtype=torch.int64))
        what, options, total = f"rows of {V}", (-100, 0, 0.0, 0.0, 0.0), (-100, 2, 0.0, 0.0, 0.0)
        if name == "cross_entropy_fwd":
            yield pair_up(what, [logits, target, *options, False], lambda t: t[..., -1:], programs=1)
            yield pair_up(f"{what}, gradient", [logits, target, *total, True], last_row_of(V), programs=1)
            continue
        dloss = large_rows(rows, dtype=torch.float32)[0]
        small = op("cross_entropy_fwd")(logits[1], target[1], *options, False)[2]
        lse = (torch.empty(2, rows), small)
        lse[0][:, -16:] = small
        out = [False, (torch.empty_like(logits[0]), torch.empty_like(logits[1]))] if name == "cross_entropy_bwd_out" else []
        yield pair_up(what, [dloss, logits, target, lse, *options, *out], tail, programs=1)


def compiled():
    def problem(M, V, reduction="mean", smoothing=0.0, softcap=0.0, **more):
        settings = (-100, ("none", "mean", "sum").index(reduction), smoothing, 1e-4 if smoothing else 0.0, softcap)

        def launch(new):
            x, target = new(M, V), new(M, dtype=torch.int64)
            loss, _, lse, _ = launcher("cross_entropy_fwd")(x, target, *settings, reduction != "none")
            launcher("cross_entropy_fwd")(x, target, *settings, False)
            launcher("cross_entropy_bwd")(loss, x, target, lse, *settings)
            launcher("cross_entropy_bwd_out")(loss, x, target, lse, *settings, False, x)

        name = (
            f"{M}x{V}" + f"-{reduction}" * (reduction != "mean") + "-smoothing" * (smoothing > 0) + "-softcap" * (softcap > 0)
        )
        plain = (M, V) if reduction == "mean" and not smoothing and not softcap else ()
        return Compiled(name, launch, columns=V, plain=plain, **more)

    yield problem(8192, 50257, main=True)
    # a lane's 32 bytes of a row beside 26 to 42 of the row's target, loss and statistics, which every lane handles
    yield problem(8192, 4096, wide=0.4)
    for M, V in ((16, 128256), (8192, 50304), (2048, 128256), (1024, 262144)):
        yield problem(M, V)
    yield problem(8192, 50304, reduction="none", smoothing=0.1, softcap=30.0)
    yield problem(8191, 50257, aligned=False)


# ---- the benchmark's: against torch.nn.functional.cross_entropy and Hugging Face's loss (in float32), mean over all rows ----

SIZES = {
    "tiny": (4, 64), "small": (64, 1000), "one row": (1, 50257), "main": (1024, 50257), "more": (8192, 8192),
    "huge": (8192, 50257),
}  # fmt: skip


def ours_inplace(logits, target):
    return cross_entropy(logits.clone(), target, inplace_backward=True)


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


def bench(settings: Settings) -> Iterator[Case]:
    for M, V, dtype, main in grid(settings, SIZES):

        def inputs(M=M, V=V, dtype=dtype):
            return [torch.randn(M, V).mul_(2).to(dtype).requires_grad_(), torch.randint(0, V, (M,))]

        yield Case(
            "cross_entropy", f"{M}x{V}", dtype, inputs, F.cross_entropy, cross_entropy, cost, others={"hf": hf}, main=main
        )
        if main:
            # logits as a model has them, no leaf, so that the gradient may be written over them
            yield Case(
                "cross_entropy",
                f"{M}x{V} in place, after a clone",
                dtype,
                inputs,
                eager_after_clone,
                ours_inplace,
                cost_after_clone,
                ("fwd+bwd",),
                options={"inplace": True},
            )
