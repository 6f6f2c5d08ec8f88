"""attn_implementation="gpt_kernels" in transformers' own registries: every family against float64, "sdpa" or "eager" beside
it; caches, masks, bands, sinks, and what is refused."""

import functools
import inspect
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, LLAMA, T, V, batch_of, cast, differences, padding, record, run, truth_of
from torch.nn import functional as F

import gpt_kernels
from gpt_kernels.accuracy import INPUT_GRADIENT, assert_close_to_truth
from gpt_kernels.hooks import transformers_attention as hook
from gpt_kernels.hooks.sinks import attention_with_sinks

transformers = pytest.importorskip("transformers")
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache  # noqa: E402

NAME = gpt_kernels.register_transformers()
FIRST = {name: family.make() for name, family in FAMILIES.items() if family.hf}
# GPT-Neo, GPT-J before 5.24 and T5 in older versions call no AttentionInterface: transformers says so and goes on with "eager"
WITHOUT = [name for name, model in FIRST.items() if not model._can_set_attn_implementation()]
HF = [name for name in FAMILIES if FAMILIES[name].hf and name not in WITHOUT]
OTHER = {name: "eager" if name == "Gemma 2" or not FIRST[name]._supports_sdpa else "sdpa" for name in HF}
# in older versions OPT makes its own masks, additive ones that may hide every key: those are for "sdpa" to do
OWN_MASKS = [name for name in HF if "create_" not in inspect.getsource(sys.modules[type(FIRST[name]).__module__])]


@pytest.fixture
def calls(monkeypatch):
    """Keyword arguments of the calls of our attention, with its "query", "key" and "bias"; and how often "sdpa" did it."""
    found, own, sdpa = [], hook.attention, hook._sdpa()

    def attention(q, k, v, bias, **options):
        found.append({"query": q, "key": k, "bias": bias, **options})
        return own(q, k, v, bias, **options)

    @functools.wraps(sdpa)
    def instead(*args, **options):
        found.append("sdpa")
        return sdpa(*args, **options)

    monkeypatch.setattr(hook, "attention", attention)
    monkeypatch.setattr(hook, "_sdpa", lambda: instead)
    return found


def made(name, implementation, **overrides):
    torch.manual_seed(0)
    return FAMILIES[name].make(attn_implementation=implementation, **overrides)


# ---- registered, and what for ----


def test_registered_where_models_look():
    assert NAME == "gpt_kernels" and AttentionInterface()[NAME] is hook.attention_forward
    assert AttentionMaskInterface()[NAME] is hook.attention_mask
    assert gpt_kernels.register_transformers() == NAME


def test_nothing_on_import():
    # whose registries cannot be touched then; torch's is looked at
    code = """
import sys, gpt_kernels, torch
assert "transformers" not in sys.modules and "kernels" not in sys.modules
assert "gpt_kernels" not in getattr(torch.nn.attention, "list_flash_attention_impls", list)()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("how", ("config", "set", "saved"))
def test_chosen_as_any_other(how, calls, tmp_path):
    model = made("Llama", "sdpa")
    if how == "config":
        model = made("Llama", NAME)
    if how == "set":
        model.set_attn_implementation(NAME)
    if how == "saved":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, attn_implementation=NAME)
    model(torch.randint(0, V, (1, 5)))
    assert len(calls) == 2 and "sdpa" not in calls


def test_every_family_but_those_without_an_interface_is_here():
    for name in WITHOUT:
        assert made(name, "eager").set_attn_implementation(NAME) is None
    assert {"GPT-Neo"} <= set(WITHOUT) <= {"GPT-Neo", "GPT-J", "T5"} and set(OWN_MASKS) <= {"OPT", "ViT"}


# ---- parity ----


def assert_parity(name, side, dtype=torch.float32):
    family, batch = FAMILIES[name], cast(batch_of(FAMILIES[name], side), dtype)
    model = made(name, OTHER[name]).to(dtype)
    eager, truth = run(family, model, batch), truth_of(family, model, batch)
    model.set_attn_implementation(NAME)
    assert differences(run(family, model, batch), eager, truth, dtype) == []


@pytest.mark.parametrize(
    "side", (pytest.param(None, marks=pytest.mark.slow), "left", pytest.param("right", marks=pytest.mark.slow))
)
@pytest.mark.parametrize("name", HF)
def test_logits_loss_and_every_gradient(name, side, calls):
    if side != "left" and FAMILIES[name].kind == "image":
        pytest.skip("images have no padding: once is enough")
    assert_parity(name, side)
    assert calls and ("sdpa" not in calls or name in OWN_MASKS)
    record(name, "attn_implementation")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", HF)
def test_16_bits(name, dtype, calls):
    assert_parity(name, None if FAMILIES[name].kind == "image" else "left", dtype)
    assert "sdpa" not in calls or name in OWN_MASKS


@pytest.mark.parametrize("name", [n for n in HF if FAMILIES[n].generates])
@pytest.mark.parametrize("cache", (pytest.param("dynamic", marks=pytest.mark.slow), "static"))
def test_generation(name, cache, calls):
    family = FAMILIES[name]
    x, mask = batch_of(family)["input_ids"], padding("left")
    options = dict(attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    if cache == "static" and name == "T5":
        options["max_new_tokens"] = 6
    model = made(name, OTHER[name])
    model.generation_config.disable_compile = True
    expected = model.generate(x, **options)
    model.set_attn_implementation(NAME)
    assert torch.equal(model.generate(x, **options), expected)
    assert calls and ("sdpa" not in calls or name in OWN_MASKS)


def test_a_call_behind_a_static_cache(calls):
    model = made("Llama", "sdpa")
    x = torch.randint(0, V, (2, T))
    expected = model(x).logits
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=30)
        parts = [model(x[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 6), (6, 7), (7, T))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)
    # causal and a mark: of no call but the single token's is there a mask
    assert [call["bias"] is not None for call in calls[::2]] == [False, True, False]


@pytest.mark.parametrize("name", ("Llama", "Gemma 3", "GPT-2"))
def test_output_attentions_as_sdpa_does(name):
    results = []
    for implementation in ("sdpa", NAME):
        model = made(name, implementation)
        try:
            out = model(torch.randint(0, V, (1, 5)), output_attentions=True)
            results.append((out.attentions, type(out)))
        except ValueError as error:
            results.append(str(error).replace(implementation, ""))
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ("Llama", "Gemma 2", "T5") if name in HF])
def test_compiled(name):
    family, batch = FAMILIES[name], batch_of(FAMILIES[name], "right")
    model = made(name, NAME)
    expected = run(family, model, batch)
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        # a compiled kernel leaves its padding unwritten
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        compiled = torch.compile(model, backend="aot_eager")
        found = run(family, compiled, batch)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key.replace("grad ", "grad _orig_mod.")], tensor, rtol=1e-4, atol=1e-4)


# ---- what the kernel is given ----


def test_key_heads_are_not_repeated(calls):
    made("Llama", NAME)(torch.randint(0, V, (1, 5)))
    assert calls[0]["query"].shape[1] == 4 and calls[0]["key"].shape[1] == 2


def test_dropout_and_softcap_and_scale_are_passed(calls):
    model = made("Gemma 2", NAME, attention_dropout=0.25).train()
    model(torch.randint(0, V, (1, 5)))
    assert calls[0]["dropout_p"] == 0.25 and calls[0]["softcap"] == 5.0 and calls[0]["scale"] == 8**-0.5
    calls.clear()
    model.eval()(torch.randint(0, V, (1, 5)))
    assert calls[0]["dropout_p"] == 0.0


def test_dropout_follows_the_seed():
    model, x = made("Llama", NAME, attention_dropout=0.5).train(), torch.randint(0, V, (2, T))
    a, b, c = (torch.manual_seed(seed) and model(x).logits for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_windows_are_bands(calls):
    """Mistral's six tokens, found in the mask and told to the kernel, which then is given no mask; not under padding."""
    model, x = made("Mistral", NAME), torch.randint(0, V, (2, T))
    model(x)
    assert [(c["bias"], c["window_left"], c["window_right"], c["causal_offset"]) for c in calls] == [(None, 5, 0, 0)] * 2
    calls.clear()
    model(x, attention_mask=padding("left"))
    assert all(c["bias"] is not None and c["window_left"] == -1 for c in calls)


def test_a_mask_that_is_written_to_is_no_band_any_more(calls):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionMaskInterface._global_mapping, "sdpa", lambda: torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())
        mask = hook.attention_mask()
    module = torch.nn.Module()
    q = torch.randn(1, 2, 5, 8)
    whole, _ = hook.attention_forward(module, q, q, q, mask)
    assert calls[-1]["bias"] is None
    mask[..., 4, 2] = False
    found, _ = hook.attention_forward(module, q, q, q, mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2))
    assert not torch.allclose(found, whole)


@pytest.mark.parametrize("rows, columns, offset", [(2, 2, 0), (5, 5, 0), (4, 9, 5), (4, 12, 5), (3, 9, 0)])
@pytest.mark.parametrize("left", (-1, 0, 1, 3))
def test_bands_are_found_and_nothing_else_is(rows, columns, offset, left):
    i, j = torch.arange(rows)[:, None] + offset, torch.arange(columns)
    one = (j <= i) & ((j >= i - left) if left >= 0 else True)
    mask = one.expand(2, 1, rows, columns)
    band = hook._band(mask)
    assert band is not None
    found = (j <= i - offset + band[0]) & ((j >= i - offset + band[0] - band[1]) if band[1] >= 0 else True)
    assert torch.equal(found, one)
    assert hook._band(mask.clone()) is None  # it may differ by row of the batch
    for place in range(one.numel()):
        flipped = one.clone().view(-1)
        flipped[place] ^= True
        band = hook._band(flipped.view(1, 1, rows, columns))
        if band is not None:
            found = (j <= i - offset + band[0]) & ((j >= i - offset + band[0] - band[1]) if band[1] >= 0 else True)
            assert torch.equal(found, flipped.view(rows, columns))


# ---- additive masks, position biases ----


def module_of(**attributes):
    module = torch.nn.Module()
    module.__dict__.update(attributes)
    return module


@pytest.mark.parametrize("hidden", (-torch.inf, torch.finfo(torch.float32).min))
@pytest.mark.parametrize("blind", (False, True))
def test_additive_masks(hidden, blind, calls):
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    mask = torch.randn(2, 1, 5, 7).masked_fill(torch.rand(2, 1, 5, 7) < 0.3, hidden)
    if blind:
        mask[0, 0, 2] = hidden
    found, _ = hook.attention_forward(module_of(num_key_value_groups=2), q, k, k, mask)
    expected = F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    # where every key is hidden without being -inf, the mean of the values is "sdpa"'s own to take
    assert ("sdpa" in calls) == (blind and hidden != -torch.inf)


def test_one_token_sees_every_key():
    """Without a mask, whatever is_causal says: it is the last one."""
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 7, 8)
    found, _ = hook.attention_forward(module_of(is_causal=True), q, k, k, None)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, k).transpose(1, 2))


def test_a_row_that_an_additive_mask_hides_is_0_under_a_softcap():
    """And its gradient: "sdpa" has no soft cap to leave it to."""
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 5, 8)
    mask = torch.zeros(1, 1, 3, 5)
    mask[0, 0, 1] = mask[0, 0, 0, 2] = torch.finfo(torch.float32).min
    o, _ = hook.attention_forward(module_of(), q, k, k, mask, softcap=2.0)
    (dq,) = torch.autograd.grad(o.square().sum(), q)
    assert not o[:, 1].any() and not dq[:, :, 1].any() and dq[:, :, 0].all()
    scores = (2.0 * torch.tanh(q @ k.mT * 8**-0.5 / 2.0) + mask).softmax(-1)
    torch.testing.assert_close(o[:, [0, 2]], (scores @ k).transpose(1, 2)[:, [0, 2]])


@pytest.mark.parametrize("mask", (None, "boolean", "additive"))
@pytest.mark.parametrize("causal", (True, False))
def test_position_bias_and_its_gradient(mask, causal):
    q, k, v = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 4, 5, 5, requires_grad=True)
    if mask is not None:
        visible = torch.rand(2, 1, 5, 5) < 0.7
        visible[..., 0] = True
        mask = (
            visible if mask == "boolean" else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        )
    # "sdpa" is causal where it is given no mask
    visible = torch.ones(5, 5, dtype=torch.bool).tril() if causal and mask is None else None
    scores = bias.masked_fill(~visible, -torch.inf) if visible is not None else bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    results = []
    for o in (
        hook.attention_forward(module_of(), q, k, v, mask, is_causal=causal, position_bias=bias)[0],
        F.scaled_dot_product_attention(q, k, v, scores).transpose(1, 2),
    ):
        results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v, bias))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- sinks ----


def with_sinks(q, k, v, sinks, mask, scale, softcap):
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = q @ k.mT * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    p = torch.cat((s, sinks.view(1, -1, 1, 1).expand(*s.shape[:3], 1)), -1).softmax(-1)[..., :-1]
    return p @ v


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("softcap", (0.0, 3.0))
@pytest.mark.parametrize("masked", (False, True))
def test_sinks(dtype, softcap, masked):
    q, k, v, sinks = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(4)
    mask = (torch.rand(2, 1, 9, 9) < 0.5) if masked else None
    if masked:
        mask[0, :, 3] = False  # that row sees its sink alone
    weights = torch.randn(2, 4, 9, 8)

    def results(f, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v, sinks)]
        o = f(*inputs)
        return o, *torch.autograd.grad((o * weights.to(dtype)).sum(), inputs)

    truth, eager = (results(lambda q, k, v, s: with_sinks(q, k, v, s, mask, 0.3, softcap), d) for d in (torch.float64, dtype))
    ours = results(lambda q, k, v, s: attention_with_sinks(q, k, v, s, mask, scale=0.3, softcap=softcap), dtype)
    for name, *found in zip(("o", "dq", "dk", "dv", "dsinks"), ours, truth, eager, strict=True):
        assert_close_to_truth(*(t.detach() for t in found), INPUT_GRADIENT, name)


def test_sinks_with_dropout_drop_what_attention_drops():
    q, sinks = torch.randn(1, 2, 40, 8), torch.full((2,), -40.0)
    torch.manual_seed(3)
    found = attention_with_sinks(q, q, q, sinks, scale=0.3, dropout_p=0.5)
    torch.manual_seed(3)
    expected, _ = hook.attention(q, q, q, scale=0.3, dropout_p=0.5)
    torch.testing.assert_close(found, expected)


def gpt_oss(implementation):
    config = transformers.GptOssConfig(
        **{**LLAMA, "initializer_range": 0.5}, head_dim=8, sliding_window=6, num_local_experts=2, num_experts_per_tok=1
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM._from_config(
        config, attn_implementation=implementation, experts_implementation="eager"
    ).eval()
    for name, p in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(p)
    return model


@pytest.mark.parametrize("side", (None, "left"))
def test_sinks_in_a_model(side):
    family, model = FAMILIES["Llama"], gpt_oss("eager")
    batch = batch_of(family, side)
    eager, truth = run(family, model, batch), truth_of(family, model, batch)
    model.set_attn_implementation(NAME)
    ours = run(family, model, batch)
    assert differences(ours, eager, truth, torch.float32) == []
    assert any("sinks" in name and g.abs().max() > 0 for name, g in ours.items())


def test_sinks_twice_differentiated_is_an_error():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    o = attention_with_sinks(q, q, q, torch.zeros(2), scale=0.3)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(o.sum(), q, create_graph=True)


# ---- what is left to "sdpa", and what is refused ----


@pytest.mark.parametrize("case", ("head dim", "dropout", "scale", "3 dimensions"))
def test_left_to_sdpa(case, calls):
    q = torch.randn(1, 2, 5, 260 if case == "head dim" else 8)
    options = {"dropout": 1e-4} if case == "dropout" else {"scaling": 0.0} if case == "scale" else {}
    mask = torch.rand(2, 5, 5) < 2 if case == "3 dimensions" else None
    hook.attention_forward(module_of(), q, q, q, mask, **options)
    assert calls == ["sdpa"]


@pytest.mark.parametrize("name", ("position_bias", "cache"))
def test_what_an_older_sdpa_would_not_read_is_an_error(name, monkeypatch):
    def sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(hook, "_sdpa", lambda: sdpa)
    q = torch.randn(1, 2, 5, 264)
    with pytest.raises(RuntimeError, match=rf"no kernel for .*, and \"sdpa\" of this transformers reads no {name}"):
        hook.attention_forward(module_of(), q, q, q, None, **{name: torch.zeros(1, 2, 5, 5)})


def test_a_paged_cache_is_left_to_sdpa(calls, monkeypatch):
    class Paged:
        pass

    given = {}

    def sdpa(*args, cache=None, **options):
        given.update(options, cache=cache)

    monkeypatch.setattr(hook, "_sdpa", lambda: sdpa)
    cache, q = Paged(), torch.randn(1, 2, 5, 8)
    hook.attention_forward(module_of(), q, q, q, None, cache=cache, cu_seq_lens_q=1)
    assert given["cache"] is cache and given["cu_seq_lens_q"] == 1 and not calls


@pytest.mark.parametrize(
    "options, message",
    [
        ({"softcap": 5.0, "dropout": 1e-4}, r"with softcap: no kernel for dropout 0\.0001"),
        ({"softcap": -1.0}, r"with softcap: no kernel for a softcap of -1\.0"),
        ({"s_aux": torch.zeros(3)}, r"with sinks \(s_aux\): no kernel for sinks of shape \(3,\), where there are 2 heads"),
        ({"s_aux": torch.zeros(2), "softcap": 2.0, "scaling": 0.0}, r"with softcap and sinks .*a scale of 0\.0"),
    ],
)
def test_what_sdpa_cannot_do_either_is_an_error(options, message):
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match=message):
        hook.attention_forward(module_of(), q, q, q, None, **options)


def test_an_argument_of_the_models_own_eager_attention_is_an_error(monkeypatch):
    def eager_attention_forward(module, query, key, value, attention_mask, scaling, tilt=None, **kwargs):
        raise NotImplementedError

    class Tilted(torch.nn.Module):
        pass

    monkeypatch.setattr(sys.modules[__name__], "eager_attention_forward", eager_attention_forward, raising=False)
    q = torch.randn(1, 2, 5, 8)
    hook.attention_forward(Tilted(), q, q, q, None, tilt=None, other=3)
    with pytest.raises(RuntimeError, match="Tilted passes tilt, which its eager attention reads"):
        hook.attention_forward(Tilted(), q, q, q, None, tilt=2.0)
    module = Tilted()
    module.sinks = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="Tilted has sinks and passes no s_aux"):
        hook.attention_forward(module, q, q, q, None)
