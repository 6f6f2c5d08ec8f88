"""Families of modules: found by module path, loaded when seen; what fails in one is a reason in the plan; keep()."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import gpt_kernels
from gpt_kernels import dispatch, integrations, patch
from gpt_kernels.names import families

module = sys.modules["gpt_kernels.patch"]
FOLDER = pathlib.Path(integrations.__file__).parent
pytestmark = pytest.mark.skipif(dispatch.kernel_of("gelu_fwd", "cpu") is None, reason="nothing is swapped without kernels")


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is gone after it."""
    importlib.import_module("gpt_kernels.integrations.torch_nn")  # which the first model would load
    rules, keeps = list(module._rules), list(module._keeps)
    yield
    module._rules[:], module._keeps[:] = rules, keeps


def made_up(name, path="madeup.models.thing.modeling_thing"):
    """A class of another library."""
    return type(name, (nn.Module,), {"__module__": path, "forward": lambda self, x: x})


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Writes integrations/madeup_thing.py, somewhere else."""
    monkeypatch.setattr(integrations, "__path__", [*integrations.__path__, str(tmp_path)])

    def write(text):
        (tmp_path / "madeup_thing.py").write_text(text)
        integrations.files.cache_clear()

    yield write
    monkeypatch.undo()
    integrations.files.cache_clear()
    for name in [n for n in sys.modules if n.endswith("madeup_thing")]:
        del sys.modules[name]


def why(plan, path):
    (row,) = [row for row in plan.rows if row.path == path]
    return row.op, row.why


def model_with(cls):
    return nn.ModuleDict({"norm": nn.LayerNorm(8), "other": cls()})


def test_a_family_is_found_by_module_path_and_loaded_when_seen(family):
    family("from gpt_kernels.patch import keep\nkeep(lambda m: type(m).__name__ == 'Thing', 'kept by its family')")
    assert integrations.of(made_up("Thing")) == ["madeup_thing"] and not integrations.of(made_up("X", "madeup.core"))
    patch(nn.Sequential(nn.LayerNorm(8)))
    assert not any(name.endswith("madeup_thing") for name in sys.modules)
    assert why(patch(model_with(made_up("Thing")), dry_run=True), "other") == (None, "kept by its family")


@pytest.mark.parametrize("fault, said", [
    ("import nothing_of_the_name", "ModuleNotFoundError: No module named 'nothing_of_the_name'"),
    ("import torch\ntorch.nn.NothingOfTheName", "AttributeError: module 'torch.nn' has no attribute 'NothingOfTheName'"),
    ("1 / 0", "ZeroDivisionError"),
])  # fmt: skip
def test_a_family_that_fails_is_a_reason_and_the_rest_is_swapped(family, fault, said):
    half = (
        "import torch\nfrom gpt_kernels.patch import register\n@register(torch.nn.Identity, ('gelu',), 'half')\nclass A: pass\n"
    )
    family(half + fault)
    before = list(module._rules)
    model = model_with(made_up("Thing"))
    plan = patch(model)
    op, reason = why(plan, "other")
    assert op is None and reason.startswith("integrations/madeup_thing.py could not be loaded: ") and said in reason
    assert why(plan, "norm")[0] == "layer_norm" and "could not be loaded" in str(plan)
    assert module._rules == before, "half of a family is none"
    gpt_kernels.unpatch(model)


def test_a_rule_that_fails_is_a_reason(family):
    family("""
from gpt_kernels.patch import register
@register(lambda m: m.no_such_name == 1, ("gelu",), "never")
class A: pass
""")
    model = nn.ModuleDict({"other": made_up("Thing")()})
    op, reason = why(patch(model), "other")
    assert op is None and reason.startswith("its rule fails: AttributeError: ") and "no_such_name" in reason


def test_no_list_of_families():
    """transformers is imported for models of its own alone."""
    code = """
import sys, torch, gpt_kernels
gpt_kernels.patch(torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.GELU()))
assert "gpt_kernels.integrations.torch_nn" in sys.modules
assert not any(name.split(".")[0] == "transformers" or "transformers" in name for name in sys.modules if "gpt_kernels" in name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- keep ----


def test_keep_by_module_class_and_function():
    model = nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.LayerNorm(8), nn.GELU()), nn.Dropout(0.1), nn.LayerNorm(8))
    gpt_kernels.keep(model[1], "measured by hand")
    gpt_kernels.keep(nn.Dropout, "of a class")
    gpt_kernels.keep(lambda m: m is model[3], "by a function")
    plan = patch(model)
    assert [row.path for row in plan.swapped] == ["0"]
    assert [why(plan, path)[1] for path in ("1.0", "1.1", "2", "3")] == ["measured by hand"] * 2 + [
        "of a class",
        "by a function",
    ]
    x = torch.randn(2, 8)
    assert torch.equal(model[1][0](x), nn.functional.layer_norm(x, (8,), model[1][0].weight, model[1][0].bias))
    with pytest.raises(ValueError, match="keep: LayerNorm is swapped already; unpatch it first"):
        gpt_kernels.keep(model[0], "too late")
    with pytest.raises(TypeError, match="keep: expected a module, a class of modules or a function of one, got str"):
        gpt_kernels.keep("LayerNorm", "a name")
    gpt_kernels.unpatch(model)


def test_a_kept_module_is_not_kept_alive():
    import gc
    import weakref

    model = nn.LayerNorm(8)
    gpt_kernels.keep(model, "for now")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert patch(nn.LayerNorm(8)).swapped


# ---- names that others call private ----


def test_private_names_of_transformers_stand_in_one_file():
    torchs = {"_C", "_modules", "_parameters"}  # torch's, of which patch.py says why
    for path in FOLDER.glob("transformers_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                of_torch = node.attr in torchs or ast.unparse(node).startswith("torch.")
                assert of_torch, f"{path.name}: {ast.unparse(node)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], path.name


def test_without_the_private_names_the_model_runs_its_own_code(monkeypatch):
    transformers = pytest.importorskip("transformers")
    from gpt_kernels.integrations import _transformers as private

    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, attn_implementation="eager")
    model, idx = transformers.GPT2LMHeadModel(config).eval(), torch.arange(6)[None]
    expected = model(idx, output_attentions=True)
    monkeypatch.setattr(private, "_active_collector", None)
    plan = patch(model)
    assert [row.op for row in plan.swapped].count("attention") == 1
    actual = model(idx, output_attentions=True)
    torch.testing.assert_close(actual.logits, expected.logits)
    assert all(a is not None for a in actual.attentions), "who may want them gets them"
    assert private.attention_implementation(object()) is None and private.own_loss_function(object(), 1) == 1
    assert "attention" in families()
    gpt_kernels.unpatch(model)
