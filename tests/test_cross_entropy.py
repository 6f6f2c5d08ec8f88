import contextlib

import pytest
import torch
import torch.nn.functional as F
from grids import BACKEND, ISAS, SLOW
from op_checks import (
    check_compile,
    check_layouts,
    check_raises,
    check_specials,
    every_dtype,
    forward_backward,
)

import gpt_kernels
from gpt_kernels import cross_entropy
from gpt_kernels.accuracy import INPUT_GRADIENT, assert_close_to_truth
from gpt_kernels.cases.cross_entropy import CLASSES, DEFAULTS, FEW_CLASSES, OPTIONS, eager, inputs
from gpt_kernels.ops.cross_entropy import bwd, bwd_out, fwd

# of an element, relative: what float32 arithmetic leaves, then the rounding of the gradient's own dtype
ELEMENT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def served_by(how):
    """an instruction set, or the reference"""
    return gpt_kernels.use_backend("reference") if how == "reference" else gpt_kernels.use_isa(how)


def check(args, **options):
    logits, target = args
    dy = torch.randn(target.shape) if options.get("reduction") == "none" else torch.tensor(1.7)
    # the loss as the kernel makes it: in the logits' dtype, as torch's, it would hide what float32 holds
    wide = torch.promote_types(logits.dtype, torch.float32)
    functions = (lambda x: cross_entropy(x, target, dtype=wide, **options), lambda x: eager(x, target, **options))
    (loss, grad), same_dtype, truth = (
        forward_backward(functions[i], (logits,), dy, of) for i, of in ((0, None), (1, None), (1, torch.float64))
    )
    name = f"{tuple(logits.shape)} {options}"
    assert loss.dtype == wide and grad.dtype == logits.dtype
    # the loss is float32 also for 16-bit logits: eager's own error there would allow anything
    narrow = loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth[0], rtol=5e-7 if narrow else 1e-12, atol=2e-7 if narrow else 1e-12)
    if narrow:
        assert_close_to_truth(grad, truth[1], same_dtype[1], INPUT_GRADIENT, f"{name} gradient")
    # each element by itself, since the gradient at the target is so much larger that it would hide all others;
    # where smoothing or z-loss is subtracted, what is left may be small
    error, t, rows = (grad.double() - truth[1]).abs(), truth[1].abs(), (target != -100).sum()
    subtracted = torch.full_like(t, options.get("label_smoothing", 0.0) / t.shape[-1])
    # at the target: 1 - p of a well-predicted row has the few digits that a float32 sum of 1 and a little leaves
    at_target = 1.0 if options.get("label_smoothing") or options.get("lse_square_scale") else 0.02
    subtracted.scatter_(-1, torch.where(target < 0, 0, target)[..., None], at_target)
    scale = dy.abs().max() / (rows if options.get("reduction", "mean") == "mean" else 1)
    smallest = 2**-24 if logits.dtype == torch.float16 else 1e-38 if narrow else 0
    allowed = ELEMENT[logits.dtype] * (t + scale * subtracted) + smallest
    worst = torch.where(error > 0, error / allowed, 0).max()
    assert worst <= 1, f"{name}: an element of the gradient is off by {worst:.2f} times what is allowed"
    ignored = grad[target == -100]
    assert torch.equal(ignored, torch.zeros_like(ignored))


@pytest.mark.parametrize("how", (*ISAS, "reference"))
@every_dtype
def test_every_element(dtype, how):
    with served_by(how):
        for i, V in enumerate(FEW_CLASSES if SLOW else CLASSES):
            # a few rows are cut into segments, many are not
            for M in (3, 17) if V <= (4097 if BACKEND == "cpu" else 1024) else (3,):
                check(inputs(M, V, dtype=dtype))
                check(inputs(M, V, dtype=dtype), **OPTIONS[1 + i % (len(OPTIONS) - 1)])
        for options in OPTIONS:
            check(inputs(2, 3, 1025, dtype=dtype), **options)
        check(inputs(33, dtype=dtype))


@pytest.mark.parametrize("how", (*ISAS, "reference"))
def test_large_logits(how):
    """lse near 1e4, where one float32 for it would leave 3 digits to the probabilities"""
    logits, target = inputs(5, 1025)
    with served_by(how):
        check((logits + 1e4, target))
        check((logits * 1e3, target))


@pytest.mark.parametrize("how", (*ISAS, "reference"))
def test_equal_logits(how):
    """V equal logits with V a power of two: p is 1 / V, so the gradient has no rounding"""
    target = torch.tensor([0, 5, -100, 2047])
    with served_by(how):
        loss, grad = forward_backward(lambda x: cross_entropy(x, target, reduction="sum"), (torch.full((4, 2048), 7.0),))
    expected = torch.full((4, 2048), 1 / 2048).index_put(
        (torch.tensor([0, 1, 3]), target[[0, 1, 3]]), torch.tensor(1 / 2048 - 1)
    )
    expected[2] = 0
    torch.testing.assert_close(loss.double(), 3 * torch.tensor(2048.0).double().log(), rtol=1e-7, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


def test_strided_rows_are_not_copied():
    logits = torch.randn(4, 7, 40)[:, :-1, 3:36]
    target = torch.randint(0, 33, (4, 9))[:, :6]
    fwd_contiguous = fwd(logits.contiguous(), target.contiguous(), *DEFAULTS, True)
    for actual, expected in zip(fwd(logits, target.contiguous(), *DEFAULTS, True), fwd_contiguous, strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(cross_entropy(logits, target), fwd_contiguous[0])


@pytest.mark.skipif(BACKEND != "triton", reason="launch parameters of the Triton kernels")
@pytest.mark.parametrize("M", (3, 7))  # split over several programs, whole rows
def test_long_rows_in_small(M):
    """the kernels of long rows on chunks of 64 columns: every skew, rows shorter than a chunk, edges, parts of rows"""
    from gpt_kernels.triton import cross_entropy as kernels

    small = {"BLOCK_M": 0, "BLOCK_N": 64, "STAGES": 2, "num_warps": 1}
    with kernels.CROSS_ENTROPY_FWD.override(small), kernels.CROSS_ENTROPY_BWD.override(small):
        for i, V in enumerate((1, 5, 8, 71, 128, 515)):
            check(inputs(M, V, dtype=(torch.float32, torch.bfloat16)[i % 2]), **OPTIONS[i])
        logits, target = inputs(M, 133)
        target[0], target[1] = 130, 2  # one in a row's second part, one where the second part has another element
        _, _, lse, dlogits = fwd(logits, target, *DEFAULTS, True)
        over = logits.clone()
        bwd_out(torch.ones(()), over, target, lse, *DEFAULTS, False, over)
        assert torch.equal(over, dlogits)
        if M == 3:
            return check_layouts(lambda x: cross_entropy(x, target, label_smoothing=0.1), (logits,))
        wide, target = torch.randn(9, 136), inputs(9, 133, ignored=False)[1]
        target[8] = -100
        for logits in (wide[:, :133], wide[:, 3:]):  # aligned rows of odd length, their gradient contiguous; skewed ones
            check((logits, target), label_smoothing=0.1, logit_softcap=5.0, lse_square_scale=1e-2)
        logits = torch.randn(9, 133)
        for row in (0, 5):  # the same bits in any skew
            same = forward_backward(
                lambda x: cross_entropy(x, torch.full((9,), 77), reduction="none", label_smoothing=0.1), (logits[[row] * 9],)
            )
            assert all(torch.equal(a, a[:1].expand_as(a)) for a in same)
        check((torch.randn(M, 133) + 1e4, target[:M]))
        logits = torch.randn(M, 133)
        logits[0, 3], logits[1, 4], logits[2, :70], logits[3], logits[4, 0] = (
            torch.nan,
            torch.inf,
            -torch.inf,
            -torch.inf,
            -torch.inf,
        )
        logits[5, target[5]] = -torch.inf
        for options in ({"reduction": "none"}, {"reduction": "none", "label_smoothing": 0.1}):
            fns = (lambda x, f=f, o=options: f(x, target[:M], **o) for f in (cross_entropy, eager))
            check_specials(*fns, (logits,))


@pytest.mark.parametrize("shape", ((7, 50257), (1, 128257), (1, 262144)), ids=str)
def test_vocabulary(shape):
    """rows of a vocabulary: whole, split, longest; odd ones begin anywhere"""
    check(inputs(*shape, dtype=torch.bfloat16), label_smoothing=0.1)
    logits, target = inputs(*shape, dtype=torch.bfloat16)
    _, _, lse, dlogits = fwd(logits, target, *DEFAULTS, True)
    bwd_out(torch.ones(()), logits, target, lse, *DEFAULTS, False, logits)
    assert torch.equal(logits, dlogits)


def test_compile_in_place():
    check_compile(lambda x, t: cross_entropy(x * 2, t, inplace_backward=True), inputs(5, 33), inputs(7, 12))


def test_specials():
    logits, target = inputs(12, 70, ignored=False)
    logits[1, 3], logits[2, 4], logits[3, 5] = float("nan"), float("inf"), float("-inf")
    logits[4] = float("-inf")
    logits[5, 1:] = float("-inf")  # one class left
    logits[6, :64] = float("-inf")  # whole vectors masked before the first class
    target[5], target[6], target[3], target[7] = 0, 65, 6, 2
    logits[7, 2] = float("-inf")  # at the target: the loss is inf
    logits[8], logits[9] = 1e30 * torch.randn(70), 1e-40
    for options in ({"reduction": "none"}, {"reduction": "none", "label_smoothing": 0.1}):
        for dtype in (torch.float32, torch.bfloat16):
            fns = (lambda x, o=options: cross_entropy(x, target, **o)), (lambda x, o=options: eager(x, target, **o))
            check_specials(*fns, (logits.to(dtype),))
    check((logits[5:7], target[5:7]), reduction="none")
    wide, far = inputs(2, 9000, ignored=False)
    wide[:, :4100], wide[1, 8500:], far[:] = float("-inf"), float("-inf"), 8000  # a whole segment masked
    check((wide, far), reduction="none")


@pytest.mark.parametrize("options", OPTIONS[:4])
def test_maximum_late_in_the_row(options):
    """above what a segment begins with by little, by much and by more than exp can hold; and behind nothing but -inf"""
    for classes in (100, 1000, 9000):
        logits, target = inputs(6, classes, ignored=False)
        for row, above in enumerate((5, 12, 60, 1000)):
            logits[row, -1 - 70 * (row % 2)] = logits[row].max() + above
        if not options.get("label_smoothing"):  # the loss would be inf
            logits[4, :90] = float("-inf")
        logits[5, : classes // 2] -= 1000
        target[:] = classes - 1
        check((logits, target), **options)


def test_nan_in_an_ignored_row_is_ignored():
    logits, target = inputs(6, 40)
    logits[2] = float("nan")
    keep = target != -100
    for scale in (1.0, 2.0):  # the gradient made in forward, and the one made in backward
        loss, grad = forward_backward(lambda x: cross_entropy(x, target), (logits,), torch.tensor(scale))
        assert torch.equal(grad[2], torch.zeros(40)) and torch.equal(loss, cross_entropy(logits[keep], target[keep]))


def test_ignore_index_may_be_a_class():
    logits, target = inputs(6, 40, ignored=False)
    target[0] = target[3] = 7
    check_args = {"ignore_index": 7}
    actual, expected = (forward_backward(lambda x, f=f: f(x, target, **check_args), (logits,)) for f in (cross_entropy, eager))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("how", (*ISAS[-1:], "reference"))
def test_nothing_to_count(how):
    logits = torch.randn(3, 40)
    with served_by(how):
        for shape, target in (((3, 40), torch.full((3,), -100)), ((0, 40), torch.empty(0, dtype=torch.long))):
            x = logits[: shape[0]]
            for reduction in ("mean", "sum", "none"):
                loss, grad = forward_backward(lambda x, r=reduction, t=target: cross_entropy(x, t, reduction=r), (x,))
                expected = F.cross_entropy(x, target, reduction=reduction)
                torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)
                assert torch.equal(grad, torch.zeros(shape))
        # no classes: nothing but ignored rows is possible
        assert cross_entropy(torch.empty(3, 0), torch.full((3,), -100), reduction="sum") == 0


def test_z_loss():
    logits, target = inputs(5, 40)
    x = logits.clone().requires_grad_()
    for reduction in ("none", "sum", "mean"):
        options = {"reduction": reduction, "label_smoothing": 0.1}
        loss, z_loss = cross_entropy(x, target, lse_square_scale=1e-2, return_z_loss=True, **options)
        z = torch.where(target == -100, 0, 1e-2 * logits.logsumexp(1).square())
        expected = {"none": z, "sum": z.sum(), "mean": z.sum() / (target != -100).sum()}[reduction]
        torch.testing.assert_close(z_loss, expected)
        torch.testing.assert_close(loss - z_loss, cross_entropy(logits, target, **options))
        assert loss.requires_grad and not z_loss.requires_grad


def test_gradient_is_handed_out_once():
    """forward's own gradient serves one backward; others, scaled ones and what the caller does to it change nothing"""
    logits, target = inputs(6, 40)
    x = logits.clone().requires_grad_()
    expected = bwd(torch.ones(()), logits, target, fwd(logits, target, *DEFAULTS, False)[2], *DEFAULTS)
    loss = cross_entropy(x, target)
    for _ in range(3):
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(grad, expected)
        grad.zero_()
    for scale in (0.25, 1.0, 0.0):
        loss = cross_entropy(x, target)
        for again in (True, False):
            (grad,) = torch.autograd.grad(loss * scale, x, retain_graph=again)
            assert torch.equal(grad, expected * scale)
    x.grad = None
    for _ in range(2):
        cross_entropy(x, target).backward()
    assert torch.equal(x.grad, 2 * expected)
    with torch.no_grad():
        assert not cross_entropy(x, target).requires_grad


def test_forward_makes_the_gradient_only_when_it_may_be_used():
    logits, target = inputs(6, 40)
    assert fwd(logits, target, *DEFAULTS, False)[3].numel() == 0
    assert fwd(logits, target, -100, 0, 0.0, 0.0, 0.0, True)[3].numel() == 0
    assert fwd(logits, target, *DEFAULTS, True)[3].shape == logits.shape


def test_inplace_backward():
    values, target = inputs(4, 6, 40)
    w = torch.ones(()).requires_grad_()
    for logits_of in (lambda x: x * w, lambda x: (x * w)[:, :5], lambda x: (x * w).transpose(0, 1)):
        logits = logits_of(values)
        t = target.reshape(-1)[: logits[..., 0].numel()].view(logits.shape[:-1])
        kept = logits.detach().clone()
        seen = []
        logits.register_hook(lambda g, at=logits, seen=seen: seen.append((g.data_ptr() == at.data_ptr(), g.clone())))
        loss = cross_entropy(logits, t, inplace_backward=True)
        loss.backward(retain_graph=True)
        _, expected = forward_backward(lambda x, t=t: cross_entropy(x, t), (kept,))
        assert seen[0][0] and torch.equal(seen[0][1], expected) and torch.equal(logits, expected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    # another user of the values gets autograd's error, not garbage
    logits = values * w
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (logits.square().sum() + cross_entropy(logits, target, inplace_backward=True)).backward()
    leaf = values.clone().requires_grad_()
    for logits, t in ((leaf, target), (leaf[1:], target[1:]), (leaf.view(-1, 40), target.view(-1))):
        check_raises(
            lambda x=logits, t=t: cross_entropy(x, t, inplace_backward=True), RuntimeError, "a leaf that requires grad"
        )
    with torch.no_grad():
        assert torch.equal(cross_entropy(leaf, target, inplace_backward=True), cross_entropy(values, target))
    same_row = (values[0, :1] * w).expand(6, 40)
    with pytest.raises(RuntimeError, match="rows that do not overlap"):
        cross_entropy(same_row, target[0], inplace_backward=True).backward()


def target_out_of_range_without_a_host_read():
    """where looking at a target would hold up the GPU: nan for its row, in loss and gradient; the other rows as ever"""
    for V in (40, 9001):
        logits, target = inputs(5, V)
        expected, _, lse, _ = fwd(logits, target, -100, 0, 0.0, 0.0, 0.0, False)
        right = bwd(torch.ones(5), logits, target, lse, -100, 0, 0.0, 0.0, 0.0)
        for bad in (V, -1, -99, 2**62, -(2**63), 2**32 + 1):
            target[3] = bad
            loss, _, lse, _ = fwd(logits, target, -100, 0, 0.0, 0.0, 0.0, False)
            dlogits = bwd(torch.ones(5), logits, target, lse, -100, 0, 0.0, 0.0, 0.0)
            assert loss[3].isnan() and dlogits[3].isnan().all()
            others = torch.arange(5) != 3
            assert torch.equal(loss[others], expected[others]) and torch.equal(dlogits[others], right[others])
            mean, _, _, dlogits = fwd(logits, target, *DEFAULTS, True)
            assert mean.isnan() and dlogits[3].isnan().all() and not dlogits[others].isnan().any()


@pytest.mark.parametrize("how", (*ISAS, "reference"))
def test_target_out_of_range(how):
    if BACKEND != "cpu" and how != "reference":
        return target_out_of_range_without_a_host_read()
    logits, target = inputs(5, 40)
    lse = fwd(logits, target, *DEFAULTS, False)[2]
    with served_by(how):
        for bad in (40, -1, -99, 2**62, -(2**63)):
            target[3] = bad
            message = f"target {bad} of row 3 is out of range, expected 0 to 39 or ignore_index -100$"
            check_raises(lambda: cross_entropy(logits, target), IndexError, "cross_entropy_fwd: " + message)
            out = torch.zeros(5, 40)
            for op, more in ((bwd, ()), (bwd_out, (False, out))):
                args = (torch.ones(()), logits, target, lse, *DEFAULTS, *more)
                check_raises(lambda op=op, args=args: op(*args), RuntimeError, "cross_entropy_bwd: " + message)
            assert not out.any()
        check_raises(lambda: cross_entropy(logits, torch.full((5,), -100), ignore_index=1), IndexError, "target -100 of row 0")


def test_bad_inputs():
    x, t = inputs(5, 40)
    loss, _, lse, _ = fwd(x, t, *DEFAULTS, False)
    nan, inf = float("nan"), float("inf")
    saved = (loss, x, t, lse, *DEFAULTS)
    for call, error, message in (
        (
            lambda: cross_entropy(x, t, reduction="avg"),
            ValueError,
            "cross_entropy: unknown reduction 'avg', expected one of none",
        ),
        (lambda: cross_entropy(x, t.int()), RuntimeError, "cross_entropy_fwd: target must be int64, got int32"),
        (lambda: cross_entropy(x, x), RuntimeError, "target must be int64, got float32"),
        (
            lambda: cross_entropy(x.long(), t),
            RuntimeError,
            "logits must be float32, (float64, )?bfloat16 or float16, got int64",
        ),
        (
            lambda: cross_entropy(x, t[:4]),
            ValueError,
            r"target must have the shape of logits \(5, 40\) without the last .* got \(4,\)",
        ),
        (lambda: cross_entropy(x, t[None]), ValueError, r"got \(1, 5\)"),
        (lambda: cross_entropy(x.sum(), t), RuntimeError, "logits must have at least 1 dimension"),
        (lambda: cross_entropy(x, t, label_smoothing=1.5), RuntimeError, "label_smoothing must be between 0 and 1, got 1.5"),
        (lambda: cross_entropy(x, t, label_smoothing=-0.1), RuntimeError, "label_smoothing must be between 0 and 1, got -0.1"),
        (lambda: cross_entropy(x, t, label_smoothing=nan), RuntimeError, "label_smoothing must be between 0 and 1, got"),
        (
            lambda: cross_entropy(x, t, lse_square_scale=-1.0),
            RuntimeError,
            "lse_square_scale must be finite and not negative, got -1",
        ),
        (lambda: cross_entropy(x, t, lse_square_scale=inf), RuntimeError, "lse_square_scale must be finite"),
        (
            lambda: cross_entropy(x, t, logit_softcap=-3.0),
            RuntimeError,
            "logit_softcap must be finite and not negative .* got -3",
        ),
        (lambda: cross_entropy(x, t, logit_softcap=nan), RuntimeError, "logit_softcap must be finite"),
        (lambda: fwd(x, t, -100, 3, 0.0, 0.0, 0.0, False), RuntimeError, r"reduction must be 0 \(none\), 1 .* got 3"),
        (
            lambda: fwd(x.t(), t.new_zeros(40), *DEFAULTS, False),
            RuntimeError,
            "last dimension of logits must be contiguous, .* 40",
        ),
        (lambda: bwd(loss.double(), x, t, lse, *DEFAULTS), RuntimeError, "dloss must be float32, got float64"),
        (lambda: bwd(x[:, 0].contiguous(), x, t, lse, *DEFAULTS), RuntimeError, "dloss must have 1 elements, got 5"),
        (lambda: bwd(loss, x, t, lse[0], *DEFAULTS), RuntimeError, r"lse must have shape \(2, 5\), got \(5,\)"),
        (lambda: bwd_out(*saved, False, x[:4].clone()), RuntimeError, "dlogits must have the shape of logits"),
        (lambda: bwd_out(*saved, False, x.bfloat16()), RuntimeError, "dlogits must be float32, got bfloat16"),
        (lambda: bwd_out(*saved, False, x[:1].expand(5, 40)), RuntimeError, "rows that do not overlap"),
    ):
        check_raises(call, error, message)


def test_no_probability_matrix():
    """beyond the logits, forward and backward hold one tensor of their size at most"""
    largest = 0

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for o in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(o, torch.Tensor) and func.namespace == "gpt_kernels":
                    largest += o.numel() * o.element_size()
            return out

    x, target = inputs(64, 1000)
    x.requires_grad_()
    with Allocations() if ISAS else contextlib.nullcontext():
        cross_entropy(x, target).backward()
    assert largest <= 1.02 * x.numel() * 4
