"""Our attention in torch.nn.attention's registry of flash attentions: activated, seen to run, right, and gone without a
trace."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

import gpt_kernels
from gpt_kernels.accuracy import INPUT_GRADIENT, assert_close_to_truth
from gpt_kernels.hooks import torch_flash
from gpt_kernels.ops.attention import attention

registry = torch.nn.attention
pytestmark = pytest.mark.skipif(
    not hasattr(registry, "restore_flash_attention_impl"), reason="this torch cannot take an implementation out again"
)


@contextlib.contextmanager
def activated():
    name = gpt_kernels.register_flash_attention()
    registry.activate_flash_attention_impl(name)
    try:
        yield
    finally:
        registry.restore_flash_attention_impl()


@pytest.fixture
def calls(monkeypatch):
    found = []
    for name in ("fwd", "bwd"):
        own = getattr(torch_flash, name)
        monkeypatch.setattr(torch_flash, name, lambda *args, _own=own, _name=name: found.append(_name) or _own(*args))
    return found


def test_registered_is_not_activated(calls):
    name = gpt_kernels.register_flash_attention()
    assert name == "gpt_kernels" and name in registry.list_flash_attention_impls()
    q = torch.randn(1, 2, 5, 8)
    F.scaled_dot_product_attention(q, q, q)
    assert registry.current_flash_attention_impl() is None and calls == []
    with activated():
        assert registry.current_flash_attention_impl() == name
        F.scaled_dot_product_attention(q, q, q)
        assert calls == ["fwd"]
    assert registry.current_flash_attention_impl() is None


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "boolean": {"attn_mask": "boolean"},
    "additive": {"attn_mask": "additive"},
    "2 dimensions": {"attn_mask": "2 dimensions"},
    "groups": {"enable_gqa": True, "is_causal": True},
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients(name, dtype, calls):
    options = dict(CASES[name])
    H = 2 if "enable_gqa" in options else 4
    q, k, v = (torch.randn(2, T, h, 16).transpose(1, 2) for T, h in ((9, 4), (9, H), (9, H)))
    mask = options.pop("attn_mask", None)
    if mask is not None:
        visible = torch.rand((9, 9) if mask == "2 dimensions" else (2, 1, 9, 9)) < 0.6
        visible[..., 0] = True
        mask = torch.randn(visible.shape) if mask == "additive" else visible
    weights = torch.randn(2, 4, 9, 16)

    def results(dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        given = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        o = F.scaled_dot_product_attention(*inputs, attn_mask=given, **options)
        return o, *torch.autograd.grad((o * weights.to(dtype)).sum(), inputs)

    truth, eager = results(torch.float64), results(dtype)
    assert calls == []
    with activated():
        ours = results(dtype)
    assert calls == ["fwd", "bwd"]
    for found, exact, theirs in zip(ours, truth, eager, strict=True):
        assert_close_to_truth(found.detach(), exact.detach(), theirs.detach(), INPUT_GRADIENT)
        assert found.stride() == theirs.stride()
    # and as before
    assert all(torch.equal(a, b) for a, b in zip(results(dtype), eager, strict=True)) and len(calls) == 2


@pytest.mark.parametrize("case", ("head dim", "scale"))
def test_what_ours_do_not_serve_is_done_by_what_stood_there(case, calls):
    q = torch.randn(1, 2, 5, 264 if case == "head dim" else 8, requires_grad=True)
    options = {"scale": -0.5} if case == "scale" else {}

    def results():
        o = F.scaled_dot_product_attention(q, q, q, **options)
        return o, *torch.autograd.grad(o.square().sum(), q)

    expected = results()
    with activated():
        found = results()
    assert calls == []
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ("by head", "by token", "packed", "batch inside", "expanded"))
def test_form_of_the_slots_results(layout, calls):
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    q = {
        "by head": torch.randn(2, 3, 5, 8),
        "by token": torch.randn(2, 5, 3, 8).transpose(1, 2),
        "packed": torch.randn(2, 5, 3, 3, 8)[:, :, 1].transpose(1, 2),
        "batch inside": torch.randn(3, 5, 2, 8).permute(2, 0, 1, 3),
        "expanded": torch.randn(2, 1, 5, 8).expand(2, 3, 5, 8),
    }[layout]

    def results():
        o, lse = forward(q, q, q)
        return o, lse, *backward(torch.ones_like(o), q, q, q, o, lse, 0.0, False)

    expected = results()
    with activated():
        found = results()
    assert calls == ["fwd", "bwd"]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        torch.testing.assert_close(ours, theirs)


def test_a_transformer_layer_trains(calls):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True)
    x = torch.randn(2, 7, 32)

    def step():
        return torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))

    expected = step()
    with activated():
        found = step()
    assert calls == ["fwd", "bwd"]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled(calls):
    q = torch.randn(2, 4, 9, 16, requires_grad=True)

    def step(q):
        return F.scaled_dot_product_attention(q.sin(), q, q.cos(), is_causal=True)

    expected = torch.autograd.grad(step(q).square().sum(), q)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with activated():
        found = torch.autograd.grad(torch.compile(step)(q).square().sum(), q)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert calls == ["fwd", "bwd"]


@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
@pytest.mark.parametrize("causal", (False, True))
def test_the_gpus_slots_on_cpu_tensors(dropout_p, causal):
    """Their functions, called with what torch's nodes pass on a GPU."""
    q, k, v, do = (torch.randn(2, 4, 9, 16) for _ in range(4))
    torch.manual_seed(5)
    o, lse, _, _, Tq, Tk, seed, offset, debug = torch_flash._cuda_forward(None)(q, k, v, dropout_p, causal)
    found = torch_flash._cuda_backward(None)(do, q, k, v, o, lse, None, None, Tq, Tk, dropout_p, causal, seed, offset)
    assert (Tq, Tk, seed.dtype, seed.shape, offset.dtype, debug.numel()) == (9, 9, torch.uint64, (2,), torch.uint64, 0)
    torch.manual_seed(5)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    expected, _ = attention(*inputs, dropout_p=dropout_p, window_right=0 if causal else -1)
    torch.testing.assert_close(o, expected)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, do), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="return_debug_mask"):
        torch_flash._cuda_forward(None)(q, k, v, 0.0, False, True)


@pytest.mark.parametrize("name", ("register_flash_attention_impl", "restore_flash_attention_impl"))
def test_a_torch_without_the_hook(name, monkeypatch):
    monkeypatch.delattr(registry, name)
    with pytest.raises(RuntimeError, match=rf"torch [\d.+a-z]+ has no torch.nn.attention.{name}"):
        gpt_kernels.register_flash_attention()
