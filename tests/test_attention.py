"""attention: the core op with every score step against a plain PyTorch formula, and its two public faces."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grids import BACKEND, INTERPRETED, ISAS
from op_checks import (
    assert_same,
    check_compile,
    check_raises,
    check_truth,
    every_isa,
    forward_backward,
    layouts,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpt_kernels
from gpt_kernels import use_backend, use_isa
from gpt_kernels.cases.attention import FACTORS, INF, RNG, eager, empty, interpreted, ours, qkv
from gpt_kernels.ops import attention as module
from gpt_kernels.ops.attention import attention
from gpt_kernels.ops.philox import dropout_threshold, philox_uint16

only_triton = pytest.mark.skipif(BACKEND != "triton", reason="launchers of the Triton kernels")


@pytest.fixture(autouse=True)
def small_tiles():
    """A few Triton tiles in a few dozen tokens: full, partly hidden and skipped ones, in every pass."""
    with interpreted() if BACKEND == "triton" else contextlib.nullcontext():
        yield


def check(q, k, v, bias=None, name="", **options):
    args = (q, k, v) if bias is None else (q, k, v, bias)
    check_truth(ours(**options), lambda *a: eager(*a, **options), args, name=name or str(options), factors=FACTORS)


TOKENS = (50, 57) if BACKEND == "triton" else (70, 81)


@every_isa
def test_boolean_mask_of_any_strides(isa):
    with use_isa(isa):
        # strides that are neither 1 nor 0, and a hidden key whose values are not numbers
        q, k, v = qkv(1, 2, 2, 9, 81, 16)
        mask = torch.rand(1, 1, 81, 9).gt(0.4).transpose(2, 3)
        expected = eager(q, k, v, mask)
        mask[..., 7] = False
        expected, k[:, :, 7] = eager(q, k, v, mask), float("nan")
        torch.testing.assert_close(ours()(q, k, v, mask), expected, rtol=1e-5, atol=1e-5)


def test_float32_bias_beside_bfloat16():
    q, k, v = qkv(1, 2, 2, 40, 40, 16, torch.bfloat16)
    bias = torch.randn(1, 1, 40, 40, requires_grad=True)
    o = ours()(q, k, v, bias)
    (dbias,) = torch.autograd.grad(o.sum(), bias)
    assert dbias.dtype == torch.float32
    torch.testing.assert_close(o, ours()(q, k, v, bias.detach().bfloat16()), rtol=0.05, atol=0.05)


@every_isa
def test_rows_that_see_nothing(isa):
    with use_isa(isa):
        for Tq, Tk in ((70, 20), (2, 1)):  # bottom-right causal: the first Tq - Tk rows see no key
            q, k, v = (t.requires_grad_() for t in qkv(1, 2, 1, Tq, Tk, 16))
            o, lse = attention(q, k, v, scale=0.25, causal_offset=Tk - Tq, window_right=0)
            blind = Tq - Tk
            assert torch.equal(o[:, :, :blind], torch.zeros(1, 2, blind, 16)) and (lse[:, :, :blind] == -INF).all()
            assert torch.isfinite(lse[:, :, blind:]).all()
            dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
            assert torch.equal(dq[:, :, :blind], torch.zeros(1, 2, blind, 16))
            assert all(torch.isfinite(t).all() for t in (dq, dk, dv))


@every_isa
def test_lse(isa):
    with use_isa(isa):
        for Tq in (2, 70):
            q, k, v = qkv(2, 4, 2, Tq, 81, 24)
            _, lse = attention(q, k, v, scale=0.5, softcap=3.0, window_right=0, causal_offset=20)
            s = 3 * torch.tanh((q.double() @ k.double().repeat_interleave(2, 1).mT) * 0.5 / 3)
            s = s.masked_fill(torch.arange(81) > torch.arange(Tq)[:, None] + 20, -INF)
            torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_large_scores_do_not_overflow(multiply_adds):
    for dtype in (torch.float32, torch.float16):
        q, k, v = qkv(1, 1, 1, 65, 129, 64, dtype)
        check(q * 5, k * 3, v, name=f"large {dtype}", right=0, offset=64)
    # what Hugging Face adds where it masks: the lowest float; such rows average over all keys, as eager's do
    q, k, v = qkv(1, 1, 1, 9, 40, 16)
    bias = torch.zeros(1, 1, 9, 40).masked_fill_(torch.ones(9, 40, dtype=torch.bool).triu(20), torch.finfo(torch.float32).min)
    bias[0, 0, 3] = torch.finfo(torch.float32).min
    torch.testing.assert_close(ours()(q, k, v, bias), eager(q, k, v, bias), rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_row():
    q, k, v = qkv(1, 1, 1, 70, 70, 16)
    q[0, 0, 9, 3] = float("nan")
    o = ours(right=0)(q, k, v)
    assert torch.isnan(o[0, 0, 9]).all() and not torch.isnan(o[0, 0, :9]).any() and not torch.isnan(o[0, 0, 10:]).any()


# ---- dropout ----


def test_dropout_mask_is_the_same_everywhere():
    q, k = torch.zeros(2, 3, 70, 8), torch.zeros(2, 3, 90, 8)
    v = torch.eye(90).expand(2, 3, 90, 90)  # the output is the matrix of probabilities
    kept = philox_uint16(RNG, 2, 3, 70, 90) >= dropout_threshold(0.25)
    for isa in ISAS:
        with use_isa(isa):
            assert torch.equal(ours(dropout_p=0.25, rng=RNG)(q, k, v) > 0, kept)
            assert torch.equal(ours(dropout_p=0.25, rng=RNG)(q[:, :, :2], k, v) > 0, kept[:, :, :2])
    with use_backend("reference"):
        assert torch.equal(ours(dropout_p=0.25, rng=RNG)(q, k, v) > 0, kept)
    assert abs(kept.double().mean().item() - 0.75) < 0.01


def test_dropout_follows_manual_seed():
    q, k, v = (t.transpose(1, 2) for t in qkv(1, 2, 2, 33, 33, 16))
    torch.manual_seed(5)
    first = gpt_kernels.flash_attn_func(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, gpt_kernels.flash_attn_func(q, k, v, dropout_p=0.5))
    torch.manual_seed(5)
    assert torch.equal(first, gpt_kernels.flash_attn_func(q, k, v, dropout_p=0.5))


# ---- the contract with torch ----


def test_layouts():
    q, k, v = qkv(2, 2, 2, 70, 70, 16)
    expected = forward_backward(ours(right=0), (q, k, v))
    for name, packed in layouts(torch.stack((q, k, v)).transpose(2, 3).contiguous()).items():
        if name.startswith("expanded"):
            continue
        given = packed.unbind(0)  # (B, T, H, D) inside
        assert_same(forward_backward(ours(right=0), [t.transpose(1, 2) for t in given]), expected, name)
    # an output gradient of any stride
    o = ours(right=0)(*(t.requires_grad_() for t in (q, k, v)))
    for dy in (torch.ones(1).expand(o.shape), torch.ones(2, 2, 16, 70).transpose(2, 3)):
        assert_same(torch.autograd.grad(o, (q, k, v), dy, retain_graph=True), expected[1:], "do")


def test_output_layout_follows_q():
    q, k, v = qkv(2, 3, 3, 10, 10, 16)
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            assert ours()(q, k, v).is_contiguous()
            swapped = q.transpose(1, 2).contiguous().transpose(1, 2)
            assert ours()(swapped, k, v).transpose(1, 2).is_contiguous()


def test_padding_between_rows_is_never_read():
    wide = [torch.full((1, 2, 70, 40), float("nan")) for _ in range(3)]
    for t in wide:
        t[..., 3:19] = torch.randn(1, 2, 70, 16)
    given = [t[..., 3:19] for t in wide]
    assert_same(forward_backward(ours(right=0), given), forward_backward(ours(right=0), [t.clone() for t in given]), "padding")


def test_compile():
    for face in (
        lambda q, k, v: gpt_kernels.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True),
        lambda q, k, v: gpt_kernels.scaled_dot_product_attention(q, k, v, is_causal=True),
    ):
        check_compile(face, qkv(2, 4, 4, 8, 9, 16), qkv(3, 6, 6, 12, 21, 16))


def test_faces_of_nothing():
    """a sum's gradient is expanded: it counts as contiguous and has stride 0"""
    for example in empty():
        for face in (gpt_kernels.scaled_dot_product_attention, gpt_kernels.flash_attn_func):
            given = [t.detach().requires_grad_() for t in example.args]
            sizes = given if face is not gpt_kernels.flash_attn_func else [t.transpose(1, 2) for t in given]
            assert not any(g.any() for g in torch.autograd.grad(face(*sizes).sum(), given))


def test_head_dim_of_zero():
    """every score is 0: the mean of the values that are seen"""
    q, k, v = torch.randn(1, 2, 3, 0), torch.randn(1, 2, 4, 0), torch.randn(1, 2, 4, 8)
    o, dq, dk, dv = forward_backward(lambda q, k, v: gpt_kernels.scaled_dot_product_attention(q, k, v), (q, k, v))
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand(1, 2, 3, 8))
    torch.testing.assert_close(dv, torch.full_like(dv, 0.75))
    assert dq.shape == q.shape and dk.shape == k.shape


def test_memory_is_linear():
    """T = 16384 would need a 1 GiB matrix of scores. In a process of its own: the mark is the highest of a process's life."""
    code = """
import resource, torch
from gpt_kernels.ops.attention import attention
q, k, v = (torch.randn(1, 1, 16384, 16, requires_grad=True) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention(q, k, v, scale=0.25, window_left=64, window_right=0)[0].sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 1024  # KiB


@pytest.mark.parametrize("far, rows", [(2**31 + 64, 2), (2**30 + 64, 3), (2**24 + 64, 130)])
def test_strides_beyond_32_bits(far, rows):
    """Rows so far apart that the last one lies 2^31 elements away; only the pages that are used take memory."""
    torch.use_deterministic_algorithms(False)  # or the whole allocation would be filled with NaN
    storage = torch.empty(far * (rows - 1) + 64, dtype=torch.float16)
    for B, H, Tk, strides in ((1, 1, rows, (0, 0, far, 1)), (1, rows, 1, (0, far, 0, 1)), (rows, 1, 1, (far, 0, 0, 1))):
        k = storage.as_strided((B, H, Tk, 16), strides)
        k.copy_(torch.randn(k.shape))
        q, _, v = qkv(B, H, H, 6, Tk, 16, torch.float16)
        assert_same(forward_backward(ours(), (q, k, v)), forward_backward(ours(), (q, k.clone(), v)), f"{far} {k.shape}")


# ---- Triton ----


@only_triton
def test_triton_descriptors_and_pointers_give_the_same_bits():
    from gpt_kernels.triton.common import recording, use_arch

    options = {"right": 0, "left": 30, "offset": 7, "dropout_p": 0.2, "rng": RNG}
    args = (*qkv(2, 4, 2, *TOKENS, 40, torch.float16, Dv=56), torch.randn(1, 4, *TOKENS))
    expected = forward_backward(ours(**options), args)
    with use_arch("sm_90"):
        assert_same(forward_backward(ours(**options), args), expected, "descriptors")
        unaligned = [F.pad(t, (1, 7))[..., 1:-7] for t in args[:3]]
        assert_same(forward_backward(ours(**options), (*unaligned, args[3])), expected, "unaligned")
    for arch, given, described in (("sm_90", args, True), ("sm_90", unaligned, False), ("sm_80", args, False)):
        with recording(arch) as launches:
            ours()(*given[:3])
        assert launches[0].parameters["TMA"] == described


@only_triton
@pytest.mark.parametrize("arch", ("sm_80", "sm_86", "sm_90", "gfx942"))
def test_triton_tables(arch):
    """Each architecture's own tiles; two blocks of rows and of keys, or more."""
    from gpt_kernels.triton import attention as forward
    from gpt_kernels.triton import attention_bwd as backward
    from gpt_kernels.triton.common import use_arch

    with contextlib.ExitStack() as stack:
        stack.enter_context(use_arch(arch))
        key = {"D": 64, "dtype": torch.bfloat16, "steps": False, "aligned": True}
        tunables = (forward.ATTENTION_FWD, {"Tq": 128}), (backward.ATTENTION_BWD_DKV, {}), (backward.ATTENTION_BWD_DQ, {})
        for tunable, more in tunables:
            stack.enter_context(tunable.override(tunable.default(arch, **key, **more)))
        check(*qkv(1, 2, 1, 150, 170, 64, torch.bfloat16), name=arch, right=0, offset=20)


@only_triton
def test_triton_order_of_programs(monkeypatch):
    """Sections of 2 of 3 heads: another order, the same programs."""
    from gpt_kernels.triton import attention as forward
    from gpt_kernels.triton import attention_bwd as backward

    args = qkv(1, 3, 3, *TOKENS, 16)
    expected = forward_backward(ours(right=0), args)
    for each in (forward, backward):
        monkeypatch.setattr(each, "section", lambda heads, *streamed: 2)
    assert_same(forward_backward(ours(right=0), args), expected, "sections")


# ---- the public faces ----


def test_scaled_dot_product_attention_is_torchs():
    q, k, v = qkv(2, 4, 4, 40, 50, 16)
    for mask in (torch.rand(1, 50) > 0.3, torch.rand(40, 50) > 0.3, torch.randn(4, 1, 50), torch.randn(2, 1, 40, 50)):
        torch.testing.assert_close(
            gpt_kernels.scaled_dot_product_attention(q, k, v, mask),
            F.scaled_dot_product_attention(q, k, v, mask),
            rtol=1e-5,
            atol=1e-5,
        )
    for options in ({"is_causal": True}, {"scale": 0.7}, {"is_causal": True, "enable_gqa": True}):
        k_, v_ = (k[:, ::2], v[:, ::2]) if "enable_gqa" in options else (k, v)
        theirs = F.scaled_dot_product_attention(q, k_, v_, **options)
        torch.testing.assert_close(gpt_kernels.scaled_dot_product_attention(q, k_, v_, **options), theirs, rtol=1e-5, atol=1e-5)
    flat = [t[:, 0] for t in (q, k, v)]
    for mask in (None, torch.randn(2, 40, 50)):
        theirs = F.scaled_dot_product_attention(*flat, mask)
        torch.testing.assert_close(gpt_kernels.scaled_dot_product_attention(*flat, mask), theirs, rtol=1e-5, atol=1e-5)


def test_flash_attn_faces():
    qkv_packed = torch.randn(2, 40, 3, 4, 16, requires_grad=True)
    q, k, v = qkv_packed.unbind(2)
    options = dict(causal=True, window_size=(12, 0), softcap=3.0, alibi_slopes=torch.rand(4))
    o = gpt_kernels.flash_attn_func(q, k, v, **options)
    expected = eager(*(t.transpose(1, 2) for t in (q, k, v)), softcap=3.0, left=12, right=0, slopes=options["alibi_slopes"])
    torch.testing.assert_close(o, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    packed = gpt_kernels.flash_attn_qkvpacked_func(qkv_packed, **options)
    kv = gpt_kernels.flash_attn_kvpacked_func(q, qkv_packed[:, :, 1:], **options)
    assert torch.equal(packed, o) and torch.equal(kv, o)
    for name, x in (("qkv", packed), ("kv", kv)):
        torch.testing.assert_close(
            *(torch.autograd.grad(t.sum(), qkv_packed)[0] for t in (x, gpt_kernels.flash_attn_func(q, k, v, **options))),
            msg=name,
        )


def test_flash_attn_bottom_right_and_probabilities():
    q, k, v = (t.transpose(1, 2) for t in qkv(1, 2, 1, 5, 9, 16))
    torch.manual_seed(1)
    o, lse, p = gpt_kernels.flash_attn_func(q, k, v, dropout_p=0.4, causal=True, return_attn_probs=True)
    assert lse.shape == (1, 2, 5) and p.shape == (1, 2, 5, 9) and (p < 0).any()
    assert torch.equal(p[0, 0] != 0, torch.ones(5, 9).tril(4).bool())
    torch.testing.assert_close(p.abs().sum(-1), torch.ones(1, 2, 5))
    kept = p.clamp(min=0) / (1 - dropout_threshold(0.4) / 65536)
    torch.testing.assert_close(o.transpose(1, 2), kept @ v.transpose(1, 2).repeat_interleave(2, 1), rtol=1e-5, atol=1e-5)


# ---- bad input ----

Q, K, V = qkv(2, 4, 2, 6, 7, 16)
BAD = {
    "int64": (lambda: ours(scale=1.0)(Q.long(), K, V), "q must be float32, (float64, )?bfloat16 or float16, got int64"),
    "mixed dtypes": (lambda: ours()(Q, K.double(), V), "k must be float32, got float64"),
    "3 dimensions": (lambda: ours()(Q, K[0], V), "k must be 4-dimensional"),
    "batch": (lambda: ours()(Q, K[:1], V), "q has batch 2, k 1 and v 2"),
    "head_dim": (lambda: ours()(Q, K[..., :8], V), "k must have q's head_dim 16, got 8"),
    "v tokens": (lambda: ours()(Q, K, V[:, :, :5]), r"v must have k's heads and tokens \(2, 7\), got \(2, 5\)"),
    "GQA": (lambda: ours()(Q[:, :3], K, V), "q's 3 heads must be a multiple of k's 2 heads"),
    "no key heads": (lambda: ours()(Q, K[:, :0], V[:, :0]), "q's 4 heads must be a multiple of k's 0 heads"),
    "head_dim limit": (lambda: ours()(*qkv(1, 1, 1, 2, 2, 257)), "q has head_dim 257, the limit is 256"),
    "scale": (lambda: ours(scale=float("nan"))(Q, K, V), "scale must be finite, got nan"),
    "softcap": (lambda: ours(softcap=-1.0)(Q, K, V), "softcap must be finite and not negative, got -1"),
    "dropout": (lambda: ours(dropout_p=1.0)(Q, K, V), r"dropout_p must be in \[0, 1\), got 1"),
    "negative dropout": (lambda: ours(dropout_p=-0.1)(Q, K, V), r"dropout_p must be in \[0, 1\), got -0.1"),
    "rng shape": (lambda: ours(dropout_p=0.1, rng=torch.tensor([1]))(Q, K, V), r"rng_state must have shape \(2,\), got \(1,\)"),
    "rng dtype": (lambda: ours(dropout_p=0.1, rng=torch.ones(2))(Q, K, V), "rng_state must be int64, got float32"),
    "bias shape": (
        lambda: ours()(Q, K, V, torch.zeros(2, 4, 6, 6)),
        r"bias of shape \(2, 4, 6, 6\) does not broadcast to \(2, 4, 6, 7\)",
    ),
    "bias dtype": (
        lambda: ours()(Q, K, V, torch.zeros(2, 4, 6, 7, dtype=torch.int64)),
        "bias must be bool, float32 like q or float32",
    ),
    "bias dims": (lambda: ours()(Q, K, V, torch.zeros(6, 7)), "bias must be 4-dimensional"),
    "bias device": (
        lambda: ours()(Q, K, V, torch.zeros(2, 4, 6, 7, device="meta")),
        "one device, got (cpu|cuda:0) and meta",
    ),
    "slopes": (lambda: ours(slopes=torch.zeros(3))(Q, K, V), r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3,\)"),
    "offset": (lambda: ours(offset=2**50)(Q, K, V), "causal_offset, window_left and window_right must be below 2\\^40"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    check_raises(call, RuntimeError, message)


def test_bad_input_of_the_faces():
    check_raises(
        lambda: gpt_kernels.scaled_dot_product_attention(Q, K, V),
        RuntimeError,
        "query has 4 heads, key 2 and value 2, which do not fit; pass enable_gqa=True",
    )
    o, lse = module.fwd(Q, K, V, None, None, None, 1.0, 0.0, 0.0, 0, -1, -1)
    options = (None, None, None, 1.0, 0.0, 0.0, 0, -1, -1, False)
    check_raises(lambda: module.bwd(o[:, :, :5], Q, K, V, o, lse, *options), RuntimeError, "attention_bwd: do must have shape")
    check_raises(
        lambda: module.bwd(o, Q, K, V, o, lse[:, :2], *options),
        RuntimeError,
        "attention_bwd: lse must be contiguous|lse must have",
    )
    check_raises(lambda: module.bwd(o, Q, K, V, o, lse, *options[:-1], True), RuntimeError, "attention_bwd: need_dbias without")


@pytest.fixture
def multiply_adds(monkeypatch):
    """The interpreter's products of float32 in the GPU's order: one multiply-add after another, from the accumulator on."""
    if BACKEND != "triton" or not INTERPRETED:
        return
    from triton.runtime import interpreter

    from gpt_kernels.triton.interpreter import mend_bfloat16

    mend_bfloat16()  # before, or putting back what stands here would undo it

    whole = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.data.dtype != np.float32:
            return whole(self, a, b, d, *options)
        acc = d.data.copy()
        for k in range(a.data.shape[-1]):
            acc += a.data[:, k : k + 1] * b.data[k : k + 1]
        return interpreter.TensorHandle(acc, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def normwise(result, truth):
    """of dq, dk, dv, relative"""
    return [((r.double() - t).norm() / t.norm()).item() for r, t in zip(result[1:], truth[1:], strict=True)]


def causal_gradients(fn, T, D, group=1, dtype=None):
    torch.manual_seed(T)
    q, k, v, dy = torch.randn(1, 2, T, D), *torch.randn(2, 1, 2 // group, T, D), torch.randn(1, 2, T, D)
    return forward_backward(lambda *a: fn(*a, is_causal=True, enable_gqa=group > 1), (q, k, v), dy, dtype)


@pytest.mark.skipif(BACKEND != "cpu", reason="torch's flash kernel on the CPU is the measure")
@pytest.mark.parametrize("T", [256, 1024, 4096, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", [1, 2])
def test_long_float32_gradients_are_as_exact_as_torchs(T, group):
    """One running sum over all queries errs in proportion to the root of their number, which no floor may hide."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torchs = F.scaled_dot_product_attention
        truth, flash = (causal_gradients(torchs, T, 64, group, dtype) for dtype in (torch.float64, None))
    ours = causal_gradients(gpt_kernels.scaled_dot_product_attention, T, 64, group)
    for name, a, e in zip(("dq", "dk", "dv"), normwise(ours, truth), normwise(flash, truth), strict=True):
        assert a <= 2 * e, f"{name}: {a:.2e}, torch's flash kernel {e:.2e}"


def test_float32_errors_do_not_grow_with_the_length(multiply_adds):
    """Head dim 16; over 8 times the queries a running sum makes 2 and more of it."""
    errors = []
    for T in (64, 256) if INTERPRETED else (64, 512):
        with use_backend("reference"):
            truth = causal_gradients(gpt_kernels.scaled_dot_product_attention, T, 16, dtype=torch.float64)
        errors.append(normwise(causal_gradients(gpt_kernels.scaled_dot_product_attention, T, 16), truth))
    for name, short, long in zip(("dq", "dk", "dv"), *errors, strict=True):
        assert long <= (1.25 if INTERPRETED else 1.4) * short, f"{name}: {short:.2e}, then {long:.2e}"


@pytest.mark.parametrize("D", [16, 40, 64])
@pytest.mark.parametrize("queries", [1, 2, 3, 40])
def test_gradient_of_scores_of_some_hundred(queries, D, multiply_adds):
    """Forward and backward have the same bits of a score, or exp(score - lse) magnifies what they differ by."""
    q, k, v = torch.randn(1, 2, queries, D) * 300, torch.randn(1, 2, 70, D), torch.randn(1, 2, 70, D)
    bias, dy = torch.randn(1, 1, queries, 70), torch.randn(1, 2, queries, D)
    for mask in (None, bias):

        def dv_of(attend, dtype=None, mask=mask):
            def call(q, k, v):
                return attend(q, k, v, None if mask is None else mask.to(q))

            return forward_backward(call, (q, k, v), dy, dtype)[3].double()

        # on a GPU flash has neither of these dtypes
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            flash, truth = (dv_of(F.scaled_dot_product_attention, dtype) for dtype in (None, torch.float64))
        error, allowed = (dv_of(gpt_kernels.scaled_dot_product_attention) - truth).abs().max(), 3 * (flash - truth).abs().max()
        allowed += 2 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert error <= allowed, f"{'no' if mask is None else 'a'} mask: dv off by {error:.2e}, allowed {allowed:.2e}"
