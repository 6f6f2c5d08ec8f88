"""Every op has every file and every role, every kernel is called by what its roles say, and nobody else lists the ops."""

import ast
import pathlib
import re

import pytest
import torch

import gpt_kernels
from gpt_kernels import cases, dispatch
from gpt_kernels.bench.settings import Settings
from gpt_kernels.names import families, family
from gpt_kernels.triton import slots

ROOT = pathlib.Path(__file__).parents[1]
KERNELS = dispatch.ops()  # at import: other tests may define their own
# (op, role) -> why it has none
NONE = {("attention", "streamed"): "its outputs are written tile by tile, as ever"}


def made(op, role):
    """What a role yields first; nothing where it yields nothing."""
    arguments = {
        "small": [torch.float32], "odd": [torch.float32, 2], "threaded": [2], "special": [torch.float32],
        "streamed": [torch.float16], "step": [cases.Sizes(1, 4, 8, 1, vocab=9), cases.New(torch.float32, "meta")],
        "calls": [cases.New(torch.float32, "meta")], "bounds": [f"{op}_fwd"], "huge": [f"{op}_fwd"], "bench": [Settings()],
    }  # fmt: skip
    return next(iter(getattr(cases.of(op), role)(*arguments.get(role, []))), None)


@pytest.mark.parametrize("role", [role for role in cases.ROLES if role != "huge"])  # gigabytes of addresses: test_triton_memory
@pytest.mark.parametrize("op", families())
def test_every_op_has_every_role(op, role):
    assert (made(op, role) is None) == ((op, role) in NONE), f"gpt_kernels/cases/{op}.py: {role}"


@pytest.mark.parametrize("op", families())
def test_every_op_is_these_files(op):
    """Those of CONTRIBUTING's "Add an op"."""
    for file in (f"gpt_kernels/ops/{op}.py", f"gpt_kernels/cases/{op}.py", f"gpt_kernels/triton/{op}.py", f"csrc/cpu/{op}.cpp",
                 f"csrc/cuda/{op}.cu", f"tests/test_{op}.py"):  # fmt: skip
        assert (ROOT / file).is_file(), file
    assert callable(cases.of(op).huge) and cases.of(op).TAKES


def test_every_defined_op_has_cases():
    """A home file without calls is tested by nobody, and would be measured and compiled by nobody."""
    homes = {p.stem for p in (ROOT / "gpt_kernels" / "ops").glob("*.py") if re.search(r"^\w+ = define\(", p.read_text(), re.M)}
    assert homes == set(families()) == {family(name) for name in KERNELS}
    assert set(slots.OPS) == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_called(name):
    of = cases.of(family(name))
    step = [n for n, _ in of.step(cases.Sizes(1, 4, 8, 1, vocab=9), cases.New(torch.float32, "meta"))]
    assert name in step, f"step() of gpt_kernels/cases/{family(name)}.py has no {name}"
    assert next(iter(of.bounds(name)), None) is not None


def test_every_public_function_is_exported():
    for op in families():
        home = __import__(f"gpt_kernels.ops.{op}", fromlist=["__all__"])
        for name in home.__all__:
            assert getattr(gpt_kernels, name) is getattr(home, name)
            assert getattr(home, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'relu'"):
        gpt_kernels.relu  # noqa: B018


# module -> why it names ops all the same
NAMES_OPS = {
    "gpt_kernels/accelerate.py": "ATen's slots of each op",
    "gpt_kernels/explain.py": "what an op of ours is to people",
    "gpt_kernels/functional.py": "torch's functions of these names",
    "gpt_kernels/hooks/layers.py": "a layer of the hub's names for each op",
    "gpt_kernels/bench/peers.py": "what each peer has, and what it has not",
    "gpt_kernels/ops/calls.py": "torch's autocast, by the ops' namesakes in torch",
    "gpt_kernels/sharding.py": "a sharding rule for each op",
    "gpt_kernels/integrations/torch_nn.py": "what torch's own module classes become",
    "gpt_kernels/structure.py": "what modules look like",
    "tools/gpu_minute.py": "the rows that fit in a minute",
    "tests/namesakes.py": "torch's own functions, argument by argument",
}


def test_nobody_else_lists_the_ops():
    """An op forgotten in a list is tested, compiled or shown by nobody, and all is green."""
    listing = []
    for path in sorted(p for folder in ("gpt_kernels", "tools", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")):
        file = str(path.relative_to(ROOT))
        if path.name.startswith("test_") or "made_up" in file:
            continue  # tests of one thing on some ops
        words = {
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        if sum(any(re.fullmatch(rf"(test_)?{op}(_fwd|_bwd)?(\.\w+)?", word) for word in words) for op in families()) >= 4:
            listing.append(file)
    assert listing == sorted(NAMES_OPS)
