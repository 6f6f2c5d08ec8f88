"""Families of models: found by their file's name, loaded when seen, declined with a reason where another library has changed;
and keep(), the counterpart of register()."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import gpt_kernels
from gpt_kernels import integrations, keep, patch, patched, unpatch
from gpt_kernels.integrations import torch_nn, transformers_gpt2, transformers_private
from gpt_kernels.patch import is_patched, register

transformers = pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

patch_module = importlib.import_module("gpt_kernels.patch")  # the function has the module's name
FAMILIES = [file.name for file in pkgutil.iter_modules(integrations.__path__)]


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    """What a test registers or keeps is forgotten after it; but not what a family says, which is loaded once."""
    for name in FAMILIES:
        importlib.import_module(f"gpt_kernels.integrations.{name}")
    monkeypatch.setattr(patch_module, "_rules", list(patch_module._rules))


def row(plan, path):
    return next(r for r in plan.rows if r.path == path)


def tiny(**overrides):
    sizes = dict(vocab_size=97, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **overrides})).eval()


# ---- found by name, loaded when seen ----


@pytest.fixture
def family(tmp_path, monkeypatch):
    """family(name, text): a file of that name in integrations/, of a library "madeup"."""
    before = set(sys.modules)
    monkeypatch.setattr(integrations, "__path__", [*integrations.__path__, str(tmp_path)])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in {name for name in set(sys.modules) - before if "madeup" in name}:
        del sys.modules[name]


def model_of(*names):
    """A model with a layer norm, and a module of class Scale from madeup.models.<name>.modeling for each name."""

    class Scale(nn.Module):
        def forward(self, x):
            return 2 * x

    classes = [type("Scale", (Scale,), {"__module__": f"madeup.models.{name}.modeling"}) for name in names]
    return nn.Sequential(nn.LayerNorm(4), *(cls() for cls in classes))


TWICE = """
import torch
from ..patch import register
@register(lambda module: type(module).__name__ == "Scale", ("gelu",), "twice by a sum")
class Scale:
    def forward(self, x):
        return x + x
"""


@pytest.mark.parametrize("named", ("scaled", "scaled_twice"))
def test_a_family_is_one_file(family, named):
    family(f"madeup_{named}", TWICE)
    family("madeup_other", "raise ValueError('not to be loaded')")
    model, x = model_of(named), torch.randn(3, 4)
    expected = model(x)
    plan = patch(model)
    assert row(plan, "1") == ("1", "Scale", "gelu", "twice by a sum") and row(plan, "0").op == "layer_norm"
    assert "gpt_kernels.integrations.madeup_other" not in sys.modules
    assert torch.allclose(model(x), expected) and unpatch(model) == 2


@pytest.mark.parametrize(
    "fault, why",
    [
        ("from torch import name_of_an_older_torch", "ImportError: cannot import name 'name_of_an_older_torch'"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("torch.nn.NoSuchClass", "AttributeError: module 'torch.nn' has no attribute 'NoSuchClass'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_broken_family_is_a_reason_and_the_rest_is_swapped(family, fault, why):
    family("madeup_broken", f"{TWICE}\n{fault}\n")  # after it has registered something
    family(
        "madeup_whole",
        TWICE.replace("type(module).__name__", "type(module).__module__.split('.')[2] + 'Scale'").replace(
            '"Scale",', '"wholeScale",'
        ),
    )
    model, x = model_of("broken", "whole"), torch.randn(3, 4)
    expected = model(x)
    for _ in range(2):
        plan = patch(model)
        kept = row(plan, "1")
        assert kept.op is None and f"integration madeup_broken could not be loaded: {why}" in kept.why
        assert row(plan, "0").op == "layer_norm" and row(plan, "2").op == "gelu"
    assert torch.allclose(model(x), expected)


def test_a_family_that_was_broken_is_tried_again(family):
    family("madeup_mended", "import no_such_library")
    model = model_of("mended")
    assert "could not be loaded" in row(patch(model), "1").why
    family("madeup_mended", TWICE + "# another size, so that no cached bytecode is taken for it\n")
    assert row(patch(model), "1").op == "gelu"


def test_a_family_that_does_not_know_a_module_is_a_reason():
    class Own(nn.Module):
        pass

    register(Own, ("gelu",), "", unless=lambda module: module.attribute_of_another_version)(type("Swap", (), {}))
    plan = patch(nn.Sequential(Own(), nn.GELU()))
    assert "AttributeError" in row(plan, "0").why and "attribute_of_another_version" in row(plan, "0").why
    assert row(plan, "1").op == "gelu"


def test_nothing_is_loaded_before_it_is_seen():
    code = """
import sys, torch, gpt_kernels
def loaded():
    return sorted(name.rpartition(".")[2] for name in sys.modules if name.startswith("gpt_kernels.integrations."))
assert loaded() == [], loaded()
assert gpt_kernels.patch(torch.nn.Sequential(torch.nn.GELU())).swapped
assert loaded() == ["torch_nn"] and "transformers" not in sys.modules, loaded()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "transformers_private"])
def test_every_file_is_found_by_the_classes_that_it_replaces(name):
    home = importlib.import_module(f"gpt_kernels.integrations.{name}").__name__
    targets = [rule.target for rule in patch_module._rules if rule.home == home and rule.replacement]
    classes = [target for target in targets if isinstance(target, type)]
    assert targets and all(name in patch_module._family_names(target) for target in classes)


# ---- attention that a class writes out: GPT-J, GPT-Neo ----


def written(name):
    from families import FAMILIES as OF_MODELS

    torch.manual_seed(0)
    return OF_MODELS[name].make()


@pytest.mark.parametrize("name", ("GPT-J", "GPT-Neo"))
def test_weights_of_written_attention(name):
    """Asked for by argument, by config, by a hook: they are there; and not asked for, there is one pass."""
    model, x = written(name), torch.randint(3, 97, (2, 9))
    expected = model(x, output_attentions=True).attentions
    with patched(model):
        for asked in ({"output_attentions": True}, {}):
            model.config.output_attentions = not asked
            found = model(x, **asked).attentions
            assert len(found) == len(expected) == 2
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        model.config.output_attentions = False
        inner = model.transformer.h[0].attn
        inner = getattr(inner, "attention", inner)
        with torch.profiler.profile() as profile:
            places = {"position_ids": torch.arange(4)[None]} if name == "GPT-J" else {}
            assert inner(torch.randn(1, 4, 32), **places)[1] is None
        assert any("attention_fwd" in event.name for event in profile.events())
        seen = []
        handle = inner.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        model(x)
        handle.remove()
        torch.testing.assert_close(seen[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", ((), (slice(0, 2),), (slice(2, 9),), (slice(6, 9),), (slice(0, 1), slice(7, 9))))
def test_windows_and_masks(hidden):
    """GPT-Neo's window of 6 beside padding: where they leave a query no key, the class's own mean of all values."""
    model, x, mask = written("GPT-Neo").train(), torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    for part in hidden:
        mask[0, part] = 0

    def run():
        logits = model(x, attention_mask=mask).logits
        return logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.parameters()))

    expected = run()
    with patched(model) as plan:
        assert "attention" in {row.op for row in plan.swapped}
        for a, b in zip(run(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


# ---- keep ----


def test_keep_a_class_with_all_that_is_inside():
    class Block(nn.Sequential):
        pass

    keep(Block, "mine alone")
    model = nn.Sequential(nn.GELU(), Block(nn.GELU(), nn.LayerNorm(4)))
    plan = patch(model)
    assert [r.op for r in plan.rows] == [None, "gelu", None, None, None]
    assert row(plan, "1").why == "mine alone" and row(plan, "1.0").why == "inside 1, which is kept: mine alone"
    assert type(model[1][0]) is nn.GELU


def test_keep_by_a_function():
    keep(lambda module: isinstance(module, nn.GELU) and module.approximate == "tanh", "I want torch's tanh")
    plan = patch(nn.Sequential(nn.GELU(), nn.GELU("tanh")))
    assert [r.op for r in plan.rows] == [None, "gelu", None] and row(plan, "1").why == "I want torch's tanh"


def test_the_last_word_counts_and_families_have_the_first():
    class Mine:
        def forward(self, input):
            return input * 0

    model, x = nn.Sequential(nn.GELU(), nn.Linear(4, 4)), torch.randn(2, 4)
    assert row(patch(model, dry_run=True), "1").why == "matrix product: torch's"
    keep(nn.GELU, "torch's")
    assert row(patch(model, dry_run=True), "0").why == "torch's"
    register(nn.GELU, ("gelu",), "nought")(Mine)
    assert row(patch(model, dry_run=True), "0").why == "nought"
    register(nn.Linear, ("gelu",), "nought")(type("Other", (Mine,), {}))
    with patched(model):
        assert not model(x).any()
    keep(nn.GELU, "torch's again")
    assert row(patch(model, dry_run=True), "0").why == "torch's again"


def test_keep_gives_back_what_was_swapped():
    model = nn.Sequential(nn.GELU(), nn.LayerNorm(4))
    patch(model)
    keep(nn.GELU, "changed my mind")
    assert type(model[0]) is not nn.GELU
    with patched(model):
        assert type(model[0]) is nn.GELU and is_patched(model)
    assert type(model[0]) is not nn.GELU
    patch(model, dry_run=True)
    assert type(model[0]) is not nn.GELU
    patch(model)
    assert type(model[0]) is nn.GELU and unpatch(model) == 1


def test_patch_keeps_modules_and_classes():
    model = nn.Sequential(nn.GELU(), nn.Sequential(nn.GELU(), nn.LayerNorm(4)), nn.LayerNorm(4))
    plan = patch(model, keep=[model[1]])
    assert [r.path for r in plan.swapped] == ["0", "2"] and row(plan, "1").why == "keep= asks for it"
    assert "inside 1" in row(plan, "1.1").why
    assert [r.path for r in patch(model, keep=[nn.GELU, model[2]]).swapped] == ["1.1"]
    assert type(model[0]) is nn.GELU and type(model[2]) is nn.LayerNorm and is_patched(model[1][1])
    unpatch(model)
    with patched(model, keep=(nn.LayerNorm,)) as plan:
        assert [r.path for r in plan.swapped] == ["0", "1.0"]
    assert not patch(model, keep=[model]).swapped


def test_a_kept_module_shared_with_one_that_is_not_kept():
    gelu = nn.GELU()
    model = nn.Sequential(gelu, nn.Sequential(gelu))
    assert "inside 1" in row(patch(model, keep=[model[1]]), "0").why and type(gelu) is nn.GELU


def test_a_parent_does_not_do_the_work_of_a_child_that_is_kept():
    model = tiny()
    plan = patch(model, keep=[model.transformer.h[0].mlp.act])
    assert row(plan, "transformer.h.0.mlp").why == "its act is kept" and row(plan, "transformer.h.0.attn").op == "attention"
    assert row(plan, "transformer.h.0.mlp.act").why == "keep= asks for it"
    plan = patch(model, keep=[nn.Dropout])
    assert row(plan, "transformer.h.0.mlp").op == "gelu" and row(plan, "transformer.h.0.attn").why == "its attn_dropout is kept"
    assert type(model.transformer.h[0].attn) is transformers_gpt2.modeling_gpt2.GPT2Attention


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: keep(m, "why"), TypeError, r"keep: expected a module class, got a Sequential; .* keep=\[module\]"),
        (lambda m: keep(int, "why"), TypeError, "keep: expected a module class or a function of a module, got <class 'int'>"),
        (lambda m: keep("0", "why"), TypeError, "keep: expected a module class or a function of a module, got '0'"),
        (lambda m: patch(m, keep=["0"]), TypeError, "patch: keep: expected modules and module classes, got '0'"),
        (lambda m: patch(m, keep=m), TypeError, "patch: keep: expected a list"),
        (lambda m: patch(m, keep=nn.GELU), TypeError, "patch: keep: expected a list"),
        (lambda m: patch(m, keep=[int]), TypeError, "patch: keep: expected modules and module classes"),
        (lambda m: patch(m, keep=[nn.GELU()]), ValueError, "patch: keep has a GELU that is not in the model"),
    ],
)
def test_keep_refuses(call, error, message):
    model = nn.Sequential(nn.GELU())
    with pytest.raises(error, match=message):
        call(model)
    assert not is_patched(model)


# ---- what transformers does not promise to keep ----


@pytest.fixture
def anew(monkeypatch):
    """anew(): the files of transformers' families as if they were not loaded yet."""

    def forget():
        names = [name for name in FAMILIES if name.startswith("transformers_")]
        homes = {f"{integrations.__name__}.{name}" for name in names}
        for name in names:
            monkeypatch.delitem(sys.modules, f"{integrations.__name__}.{name}")
            monkeypatch.delattr(integrations, name)
        monkeypatch.setattr(patch_module, "_rules", [rule for rule in patch_module._rules if rule.home not in homes])

    return forget


ATTENTION, MLP, LOSS = "transformer.h.0.attn", "transformer.h.0.mlp", ""


@pytest.mark.parametrize(
    "module, name, lost",
    [
        ("modeling_utils", "ALL_ATTENTION_FUNCTIONS", {"sdpa": ATTENTION, "eager": ATTENTION}),
        ("integrations.sdpa_attention", "sdpa_attention_forward", {"sdpa": ATTENTION, "eager": None}),
        ("models.gpt2.modeling_gpt2", "eager_attention_forward", {"sdpa": None, "eager": ATTENTION}),
        ("utils.output_capturing", "_active_collector", {"sdpa": None, "eager": ATTENTION}),
        ("loss.loss_utils", "LOSS_MAPPING", {"sdpa": LOSS}),
        ("loss.loss_utils", "ForCausalLMLoss", {"sdpa": LOSS}),
        ("activations", "NewGELUActivation", {"sdpa": MLP}),
        ("activations", "GELUTanh", {"sdpa": None}),
    ],
)
@pytest.mark.parametrize("how", ("name", "module"))
def test_an_absent_name_is_a_reason(module, name, lost, how, anew, monkeypatch):
    if how == "module" and name in ("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward", "NewGELUActivation", "GELUTanh"):
        pytest.skip("the model is of that module, or imports it anew")
    models = {implementation: tiny(attn_implementation=implementation) for implementation in lost}
    x = torch.randint(0, 97, (2, 9))
    full = {i: {r.path for r in patch(model, dry_run=True).swapped} for i, model in models.items()}
    expected = {i: model(x, labels=x) for i, model in models.items()}
    anew()
    with monkeypatch.context() as absent:
        if how == "name":
            absent.delattr(f"transformers.{module}.{name}")
        else:
            absent.setitem(sys.modules, f"transformers.{module}", None)
        plans = {implementation: patch(model) for implementation, model in models.items()}
    for implementation, path in lost.items():
        plan, swapped = plans[implementation], {r.path for r in plans[implementation].swapped}
        # a module of which the parent does not do the work any more may be swapped itself
        assert full[implementation] - swapped == ({path} - {None}), implementation
        if path is not None:
            # the first of the absent, where all of its module are
            assert (name if how == "name" else module) in row(plan, path).why
        out = models[implementation](x, labels=x)
        torch.testing.assert_close(out.logits, expected[implementation].logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.loss, expected[implementation].loss, rtol=1e-5, atol=1e-5)


def test_an_eager_attention_put_into_the_models_module_is_used(monkeypatch):
    model, x = tiny(attn_implementation="eager"), torch.randint(0, 97, (2, 9))
    patch(model)
    own = transformers_gpt2.modeling_gpt2.eager_attention_forward

    def doubled(*args, **options):
        return 2 * own(*args, **options)[0], None

    monkeypatch.setattr(transformers_gpt2.modeling_gpt2, "eager_attention_forward", doubled)
    ours = model(x).logits
    unpatch(model)
    torch.testing.assert_close(ours, model(x).logits, rtol=1e-5, atol=1e-5)


def test_a_config_without_an_implementation_is_a_reason():
    model = tiny()
    attn = model.transformer.h[0].attn
    attn.config = type("Config", (), {})()
    assert row(patch(model), ATTENTION).why == "attention implementation None"


OF_EVERY_MODULE = set(dir(nn.Module()))


def private_names(text):
    """What a file reads of transformers that is not public: imports from inside it but a model's classes, names with "_"."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.startswith("transformers")]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "transformers":
            public = node.module == "transformers" or node.module.startswith("transformers.models.")
            found += [
                n.name
                for n in node.names
                if not public or n.name[0] == "_" or not (n.name[0].isupper() or "modeling" in n.name)
            ]
        elif isinstance(node, ast.Attribute) and not ast.unparse(node).startswith("torch."):
            of_model = isinstance(node.value, ast.Name) and node.value.id.startswith("modeling_")
            hidden = node.attr[0] == "_" and node.attr[:2] != "__" and node.attr not in OF_EVERY_MODULE
            found += [node.attr] * (hidden or of_model and not node.attr[0].isupper())
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found += [node.value] * (node.value[0] == "_" and node.value[:2] != "__" and node.value not in OF_EVERY_MODULE)
    return found


def test_private_names_of_transformers_are_in_one_file():
    files = {path.stem: path.read_text() for path in pathlib.Path(integrations.__path__[0]).glob("*.py")}
    assert {"torch_nn", "transformers_gpt2"} <= files.keys()
    known = set(private_names(files.pop("transformers_private")))
    assert {"_active_collector", "_loss_function", "_attn_implementation", "_gelu_python"} <= known
    of_transformers = {name: text for name, text in files.items() if name.startswith("transformers_")}
    assert {name: found for name, text in of_transformers.items() if (found := private_names(text))} == {}


@pytest.mark.parametrize(
    "line, name",
    [
        ("from transformers.loss.loss_utils import LOSS_MAPPING", "LOSS_MAPPING"),
        ("from transformers import _lazy", "_lazy"),
        ("from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward", "eager_attention_forward"),
        ("f(modeling_gpt2.eager_attention_forward)", "eager_attention_forward"),
        ("module.config._attn_implementation", "_attn_implementation"),
        ("hasattr(model, '_loss_function')", "_loss_function"),
        ("import transformers.modeling_utils", "transformers.modeling_utils"),
    ],
)
def test_the_scan_sees(line, name):
    assert private_names(line) == [name]


def test_public_names():
    assert gpt_kernels.keep is patch_module.keep
    assert torch_nn.LayerNorm.__module__ == "gpt_kernels.integrations.torch_nn"
    assert transformers_private.absent("LOSS_MAPPING") is None


def test_a_replacement_names_the_arguments_of_its_class():
    """One that the class renames would be swallowed by **kwargs, unseen."""
    seen = 0
    for rule in patch_module._rules:
        own = getattr(rule.target, "forward", None) if isinstance(rule.target, type) else None
        ours = getattr(rule.replacement, "forward", None)
        if own is None or ours is None:
            continue
        names, theirs = (list(inspect.signature(f).parameters) for f in (ours, own))
        if names != ["self", "args", "kwargs"]:
            seen += 1
            # its cache, which it calls by either name
            assert names == ["past_key_values" if name == "cache" else name for name in theirs], rule
    assert seen >= 7


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rotary_of_sixteen_bits_by_tables_of_thirty_two(dtype):
    """As autocast has it: what comes out is float32, of the model's function and of ours in its place."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as own

    from gpt_kernels.substitute import rotary

    made = rotary(own, nn.Identity(), torch.device("cpu"))
    ours = made.make(own, *made.args)
    q, k = (torch.randn(2, heads, 5, 8).to(dtype).requires_grad_() for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 5, 8)

    def run(function):
        outs = function(q, k, cos, sin)
        return *outs, *torch.autograd.grad([y.square().sum() for y in outs], (q, k))

    expected = run(own)
    with torch.profiler.profile() as profile:
        found = run(ours)
    assert any("rotary_fwd" in event.name for event in profile.events())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.01 if a.dtype is dtype else 1e-6, atol=0.01 if a.dtype is dtype else 1e-6)
    # of two dtypes of 16 bits, and of wider positions, torch's own
    for x, table in ((q, cos.to(torch.bfloat16 if dtype is torch.float16 else torch.float16)), (q, cos.double())):
        assert ours(x, k, table, table)[0].dtype == own(x, k, table, table)[0].dtype
