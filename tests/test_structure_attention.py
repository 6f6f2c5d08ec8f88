"""Attention that somebody wrote out is served in one pass where it is what ours is, and left alone where it is subtly not."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt_kernels import patch, structure, unpatch
from gpt_kernels.accuracy import assert_close_to_truth

C, H, L = 32, 4, 24


class Base(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.heads = H
        self.register_buffer("mask", torch.tril(torch.ones(L, L)), persistent=False)
        self.drop = nn.Dropout(p)

    def query_of(self, q):
        return q

    def scale_of(self, q, scale):
        return scale

    def weigh(self, q, k, v, scale):
        T = q.shape[-2]
        s = self.query_of(q) @ k.transpose(-2, -1) * self.scale_of(q, scale)
        s = s.masked_fill(self.mask[:T, :T] == 0, float("-inf"))
        return self.drop(F.softmax(s, dim=-1)) @ v


class OneHead(Base):
    """As lectures begin: its scale is of the input's width, its layers in an order of their own."""

    def __init__(self, p=0.0):
        super().__init__(p)
        self.key, self.query, self.value = (nn.Linear(C, 16, bias=False) for _ in range(3))

    def forward(self, x):
        return self.weigh(self.query(x), self.key(x), self.value(x), x.shape[-1] ** -0.5)


class Packed(Base):
    def __init__(self, p=0.0):
        super().__init__(p)
        self.qkv, self.proj, self.last = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Dropout(p)

    def parts(self, x):
        B, T, _ = x.shape
        return self.qkv(x).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.parts(x)
        y = self.weigh(q, k, v, 1 / math.sqrt(q.shape[-1]))
        return self.last(self.proj(y.transpose(1, 2).reshape(x.shape)))


class InsideHeads(Packed):
    def parts(self, x):
        B, T, _ = x.shape
        return self.qkv(x).reshape(B, T, self.heads, 3, -1).permute(3, 0, 2, 1, 4)


class Both(Packed):
    """Bidirectional, without a mask."""

    def weigh(self, q, k, v, scale):
        return self.drop((q @ k.mT * scale).softmax(-1)) @ v


class Apart(Base):
    """Four layers; two key heads for four query heads."""

    def __init__(self, p=0.0, key_heads=H):
        super().__init__(p)
        inner = C // H * key_heads
        self.wq, self.wk, self.wv, self.wo = nn.Linear(C, C), nn.Linear(C, inner), nn.Linear(C, inner), nn.Linear(C, C)

    def forward(self, x):
        assert x.shape[1] <= L, "longer than the mask"
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, C // self.heads).transpose(1, 2) for f in (self.wq, self.wk, self.wv))
        if k.shape != q.shape:
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return self.wo(self.weigh(q, k, v, (C // self.heads) ** -0.5).transpose(1, 2).reshape(B, T, C))


class Grouped(Apart):
    def __init__(self, p=0.0):
        super().__init__(p, 2)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, C // self.heads).transpose(1, 2) for f in (self.wq, self.wk, self.wv))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return self.wo(self.weigh(q, k, v, (C // self.heads) ** -0.5).transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("cls", (OneHead, Packed, InsideHeads, Both, Grouped), ids=lambda cls: cls.__name__)
def test_it_is_served(cls):
    torch.manual_seed(1)
    module = cls(0.1).eval()
    x = torch.randn(2, 11, C)
    exact = cls(0.1).eval().double()
    exact.load_state_dict(module.state_dict())

    def run(module, x):
        x = x.clone().requires_grad_()
        y = module(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))

    truth, eager = run(exact, x.double()), run(module, x)
    (row, *_) = patch(module).swapped
    assert (row.path, row.op) == ("", "attention") and "probe: error" in row.why
    for ours, t, e in zip(run(module, x), truth, eager, strict=True):
        assert_close_to_truth(ours, t, e, 4.0)
    module.train()
    with torch.profiler.profile() as profile:
        a, b = module(x), module(x)
    assert any("attention_fwd" in event.name for event in profile.events())
    assert not torch.equal(a, b)  # it drops
    unpatch(module)
    module.eval()
    assert torch.equal(run(module, x)[0], eager[0])


@pytest.mark.parametrize("cls", (Packed, Grouped))
def test_a_text_longer_than_the_mask_has_the_classs_own_error(cls):
    module, x = cls(), torch.randn(1, L + 1, C)
    patch(module)
    with pytest.raises(RuntimeError, match="must match"):
        module(x)


def test_what_is_hooked_or_replaced_is_called():
    module, x = Packed().eval(), torch.randn(2, 5, C)
    expected = module(x)
    patch(module)
    seen = []
    handle = module.drop.register_forward_hook(lambda *args: seen.append(args[1][0].shape))
    torch.testing.assert_close(module(x), expected)
    assert seen == [(2, H, 5, 5)]
    handle.remove()
    module.heads = 2
    other = module(x)
    unpatch(module)
    assert torch.equal(other, module(x)) and not torch.allclose(other, expected)


# ---- what only looks like it ----


class Window(Packed):
    def weigh(self, q, k, v, scale):
        T = q.shape[-2]
        near = torch.ones(T, T, dtype=torch.bool).tril().triu(-2)
        return self.drop((q @ k.mT * scale).masked_fill(~near, float("-inf")).softmax(-1)) @ v


class Placed(Packed):
    """A bias by position."""

    def weigh(self, q, k, v, scale):
        T = q.shape[-2]
        return self.drop((q @ k.mT * scale + 1e-3 * torch.arange(T)).softmax(-1)) @ v


class Scaled(Packed):
    def scale_of(self, q, scale):
        return scale * 1.01


class Normed(Packed):
    def query_of(self, q):
        return F.normalize(q, dim=-1)


class Reversed(Packed):
    def parts(self, x):
        B, T, _ = x.shape
        return self.qkv(x).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).flip(2)


class Renormed(Packed):
    """Dropout that is scaled anew in training."""

    def weigh(self, q, k, v, scale):
        T = q.shape[-2]
        s = (q @ k.mT * scale).masked_fill(self.mask[:T, :T] == 0, float("-inf")).softmax(-1)
        s = self.drop(s)
        return s / s.sum(-1, keepdim=True).clamp(min=1e-6) @ v


class ByLength(Packed):
    def scale_of(self, q, scale):
        return scale if q.shape[-2] < 16 else 2 * scale


SPAN = 12


class LongWindow(Packed):
    """Of more tokens than the probe has: its number is an attribute, a global, a default, or stands in the code."""

    def __init__(self, p=0.0):
        super().__init__(p)
        self.span = 12

    def weigh(self, q, k, v, scale):
        T = q.shape[-2]
        near = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - self.span)
        return self.drop((q @ k.mT * scale).masked_fill(~near, float("-inf")).softmax(-1)) @ v


class GlobalWindow(Packed):
    def weigh(self, q, k, v, scale):
        T = q.shape[-2]
        near = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - SPAN)
        return self.drop((q @ k.mT * scale).masked_fill(~near, float("-inf")).softmax(-1)) @ v


class DefaultWindow(Packed):
    def weigh(self, q, k, v, scale, span=12):
        T = q.shape[-2]
        near = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - span)
        return self.drop((q @ k.mT * scale).masked_fill(~near, float("-inf")).softmax(-1)) @ v


class WrittenWindow(Packed):
    def weigh(self, q, k, v, scale):
        T = q.shape[-2]
        near = torch.ones(T, T, dtype=torch.bool).tril().triu(-11)
        return self.drop((q @ k.mT * scale).masked_fill(~near, float("-inf")).softmax(-1)) @ v


class ParentsWindow(LongWindow):
    """Behind super(), where the number is not read."""

    def weigh(self, q, k, v, scale):
        return super().weigh(q, k, v, scale).softmax(-1) * 0 + super().weigh(q, k, v, scale)


class Table:
    near = staticmethod(lambda T: torch.ones(T, T, dtype=torch.bool).tril().triu(-11))


class OthersWindow(Packed):
    """Of an object that the code names."""

    def weigh(self, q, k, v, scale):
        return self.drop((q @ k.mT * scale).masked_fill(~Table.near(q.shape[-2]), float("-inf")).softmax(-1)) @ v


WINDOWS = (LongWindow, GlobalWindow, DefaultWindow, WrittenWindow, ParentsWindow, OthersWindow)


@pytest.mark.parametrize("cls", WINDOWS, ids=lambda cls: cls.__name__)
def test_a_window_longer_than_the_probe(cls):
    """Up to its length it is causal attention, beyond it the class's own."""
    structure._cache.clear()
    module, x = cls().eval(), torch.randn(2, 20, C)
    expected = [module(x[:, :T]) for T in (9, 20)]
    patch(module)
    for T, y in zip((9, 20), expected, strict=True):
        torch.testing.assert_close(module(x[:, :T]), y)


@pytest.mark.parametrize("when", ("before", "after"))
def test_a_mask_in_a_buffer_is_looked_at(when):
    """A band of 12, in a buffer: before patch it is not proposed, after it a call is the class's own."""
    structure._cache.clear()
    module, x = Packed().eval(), torch.randn(2, 20, C)

    def narrow():
        module.mask.copy_(torch.tril(torch.ones(L, L)).triu(-11))

    if when == "before":
        narrow()
        expected = module(x)
        assert "attention" not in (patch(module).rows[0].op or "")
    else:
        assert patch(module).rows[0].op == "attention"
        narrow()
        other = Packed().eval()
        other.load_state_dict(module.state_dict())
        other.mask.copy_(module.mask)
        expected = other(x)
    torch.testing.assert_close(module(x), expected)


class FourDoubled(Packed):
    """No branch: four tokens, as one of the probe's texts has, are weighed otherwise."""

    def scale_of(self, q, scale):
        return scale * (1 + (q.shape[-2] == 4))


# the last branches by shapes, for which a probe cannot vouch
WRONG = (Window, Placed, Scaled, Normed, Reversed, Renormed, FourDoubled, ByLength, Apart)


@pytest.mark.parametrize("cls", WRONG, ids=lambda cls: cls.__name__)
def test_what_it_only_looks_like(cls):
    structure._cache.clear()
    module, x = cls(0.1).eval(), torch.randn(2, 20, C)
    expected = module(x)
    row = patch(module).rows[0]
    # not even proposed: the first that a probe is not asked
    assert "attention" not in (row.op or "") and ("not attention" in row.why or cls in (ByLength, Apart)), row
    torch.testing.assert_close(module(x), expected)
