"""kernel_mapping and kernel_config in the registries of the package kernels and of transformers.

transformers takes certain versions of kernels alone, and the pinned one takes none that the index has: the tests that need
both run where they are installed, which the slow tier does for the last pair that goes together
(test_the_pair_in_a_venv_of_its_own)."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, batch_of, differences, run, truth_of
from torch import nn
from torch.nn import functional as F

import gpt_kernels
from gpt_kernels.hooks import kernelized, layers
from gpt_kernels.hooks.layers import LAYERS

ROOT = pathlib.Path(__file__).parents[1]
PAIR = ("transformers==5.22.2", "kernels==0.17.2", "peft==0.21.2", "accelerate==1.15.0")


def has_pair():
    if importlib.util.find_spec("kernels") is None or importlib.util.find_spec("transformers") is None:
        return False
    from transformers.utils.import_utils import is_kernels_available

    return is_kernels_available()


with_pair = pytest.mark.skipif(not has_pair(), reason="no transformers with a kernels that it takes; see the slow tier")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(layers, "_agreed", {})


# ---- the layers, and what kernels asks of them ----


def test_mapping_has_the_cpu():
    mapping = gpt_kernels.kernel_mapping()
    assert {name for name in mapping if "cpu" in mapping[name]} >= {"RMSNorm", "GeLU", "GeluTanh", "NewGELU", "FastGELU"}
    for name, devices in mapping.items():
        assert devices["cpu"].load() is LAYERS[name][0] and devices["cpu"] == kernelized.LocalLayer(name)
        assert hash(devices["cpu"]) == hash(kernelized.LocalLayer(name)) and name in str(devices["cpu"])


def test_no_kernel_no_entry(monkeypatch):
    served = gpt_kernels.where("rms_norm_fwd")
    monkeypatch.setattr(kernelized, "where", lambda op: {"CPU": gpt_kernels.Served("reference", ""), "CUDA": served["CUDA"]})
    assert not any("cpu" in devices for devices in gpt_kernels.kernel_mapping().values())


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_stateless(name):
    layer = LAYERS[name][0]
    assert layer.__init__ is nn.Module.__init__
    assert set(dir(layer)) - set(dir(nn.Module)) <= {"has_backward", "can_torch_compile"}


class LlamaRMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6, power=2):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(size)), eps

    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class OneMore(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * (1 + 1 / self.weight)


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class Rotary(nn.Module):
    sign = 1

    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(t * cos + self.sign * rotate_half(t) * sin for t in (q, k))


class RotaryBack(Rotary):
    sign = -1  # as nanochat's


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class HalvedMLP(GatedMLP):
    def forward(self, x):
        return super().forward(x) / 2


class Gelu(nn.Module):
    def forward(self, input):
        return F.gelu(input)


def replaced(module, name):
    """As kernelize does it."""
    module.forward = LAYERS[name][0].forward.__get__(module)
    return module


def watch(monkeypatch, op):
    calls = []
    own = getattr(layers, op)
    monkeypatch.setattr(layers, op, lambda *args, **options: calls.append(op) or own(*args, **options))
    return calls


@pytest.mark.parametrize(
    "cls, name, op, served",
    [
        (lambda: LlamaRMSNorm(8), "RMSNorm", "rms_norm", True),
        (lambda: OneMore(8), "RMSNorm", "rms_norm", False),
        (GatedMLP, "MLP", "swiglu", True),
        (HalvedMLP, "MLP", "swiglu", False),
        (Gelu, "GeLU", "gelu", True),
        (Gelu, "GeluTanh", "gelu", False),
        (Rotary, "rotary_pos_emb", "apply_rotary_pos_emb", True),
        (RotaryBack, "rotary_pos_emb", "apply_rotary_pos_emb", False),
    ],
)
def test_what_is_another_formula_is_left_to_its_class(cls, name, op, served, monkeypatch):
    torch.manual_seed(0)
    module, x = cls(), torch.randn(2, 5, 8)
    args = (x,)
    if name == "rotary_pos_emb":
        args = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8))
    inputs = [a.requires_grad_() for a in args[:2]]
    results = []
    calls = watch(monkeypatch, op)
    state = torch.get_rng_state()
    for own in (True, False):
        out = (module if own else replaced(module, name))(*args)
        out = out if isinstance(out, tuple) else (out,)
        results.append((*out, *torch.autograd.grad(sum(o.square().sum() for o in out), [*inputs, *module.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(calls) == (2 if served else 1)  # the first is the comparison
    assert torch.equal(torch.get_rng_state(), state)
    module(*args)
    assert len(calls) == (3 if served else 1)


@pytest.mark.parametrize("case", ("float32 weight", "integers", "eps", "empty"))
def test_a_call_that_is_not_ours_is_the_classs_own(case, monkeypatch):
    module = LlamaRMSNorm(8)
    x = torch.randn(2, 8)
    x = {"float32 weight": x.bfloat16(), "integers": x.long(), "empty": x[:0]}.get(case, x)
    if case == "eps":
        module.variance_epsilon = torch.tensor(1e-6)
    expected = module(x)
    calls = watch(monkeypatch, "rms_norm")
    found = replaced(module, "RMSNorm")(x)
    assert torch.equal(found, expected) and found.dtype == expected.dtype and calls == []


# ---- in kernels' own registry ----


def test_kernelize_of_the_package(monkeypatch):
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "use_kernel_mapping"):
        pytest.skip("this kernels has no mapping")

    @kernels.use_kernel_forward_from_hub("RMSNorm")
    class Norm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    model = nn.Sequential(Norm(8), nn.Linear(8, 8), Norm(8))
    x = torch.randn(3, 8)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    calls = watch(monkeypatch, "rms_norm")
    with kernels.use_kernel_mapping(gpt_kernels.kernel_mapping()):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert len(calls) == 3  # two, and the comparison
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- in transformers ----


@with_pair
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("name", ("Llama", "Qwen3", "Phi-3", "Gemma 3", "GPT-2", "BERT", "ViT"))
def test_use_kernels(name, training, monkeypatch):
    family = FAMILIES[name]
    torch.manual_seed(0)
    model, batch = family.make(), batch_of(family)
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if hasattr(model.config, "attn_pdrop"):
        model.config.attn_pdrop = 0.0
    for module in model.modules():
        for attribute in ("dropout_prob", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    eager, truth = run(family, model, batch), truth_of(family, model, batch)
    calls = [watch(monkeypatch, op) for op in ("rms_norm", "gelu", "apply_rotary_pos_emb")]
    config = gpt_kernels.kernel_config()
    model.set_use_kernels(True, config)
    assert model.use_kernels and model.kernel_config is config and "RMSNorm" in config.kernel_mapping
    assert differences(run(family, model, batch), eager, truth, torch.float32) == []
    # Gemma's norm carries no name
    assert any(calls)


@with_pair
def test_from_pretrained(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    FAMILIES["Llama"].make().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, use_kernels=True, kernel_config=gpt_kernels.kernel_config())
    x = torch.randint(0, 97, (1, 5))
    calls = watch(monkeypatch, "rms_norm")
    found = model(x).logits
    assert len(calls) == 6
    torch.testing.assert_close(found, LlamaForCausalLM.from_pretrained(tmp_path)(x).logits, rtol=1e-4, atol=1e-4)


@with_pair
def test_transformers_own_config_refuses_the_cpu():
    """What ours is for: when this fails, transformers' own will do."""
    from transformers import KernelConfig

    model = FAMILIES["Llama"].make()
    with pytest.raises(ValueError, match="Only devices in .* are supported, got: cpu"):
        model.set_use_kernels(True, KernelConfig({"RMSNorm": {"cpu": "/a/b:RMSNorm"}}, use_local_kernel=True))


@with_pair
@pytest.mark.slow
def test_compiled():
    family = FAMILIES["Llama"]
    model, batch = family.make(), batch_of(family)
    expected = run(family, model, batch)
    model.set_use_kernels(True, gpt_kernels.kernel_config())
    run(family, model, batch)
    torch.utils.deterministic.fill_uninitialized_memory = False
    found = run(family, torch.compile(model, backend="aot_eager"), batch)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key.replace("grad ", "grad _orig_mod.")], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_pair_in_a_venv_of_its_own(tmp_path):
    """These tests again, on a transformers and a kernels that go together."""
    if has_pair():
        pytest.skip("this environment has such a pair")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PAIR[:2]], check=True, timeout=900)
    # the rest as here, after what was installed there
    (site / "here.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    result = subprocess.run(
        [python, "-m", "pytest", "-q", "-n", "0", "-rs", "tests/test_hooks_kernels.py", "-k", "not venv"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0 and "SKIPPED" not in result.stdout, result.stdout + result.stderr
