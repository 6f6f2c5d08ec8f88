"""Every Triton kernel compiled to machine code for every GPU, with no GPU; and the gates seen red."""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from gpt_kernels import triton as backend
from gpt_kernels.cases import Compiled
from gpt_kernels.names import families, family
from gpt_kernels.triton import common, slots
from gpt_kernels.triton.common import Launch
from tools import gates, static, static_triton
from tools.gates import Budget
from tools.problems import ARCHS, DTYPES, PR_ARCHS, PROBLEMS, Case, Inputs, Problem, matrix

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="kernels are interpreted: nothing is compiled")
BUDGET = Budget.load("triton", triton.__version__)
PR, FULL = matrix("pr"), matrix("full")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def cases(cases):
    return pytest.mark.parametrize("case", cases, ids=[c.id for c in cases])


def check(case):
    found = static_triton.rows(case)
    assert found, "nothing was launched"
    faults = [f"{row.kernel} {fault}" for row in found for fault in row.faults()]
    if BUDGET.comparable(triton.__version__):
        faults += [f"{row.kernel} {overrun}" for row in found for overrun in row.overruns(BUDGET.kernels)]
    assert not faults, "\n".join(faults)


@cases(PR)
def test_pr(case):
    check(case)


@pytest.mark.slow
@cases([c for c in FULL if c not in PR])
def test_full(case):
    check(case)


# ---- the matrix is whole ----


def test_every_kernel_is_launched_by_some_case():
    launched = {
        launch.kernel.__name__ for case in FULL if case.arch in ("sm_80", "sm_90", "gfx942") for launch in case.launches()
    }
    modules = [importlib.import_module(f"{backend.__name__}.{m.name}") for m in pkgutil.iter_modules(backend.__path__)]
    written = {n for m in modules for n, k in vars(m).items() if n.endswith("_kernel") and isinstance(k, triton.JITFunction)}
    assert written and launched == written


def test_every_op_architecture_and_dtype_is_in_the_matrix():
    assert {p.op for p in PROBLEMS} == {family(op) for op in slots.OPS}
    assert {(c.problem.op, c.arch, c.dtype) for c in FULL} == {(p.op, a, d) for p in PROBLEMS for a in ARCHS for d in DTYPES}
    assert {p.op for p in PROBLEMS if not p.of.aligned} == {p.op for p in PROBLEMS if p.of.main} == {p.op for p in PROBLEMS}
    assert len({c.id for c in FULL}) == len(FULL) and set(PR) < set(FULL)


def test_the_baseline_is_of_the_pinned_triton():
    (pin,) = re.findall(r"^triton==([\w.]+)", (ROOT / "requirements-dev.txt").read_text(), re.M)
    assert BUDGET.compiler == pin, "python -m tools.static --subset full --facts --write-baseline"


def test_the_baseline_has_every_kernel_once():
    assert {id.split()[0] for id in BUDGET.kernels} == {case.id for case in FULL}


# ---- what is compiled is what would be launched ----


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_specialised_as_on_a_gpu(arch, aligned):
    """Types and divisibility come from Triton's own specialisation of the recorded arguments."""
    from gpt_kernels.triton.dropout import dropout_fwd

    new = Inputs(torch.float16, aligned)
    with common.recording(arch) as launches:
        dropout_fwd(new(48, 1 if not aligned else 32), None, new(2, dtype=torch.int64), 0.5)
    source = static_triton.compile_launch(launches[0], arch).src
    pointer = [["tt.divisibility", 16]] * aligned + [["tt.pointer_range", 32]] * (arch == "gfx942")
    types = {"y": "*fp16", "x": "*fp16", "residual": "constexpr", "rng_state": "*i64", "M": "i32", "threshold": "i32",
             "N": "i32" if aligned else "constexpr", "keep_scale": "fp32", "chunks": "constexpr",
             "VEC": "constexpr"}  # fmt: skip
    assert {k: v for k, v in source.signature.items() if not k.startswith("BLOCK")} == types, "None and 1 become constants"
    hints = {source.fn.arg_names[position]: sorted(hint) for (position,), hint in source.attrs.items()}
    assert hints["x"] == sorted(pointer) and hints["M"] == [["tt.divisibility", 16]]


def test_long_integers_and_descriptors():
    """An int beyond 32 bits is an i64; a host-side tensor descriptor is compiled as one."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    big = static_triton.compile_launch(Launch(copy_kernel, (1,), (*tensors(2, 64), 2**40), {"BLOCK": 64}), "sm_80")
    assert big.src.signature["N"] == "i64"
    x, y = tensors(2, 128, 64)
    blocks = [TensorDescriptor(t, [128, 64], [64, 1], [64, 64]) for t in (y, x)]
    found = static_triton.compile_launch(Launch(descriptor_kernel, (2,), tuple(blocks), {}), "sm_90")
    assert "UTMALDG" in {i.base for i in static_triton._read(found.asm["cubin"]).instructions}
    assert static_triton.facts(found, "sm_90").wide == 1.0


def test_the_driver_comes_back():
    before = static_triton.driver._active
    with pytest.raises(RuntimeError), static_triton.pretending("sm_90"):
        raise RuntimeError
    assert static_triton.driver._active is before


# ---- gates seen red ----


@triton.jit
def copy_kernel(y, x, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def descriptor_kernel(y, x):
    at = tl.program_id(0) * 64
    y.store([at, 0], x.load([at, 0]))


@triton.jit
def product_kernel(c, a, b, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * N + tl.arange(0, BLOCK)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(tl.bfloat16))


@triton.jit
def broken_kernel(y, x, N, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK + 1)))


def tensors(count, *shape, aligned=True):
    return tuple(Inputs(torch.bfloat16, aligned)(*shape) for _ in range(count))


def row(kernel, *args, arch="sm_80", wide=0.0, matrix="", monkeypatch=None, **parameters):
    """The row of one launch, as if it came from a case."""
    problem = Problem("none", Compiled("none", lambda new: None, wide=wide, matrix=matrix))
    case = Case(problem, arch, "bf16")
    launch = Launch(kernel, (1,), args, parameters)
    monkeypatch.setattr(Case, "launches", lambda self: [launch])
    (found,) = static_triton.rows(case)
    return found


def test_red_spills(monkeypatch):
    at = {"BLOCK": 8192, "num_warps": 1, "monkeypatch": monkeypatch}
    assert row(copy_kernel, *tensors(2, 8192), 8192, **at).faults() == []
    (fault,) = row(copy_kernel, *tensors(2, 8192), 8192, maxnreg=24, **at).faults()
    assert re.fullmatch(r"spills: \d+ accesses to local memory", fault)
    (fault,) = row(copy_kernel, *tensors(2, 2**16), 2**16, arch="gfx942", **{**at, "BLOCK": 2**16}).faults()
    assert fault.startswith("spills")
    monkeypatch.setitem(gates.SPILLS, "none-none.* copy_kernel", "a test")
    assert row(copy_kernel, *tensors(2, 8192), 8192, maxnreg=24, **at).faults() == []


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_red_narrow_accesses(arch, monkeypatch):
    at = {"BLOCK": 4096, "arch": arch, "wide": 0.9, "monkeypatch": monkeypatch}
    assert row(copy_kernel, *tensors(2, 4096), 4096, **at).faults() == []
    assert row(copy_kernel, *tensors(2, 4096, aligned=False), 4096, **at).faults() == [
        "moves 0% of its bytes 16 at a time, expected 90%"
    ]
    assert row(copy_kernel, *tensors(2, 4096), 4097, **at).faults(), "rows of an odd length"
    monkeypatch.setitem(gates.NARROW, "none-none.* copy_kernel", "a test")
    assert row(copy_kernel, *tensors(2, 4096), 4097, **at).faults() == []


@pytest.mark.parametrize(
    "parameters, columns, share",
    [({"CHUNK": 512, "CHUNKS": 3}, 1280, 5 / 6), ({"BLOCK_N": 1024}, 768, 0.75), ({"BLOCK_N": 1024}, 0, 1), ({}, 768, 1)],
)
def test_idle_lanes(parameters, columns, share):
    assert static_triton.useful(Launch(copy_kernel, (1,), (), parameters), columns) == share


@pytest.mark.parametrize("arch", ARCHS)
def test_red_matrix_instruction(arch, monkeypatch):
    at = {"BLOCK": 128, "arch": arch, "monkeypatch": monkeypatch}
    assert row(product_kernel, *tensors(3, 128, 128), 128, **at).faults() == []
    if arch.startswith("sm_"):
        (fault,) = row(product_kernel, *tensors(3, 128, 128), 128, matrix="IMMA", **at).faults()
        assert fault.startswith("has products but no IMMA, only {")


def test_red_shared_memory(monkeypatch):
    found = row(product_kernel, *tensors(3, 256, 256), 256, BLOCK=256, num_warps=8, arch="sm_86", monkeypatch=monkeypatch)
    assert f"needs {found.facts.shared} bytes of shared memory, sm_86 has 99 KB" in found.faults()


def test_red_occupancy(monkeypatch):
    found = row(copy_kernel, *tensors(2, 8192), 8192, BLOCK=8192, monkeypatch=monkeypatch)
    facts = dataclasses.replace(found.facts, ctas=0, limit="registers")
    assert dataclasses.replace(found, facts=facts).faults() == ["does not fit on a processor: registers"]


def test_red_compilation(monkeypatch):
    (fault,) = row(broken_kernel, *tensors(2, 64), 64, BLOCK=64, monkeypatch=monkeypatch).faults()
    assert fault.startswith("does not compile: ") and "power of 2" in fault


def test_red_launcher(monkeypatch):
    def refuses(self):
        raise RuntimeError("op: x must be nice")

    monkeypatch.setattr(Case, "launches", refuses)
    (found,) = static_triton.rows(PR[0])
    assert found.faults() == ["does not launch: op: x must be nice"]


def test_red_budget(monkeypatch):
    found = row(copy_kernel, *tensors(2, 4096), 4096, BLOCK=4096, monkeypatch=monkeypatch)
    budget = found.budget()
    assert found.overruns({}) == ["is not in the baseline: --write-baseline"]
    assert found.overruns({found.id: budget}) == []
    for name, slack in (("registers", 8), ("code", 256)):
        assert found.overruns({found.id: {**budget, name: budget[name] - slack}}) == []
        (over,) = found.overruns({found.id: {**budget, name: budget[name] - slack - 1}})
        assert over == f"{name} {budget[name]}, the baseline has {budget[name] - slack - 1}"
    for name in ("shared", "spills"):
        assert len(found.overruns({found.id: {**budget, name: budget[name] - 1}})) == 1
    assert found.changes({found.id: {**budget, "code": 1}}) == f"code 1 -> {budget['code']}"


# ---- the command ----


def command(*flags):
    return static.main([*map(str, flags)])


def test_command(monkeypatch, tmp_path, capsys):
    """Table, JSON, Markdown; the baseline is renewed, and compared with."""
    monkeypatch.setattr(gates, "BUDGETS", tmp_path / "new")
    kept = tmp_path / "new" / "triton.json"
    only = ("--op", "dropout", "--arch", "sm_80")
    assert command(*only, "--facts") == 1, "no baseline yet"
    assert "not in the baseline" in capsys.readouterr().err
    assert command(*only, "--facts", "--write-baseline") == 0
    first = kept.read_text()
    assert command(*only, "--json", tmp_path / "t.json", "--markdown", tmp_path / "t.md") == 0
    assert "nothing was executed" in capsys.readouterr().out and kept.read_text() == first
    (figures,) = json.loads((tmp_path / "t.json").read_text())["kernels"]
    assert (
        figures["kernel"] == "dropout_fwd_kernel" and 0 < figures["regions"][0]["model"] <= figures["regions"][0]["bound"] <= 1
    )
    table = (tmp_path / "t.md").read_text().splitlines()
    assert len(table) == 3 and "| bound | model |" in table[0] and len({line.count("|") for line in table}) == 1

    smaller = json.loads(first)
    smaller["kernels"][figures["id"]]["registers"] -= 20
    kept.write_text(json.dumps(smaller))
    assert command(*only, "--facts") == 1
    streams = capsys.readouterr()
    assert "registers" in streams.err and "registers" in streams.out and "->" in streams.out
    kept.write_text(json.dumps({**smaller, "triton": "3.0.0"}))
    assert command(*only, "--facts") == 0, "the figures of another Triton are not compared"
    assert "not compared" in capsys.readouterr().out


def test_liger():
    pytest.importorskip("liger_kernel")
    problem = next(p for p in PROBLEMS if p.op == "layer_norm" and p.of.main)
    forward, backward = static_triton.rows(Case(problem, "sm_90", "bf16"), "liger", figures=True)
    assert backward.kernel == "_layer_norm_backward_kernel" and backward.regions[0].in_flight_sm == 40 * 128, "one CTA on an SM"
    assert forward.regions[0].bound == 1.0 and forward.facts.wide > 0.8
    assert static.show(backward, Budget("triton", "0", {}))["occupancy"].endswith("%")


def test_where_liger_has_no_kernel_is_said(capsys):
    pytest.importorskip("liger_kernel")
    assert command("--op", "dropout", "--arch", "sm_80", "--against", "liger", "--facts") == 0
    assert "liger has no kernel beside ours for dropout-8192x768-residual" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--arch", "sm_70"], "invalid choice: 'sm_70'"),
        (["--op", "relu"], "invalid choice: 'relu'"),
        (["--problem", "nothing like this"], "no case is left"),
    ],
)
def test_command_line_errors(capsys, flags, why):
    with pytest.raises(SystemExit) as stop:
        command(*flags)
    assert stop.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.parametrize("module", ["tools.static", "benchmarks.static"])
def test_interpreted_kernels_are_refused(module):
    command = [sys.executable, "-m", module]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 2 and "TRITON_INTERPRET is set" in result.stderr


# ---- every other Triton that a supported torch brings ----


@pytest.fixture(scope="module", params=sorted({*backend.PAIRS.values()} - {triton.__version__}))
def other_triton(request, tmp_path_factory):
    """(its version, an environment with it in front of the installed one); downloaded once, `make clean` removes it."""
    site = ROOT / "build" / f"triton-{request.param}-py{sys.version_info[0]}{sys.version_info[1]}"
    if not site.exists():
        new = site.with_name(f"{site.name}-{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(new), f"triton=={request.param}"]
        # the interpreter of 3.6 makes Python numbers of arrays with a dimension, which NumPy 2.4 refuses
        subprocess.run([*pip, "numpy<2.4"] if request.param < "3.7" else pip, check=True)
        with contextlib.suppress(OSError):  # another worker was first
            new.rename(site)
        shutil.rmtree(new, ignore_errors=True)
    cache = tmp_path_factory.mktemp("cache")
    yield request.param, {**os.environ, "PYTHONPATH": str(site), "TRITON_CACHE_DIR": str(cache)}
    shutil.rmtree(cache)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_matrix_on_every_other_triton(other_triton, arch):
    """Facts alone: the budgets are of the pinned Triton."""
    version, env = other_triton
    command = [sys.executable, "-m", "tools.static", "--facts", "--subset", "pr" if arch not in PR_ARCHS else "full"]
    result = subprocess.run([*command, "--arch", arch], cwd=ROOT, env=env, capture_output=True, text=True)
    assert f"triton {version}:" in result.stdout, result.stderr
    assert result.returncode == 0, result.stderr


SLICE = "(test_truth or test_exact)"  # values, in every op


@pytest.mark.slow
@pytest.mark.parametrize("op", families())
def test_interpreted_slice_on_every_other_triton(other_triton, op):
    version, env = other_triton
    command = [sys.executable, "-m", "pytest", "tests/test_ops.py", "-k", f"{SLICE} and {op}"]
    result = subprocess.run(command, cwd=ROOT, env={**env, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
