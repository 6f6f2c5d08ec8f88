"""The public functions beside those they are named for: tests/namesakes.py calls both."""

import importlib
import inspect

import namesakes
import pytest
import torch
import torch.nn.functional as F
from grids import DEVICE

import gpt_kernels
from gpt_kernels import cross_entropy, dispatch, layer_norm, softmax
from gpt_kernels.ops import calls

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="what torch answers on a CPU is what the table says")


@pytest.fixture(scope="module")
def differ():
    return namesakes.found()


def test_every_difference_has_a_reason_and_every_reason_a_difference(differ):
    unexplained = [
        f"{call}: torch {theirs}, ours {ours}" for call, (theirs, ours) in differ.items() if not namesakes.reason_of(call)
    ]
    assert not unexplained, "\n".join(unexplained)
    found = {(call.function, call.code) for call in differ}
    stale = [f"{r.function}: {code}" for r in namesakes.REASONS for code in r.codes if (r.function, code) not in found]
    assert not stale, f"these are the same now: {stale}"


def test_the_table_is_the_one_that_is_found(differ):
    assert namesakes.TABLE.read_text() == namesakes.table(differ), "python tests/namesakes.py writes it anew"


def test_the_sweep_sees_each_kind_of_difference(monkeypatch):
    """error, dtype, strides, values, gradient, the input itself"""
    call = namesakes.Call("gelu", "f(t(2, 5, 8).transpose(1, 2), approximate='tanh')")
    assert namesakes.difference(call) is None

    def broken(**change):
        def gelu(x, approximate):
            y = F.gelu(x, approximate=approximate)
            y = {
                "dtype": y.double,
                "strides": y.contiguous,
                "values": lambda: y + 1e-3,
                "shape": lambda: y[None],
                "self": lambda: x,
            }.get(change["kind"], lambda: y)()
            if change["kind"] == "gradient":
                y.register_hook(lambda g: 2 * g)
            if change["kind"] == "error":
                raise RuntimeError
            return y

        return gelu

    for kind in ("dtype", "strides", "values", "shape", "self", "gradient", "error"):
        monkeypatch.setattr(gpt_kernels, "gelu", broken(kind=kind))
        assert namesakes.difference(call) is not None, kind


CALLS = {
    "scaled_dot_product_attention": lambda x: (x[None, None],) * 3,
    "softmax": lambda x: (x,),
    "gelu": lambda x: (x,),
    "dropout": lambda x: (x, 0.5),
    "layer_norm": lambda x: (x, x[0], x[0]),
    "rms_norm": lambda x: (x, x[0]),
    "cross_entropy": lambda x: (x, torch.tensor([1, 2])),
}


@pytest.mark.parametrize("name", namesakes.NAMESAKES)
def test_a_mode_sees_the_call(name):
    """one call of ours, as of torch's own; what is inside it then runs without the mode"""
    function, args, seen = getattr(gpt_kernels, name), CALLS[name](torch.randn(2, 8)), []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    expected = function(*args)
    torch.manual_seed(0)
    with Mode():
        y = function(*args)
    assert seen == [function] and torch.equal(y, expected)


@pytest.mark.parametrize("name", namesakes.NAMESAKES)
def test_a_subclass_comes_back_as_one(name):
    sub = torch.randn(2, 8).as_subclass(namesakes.Sub)
    args = CALLS[name](sub)
    assert type(getattr(gpt_kernels, name)(*args)) is type(namesakes.NAMESAKES[name](*torch_args(name, args))) is namesakes.Sub


def torch_args(name, args):
    more = {"softmax": (-1,), "layer_norm": ((8,),), "rms_norm": ((8,),)}.get(name, ())
    return (*args[:1], *more, *args[1:])


def test_autocast_casts_where_torch_does(monkeypatch):
    """on a GPU torch's norms and softmax answer in float32: its own table says for which ops, and on which devices"""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert calls._CASTS["attention"] >= {"cpu", "cuda"} and calls._CASTS["cross_entropy"] >= {"cpu", "cuda"}
    for op, aten in (("layer_norm", "layer_norm"), ("rms_norm", "rms_norm"), ("softmax", "softmax.int")):
        assert ("cuda" in calls._CASTS[op], "cpu" in calls._CASTS[op]) == tuple(
            has(f"aten::{aten}", key) for key in ("AutocastCUDA", "AutocastCPU")
        )
    # as if the CPU were such a device: the general path is the one that a GPU's tensors take under autocast
    monkeypatch.setattr(calls, "_CASTS", dict.fromkeys(calls._CASTS, frozenset({"cpu"})))
    x, w = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        for op, args in (("layer_norm", (None, w, None, 1e-5, (), None)), ("rms_norm", (w, 1e-6, (), None))):
            module = importlib.import_module(f"gpt_kernels.ops.{op}")
            args = args if op == "rms_norm" else (w, None, 1e-5, (), None)
            assert module._general(x, *args, None).dtype == torch.float32
        y = importlib.import_module("gpt_kernels.ops.softmax")._general(x, None, 1.0, False, -1, None, None)
    assert y.dtype == torch.float32
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.dtype == torch.bfloat16


def test_dtype_of_the_loss():
    logits, target = torch.randn(5, 7), torch.tensor([1, 2, 3, 4, -100])
    for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = logits.to(d)
        assert cross_entropy(x, target).dtype == F.cross_entropy(x, target).dtype == d
        wide = cross_entropy(x, target, dtype=torch.float32)
        torch.testing.assert_close(wide, F.cross_entropy(x.float(), target))
        assert cross_entropy(x, target, dtype=torch.float64).dtype == torch.float64
        loss, z_loss = cross_entropy(x, target, lse_square_scale=0.1, return_z_loss=True)
        assert loss.dtype == z_loss.dtype == d


def test_signatures_of_flash_attn():
    """flash-attn 2.8, which needs a GPU to be called"""
    tail = (
        "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
        "deterministic=False, return_attn_probs=False)"
    )
    for name, head in (("func", "(q, k, v, "), ("qkvpacked_func", "(qkv, "), ("kvpacked_func", "(q, kv, ")):
        signature = inspect.signature(getattr(gpt_kernels, f"flash_attn_{name}"))
        plain = signature.replace(
            parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()], return_annotation=signature.empty
        )
        assert str(plain) == head + tail


def test_sdpa_has_torchs_signature():
    signature = inspect.signature(gpt_kernels.scaled_dot_product_attention)
    kinds = [(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in signature.parameters.values()]
    missing = inspect.Parameter.empty
    assert kinds == [
        ("query", missing, False),
        ("key", missing, False),
        ("value", missing, False),
        ("attn_mask", None, False),
        ("dropout_p", 0.0, False),
        ("is_causal", False, False),
        ("scale", None, True),
        ("enable_gqa", False, True),
    ]


def test_flash_attn_under_autocast():
    """a cache in float32 beside queries in bfloat16: everything in autocast's dtype"""
    q, k, v = torch.randn(1, 3, 2, 8).bfloat16(), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        o = gpt_kernels.flash_attn_func(q, k, v)
    assert torch.equal(o, gpt_kernels.flash_attn_func(q, k.bfloat16(), v.bfloat16()))
    o.sum().backward()
    assert v.grad.dtype == torch.float32


def test_names_that_could_be_taken_for_others_are_refused():
    x, w = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(TypeError, match="give weight and bias both by place, or all three by name"):
        layer_norm(x, (8,), bias=w)
    with pytest.raises(TypeError, match="two names of one argument"):
        softmax(x, input=x)
    with pytest.raises(RuntimeError, match="mask and causal go with the last dimension"):
        softmax(x, causal=True, dim=0)
    # a mean over 1e-6 or torch's own default: in torch's form, torch's
    torch.testing.assert_close(gpt_kernels.rms_norm(x * 1e-4, (8,)), F.rms_norm(x * 1e-4, (8,)))
    torch.testing.assert_close(gpt_kernels.rms_norm(x * 1e-4), F.rms_norm(x * 1e-4, (8,), None, 1e-6))


def test_modules_are_torchs():
    """by the arguments that torch's classes take"""
    x = torch.randn(3, 8)
    for ours, theirs in (
        (gpt_kernels.Softmax(-1), torch.nn.Softmax(-1)),
        (gpt_kernels.Softmax(0), torch.nn.Softmax(0)),
        (gpt_kernels.RMSNorm(8, None), torch.nn.RMSNorm(8)),
        (gpt_kernels.LayerNorm(8, 1e-3, bias=False), torch.nn.LayerNorm(8, 1e-3, bias=False)),
        (gpt_kernels.GELU("none"), torch.nn.GELU("none")),
        (gpt_kernels.Dropout(1.0), torch.nn.Dropout(1.0)),
    ):
        torch.testing.assert_close(ours(x * 1e-3), theirs(x * 1e-3))
    with pytest.raises(TypeError, match="Softmax: dim must be an int, got 0.5; scale is given by name"):
        gpt_kernels.Softmax(0.5)
    y = x.clone()
    assert gpt_kernels.Dropout(0.5, inplace=True)(y) is y and not torch.equal(x, y)


def test_gpu_slots_serve_float64_by_the_reference():
    called = []
    serve = dispatch._or_reference("gelu_fwd", lambda *args: called.append(args[0].dtype))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(serve(x, None, True), F.gelu(x, approximate="tanh")) and not called
    assert serve(x.float(), None, True) is None and called == [torch.float32]
