"""GPT: Hugging Face's GPT-2 to the last gradient, its files, generation with a cache, and everything refused."""

import copy
import json
import os
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt_kernels import GELU, GPT, GPTConfig, LayerNorm, RMSNorm, Softmax, checkpoint
from gpt_kernels.accuracy import MODEL_GRADIENT, MODEL_OUTPUT
from gpt_kernels.verify import compare

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model  # noqa: E402

V, T, BLOCK = 97, 17, 40
CONFIGS = {
    "plain": {},
    "odd head dim": {"n_embd": 36},
    "n_inner, erf": {"n_inner": 50, "activation_function": "gelu"},
    "inverse layer scale": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu_pytorch_tanh"},
    "unscaled, eps": {"scale_attn_weights": False, "layer_norm_epsilon": 1e-3},
}


def tiny_hf(cls=GPT2LMHeadModel, **overrides):
    # weights ten times the usual: attention and GELU leave their linear range
    sizes = dict(vocab_size=V, n_positions=BLOCK, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **overrides})
    model = cls(config).eval()
    for name, p in model.named_parameters():  # biases and norms that are not 0 and 1
        if p.dim() == 1:
            nn.init.normal_(p, mean=float(name.endswith("weight")), std=0.2)
    return model


def tiny(**overrides):
    sizes = dict(vocab_size=V, block_size=BLOCK, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT(GPTConfig(**{**sizes, **overrides})).eval()


def tokens(batch=2, length=T):
    return torch.randint(0, V, (batch, length))


def shifted(x):
    return F.pad(x[:, 1:], (0, 1), value=-1)


def all_logits(model, x):
    return model.lm_head(model.hidden(x))


# ---- parity with Hugging Face ----


def hf_run(model, x):
    logits = model(x).logits
    loss = F.cross_entropy(
        logits[:, :-1].reshape(-1, V).to(torch.promote_types(logits.dtype, torch.float32)), x[:, 1:].reshape(-1)
    )
    names, params = zip(*model.named_parameters(), strict=True)
    return {"logits": logits, "loss": loss} | dict(zip(names, torch.autograd.grad(loss, params), strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_every_gradient(name, dtype):
    hf, x = tiny_hf(**CONFIGS[name]).to(dtype), tokens()
    eager, truth = hf_run(hf, x), hf_run(copy.deepcopy(hf).double(), x)
    model = GPT.from_hf(hf)
    logits, loss = model(x, shifted(x))
    names, params = zip(*model.named_parameters(), strict=True)
    ours = {"logits": logits, "loss": loss}
    for n, g in zip(names, torch.autograd.grad(loss, params), strict=True):
        ours[n] = g.mT if checkpoint._is_conv1d(n) else g
    assert set(ours) == set(truth)
    for n in truth:
        factor = MODEL_GRADIENT if n in names else MODEL_OUTPUT
        assert (c := compare(n, ours[n], eager[n], truth[n], dtype, factor)).ok, c


def test_training_32_steps():
    hf = tiny_hf(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.02).train()
    ours = GPT.from_hf(hf).train()
    losses = []
    for step in (lambda x: hf(x, labels=x).loss, lambda x: ours(x, shifted(x))[1]):
        torch.manual_seed(1)
        model = (hf, ours)[len(losses)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(32):
            loss = step(torch.randint(0, 10, (4, T)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.8 * losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=0.0)


# ---- nanoGPT's interface ----


def test_state_dict_names():
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for i in range(2):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names += [f"transformer.h.{i}.{part}.weight", f"transformer.h.{i}.{part}.bias"]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
    model = tiny()
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.transformer.wte.weight
    assert list(tiny(bias=False).state_dict()) == [n for n in names if not n.endswith("bias")]


def test_forward_as_nanogpt():
    model, x = tiny(), tokens()
    last, loss = model(x)
    assert last.shape == (2, 1, V) and loss is None
    logits, loss = model(x, shifted(x))
    assert logits.shape == (2, T, V) and loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(last, logits[:, -1:])
    expected = F.cross_entropy(logits.view(-1, V), shifted(x).view(-1), ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    labels = F.pad(x[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(x, labels, ignore_index=-100)[1], expected)


@pytest.mark.parametrize(
    "name, parameters",
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_presets_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert model.num_parameters() == parameters
    assert model.num_parameters(non_embedding=True) == parameters - 1024 * model.config.n_embd


def test_initialisation():
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=128))
    block = model.transformer.h[3]
    for weight, std in (
        (block.mlp.c_fc.weight, 0.02),
        (block.mlp.c_proj.weight, 0.02 / 4),
        (model.transformer.wte.weight, 0.02),
    ):
        assert abs(weight.std().item() / std - 1) < 0.05
    assert not block.attn.c_attn.bias.any() and (block.ln_1.weight == 1).all()


def test_flops_counted_by_hand():
    model = tiny()
    C, L = 32, 2
    matrices = L * (C * 3 * C + C * C + 2 * C * 4 * C) + V * C
    forward = 2 * matrices * T + L * 2 * 2 * T * T * C
    assert model.estimate_flops(1, T, backward=False) == pytest.approx(forward, rel=0.05)
    assert model.estimate_flops(3, T) == 3 * 3 * model.estimate_flops(1, T, backward=False)


def test_optimizer_decays_matrices_only():
    model = tiny()
    decayed, others = model.configure_optimizers(0.3, 1e-3).param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("dropout", (0.0, 0.2))
def test_gradient_checkpointing_changes_nothing(dropout):
    model, x = tiny(dropout=dropout).train(), tokens()
    results = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(model(x, shifted(x))[1], list(model.parameters())))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_gradient_checkpointing_keeps_less():
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(x, shifted(x))
        return sum(sizes)

    model, x = tiny(n_layer=6).train(), tokens()
    before = kept(model)
    model.gradient_checkpointing = True
    assert kept(model) < 0.4 * before


def test_dropout_in_training_only():
    model, x = tiny(dropout=0.0, attn_dropout=0.5), tokens()
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


def test_autocast():
    model, x = tiny(), tokens()
    logits, _ = model(x, shifted(x))
    with torch.autocast("cpu", torch.bfloat16):
        low, loss = model(x, shifted(x))
        out = model.generate(x, 3, temperature=0.0)
    loss.backward()
    assert low.dtype == torch.bfloat16 and out.shape == (2, T + 3)
    torch.testing.assert_close(low.float(), logits, rtol=0.1, atol=0.2)


def test_training_under_autocast_with_dropout():
    """A block adds what a product gave in 16 bits to a stream in float32."""
    model, x = tiny(dropout=0.1).train(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        _, loss = model(x, shifted(x))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compile_fullgraph():
    model, x = tiny(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (T, T - 3):
        expected, actual = (m(x[:, :length], shifted(x[:, :length])) for m in (model, compiled))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        params = list(model.parameters())
        torch.testing.assert_close(torch.autograd.grad(actual[1], params), torch.autograd.grad(expected[1], params))


def test_deepcopy():
    model, x = tiny(), tokens()
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.transformer.wte.weight and torch.equal(other(x)[0], model(x)[0])


@pytest.mark.parametrize(
    "ours, torchs",
    [
        (LayerNorm(24), nn.LayerNorm(24)),
        (LayerNorm(24, 1e-3, bias=False), nn.LayerNorm(24, 1e-3, bias=False)),
        (RMSNorm(24), nn.RMSNorm(24, 1e-6)),
        (Softmax(scale=2.0), lambda x: (2 * x).softmax(-1)),
        (Softmax(causal=True), lambda x: x.masked_fill(torch.ones(5, 24).triu(20).bool(), float("-inf")).softmax(-1)),
        (GELU(), nn.GELU("tanh")),
        (GELU("none"), nn.GELU()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_are_torchs(ours, torchs):
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(ours(x), torchs(x))


# ---- generation ----


def test_greedy_equals_hugging_face():
    hf, x = tiny_hf(), tokens()
    expected = hf.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=BLOCK - T, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert len(expected[:, T:].unique()) > 3
    assert torch.equal(GPT.from_hf(hf).generate(x, BLOCK - T, temperature=0.0), expected)


def test_cache_equals_full_forward():
    model, x = tiny(), tokens()
    cache = torch.full((2, 2, 2, T, 4, 8), float("nan"))
    with torch.no_grad():
        parts = [model.hidden(x[:, a:b], cache, a) for a, b in ((0, 5), (5, 6), (6, 13), (13, T))]
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden(x), rtol=1e-5, atol=1e-5)


def test_past_block_size_equals_reading_the_last_window():
    model, x = tiny(block_size=20), tokens()
    out, expected = model.generate(x, 12, temperature=0.0), x
    for _ in range(12):
        expected = torch.cat((expected, model(expected[:, -20:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, expected) and len(out[:, T:].unique()) > 2
    long = torch.randint(0, V, (1, 33))
    assert model.generate(long, 2).shape == (1, 35)


def test_eos_ends_rows_and_generation():
    model, x = tiny(), tokens(3)
    free = model.generate(x, 20, temperature=0.0)
    eos = free[0, T + 2].item()
    out = model.generate(x, 20, temperature=0.0, eos_token_id=eos)
    stops = [next((i for i in range(T, T + 20) if row[i] == eos), T + 20) for row in free]
    assert out.shape[1] == min(max(stops) + 1, T + 20)
    for row, whole, stop in zip(out, free, stops, strict=True):
        assert torch.equal(row[: stop + 1], whole[: stop + 1][: len(row)]) and (row[stop + 1 :] == eos).all()


def test_sampling_options():
    model, x = tiny(initializer_range=0.05), tokens()
    greedy = model.generate(x, 8, temperature=0.0)
    assert torch.equal(model.generate(x, 8, top_k=1), greedy)
    assert torch.equal(model.generate(x, 8, top_p=1e-6), greedy)
    assert torch.equal(model.generate(x, 8, temperature=1e-4), greedy)
    seeded = [model.generate(x, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize("top_k, top_p", [(3, None), (None, 0.6), (5, 0.5), (V + 5, 1.0)])
def test_samples_come_from_the_cut_distribution(top_k, top_p):
    model = tiny(initializer_range=0.3)
    x = tokens(1).expand(2000, -1)
    p = model(x[:1])[0][0, -1].softmax(-1)
    ordered, index = p.sort(descending=True)
    keep = torch.ones(V, dtype=torch.bool)
    if top_k is not None:
        keep[top_k:] = False
    cut = ordered * keep / (ordered * keep).sum()
    if top_p is not None:
        keep &= cut.cumsum(0) - cut < top_p
    expected = torch.zeros(V).scatter_(0, index, ordered * keep / (ordered * keep).sum())
    drawn = torch.bincount(model.generate(x, 1, top_k=top_k, top_p=top_p)[:, -1], minlength=V) / 2000
    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() < 4 * 0.5 / 2000**0.5


def test_generate_leaves_modes_and_dropout_off():
    model, x = tiny(dropout=0.5).train(), tokens()
    model.transformer.drop.eval()
    modes = [m.training for m in model.modules()]
    assert torch.equal(model.generate(x, 5, temperature=0.0), model.generate(x, 5, temperature=0.0))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.generate(x, 0), x)


def test_loss_and_perplexity_of_a_text():
    model, text = tiny(block_size=16), torch.randint(0, V, (50,))
    windows = [(0, 16), (16, 32), (32, 48), (48, 49)]
    nll = [F.cross_entropy(all_logits(model, text[None, a:b])[0], text[a + 1 : b + 1], reduction="sum") for a, b in windows]
    assert model.loss(text) == pytest.approx(sum(nll).item() / 49, rel=1e-5)
    assert model.perplexity(text) == pytest.approx(torch.exp(sum(nll) / 49).item(), rel=1e-4)
    each = [
        F.cross_entropy(all_logits(model, text[None, max(0, i - 15) : i + 1])[0, -1:], text[i + 1 : i + 2], reduction="sum")
        for i in range(49)
    ]
    assert model.loss(text, stride=1) == pytest.approx(sum(each).item() / 49, rel=1e-5)


# ---- files ----


def test_round_trip_hf_ours_hf(tmp_path):
    hf, x = tiny_hf(n_inner=50, activation_function="gelu", attn_pdrop=0.3), tokens()
    hf.save_pretrained(tmp_path / "a")
    model = GPT.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(all_logits(model, x), hf(x).logits, rtol=1e-5, atol=1e-5)
    assert (model.config.dropout, model.config.attn_dropout, model.config.approximate) == (0.1, 0.3, "none")
    model.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(again(x).logits, hf(x).logits)
    for field in ("n_inner", "activation_function", "attn_pdrop", "n_positions", "eos_token_id"):
        assert getattr(again.config, field) == getattr(hf.config, field)
    assert GPT.from_pretrained(tmp_path / "b").config == model.config


def test_base_model_and_dtype(tmp_path):
    hf, x = tiny_hf(GPT2Model).bfloat16(), tokens()
    torch.testing.assert_close(GPT.from_hf(hf).eval().hidden(x), hf(x).last_hidden_state, rtol=0.05, atol=0.05)
    hf.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert GPT.from_pretrained(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_from_hf_copies():
    hf = tiny_hf()
    model = GPT.from_hf(hf, dropout=0.0, attn_dropout=0.0)
    assert model.config.dropout == 0.0 and model.lm_head.weight is model.transformer.wte.weight
    before = hf.transformer.wte.weight.clone()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(hf.transformer.wte.weight, before)


def test_without_biases_is_saved_with_zeros(tmp_path):
    model, x = tiny(bias=False), tokens()
    model.save_pretrained(tmp_path)
    hf = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(hf(x).logits, all_logits(model, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(all_logits(GPT.from_pretrained(tmp_path, bias=False), x), all_logits(model, x))


HEADS = {
    "of its own": lambda m: setattr(m, "lm_head", nn.Linear(32, V, bias=False)),
    "equal but apart": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.detach().clone())),
    "tied": lambda m: None,
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_its_own_is_kept(head, tmp_path):
    """Ours and Hugging Face's, copied, saved and loaded by both: the same function, and one parameter or two as before."""
    x = tokens()
    for model in (tiny(), tiny_hf()):
        HEADS[head](model)
        own = model if isinstance(model, GPT) else GPT.from_hf(model)
        expected = all_logits(own, x)
        if own is not model:
            torch.testing.assert_close(expected, model(x).logits, rtol=1e-5, atol=1e-5)
        assert own.tied == (head == "tied")
        own.save_pretrained(tmp_path)
        again = GPT.from_pretrained(tmp_path)
        assert torch.equal(all_logits(again, x), expected) and again.tied == own.tied == again.config.tie_word_embeddings
        hf = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(hf(x).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_file_whose_head_contradicts_its_config_is_refused(tmp_path):
    model, x = tiny(tie_word_embeddings=False), tokens()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="from_pretrained: lm_head.weight differs from transformer.wte.weight"):
        GPT.from_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path, tie_word_embeddings=False)(x)[0], model(x)[0])


def test_a_state_of_two_weights_does_not_load_into_one():
    own, x = tiny(tie_word_embeddings=False), tokens()
    for assign in (False, True):
        model = tiny()
        with pytest.raises(RuntimeError, match="lm_head.weight differs .*, and this GPT ties them"):
            model.load_state_dict(own.state_dict(), assign=assign)
        model = tiny(tie_word_embeddings=False)
        model.load_state_dict(own.state_dict(), assign=assign)
        assert torch.equal(model(x)[0], own(x)[0]) and not model.tied


def test_assigned_weights_stay_tied():
    model = tiny()
    with torch.device("meta"):
        empty = GPT(model.config)
    empty.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    assert empty.tied and len(list(empty.parameters())) == len(list(model.parameters()))
    wrapped = nn.Sequential(tiny())
    wrapped.load_state_dict({f"0.{name}": t.clone() for name, t in model.state_dict().items()}, assign=True)
    assert wrapped[0].tied, "also where it is part of another module"


@pytest.mark.parametrize(
    "field, value",
    [("n_head", 2), ("approximate", "tanh"), ("layer_norm_eps", 1e-2), ("scale_attn_weights", False),
     ("scale_attn_by_inverse_layer_idx", True)],
)  # fmt: skip
def test_what_no_shape_tells_goes_with_the_state(field, value, tmp_path):
    """Into a model of other settings, through a file, from inside torch.compile and from inside another module."""
    trained, x = tiny(**{field: value}), tokens()
    for way in ("plain", "compiled", "wrapped"):
        compiled = torch.compile(trained, backend="eager")
        state = (compiled if way == "compiled" else trained).state_dict()
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt")
        for name in list(state):  # as nanoGPT's train.py does
            state[name.removeprefix("_orig_mod.")] = state.pop(name)
        model = tiny()
        assert not torch.equal(model.eval()(x)[0], trained(x)[0])
        target = nn.Sequential(model) if way == "wrapped" else model
        if way == "wrapped":
            state = nn.Sequential(trained).state_dict()
        with pytest.warns(UserWarning, match=f"takes over .*: {field}={value!r} for "):
            target.load_state_dict(state)
        assert torch.equal(model(x)[0], trained(x)[0]) and getattr(model.config, field) == value
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(tiny().state_dict())
        model.load_state_dict(dict(trained.state_dict()))  # nothing is known of a plain dict


def test_published_files_without_prefix_and_with_mask_buffers(tmp_path):
    hf, x = tiny_hf(), tokens()
    hf.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, BLOCK, BLOCK, dtype=torch.uint8)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(all_logits(GPT.from_pretrained(tmp_path).eval(), x), hf(x).logits, rtol=1e-5, atol=1e-5)


def sharded(folder):
    model = tiny_hf()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model


def test_shards(tmp_path):
    hf, x = sharded(tmp_path), tokens()
    torch.testing.assert_close(all_logits(GPT.from_pretrained(tmp_path).eval(), x), hf(x).logits, rtol=1e-5, atol=1e-5)


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    tiny_hf().save_pretrained(tmp_path)
    model, x = GPT.from_pretrained(tmp_path), tokens()
    before = model(x)[0]
    os.truncate(tmp_path / "model.safetensors", 10)  # a memory map would now end in SIGBUS
    assert torch.equal(model(x)[0], before)


def test_save_leaves_the_old_file_whole_when_it_fails(tmp_path, monkeypatch):
    model = tiny()
    model.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}

    def breaks(tensors, file, metadata):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", breaks)
    with pytest.raises(OSError, match="disk full"):
        tiny().save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file)


def overwrite(folder, data, name="model.safetensors"):
    (folder / name).write_bytes(data)


def header(folder, change):
    raw = (folder / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    text = json.dumps(change(json.loads(raw[8 : 8 + n]))).encode()
    overwrite(folder, len(text).to_bytes(8, "little") + text + raw[8 + n :])


def with_entry(key, value):
    def change(head):
        head["transformer.ln_f.bias"][key] = value
        return head

    return change


def cut_tail(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


MALFORMED = {
    "empty file": (lambda d: overwrite(d, b""), "not a valid safetensors file"),
    "not safetensors": (lambda d: overwrite(d, b"\x80\x02}q\x00" * 20), "not a valid safetensors file"),
    "huge header": (lambda d: overwrite(d, (2**62).to_bytes(8, "little") + b"{}"), "not a valid safetensors file"),
    "header is no JSON": (lambda d: overwrite(d, (4).to_bytes(8, "little") + b"abcd"), "not a valid safetensors file"),
    "truncated": (cut_tail, "not a valid safetensors file"),
    "offsets past the end": (lambda d: header(d, with_entry("data_offsets", [0, 2**40])), "not a valid safetensors file"),
    "offsets backwards": (lambda d: header(d, with_entry("data_offsets", [128, 0])), "not a valid safetensors file"),
    "shape against offsets": (lambda d: header(d, with_entry("shape", [2**40])), "not a valid safetensors file"),
    "negative shape": (lambda d: header(d, with_entry("shape", [-32])), "not a valid safetensors file"),
    "unknown dtype": (lambda d: header(d, with_entry("dtype", "X99")), "not a valid safetensors file"),
    "integer dtype": (lambda d: header(d, with_entry("dtype", "I32")), "ln_f.bias has dtype I32"),
    "missing tensor": (lambda d: edit(d, lambda t: {k: v for k, v in t.items() if k != "transformer.h.1.ln_2.bias"}),
                       "tensor transformer.h.1.ln_2.bias is missing"),
    "extra tensor": (lambda d: edit(d, lambda t: t.update(surprise=torch.zeros(2))), "tensor transformer.surprise is not part"),
    "transposed": (lambda d: edit(d, lambda t: {k: v.mT.contiguous() if "c_fc.weight" in k else v for k, v in t.items()}),
                   r"c_fc.weight has shape \(128, 32\), config says \(32, 128\)"),
    "two dtypes": (lambda d: edit(d, lambda t: {k: v.half() if "ln_f" in k else v for k, v in t.items()}), "pass dtype"),
    "twice": (lambda d: edit(d, lambda t: t.update({"wte.weight": t["transformer.wte.weight"].clone()})), "there twice"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "config no JSON": (lambda d: overwrite(d, b"{", "config.json"), "not valid JSON"),
    "config a list": (lambda d: overwrite(d, b"[]", "config.json"), "must hold a JSON object, got list"),
    "config nested too deep": (lambda d: overwrite(d, b"[" * 10**6, "config.json"), "not valid JSON"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_folders_are_refused(name, tmp_path):
    tiny().save_pretrained(tmp_path)
    breaks, message = MALFORMED[name]
    breaks(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        GPT.from_pretrained(tmp_path)
    assert "from_pretrained: " in str(error.value)


CONFIG_EDITS = {
    "model_type": ("llama", "model_type 'llama'"),
    "activation_function": (["relu"], r"activation_function \['relu'\]"),
    "add_cross_attention": (True, "add_cross_attention=True"),
    "tie_word_embeddings": (False, "tensor lm_head.weight is missing"),
    "n_embd": (31, "not a multiple of n_head"),
    "n_layer": (2**30, "transformer.h.2.ln_1.weight is missing"),
    "n_head": (0, "n_head must be positive"),
    "vocab_size": (2**40, "vocab_size must be positive and below"),
    "n_positions": ("1024", "block_size must be an int, got '1024'"),
    "n_inner": (-1, "n_inner must be positive"),
    "resid_pdrop": (1.5, r"dropout must be in \[0, 1\)"),
    "layer_norm_epsilon": (None, "layer_norm_eps must be a number, got None"),
    "scale_attn_weights": ("yes", "scale_attn_weights must be a bool"),
}


@pytest.mark.parametrize("field", CONFIG_EDITS)
def test_configs_that_do_not_fit_are_refused(field, tmp_path):
    tiny().save_pretrained(tmp_path)
    value, message = CONFIG_EDITS[field]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises((ValueError, TypeError), match=message):
        GPT.from_pretrained(tmp_path)


def test_shape_is_checked_before_memory_is_taken(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 2**31 - 1}))
    monkeypatch.setattr(GPT, "__init__", lambda self, config: pytest.fail("built a model"))
    with pytest.raises(ValueError, match=re.escape(f"has shape (97, 32), config says ({2**31 - 1}, 32)")):
        GPT.from_pretrained(tmp_path)


def index_with(change):
    def breaks(folder):
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return breaks


WPE = "transformer.wpe.weight"
BAD_SHARDS = {
    "outside": (index_with(lambda m: m.update({WPE: "../model.safetensors"})), "names the file '../model.safetensors'"),
    "absolute": (index_with(lambda m: m.update({WPE: "/etc/passwd"})), "names the file '/etc/passwd'"),
    "pickle": (index_with(lambda m: m.update({WPE: "model.bin"})), "names the file 'model.bin'"),
    "no such shard": (index_with(lambda m: m.update({WPE: "none.safetensors"})), "none.safetensors does not exist"),
    "misplaced": (index_with(lambda m: m.update({WPE: m["transformer.ln_f.bias"]})), "does not place there"),
    "lacking": (index_with(lambda m: m.update(more=m[WPE])), "lacks tensor more"),
    "not a string": (index_with(lambda m: m.update({WPE: 3})), "has no weight_map"),
    "no map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_malformed_shards_are_refused(name, tmp_path):
    sharded(tmp_path)
    breaks, message = BAD_SHARDS[name]
    breaks(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GPT.from_pretrained(tmp_path)


# ---- arguments ----

X = torch.zeros(1, 3, dtype=torch.int64)
BAD_CALLS = {
    "idx 1-D": (lambda m: m(X[0]), ValueError, r"idx must be \(B, T\)"),
    "idx float": (lambda m: m(X.float()), TypeError, "idx must be int64 or int32"),
    "idx too long": (lambda m: m(X.expand(1, 3).repeat(1, 20)), ValueError, "length 60 is above block_size 40"),
    "idx out of range": (lambda m: m(X + V), IndexError, "out of range"),
    "targets' shape": (lambda m: m(X, X[:, 1:]), ValueError, r"targets have shape \(1, 2\), idx has \(1, 3\)"),
    "targets out of range": (lambda m: m(X, X + V), (IndexError, RuntimeError), str(V)),
    "no prompt": (lambda m: m.generate(X[:, :0], 1), ValueError, "T >= 1"),
    "negative count": (lambda m: m.generate(X, -1), ValueError, "max_new_tokens must not be negative"),
    "temperature": (lambda m: m.generate(X, 1, temperature=-1.0), ValueError, "temperature"),
    "temperature NaN": (lambda m: m.generate(X, 1, temperature=float("nan")), ValueError, "temperature"),
    "top_k": (lambda m: m.generate(X, 1, top_k=0), ValueError, "top_k must be at least 1"),
    "top_p": (lambda m: m.generate(X, 1, top_p=0.0), ValueError, r"top_p must be in \(0, 1\]"),
    "one token": (lambda m: m.loss(X[0, :1]), ValueError, "N >= 2"),
    "batch of texts": (lambda m: m.loss(X), ValueError, r"tokens must be \(N,\)"),
    "stride": (lambda m: m.loss(X[0], stride=41), ValueError, r"stride must be in \[1, block_size 40\]"),
    "preset": (lambda m: GPTConfig.preset("gpt3"), ValueError, "unknown preset 'gpt3'"),
    "heads": (lambda m: GPTConfig(n_head=5), ValueError, "768 is not a multiple of n_head 5"),
    "head dim": (lambda m: GPTConfig(n_head=2), ValueError, "head dim 384 is above 256"),
    "layers": (lambda m: GPTConfig(n_layer=0), ValueError, "n_layer must be positive"),
    "float size": (lambda m: GPTConfig(n_embd=768.0), TypeError, "n_embd must be an int"),
    "bool size": (lambda m: GPTConfig(n_layer=True), TypeError, "n_layer must be an int"),
    "dropout": (lambda m: GPTConfig(dropout=1.0), ValueError, "dropout must be in"),
    "approximate": (lambda m: GPTConfig(approximate="erf"), ValueError, "approximate"),
    "crop": (lambda m: m.crop_block_size(41), ValueError, r"block_size must be in \[1, 40\], got 41"),
    "crop to nothing": (lambda m: m.crop_block_size(0), ValueError, r"block_size must be in \[1, 40\], got 0"),
    "override_args": (lambda m: GPT.from_pretrained("x", dict(n_head=2)), ValueError, "takes dropout alone.* got 'n_head'"),
    "positional dtype": (lambda m: GPT.from_pretrained("x", torch.float32), TypeError, "dtype is given by name"),
    "no such name": (lambda m: GPT.from_pretrained("gpt2-none"), FileNotFoundError, "never downloaded"),
    "unknown field": (lambda m: GPT.from_hf(tiny_hf(), depth=3), TypeError, "'depth' is not a field"),
    "other model": (lambda m: GPT.from_hf(nn.Linear(1, 1)), TypeError, "from_hf: expected"),
    "no folder": (lambda m: GPT.from_pretrained("/nonexistent/gpt2"), FileNotFoundError, "never downloaded"),
    "GELU": (lambda m: GELU("erf"), ValueError, "approximate must be 'tanh' or 'none'"),
    "LayerNorm": (lambda m: LayerNorm((2, 3)), ValueError, "one normalised dimension"),
    "RMSNorm": (lambda m: RMSNorm((2, 3)), ValueError, "one normalised dimension"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call(tiny())
