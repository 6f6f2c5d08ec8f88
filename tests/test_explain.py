"""explain tells who serves what, times each candidate, and leaves the model as it was."""

import json

import pytest
import torch
from torch import nn

import gpt_kernels
from gpt_kernels import GPT, GPTConfig, cli, explain, measured, policy
from gpt_kernels.explain import _OWN
from gpt_kernels.patch import is_patched

V, T = 97, 16


@pytest.fixture(autouse=True)
def little_time(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "ROUNDS", (2, 2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def gpt2(**overrides):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=V, n_positions=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **overrides})).train()


def tokens():
    return torch.randint(0, V, (2, T))


def told(model, batch=None, **options):
    return explain(model, tokens() if batch is None else batch, **{"compile": False, "show": False, "seconds": 0.0, **options})


def test_a_model_that_is_not_patched():
    found = told(gpt2())
    choices = {(c.op, c.module): c for c in found.choices}
    assert {op for op, _ in choices} == {"layer_norm", "attention", "gelu", "dropout", "cross_entropy"}
    attention = choices["attention", "transformer.h.*.attn"]
    assert (
        attention.calls == attention.modules == 2 and attention.shapes == f"(2, {T}, 32) float32" and attention.chosen == "ours"
    )
    assert attention.served == str(gpt_kernels.where("attention_fwd")["CPU"])
    assert "attention_fwd x1" in attention.ran and "attention_bwd x1" in attention.ran
    for c in (*found.choices, found.step):
        assert c.seconds.keys() == {"eager", "ours"} and not c.absent.keys() - {"compile"}
        assert all(s.forward > 0 and (s.backward or 0) > 0 for s in c.seconds.values())
    served = {o.op: o for o in found.ops}
    assert served["layer_norm_fwd"].calls == served["layer_norm_bwd"].calls == 5 and served["attention_bwd"].calls == 2
    assert ("Linear", 1, "matrix product: torch's") in found.kept
    assert not found.patched and "as patch() would have it" in str(found)
    assert "transformer.h.*.attn" in str(found) and str(gpt_kernels.where("gelu_fwd")["CPU"]) in str(found)


def test_a_patched_model_is_explained_as_it_is(monkeypatch):
    model = gpt2()

    def entry(kind):
        return {"eager": 1e-3, "ours": 2e-3, "slower": 1.0 if type(kind.module) is nn.LayerNorm else 0.0}

    monkeypatch.setattr(policy, "measured", entry)
    gpt_kernels.patch(model, policy="measured", sample=tokens())
    found = told(model)
    by_op = {c.op: c for c in found.choices}
    assert by_op["layer_norm"].chosen == "eager" and "patch kept it" in by_op["layer_norm"].why
    assert by_op["attention"].chosen == "ours" and found.patched and "as it is patched" in found.summary()
    assert "layer_norm_fwd" not in {o.op for o in found.ops} and "attention_fwd" in {o.op for o in found.ops}


@pytest.mark.parametrize("was_patched", [False, True])
def test_the_model_is_left_as_it_was(was_patched):
    model, ids = gpt2(), tokens()
    if was_patched:
        gpt_kernels.patch(model)
    classes, state = [type(m) for m in model.modules()], torch.get_rng_state()
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    told(model, ids)
    assert [type(m) for m in model.modules()] == classes and is_patched(model) == was_patched
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_pre_hooks for m in model.modules())


def test_the_model_is_left_as_it_was_after_an_error():
    model = gpt2()
    with pytest.raises(Exception, match="index"):
        told(model, torch.full((1, 4), V))
    assert not is_patched(model) and not any(m._forward_pre_hooks for m in model.modules())


def test_our_own_model_stands_beside_torchs_functions():
    found = told(GPT(GPTConfig(vocab_size=V, block_size=40, n_layer=2, n_head=2, n_embd=32, dropout=0.1)))
    by_class = {c.cls: c for c in found.choices}
    assert by_class.keys() == {"CausalSelfAttention", "MLP", "LayerNorm", "Dropout"}
    assert all(c.seconds.keys() == {"eager", "ours"} and c.chosen == "ours" for c in found.choices)
    assert by_class["MLP"].op == "gelu" and "gelu_fwd x1" in by_class["MLP"].ran
    assert {"cross_entropy_fwd", "attention_bwd"} <= {o.op for o in found.ops}


def test_the_table_of_our_modules_computes_what_they_do():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=V, block_size=40, n_layer=1, n_head=2, n_embd=32)
    block, x = GPT(config).transformer.h[0], torch.randn(2, T, 32)
    calls = [
        (block.attn, (x, None, 0, x)),
        (block.mlp, (x, x)),
        (block.ln_1, (x,)),
        (gpt_kernels.RMSNorm(32), (x,)),
        (gpt_kernels.Dropout(0.0), (x, x)),
        (gpt_kernels.GELU(), (x, x[0, 0])),
        (gpt_kernels.Softmax(scale=0.5, causal=True), (x, x)),
    ]
    assert {type(module) for module, _ in calls} == set(_OWN)
    for module, args in calls:
        torch.testing.assert_close(_OWN[type(module)][1](module, *args), module(*args), atol=2e-6, rtol=1e-5)


def test_a_model_of_which_nothing_is_ours():
    found = told(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(3, 4),))
    assert not found.choices and not found.ops and "none of our ops runs" in str(found)
    assert found.step.seconds["ours"].backward > 0 and ("ReLU", 1, "no replacement for this class") in found.kept


def test_what_our_kernels_do_not_serve_is_said():
    """The class is swapped, the call is not served: a layer norm of a transposed input."""

    class Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x.transpose(1, 2))

    (choice,) = told(Across(), (torch.randn(2, 4, 4),)).choices
    assert choice.op == "layer_norm" and choice.ran == ""


def test_a_candidate_that_fails_says_why(monkeypatch):
    def broken(function, **options):
        def call(*args, **kwargs):
            raise NotImplementedError("not this one\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    found = told(gpt2(n_layer=1), compile=True)
    c = next(c for c in found.choices if c.op == "gelu")
    assert c.absent["compile"] == "NotImplementedError: not this one" and "not this one" in str(found)


def test_compiled_stands_beside_them(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: [compiled.append(function), function][1])
    found = told(gpt2(n_layer=1), compile=True)
    assert all("compile" in c.seconds for c in (*found.choices, found.step) if c.op != "cross_entropy")
    assert len(compiled) == len(found.choices), "all but the model's own row, and the step"


@pytest.mark.slow
def test_really_compiled():
    found = told(gpt2(n_layer=1), compile=True)
    assert all("compile" in c.seconds for c in (*found.choices, found.step) if c.op != "cross_entropy")


def test_verdict():
    def timing(eager, ours, slower):
        return measured.Timing({"eager": measured.Seconds(eager, None), "ours": measured.Seconds(ours, None)}, slower, {})

    verdict = gpt_kernels.explain.__globals__["_verdict"]
    assert verdict(timing(2.0, 1.0, 0.0)) == "2.00x as fast as eager"
    assert verdict(timing(1.0, 1.01, 1.0)) == "as fast as eager"
    assert verdict(timing(1.0, 2.0, 1.0)) == '2.00x eager\'s time: policy="measured" keeps eager'
    assert verdict(timing(1.0, 2.0, 0.6)).endswith("but not in every round")
    assert verdict(measured.Timing({}, None, {})) == "not measured"


def test_errors():
    with pytest.raises(TypeError, match="explain: expected a torch.nn.Module, got int"):
        explain(3, tokens())
    with pytest.raises(TypeError, match="explain: batch must be"):
        explain(gpt2(), 3)


# ---- JSON, page, command ----


def test_json_and_page(tmp_path):
    found = told(gpt2(n_layer=1))
    data = json.loads(found.to_json())
    assert data["step"]["seconds"]["eager"]["forward"] > 0 and data["summary"] == found.summary()
    found.model = "<script>"
    found.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "http" not in text and "src=" not in text
    for c in found.choices:
        assert c.cls in text and c.module in text
    assert "layer_norm_bwd" in text and "matrix product: torch&#39;s" in text and "var(--ours)" in text and "--ours:" in text


def test_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    from gpt_kernels.models.config import PRESETS
    from gpt_kernels.workflows import models

    real = models.gpt2
    monkeypatch.setattr(models, "gpt2", lambda **sizes: real(**{**sizes, "width": 32, "heads": 2, "vocab": 50257}))
    out = str(tmp_path / "out")
    code = cli.main(["explain", "gpt2", "--layers", "1", "--seq", "8", "--no-compile", "--dtype", "bfloat16", "--out", out])
    printed = capsys.readouterr().out
    assert code == 0 and "written: explain.html and explain.json" in printed and "transformer.h.*.attn" in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["explain.html", "explain.json"] and "gpt2" in PRESETS


def test_command_on_a_folder_of_transformers(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert cli.main(["explain", str(tmp_path), "--layers", "1", "--seq", "8", "--no-compile"]) == 0
    assert "model.layers.*.self_attn" in capsys.readouterr().out
    assert cli.main(["explain", str(tmp_path), "--seq", "99"]) == 2 and "has 64 positions" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    assert cli.main(["explain", str(tmp_path)]) == 2 and "no config that transformers reads" in capsys.readouterr().err


LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("gpt5",), "explain: unknown model 'gpt5', expected one of gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        (("gpt2", "--batch", "-1"), "--batch: must be at least 1, got -1"),
        (("gpt2", "--seq", "4096"), "--seq 4096: gpt2 has 1024 positions"),
        ((), "required: MODEL"),
    ],
)
def test_bad_arguments_end_with_code_2(capsys, arguments, words):
    try:
        code = cli.main(["explain", *arguments])
    except SystemExit as stop:
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2 and words in message and "Traceback" not in message
