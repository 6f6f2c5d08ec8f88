"""patch, unpatch and patched on Hugging Face's GPT-2: same results, same objects, and a plan that says what and why."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpt_kernels
from gpt_kernels import Served, patch, patched, unpatch
from gpt_kernels.accuracy import MODEL_GRADIENT, MODEL_OUTPUT
from gpt_kernels.integrations import transformers_models
from gpt_kernels.patch import is_patched
from gpt_kernels.verify import compare

transformers = pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model  # noqa: E402

V, T = 97, 17
CONFIGS = {
    "plain": {},
    "odd head dim": {"n_embd": 36},
    "n_inner, erf": {"n_inner": 50, "activation_function": "gelu"},
    "inverse layer scale, tanh": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu_pytorch_tanh"},
    "unscaled": {"scale_attn_weights": False},
}
IMPLEMENTATIONS = ("sdpa", "eager")


def tiny(cls=GPT2LMHeadModel, **overrides):
    # weights ten times the usual: attention and GELU leave their linear range
    sizes = dict(vocab_size=V, n_positions=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **overrides})
    return cls(config).eval()


def tokens(batch=2, length=T):
    return torch.randint(0, V, (batch, length))


def padding(side):
    """(2, T) mask with one row padded. On the left, the first real token is predicted from a query that sees no key."""
    mask = torch.ones(2, T, dtype=torch.int64)
    if side == "left":
        mask[0, :5] = 0
    if side == "right":
        mask[1, -4:] = 0
    return None if side is None else mask


def run(model, x, mask=None):
    """{name: tensor}: logits, the loss that the model computes, and every gradient."""
    labels = x if mask is None else x.masked_fill(mask == 0, -100)
    out = model(x, attention_mask=mask, labels=labels)
    loss = out.loss
    if out.logits.dtype == torch.float64:
        # the model's own loss goes through float32
        loss = F.cross_entropy(out.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    names, params = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, params)
    return {"loss": loss, "logits": out.logits} | {f"grad {n}": g for n, g in zip(names, gradients, strict=True)}


def assert_parity(model, x, mask=None):
    truth = run(copy.deepcopy(model).double(), x, mask)
    eager = run(model, x, mask)
    with patched(model) as plan:
        ours = run(model, x, mask)
    assert {row.op for row in plan.swapped} == {"layer_norm", "attention", "gelu", "dropout", "cross_entropy"}
    dtype = next(model.parameters()).dtype
    bad = [
        c
        for n in truth
        for c in [compare(n, ours[n], eager[n], truth[n], dtype, MODEL_GRADIENT if n[:4] == "grad" else MODEL_OUTPUT)]
        if not c.ok
    ]
    assert not bad, bad


@pytest.mark.parametrize("side", (None, "left", "right"))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_every_gradient(name, implementation, side):
    assert_parity(tiny(attn_implementation=implementation, **CONFIGS[name]), tokens(), padding(side))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", (None, "right"))
def test_bfloat16(implementation, side):
    assert_parity(tiny(attn_implementation=implementation).bfloat16(), tokens(), padding(side))


def test_longer_than_a_tile():
    assert_parity(tiny(n_positions=200), tokens(1, 200))


def test_training_32_steps():
    models = [tiny(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.02).train()]
    models.append(copy.deepcopy(models[0]))
    patch(models[1])
    losses = []
    for model in models:
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(32):
            x = torch.randint(0, 10, (4, T))
            loss = model(x, labels=x).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.8 * losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=0.0)


def test_dropout_follows_the_seed():
    model, x = tiny(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.5).train(), tokens()
    with torch.no_grad(), patched(model):
        a, b, c = (torch.manual_seed(seed) and model(x).logits for seed in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
        model.eval()
        assert torch.equal(model(x).logits, model(x).logits)


# ---- generation and cache ----


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", ({}, {"num_beams": 2}, {"use_cache": False}), ids=str)
def test_generation(implementation, options):
    model, x, mask = tiny(attn_implementation=implementation), tokens(), padding("left")
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    expected = model.generate(x, **options)
    assert len(expected[:, T:].unique()) > 2  # not one token again and again
    with patched(model):
        assert torch.equal(model.generate(x, **options), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cache_equals_full_forward(implementation):
    model, x = tiny(attn_implementation=implementation), tokens()
    with torch.no_grad(), patched(model):
        full = model(x).logits
        cache, parts = None, []
        for start, end in ((0, 5), (5, 6), (6, 13), (13, T)):
            out = model(x[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)


def test_static_cache():
    from transformers import StaticCache

    model, x = tiny(), tokens()
    with torch.no_grad():
        expected = model(x).logits
        with patched(model):
            cache = StaticCache(config=model.config, max_cache_len=30)
            first = model(x[:, :9], past_key_values=cache, use_cache=True).logits
            rest = model(x[:, 9:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=1e-5, atol=1e-5)


# ---- identity ----


def fingerprint(model):
    """Everything that must be as before: objects by id, classes, attribute names, hooks, keys, config."""
    modules = [
        (
            path,
            id(m),
            type(m),
            sorted(m.__dict__),
            {k: id(v) for k, v in m.__dict__.items() if k[:1] != "_"},
            list(m._forward_hooks),
            m.training,
        )
        for path, m in model.named_modules()
    ]
    params = [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]
    return modules, params, list(model.state_dict()), model.config.to_dict()


@pytest.mark.parametrize("cls", (GPT2LMHeadModel, GPT2Model, GPT2DoubleHeadsModel))
def test_unpatch_restores_the_same_objects(cls):
    model, x = tiny(cls), tokens()
    before = fingerprint(model)
    plan = patch(model)
    assert is_patched(model)
    out = model(x)
    out[0].sum().backward()
    assert unpatch(model) == len(plan.swapped) > 5
    model.zero_grad()
    assert fingerprint(model) == before and not is_patched(model)


def test_patched_model_keeps_names_objects_and_types():
    model = tiny()
    classes = {path: (type(m).__name__, type(m).__qualname__, str(type(m)), type(m)) for path, m in model.named_modules()}
    params, keys, config = [id(p) for p in model.parameters()], list(model.state_dict()), model.config.to_dict()
    patch(model)
    for path, module in model.named_modules():
        assert classes[path][:3] == (type(module).__name__, type(module).__qualname__, str(type(module)))
        assert isinstance(module, classes[path][3])
    assert params == [id(p) for p in model.parameters()]
    assert keys == list(model.state_dict()) and config == model.config.to_dict()


def test_save_and_load_while_patched(tmp_path):
    model, x = tiny(), tokens()
    expected = model(x).logits
    with patched(model):
        model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert again.config.architectures == ["GPT2LMHeadModel"] and type(again) is GPT2LMHeadModel
    assert torch.equal(again(x).logits, expected)


@pytest.mark.parametrize("clone", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("deepcopy", "pickle"))
def test_copies_are_patched_and_independent(clone):
    model, x = tiny(), tokens()
    patch(model)
    other = clone(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(other(x).logits, model(x).logits)
    unpatch(model)
    assert is_patched(other) and not is_patched(model)
    unpatch(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]


def test_twice_is_once_and_none_is_nothing():
    model = tiny()
    assert unpatch(model) == 0
    first, types = patch(model), [type(m) for m in model.modules()]
    second = patch(model)
    assert second.rows == first.rows and types == [type(m) for m in model.modules()]
    assert unpatch(model) == len(first.swapped)
    assert unpatch(model) == 0


def test_dry_run_changes_nothing_and_tells_the_same():
    model = tiny()
    before = fingerprint(model)
    plan = patch(model, dry_run=True)
    assert fingerprint(model) == before and plan.dry_run and "would swap" in str(plan)
    assert patch(model).rows == plan.rows


def test_patched_restores_after_an_error_and_leaves_an_outer_patch():
    model = tiny()
    with pytest.raises(ZeroDivisionError), patched(model):
        raise ZeroDivisionError
    assert not is_patched(model)
    patch(model)
    with patched(model):
        pass
    assert is_patched(model)


# ---- the plan ----


def row(plan, path):
    return next(r for r in plan.rows if r.path == path)


def test_plan_lists_every_module():
    model = tiny()
    plan = patch(model, dry_run=True)
    assert [r.path for r in plan.rows] == [path for path, _ in model.named_modules()]
    assert all(r.why for r in plan.rows) and len(plan.swapped) + len(plan.kept) == len(plan.rows)
    assert row(plan, "transformer.h.1.attn").op == "attention" and row(plan, "transformer.h.0.mlp").op == "gelu"
    assert row(plan, "").op == "cross_entropy" and row(plan, "transformer.ln_f").op == "layer_norm"
    assert "inside its parent" in row(plan, "transformer.h.0.mlp.act").why
    text = str(plan)
    assert "transformer.h.*.ln_1" in text and "swap 15 of 34 modules" in text and "matrix product" in text
    assert plan.to_dict()["rows"][0]["op"] == "cross_entropy"


def custom_loss(model):
    model.loss_function = lambda logits, labels, **_: logits.sum()
    return model


def own_forward(model):
    model.transformer.ln_f.forward = model.transformer.ln_f.forward
    return model


def hooked(model, child):
    model.transformer.h[0].mlp.get_submodule(child).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "make, path, why",
    [
        (lambda: tiny(activation_function="relu"), "transformer.h.0.mlp", "ReLU"),
        (lambda: tiny(activation_function="gelu_fast"), "transformer.h.0.mlp", "FastGELU"),
        (lambda: tiny(add_cross_attention=True), "transformer.h.0.crossattention", "cross-attention"),
        (lambda: tiny(reorder_and_upcast_attn=True, attn_implementation="eager"), "transformer.h.0.attn", "reorder"),
        (lambda: tiny(n_embd=257, n_head=1), "transformer.h.0.attn", "257 is above 256"),
        (lambda: custom_loss(tiny()), "", "loss function"),
        (lambda: own_forward(tiny()), "transformer.ln_f", "replaced on the object"),
        (lambda: hooked(tiny(), "act"), "transformer.h.0.mlp", "hooks"),
        (lambda: tiny().to(torch.float8_e5m2), "transformer.ln_f", "float8"),
        (lambda: tiny().to("meta"), "transformer.ln_f", "no kernel"),
        (lambda: nn.Sequential(nn.LayerNorm((3, 4))), "0", "2 dimensions"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "1", "no replacement"),
        (lambda: gpt_kernels.GELU(), "", "already"),
    ],
)
def test_kept_and_why(make, path, why):
    model = make()
    before = [type(m) for m in model.modules()]
    kept = row(patch(model), path)
    assert kept.op is None and why in kept.why
    assert all(type(m) is cls for m, cls in zip(model.modules(), before, strict=True) if m is model.get_submodule(path))


def test_unknown_model_says_that_nothing_was_swapped():
    plan = patch(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert not plan.swapped and "swapped nothing in 3 modules" in plan.summary()


def test_nothing_is_swapped_where_there_is_no_kernel(monkeypatch):
    module = importlib.import_module("gpt_kernels.patch")  # the function has the module's name
    nothing = {"CPU": Served("reference", "not built"), "CUDA": Served("reference", "none")}
    monkeypatch.setattr(module, "where", lambda op: nothing)
    plan = patch(tiny())
    assert not plan.swapped and "not built" in row(plan, "transformer.ln_f").why


# ---- what a call may ask for ----


def agree(model, call):
    expected = call(model)
    with patched(model):
        actual = call(model)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    return actual


def test_attention_weights_when_asked_for():
    model, x = tiny(attn_implementation="eager"), tokens()
    weights = agree(model, lambda m: m(x, output_attentions=True).attentions)
    assert len(weights) == 2 and weights[0].shape == (2, 4, T, T)
    agree(model, lambda m: m(x).logits)


def test_hidden_states_and_embeddings_as_input():
    model, x = tiny(), tokens()
    assert len(agree(model, lambda m: m(x, output_hidden_states=True).hidden_states)) == 3
    agree(model, lambda m: m(inputs_embeds=m.transformer.wte(x), position_ids=torch.arange(3, 3 + T)[None]).logits)


def test_cross_attention():
    model, x, encoder = tiny(add_cross_attention=True), tokens(), torch.randn(2, 5, 32)
    agree(model, lambda m: m(x, encoder_hidden_states=encoder).logits)
    agree(model, lambda m: m(x, encoder_hidden_states=encoder, use_cache=True).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_additive_mask_of_the_callers(implementation):
    model, x = tiny(attn_implementation=implementation), tokens()
    bias = torch.randn(2, 4, T, T)
    agree(model, lambda m: m(x, attention_mask=bias).logits)


def test_double_heads():
    model, x = tiny(GPT2DoubleHeadsModel), torch.randint(0, V, (2, 3, T))
    agree(model, lambda m: m(x, mc_token_ids=torch.full((2, 3), T - 1), labels=x, mc_labels=torch.tensor([0, 2]))[:4])


def test_implementation_set_after_patch():
    model, x = tiny(), tokens()
    patch(model)
    a = model(x).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(x).logits, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(2 * T).view(2, T)},
    ],
    ids=str,
)
def test_loss_options(options):
    model, x = tiny(), tokens()
    agree(model, lambda m: m(x, labels=x, **options).loss)


def test_loss_reads_the_logits_that_the_model_returns(monkeypatch):
    model, x, seen = tiny(), tokens(), []
    real = transformers_models.cross_entropy
    monkeypatch.setattr(
        transformers_models, "cross_entropy", lambda logits, *a, **k: seen.append(logits) or real(logits, *a, **k)
    )
    with patched(model):
        logits = model(x, labels=x).logits
    assert seen[0].data_ptr() == logits.data_ptr() and seen[0].dtype == logits.dtype


def test_loss_function_set_after_patch_is_used_and_kept():
    model, x = tiny(), tokens()
    patch(model)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 3
    assert model(x, labels=x).loss.item() == 3
    unpatch(model)
    assert model(x, labels=x).loss.item() == 3


def test_hooks_fire():
    model, x, fired = tiny(), tokens(), []
    patch(model)
    for path in ("transformer.ln_f", "transformer.h.0.attn", "transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.act"):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: fired.append(path))
    model(x)
    assert sorted(fired) == ["transformer.h.0.attn", "transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.act", "transformer.ln_f"]


def test_adapter_put_in_after_patch_is_used():
    class Doubled(transformers.pytorch_utils.Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = tiny(), tokens()
    patch(model)
    for block in model.transformer.h:
        block.mlp.c_fc.__class__ = Doubled
        block.attn.c_attn.__class__ = Doubled
    ours = model(x).logits
    unpatch(model)
    torch.testing.assert_close(ours, model(x).logits, rtol=1e-5, atol=1e-5)


# ---- other machinery ----


def test_gradient_checkpointing():
    model, x = tiny().train(), tokens()
    patch(model)
    torch.manual_seed(3)
    a = torch.autograd.grad(model(x, labels=x).loss, list(model.parameters()))
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    b = torch.autograd.grad(model(x, labels=x).loss, list(model.parameters()))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autocast():
    model, x = tiny(), tokens()
    truth = model(x, labels=x)
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(x, labels=x)
        with patched(model):
            ours = model(x, labels=x)
    ours.loss.backward()
    assert ours.logits.dtype == eager.logits.dtype == torch.bfloat16
    error, eager_error = ((m.logits.float() - truth.logits).square().mean().sqrt() for m in (ours, eager))
    assert error <= 1.5 * eager_error


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compile_fullgraph(implementation):
    model, x = tiny(attn_implementation=implementation), tokens()
    expected = run(model, x)
    patch(model)
    actual = run(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(list(actual.values()), list(expected.values()), rtol=1e-4, atol=1e-5)


def test_torch_modules():
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.GELU("tanh"), nn.RMSNorm(8), nn.LayerNorm(8, elementwise_affine=False))
    x = torch.randn(5, 8)
    assert len(patch(model, dry_run=True).swapped) == 5
    agree(model, lambda m: m(x))


# ---- errors ----


@pytest.mark.parametrize("call", (patch, unpatch, lambda m: patched(m).__enter__()))
@pytest.mark.parametrize("model", (None, "gpt2", torch.zeros(2)), ids=("None", "str", "Tensor"))
def test_not_a_module(call, model):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got"):
        call(model)


def test_unpatch_refuses_a_class_changed_since():
    model = tiny()
    patch(model)
    attn = model.transformer.h[0].attn
    attn.__class__ = type("Wrapped", (type(attn),), {})
    with pytest.raises(RuntimeError, match=r"transformer\.h\.0\.attn was given class Wrapped after patch"):
        unpatch(model)
    assert is_patched(model)


def test_errors_inside_are_the_models_own():
    model = tiny()
    patch(model)
    with pytest.raises(IndexError):
        model(torch.full((1, 3), V))
    with pytest.raises((IndexError, RuntimeError), match=str(V)):
        model(tokens(), labels=torch.full((2, T), V))
