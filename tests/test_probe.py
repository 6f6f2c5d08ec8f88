"""Structure proposes, a probe decides: made-up classes that are what they look like are swapped, those that are subtly not are
kept; and the probe leaves everything as it was."""

import copy
import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt_kernels import patch, structure, unpatch
from gpt_kernels.accuracy import SAME_FORMULA

N = 16


class RMS(nn.Module):
    eps = 1e-5

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(N))

    def rstd(self, x):
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return x * self.rstd(x) * self.scale


class OnePlus(RMS):
    def forward(self, x):
        return (x.float() * self.rstd(x.float()) * (1 + self.scale.float())).type_as(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta, self.gamma = nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(N))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.gamma * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6) + self.beta


class Erf(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


class MLP(nn.Module):
    act = staticmethod(F.gelu)

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(N, 3 * N), nn.Linear(3 * N, N), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class GLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(N, 24, bias=False), nn.Linear(N, 24, bias=False)
        self.out, self.act = nn.Linear(24, N, bias=False), nn.SiLU()

    def forward(self, x):
        return self.out(self.act(self.b(x)) * self.a(x))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(N, 48), nn.Linear(24, N)

    def forward(self, x):
        up, gate = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


RIGHT = {RMS: "rms_norm", OnePlus: "rms_norm", Layer: "layer_norm", Erf: "gelu", MLP: "gelu", GLU: "glu", Packed: "glu"}


@pytest.mark.parametrize("cls", RIGHT, ids=lambda cls: cls.__name__)
def test_what_it_looks_like(cls):
    module, x = nn.Sequential(cls()).eval(), torch.randn(2, 7, N, requires_grad=True)
    expected = [module(x), *torch.autograd.grad(module(x).cos().sum(), [x, *module.parameters()])]
    plan = patch(module)
    assert plan.rows[1].op == RIGHT[cls] and "probe: error" in str(plan) and type(module[0]).__name__ == cls.__name__
    actual = [module(x), *torch.autograd.grad(module(x).cos().sum(), [x, *module.parameters()])]
    tolerance = SAME_FORMULA[torch.float32]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    unpatch(module)
    assert type(module[0]) is cls


class Outside(RMS):
    def rstd(self, x):
        return 1 / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class Twice(RMS):
    def forward(self, x):
        return x * self.rstd(x) * (2 + self.scale)


class Unbiased(Layer):
    def forward(self, x):
        return self.gamma * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6) + self.beta


class Elsewhere(RMS):
    def rstd(self, x):
        return torch.rsqrt(x.square().mean(-2, keepdim=True) + self.eps)


class Clipped(Erf):
    def forward(self, x):
        return super().forward(x).clamp(max=40.0)


class Detached(Erf):
    def forward(self, x):
        return x * 0.5 * (1 + torch.erf(x.detach() / math.sqrt(2)))


class Counting(RMS):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Running(RMS):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


class OnValues(RMS):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e30 else x


class OnShape(RMS):
    def forward(self, x):
        return super().forward(x) if x.shape[1] < 100 else x


class Swish(GLU):
    def __init__(self):
        super().__init__()
        self.act = nn.Mish()


class Both(GLU):
    def forward(self, x):
        return self.out(self.act(self.b(x)) * self.act(self.a(x)))


class InTraining(MLP):
    def forward(self, x):
        return super().forward(x) * (1.5 if self.training else 1.0)


WRONG = (Outside, Twice, Unbiased, Elsewhere, Clipped, Detached, Counting, Running, OnValues, OnShape, Swish, Both, InTraining)


@pytest.mark.parametrize("cls", WRONG, ids=lambda cls: cls.__name__)
def test_what_it_only_looks_like(cls):
    module = nn.Sequential(cls())
    plan = patch(module)
    assert plan.rows[1].op is None and plan.rows[1].why and type(module[0]) is cls


def test_nothing_is_touched():
    module = nn.Sequential(RMS(), MLP(), GLU()).train()
    fired = []
    module[2].a.register_forward_hook(lambda *_: fired.append(1))
    structure._cache.clear()
    state = copy.deepcopy(module.state_dict())
    torch.manual_seed(3), random.seed(3)
    expected = torch.rand(3), random.random()
    torch.manual_seed(3), random.seed(3)
    patch(module)
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())
    assert not fired and all(p.grad is None for p in module.parameters()) and all(m.training for m in module.modules())


def test_layers_alike_are_probed_once(monkeypatch):
    calls = []
    real = structure.probe
    monkeypatch.setattr(structure, "probe", lambda *a: calls.append(1) or real(*a))
    structure._cache.clear()
    patch(nn.Sequential(*(GLU() for _ in range(8))))
    assert len(calls) == 1
    patch(nn.Sequential(GLU()))
    assert len(calls) == 1


def test_changes_after_patch_are_seen():
    module, x = nn.Sequential(GLU(), RMS()), torch.randn(2, 3, N)
    patch(module)
    module[0].act = nn.Tanh()
    module[1].eps = 0.5
    ours = module(x)
    unpatch(module)
    torch.testing.assert_close(ours, module(x))


def test_not_probed():
    assert "not probed" in patch(nn.Sequential(RMS()), probe=False).rows[1].why


def test_a_kept_bound_forward_is_the_classs_own_after_unpatch():
    module, x = nn.Sequential(RMS()), torch.randn(2, 3, N)
    patch(module)
    bound = module[0].forward
    unpatch(module)
    assert torch.equal(bound(x), module[0](x))


def test_children_of_other_classes_are_called():
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    module, x = nn.Sequential(GLU(), MLP()).eval(), torch.randn(2, 3, N)
    patch(module)
    module[0].a, module[1].fc1 = Adapter(N, 24), Adapter(N, 3 * N)
    ours = module(x)
    unpatch(module)
    torch.testing.assert_close(ours, module(x))
