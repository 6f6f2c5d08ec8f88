"""verify passes what is right, fails what is wrong by little, and leaves the model as it was."""

import json

import pytest
import torch
from torch import nn

from gpt_kernels import GPT, GPTConfig, patch, unpatch, verify
from gpt_kernels.accuracy import MODEL_GRADIENT, model_floor
from gpt_kernels.integrations import transformers_gpt2, transformers_models, transformers_private
from gpt_kernels.patch import is_patched
from gpt_kernels.verify import compare

pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model  # noqa: E402

V, T = 97, 17


def tiny(cls=GPT2LMHeadModel, **overrides):
    sizes = dict(vocab_size=V, n_positions=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return cls(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **overrides}))


def tokens():
    return torch.randint(0, V, (2, T))


# ---- the rule ----


def test_floor_is_two_roundings_of_the_largest_value():
    truth = torch.tensor([0.5, -4.0, float("inf"), float("nan")], dtype=torch.float64)
    assert model_floor(truth, torch.float32) == 2 * 2**-23 * 4
    assert model_floor(truth[2:], torch.float32) == 0.0
    assert model_floor(truth, torch.float64) == 4e-12


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("size", (1e-4, 1.0, 1e4))
def test_rule_accepts_another_rounding_and_nothing_more(dtype, size):
    truth = torch.randn(300, 40, dtype=torch.float64) * size
    truth = truth.to(dtype).double() + truth * torch.finfo(dtype).eps / 5
    eager = truth.to(dtype)
    assert compare("x", eager, eager, truth, dtype, 1.5).ok
    other = (truth * (1 + torch.finfo(dtype).eps / 4)).to(dtype)
    assert compare("x", other, eager, truth, dtype, 1.5).ok
    allowed = compare("x", eager, eager, truth, dtype, 1.5).allowed
    for where in ((0, 0), (299, 39), (150, 7)):
        wrong = eager.clone()
        wrong[where] += 8 * allowed
        assert not compare("x", wrong, eager, truth, dtype, 1.5).ok


def test_a_truth_that_is_nothing_beside_eagers_error():
    """Of a gradient that cancels, each way of computing it leaves another rest."""
    truth, eager = torch.full((8,), 1e-17, dtype=torch.float64), torch.full((8,), 2e-9)
    for size, right in ((2e-8, True), (3e-8, False)):
        assert compare("g", torch.full((8,), size), eager, truth, torch.float32, MODEL_GRADIENT).ok is right
    # and of one that does not, three times eager's is the end
    assert not compare("g", 1 + 2e-6 * torch.ones(8), 1 + eager, truth * 0 + 1, torch.float32, MODEL_GRADIENT).ok


def test_one_bad_element_of_eager_hides_no_other_error():
    truth = torch.randn(1000, dtype=torch.float64)
    eager, ours = truth.float(), truth.float() + 1e-5
    eager[0] += 1e-4
    c = compare("x", ours, eager, truth, torch.float32, 1.5)
    assert c.error <= c.allowed and c.rms > c.allowed_rms and not c.ok


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_nonfinite_must_stand_where_it_belongs(value):
    truth = torch.randn(10, dtype=torch.float64)
    eager = truth.float()
    ours = eager.clone()
    ours[3] = value
    assert not compare("x", ours, eager, truth, torch.float32, 1.5).ok
    assert compare("x", ours, ours, truth, torch.float32, 1.5).ok  # as eager has it
    truth[3] = value
    assert compare("x", ours, ours, truth, torch.float32, 1.5).ok
    assert not compare("x", eager, eager, truth, torch.float32, 1.5).ok


# ---- models that are right ----


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_right_models_pass(dtype, implementation, capsys):
    model, x = tiny(attn_implementation=implementation).to(dtype), tokens()
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    report = verify(model, {"input_ids": x, "attention_mask": mask})
    names = [f"grad {name}" for name, _ in model.named_parameters()]
    assert report.ok and [row.name for row in report.rows] == ["loss", "logits", *names]
    assert report.dtype == str(dtype).removeprefix("torch.")
    printed = capsys.readouterr().out
    assert (
        printed.rstrip() == str(report)
        and "OK: of 30 tensors" in printed
        and "grad transformer.h.*.attn.c_attn.weight" in printed
    )
    data = json.loads(report.to_json())
    assert data["ok"] is True and len(data["rows"]) == 30 and data["rows"][1]["eager_error"] > 0 or dtype == torch.float64


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_autocast_is_compared_as_it_runs(implementation, monkeypatch):
    # a scalar may be right by luck in eager: several seeds
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = tiny(attn_implementation=implementation), tokens()
        with torch.autocast("cpu", torch.bfloat16):
            report = verify(model, x, show=False)
            assert torch.is_autocast_enabled("cpu")
        assert report.ok and report.dtype == "float32 under autocast to bfloat16", report
        plain = {row.name: row for row in verify(model, x, show=False).rows}
        # it did run under autocast, and the truth did not
        assert all(row.eager_error > 30 * plain[row.name].eager_error for row in report.rows if row.name == "logits")
    wrong_backward(monkeypatch)
    monkeypatch.setattr(_Scaled, "backward", staticmethod(lambda ctx, dx: dx * 1.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert not verify(model, x, show=False).ok


def test_errors_are_measured_against_real_float64():
    # transformers takes its loss through float32 even for a float64 model
    model, x = tiny(), tokens()
    loss = verify(model, x, show=False).rows[0]
    logits = model.double().eval()(x).logits
    truth = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), x[:, 1:].reshape(-1))
    eager = model.float()(x, labels=x).loss
    assert loss.eager_error == pytest.approx(abs(eager.item() - truth.item()), rel=1e-6, abs=1e-13)


def test_model_without_loss_and_keywords():
    x = tokens()
    report = verify(tiny(GPT2Model), x, show=False)
    assert report.ok and report.rows[0].name == "last_hidden_state" and len(report.rows) == 29
    assert verify(tiny(), {"inputs_embeds": torch.randn(2, T, 32)}, show=False).ok


def test_own_gpt_against_the_reference():
    model, x = GPT(GPTConfig(block_size=40, vocab_size=V, n_layer=2, n_head=4, n_embd=32, dropout=0.1)), tokens()
    report = verify(model, x, show=False)
    assert report.ok and {"loss", "logits"} <= {row.name for row in report.rows} and "own modules" in report.swapped
    assert verify(model, (x, x), show=False).ok


def test_torch_modules():
    assert verify(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)), torch.randn(5, 8), show=False).ok


# ---- models that are wrong ----


def wrong_scale(monkeypatch):
    real = transformers_gpt2.attention
    monkeypatch.setattr(transformers_gpt2, "attention", lambda *a, scale, **k: real(*a, scale=scale * 1.0001, **k))


def wrong_gelu(monkeypatch):
    monkeypatch.setattr(transformers_private, "gelu_of", lambda act: "none")


def lost_bias(monkeypatch):
    real = transformers_gpt2.gelu
    monkeypatch.setattr(transformers_gpt2, "gelu", lambda x, bias, approximate: real(x, bias.detach(), approximate))


def not_causal(monkeypatch):
    real = transformers_gpt2.attention
    monkeypatch.setattr(transformers_gpt2, "attention", lambda *a, window_right, **k: real(*a, window_right=1, **k))


def wrong_loss(monkeypatch):
    real = transformers_models.cross_entropy
    monkeypatch.setattr(transformers_models, "cross_entropy", lambda *a, **k: real(*a, **k) * (1 + 1e-5))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx * (1 + 1e-4)


def wrong_backward(monkeypatch):
    real = transformers_gpt2.gelu
    monkeypatch.setattr(transformers_gpt2, "gelu", lambda x, bias, approximate: _Scaled.apply(real(x, bias, approximate)))


def a_nan(monkeypatch):
    real = transformers_gpt2.gelu

    def poisoned(*args):
        y = real(*args)
        return y.index_fill(0, torch.tensor([1]), float("nan"))

    monkeypatch.setattr(transformers_gpt2, "gelu", poisoned)


@pytest.mark.parametrize(
    "fault, name",
    [
        (wrong_scale, "logits"),
        (wrong_gelu, "logits"),
        (lost_bias, "grad transformer.h.0.mlp.c_fc.bias"),
        (not_causal, "logits"),
        (wrong_loss, "loss"),
        (wrong_backward, "grad transformer.h.0.mlp.c_fc.weight"),
        (a_nan, "logits"),
    ],
)
def test_seeded_faults_are_found(fault, name, monkeypatch, capsys):
    model, x = tiny(), tokens()
    assert verify(model, x, show=False).ok
    fault(monkeypatch)
    report = verify(model, x)
    assert not report.ok and name in [row.name for row in report.rows if not row.ok]
    printed = capsys.readouterr().out
    assert "FAIL" in printed and "worse than eager" in printed
    assert json.loads(report.to_json())["ok"] is False


# ---- left as it was ----


@pytest.mark.parametrize("was_patched", (False, True))
def test_model_is_left_as_it_was(was_patched):
    model, x = tiny().train(), tokens()
    model.transformer.drop.eval()
    if was_patched:
        patch(model)
    marks = [torch.full_like(p, 7.0) for p in model.parameters()]
    for p, mark in zip(model.parameters(), marks, strict=True):
        p.grad = mark
    modules = [(id(m), type(m), m.training) for m in model.modules()]
    values, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    draw = model.register_forward_hook(lambda *_: torch.rand(1) and None)
    verify(model, x, show=False)
    draw.remove()
    assert [(id(m), type(m), m.training) for m in model.modules()] == modules
    assert all(p.grad is mark and (mark == 7.0).all() for p, mark in zip(model.parameters(), marks, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and is_patched(model) is was_patched


def test_model_is_left_as_it_was_after_an_error():
    model = tiny().train()
    patch(model)
    with pytest.raises(IndexError):
        verify(model, torch.full((2, T), V))
    assert is_patched(model) and all(m.training for m in model.modules())
    unpatch(model)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: verify("gpt2", tokens()), TypeError, "expected a torch.nn.Module, got str"),
        (lambda: verify(tiny(), "text"), TypeError, "batch must be a dict, a tuple or a tensor, got str"),
        (lambda: verify(nn.Linear(3, 3), torch.zeros(2, 3)), ValueError, "nothing to compare"),
        (lambda: verify(tiny().requires_grad_(False), tokens()), ValueError, "no parameter of the model requires"),
        (lambda: verify(nn.Sequential(nn.ReLU()), torch.zeros(2, 3)), ValueError, "no parameter of the model requires"),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
