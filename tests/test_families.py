"""Every family of tests/families.py, patched beside unpatched: results, gradients, generation, caches, modes, and what is left
behind.

make test takes a slice of it, make test-full all. With GPT_KERNELS_FAMILIES=FILE in the environment each test that passes
writes down what it has shown; `python -m tools.docs --families FILE` makes docs/families.md of it.
"""

import contextlib
import copy
import inspect
import io
import pickle

import pytest
import torch
from families import FAMILIES, batch_of, cast, differences, forward, padding, ran, record, run, truth_of
from torch import nn

import gpt_kernels
from gpt_kernels import patch, patched, unpatch

pytest.importorskip("transformers")
HF = [name for name, family in FAMILIES.items() if family.hf]
GENERATING = [name for name, family in FAMILIES.items() if family.generates]
SLICE = ("Llama", "Gemma 2", "T5", "GPT-2")
slow = pytest.mark.slow


def made(name, **config):
    torch.manual_seed(0)
    return FAMILIES[name].make(**config)


def fast(names, chosen=SLICE):
    """Of the families, those in `chosen` in make test and the others in make test-full."""
    return [name if name in chosen else pytest.param(name, marks=slow) for name in names]


def served(plan):
    return {op for row in plan.swapped for op in row.op.split("+")}


# ---- results and gradients ----


def assert_parity(name, side=None, dtype=torch.float32, **config):
    family = FAMILIES[name]
    model, batch = made(name, **config).to(dtype), cast(batch_of(family, side), dtype)
    truth, eager = truth_of(family, model, batch), run(family, model, batch)
    seen = {}
    with patched(model) as plan:
        assert plan.swapped
        ours = run(family, model, batch, seen)
    assert differences(ours, eager, truth, dtype) == []
    again = run(family, model, batch)
    assert all(torch.equal(again[key], eager[key]) for key in eager)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_every_gradient(name):
    seen = assert_parity(name, None if FAMILIES[name].kind in ("image", "own") else "left")
    for phase, ops in seen.items():
        record(name, phase, ops)


@slow
@pytest.mark.parametrize("side", (None, "right"))
@pytest.mark.parametrize("name", FAMILIES)
def test_other_paddings(name, side):
    for phase, ops in assert_parity(name, side).items():
        record(name, phase, ops)


@slow
@pytest.mark.parametrize("side", (None, "left", "right"))
@pytest.mark.parametrize("name", HF)
def test_eager_attention(name, side):
    assert_parity(name, side, attn_implementation="eager")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", fast(FAMILIES, ("Llama",)))
def test_16_bits(name, dtype):
    assert_parity(name, None if FAMILIES[name].kind in ("image", "own") else "left", dtype)
    record(name, str(dtype)[6:])


# ---- generation ----


def assert_generates(name, model=None, **options):
    family, model = FAMILIES[name], model or made(name)
    x = batch_of(family)["input_ids"]
    # no token twice: tied embeddings would say one and the same again and again
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    options["no_repeat_ngram_size"] = 1
    model.generation_config.disable_compile = True

    def tokens():
        torch.manual_seed(5)
        return model.generate(x, attention_mask=padding("left"), **options)

    expected = tokens()
    assert len(expected[:, -8:].unique()) > 8
    seen = set()
    with patched(model), ran(seen):
        assert torch.equal(tokens(), expected)
    return seen


HOW = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("how", [how if how == "greedy" else pytest.param(how, marks=slow) for how in HOW])
@pytest.mark.parametrize("name", fast(GENERATING))
def test_generation(name, how):
    if how == "static cache" and not made(name)._can_compile_fullgraph:
        # what transformers says of a class whose static cache it does not vouch for
        pytest.skip("transformers has no static cache for it")
    record(name, f"generate {how}", assert_generates(name, **HOW[how]))


@slow
@pytest.mark.parametrize("name", [name for name in GENERATING if FAMILIES[name].window])
def test_generation_behind_windows(name):
    """More tokens than the window of 6, in caches that hold no more than it."""
    if name == "GPT-Neo":
        pytest.skip("its window is a mask, its cache a whole one")
    from transformers import DynamicCache

    model = made(name)
    cache = DynamicCache(config=model.config)
    assert any(cache.is_sliding)
    record(name, "generate sliding window cache", assert_generates(name, model, max_new_tokens=14))


# ---- hidden states, attentions, checkpointing ----


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value or () for t in tensors(v)]


@pytest.mark.parametrize("name", fast(HF))
def test_hidden_states_and_attentions(name):
    family, batch = FAMILIES[name], batch_of(FAMILIES[name])
    model = made(name, attn_implementation="eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected = model(**batch, **wanted)
    with patched(model):
        found = model(**batch, **wanted)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    recorded = [key for key in expected if key.endswith(("hidden_states", "attentions"))]
    assert len(recorded) >= (2 if family.kind != "seq2seq" else 5)
    for key in recorded:
        ours, theirs = tensors(found[key]), tensors(expected[key])
        # what there is none of, as of cross attention in a decoder alone, has none
        assert len(ours) == len(theirs) and (theirs or key == "cross_attentions"), key
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    record(name, "hidden states, attentions")


@pytest.mark.parametrize("name", fast(HF))
def test_gradient_checkpointing(name):
    family, batch = FAMILIES[name], batch_of(FAMILIES[name])
    model = without_dropout(made(name))
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers has no checkpointing for it")
    model.train()
    expected = run(family, model, batch, **({"use_cache": False} if family.generates else {}))
    model.gradient_checkpointing_enable()
    with patched(model):
        found = run(family, model, batch, **({"use_cache": False} if family.generates else {}))
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    record(name, "checkpointing")


def without_dropout(model):
    """In training mode, with nothing dropped: as modules, as numbers on modules and in the config."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "dropout_prob", "activation_dropout", "dropout_p"):
            if isinstance(module.__dict__.get(key), float):
                setattr(module, key, 0.0)
    return model


@pytest.mark.parametrize("name", fast(FAMILIES))
def test_dropout_follows_the_seed(name):
    family, batch = FAMILIES[name], batch_of(FAMILIES[name])
    model = made(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    with torch.no_grad():
        plain = [forward(family, without_dropout(copy.deepcopy(model)), batch)[1]]
        with patched(model) as plan:
            if "dropout" not in served(plan):
                pytest.skip("it drops nothing")
            a, b = (torch.manual_seed(seed) and forward(family, model, batch)[1] for seed in (1, 2))
            torch.manual_seed(1)
            seen = {}
            with torch.enable_grad():
                again = run(family, model, batch, seen)
    assert torch.equal(a, again["logits"])
    assert not torch.equal(a, b) and not torch.equal(a, plain[0])
    for phase, ops in seen.items():
        record(name, phase, ops)


# ---- copies, files, identity ----


def fingerprint(model):
    modules = [
        (path, id(m), type(m), sorted(m.__dict__), m.training, len(m._forward_hooks)) for path, m in model.named_modules()
    ]
    values = [(path, {k: id(v) for k, v in m.__dict__.items() if not k.startswith("_")}) for path, m in model.named_modules()]
    tensors = [(name, id(t), t.data_ptr(), t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    return modules, values, tensors, list(model.state_dict()), str(getattr(model, "config", None))


@pytest.mark.parametrize("name", FAMILIES)
def test_unpatch_leaves_the_same_objects(name):
    family, model, batch = FAMILIES[name], made(name), batch_of(FAMILIES[name])
    with torch.no_grad():
        expected = forward(family, model, batch)[1]
        before = fingerprint(model)
        for _ in range(2):
            plan = patch(model)
        forward(family, model, batch)
        assert unpatch(model) == len(plan.swapped) > 0
        assert fingerprint(model) == before
        assert torch.equal(forward(family, model, batch)[1], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_copied_pickled_saved_and_loaded(name, tmp_path):
    family, model, batch = FAMILIES[name], made(name), batch_of(FAMILIES[name])
    names = list(model.state_dict())
    with torch.no_grad(), patched(model):
        expected = forward(family, model, batch)[1]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        for made_anew in copies:
            assert torch.equal(forward(family, made_anew, batch)[1], expected)
            assert list(made_anew.state_dict()) == names
            assert unpatch(made_anew) > 0
        assert list(model.state_dict()) == names
        if family.hf:
            model.save_pretrained(tmp_path)
    if family.hf:
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert not gpt_kernels.patch.__globals__["is_patched"](loaded)
        with torch.no_grad():
            torch.testing.assert_close(forward(family, loaded, batch)[1], forward(family, model, batch)[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_who_looks_at_classes_sees_the_modules_own(name):
    model = made(name)
    own = {path: type(m) for path, m in model.named_modules()}
    with patched(model):
        for path, module in model.named_modules():
            cls = type(module)
            assert isinstance(module, own[path]) and issubclass(cls, own[path]) and module.__class__ is cls
            seen = (cls.__name__, cls.__qualname__, cls.__module__, repr(cls), cls.__doc__)
            assert seen == (
                own[path].__name__,
                own[path].__qualname__,
                own[path].__module__,
                repr(own[path]),
                own[path].__doc__,
            )
            assert inspect.signature(cls.forward) == inspect.signature(own[path].forward), path
        assert repr(model) == repr(made(name))


@pytest.mark.parametrize("name", fast(HF))
def test_hooks_see_every_module_that_they_saw(name):
    """As recorders do: hooks on modules of a class, called in the same order with the same shapes."""
    family, batch = FAMILIES[name], batch_of(FAMILIES[name])
    model, seen = made(name), []

    def hook(module, args, kwargs, out):
        shapes = [tuple(t.shape) for t in tensors(list(out.values()) if isinstance(out, dict) else out)]
        seen.append((names[module], type(module).__name__, shapes))

    names = {module: path for path, module in model.named_modules()}
    for module in model.modules():
        module.register_forward_hook(hook, with_kwargs=True)
    found = []
    with torch.no_grad():
        for context in (contextlib.nullcontext(), patched(model)):
            with context:
                seen.clear()
                forward(family, model, batch)
                found.append(list(seen))
    assert found[0] == found[1] and len(found[0]) > 5


# ---- compile, Trainer, LoRA ----


@slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled(name):
    family, model, batch = FAMILIES[name], made(name), batch_of(FAMILIES[name], None)
    expected = run(family, model, batch)
    torch._dynamo.reset()
    torch.utils.deterministic.fill_uninitialized_memory = False
    seen = {}
    with patched(model):
        compiled = torch.compile(model, backend="aot_eager")
        run(family, compiled, batch)
        found = run(family, compiled, batch, seen)
    for key, tensor in expected.items():
        other = found[key.replace("grad ", "grad _orig_mod.")]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    record(name, "compile", set.union(*seen.values()))


class Rows(torch.utils.data.Dataset):
    """The rows of a batch, twice."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 2 * len(self.batch["labels"])

    def __getitem__(self, i):
        return {key: t[i % len(t)] for key, t in self.batch.items()}


@slow
@pytest.mark.parametrize("name", HF)
def test_trainer_one_epoch(name, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    weights = []
    for swap in (False, True):
        model = without_dropout(made(name))
        if swap:
            patch(model)
        arguments = TrainingArguments(
            str(tmp_path / str(swap)), num_train_epochs=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            optim="sgd", use_cpu=True, save_strategy="no", disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Rows(batch_of(FAMILIES[name])))
        loss = trainer.train().training_loss
        trainer.save_model()
        weights.append((loss, dict(model.named_parameters())))
    (loss, theirs), (our_loss, ours) = weights
    assert abs(our_loss - loss) < 1e-4 * abs(loss)
    for key, p in theirs.items():
        torch.testing.assert_close(ours[key], p, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    record(name, "Trainer")


@slow
@pytest.mark.parametrize("order", ("LoRA, then patch", "patch, then LoRA"))
@pytest.mark.parametrize("name", HF)
def test_lora(name, order):
    peft = pytest.importorskip("peft")
    family, batch = FAMILIES[name], batch_of(FAMILIES[name])
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)

    def wrapped(model):
        torch.manual_seed(7)
        adapted = peft.get_peft_model(model, config).eval()
        for key, p in adapted.named_parameters():
            if "lora_" in key:
                nn.init.normal_(p, std=0.05)
        return adapted

    eager_model = wrapped(made(name))
    truth, eager = truth_of(family, eager_model, batch), run(family, eager_model, batch)
    model = made(name)
    if order.startswith("patch"):
        patch(model)
    model = wrapped(model)
    if order.startswith("LoRA"):
        patch(model)
    seen = {}
    ours = run(family, model, batch, seen)
    assert differences(ours, eager, truth, torch.float32) == []
    assert any("lora" in key for key in ours)
    unpatch(model)
    again = run(family, model, batch)
    assert all(torch.equal(again[key], eager[key]) for key in eager)
    # merged into the weights, patched again
    merged = model.merge_and_unload()
    before = forward(family, merged, batch)[1]
    with patched(merged):
        torch.testing.assert_close(forward(family, merged, batch)[1], before, rtol=1e-3, atol=1e-4)
    record(name, order, set.union(*seen.values()))


# ---- the table itself ----


def test_every_family_is_there():
    wanted = """GPT-2 GPT-Neo GPT-NeoX GPT-J OPT Llama Mistral Qwen2 Qwen3 Gemma_2 Gemma_3 Phi-3 OLMo_2 SmolLM BERT RoBERTa
    DistilBERT T5 ViT
        nanoGPT minGPT torch.nn.TransformerEncoderLayer torch.nn.MultiheadAttention a_class_of_the_tests"""
    assert list(FAMILIES) == [name.replace("_", " ") for name in wanted.split()]
    model = made("SmolLM")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_wrong_kernel_is_seen(monkeypatch):
    """The rule that every test here stands on: a norm that is off by one per mille."""
    from gpt_kernels.ops import rms_norm as home

    fwd = home.fwd
    monkeypatch.setattr(
        home, "fwd", lambda x, w, eps: tuple(t * (1.001 if i == 0 else 1) for i, t in enumerate(fwd(x, w, eps)))
    )
    with pytest.raises(AssertionError):
        assert_parity("Llama")
