"""The dispatcher: pushing and popping backends, saying what serves, choosing the instruction set, doing without the library."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import gpt_kernels
from gpt_kernels import dispatch, library, triton
from gpt_kernels.triton import slots

OP = "layer_norm_fwd"
needs_library = pytest.mark.skipif(library.cpu is None, reason="the C++ kernels are not built")


def python(code, *arguments, **environment):
    """Run code in a fresh interpreter; None removes a variable."""
    merged = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, env=merged)


def served():
    return dispatch.where(OP)["CPU"].backend


@pytest.fixture
def counted(monkeypatch):
    """How often the reference ran: what `where` says is compared with what happens."""
    calls = []
    op = dispatch._ops[OP]
    reference = op.reference
    monkeypatch.setattr(op, "reference", lambda *a: (calls.append(1), reference(*a))[1])
    return calls


def run():
    return gpt_kernels.layer_norm(torch.randn(3, 8))


@needs_library
def test_use_backend_pushes_and_restores(counted):
    run()
    assert served() == "cpu" and not counted
    with gpt_kernels.use_backend("reference"):
        run()
        assert served() == "reference" and "use_backend" in dispatch.where(OP)["CPU"].reason and len(counted) == 1
    run()
    assert served() == "cpu" and len(counted) == 1


@needs_library
def test_use_backend_nests(counted):
    with gpt_kernels.use_backend("reference"):
        with gpt_kernels.use_backend("cpu"):
            run()
            assert served() == "cpu" and not counted
        run()
        assert served() == "reference" and len(counted) == 1
        with gpt_kernels.use_backend("reference"):
            run()
            assert len(counted) == 2
    assert served() == "cpu"


@needs_library
def test_use_backend_for_named_ops_only(counted):
    with gpt_kernels.use_backend("reference", "layer_norm_bwd"):
        run()
        assert served() == "cpu" and not counted
        assert dispatch.where("layer_norm_bwd")["CPU"].backend == "reference"


@needs_library
def test_use_backend_restores_after_an_exception():
    with pytest.raises(KeyError), gpt_kernels.use_backend("reference"):
        raise KeyError
    assert served() == "cpu" and not dispatch._pushed


@needs_library
def test_both_backends_agree():
    x, w, b = torch.randn(5, 33), torch.randn(33), torch.randn(33)
    ours = gpt_kernels.layer_norm(x, w, b)
    with gpt_kernels.use_backend("reference"):
        torch.testing.assert_close(gpt_kernels.layer_norm(x, w, b), ours)


@pytest.mark.parametrize(
    "arguments, words", [(("tpu",), "'tpu'.*reference, cpu"), (("reference", "convolution"), "'convolution'.*layer_norm_fwd")]
)
def test_use_backend_refuses_unknown_names(arguments, words):
    with pytest.raises(ValueError, match=words), gpt_kernels.use_backend(*arguments):
        pass
    assert not dispatch._pushed


def test_use_backend_without_a_kernel_raises_and_pushes_nothing(monkeypatch):
    monkeypatch.setattr(dispatch._ops["layer_norm_bwd"], "kernels", {})
    before = dispatch.where(OP)
    with pytest.raises(RuntimeError, match="'cpu' has no kernel for layer_norm_bwd"), gpt_kernels.use_backend("cpu"):
        pass
    assert dispatch.where(OP) == before


def test_where_names_a_reason_for_each_device():
    for op in dispatch.ops():
        answer = gpt_kernels.where(op)
        assert set(answer) == {"CPU", "CUDA"}
        assert all(served.reason for served in answer.values())
        if "cuda" in dispatch._ops[op].kernels:
            assert str(answer["CUDA"]) == f"cuda (compiled kernel, {library.cuda_archs()}; float64: none)"
        elif "triton" not in dispatch._ops[op].kernels:
            assert str(answer["CUDA"]) == f"reference ({triton.absence() or 'no kernel was registered'})"
        elif triton.INTERPRETED:
            assert str(answer["CUDA"]) == "reference (TRITON_INTERPRET is set: the Triton kernels serve CPU tensors)"
        else:
            assert str(answer["CUDA"]) == "triton (compiled at its first call for each kind of argument; float64: reference)"
    with pytest.raises(ValueError, match="unknown op 'nothing'"):
        gpt_kernels.where("nothing")


@needs_library
def test_every_op_has_a_kernel():
    assert [op for op in dispatch.ops() if "cpu" not in dispatch._ops[op].kernels] == []


@needs_library
def test_use_isa_restores_and_refuses():
    best = library.best_isa()
    before = gpt_kernels.isa()
    with gpt_kernels.use_isa("base"):
        assert gpt_kernels.isa() == "base" and "base" in dispatch.where(OP)["CPU"].reason
        with gpt_kernels.use_isa(best):
            assert gpt_kernels.isa() == best
        assert gpt_kernels.isa() == "base"
    with pytest.raises(KeyError), gpt_kernels.use_isa("base"):
        raise KeyError
    assert gpt_kernels.isa() == before
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'.*base, avx2, avx512"):
        gpt_kernels.set_isa("sse9")
    for name in library.ISA_LEVELS[library.ISA_LEVELS.index(best) + 1 :]:
        with pytest.raises(ValueError, match=f"this CPU has no {name}, its best is {best}"):
            gpt_kernels.set_isa(name)
    assert gpt_kernels.isa() == before


@needs_library
def test_environment_forces_the_instruction_set():
    show = "import gpt_kernels; print(gpt_kernels.isa())"
    assert python(show, GPT_KERNELS_ISA="base").stdout.strip() == "base"
    assert (
        python(show, GPT_KERNELS_ISA="").stdout.strip()
        == python(show, GPT_KERNELS_ISA=None).stdout.strip()
        == library.best_isa()
    )
    bad = python(show, GPT_KERNELS_ISA="sse9")
    assert bad.returncode != 0 and "unknown instruction set 'sse9'" in bad.stderr


ON_CPU = ["reference", *(name for name, (key, _) in dispatch._ops[OP].kernels.items() if key == "CPU")]


@needs_library
@pytest.mark.parametrize("backend", ON_CPU)
def test_compiled_code_follows_the_slots(backend, counted):
    """A compiled function holds the op, not the kernel: what is pushed later serves it."""
    compiled = torch.compile(lambda x: gpt_kernels.layer_norm(x) + 1, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 8)
    expected = run() is not None and torch.nn.functional.layer_norm(x, (8,)) + 1
    torch.testing.assert_close(compiled(x), expected)
    counted.clear()
    with gpt_kernels.use_backend(backend, OP):
        torch.testing.assert_close(compiled(x), expected)
    assert len(counted) == (backend == "reference")


WITHOUT_LIBRARY = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **k: self.name != "_cpu.so" and exists(self, **k)
import torch, gpt_kernels
from gpt_kernels import dispatch
x = torch.randn(3, 8, requires_grad=True)
y = gpt_kernels.layer_norm(x)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))
y.sum().backward()
print(gpt_kernels.where("layer_norm_fwd")["CPU"], "|", gpt_kernels.isa(), "|", gpt_kernels.info()["library"]["problem"])
for call in (lambda: gpt_kernels.use_backend("cpu").__enter__(), lambda: gpt_kernels.set_isa("base")):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


def test_without_the_library_the_reference_serves_and_where_says_why():
    done = python(WITHOUT_LIBRARY, GPT_KERNELS_ISA="base")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        lines[0].startswith("reference (the C++ kernels were not built")
        and "| None | the C++ kernels were not built" in lines[0]
    )
    assert "backend 'cpu' has no kernel" in lines[1] and "not built" in lines[1]
    assert lines[2].startswith("set_isa: the C++ kernels were not built")


def test_a_library_that_does_not_load_is_reported(tmp_path):
    """A damaged or foreign file beside the package: the import works, info says what is wrong."""
    package = tmp_path / "gpt_kernels"
    shutil.copytree(os.path.dirname(gpt_kernels.__file__), package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_cpu.so").write_bytes(b"not a library")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import gpt_kernels; print(gpt_kernels.where('layer_norm_fwd')['CPU'])"
    done = python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference (the C++ kernels could not be loaded under torch")


def test_a_registered_kernel_is_run_and_named():
    before = list(dispatch.BACKENDS)
    x = torch.randn(3, 8)
    try:

        @dispatch.kernel("layer_norm_fwd", "doubled", "CPU")
        def doubled(x, weight, bias, eps):
            return 2 * x, x.new_zeros(3), x.new_ones(3)

        with gpt_kernels.use_backend("doubled", "layer_norm_fwd"):
            assert torch.equal(gpt_kernels.layer_norm(x), 2 * x)
            assert str(gpt_kernels.where("layer_norm_fwd")["CPU"]) == "doubled (pushed by use_backend)"
        assert not torch.equal(gpt_kernels.layer_norm(x), 2 * x)
        with pytest.raises(RuntimeError, match="'doubled' has no kernel for rms_norm_fwd: no kernel was registered"):
            with gpt_kernels.use_backend("doubled", "rms_norm_fwd"):
                pass
    finally:
        dispatch._ops["layer_norm_fwd"].kernels.pop("doubled", None)
        dispatch.BACKENDS[:] = before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("no_such_op", "mine", "CPU"), "unknown op 'no_such_op'"),
        (("layer_norm_fwd", "mine", "TPU"), "unknown device key 'TPU'"),
        (("layer_norm_fwd", "cpu", "CPU"), "backend 'cpu' is built in"),
    ],
)
def test_kernel_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        dispatch.kernel(*arguments)


# ---- the Triton backend's place in the slots ----


needs_triton = pytest.mark.skipif(triton.absence() is not None, reason=str(triton.absence()))
on_gpu_slots = pytest.mark.skipif(triton.INTERPRETED, reason="TRITON_INTERPRET leaves the CUDA slots alone")


@needs_triton
def test_every_op_has_a_triton_launcher():
    assert set(slots.OPS) == set(dispatch.ops())
    assert [op for op in dispatch.ops() if "triton" not in dispatch._ops[op].kernels] == []


def filled(op):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"gpt_kernels::{op}", "CUDA")


@needs_triton
@on_gpu_slots
def test_triton_fills_the_cuda_slots():
    for op in dispatch.ops():
        assert filled(op) == ("triton" in dispatch._ops[op].kernels), op
    assert filled("dropout_fwd") and dispatch.where("dropout_fwd")["CUDA"].backend == "triton"


@needs_triton
@on_gpu_slots
def test_use_backend_triton_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hint = "'triton' needs a GPU and torch sees none; TRITON_INTERPRET=1 in the environment runs its kernels on CPU tensors"
    with pytest.raises(RuntimeError, match=hint), gpt_kernels.use_backend("triton", "dropout_fwd"):
        pass
    assert not dispatch._pushed


SHOW = """
import sys, torch, gpt_kernels
from gpt_kernels import dispatch
print(torch._C._dispatch_has_kernel_for_dispatch_key("gpt_kernels::dropout_fwd", "CUDA"), "triton" in sys.modules)
print(gpt_kernels.where("dropout_fwd")["CUDA"])
print(gpt_kernels.info()["triton"]["problem"])
print("triton" in sys.modules)
try:
    gpt_kernels.use_backend("triton", "dropout_fwd").__enter__()
except RuntimeError as error:
    print(error)
"""


def shown(code, **environment):
    done = python(code, TRITON_INTERPRET=None, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("version", ["3.5.9", "2.3.1", "3.10.0", "4.0.0+git1"])
def test_a_triton_outside_the_range_is_refused_unimported(tmp_path, version):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"__version__ = '{version}'\nraise SystemExit('imported')\n")
    reason = f"Triton {version} is outside the supported range 3.6 to 3.9"
    assert shown(SHOW, PYTHONPATH=str(tmp_path)) == [
        "False False",
        f"reference ({reason})",
        reason,
        "False",
        f"use_backend: backend 'triton' has no kernel for dropout_fwd: {reason}",
    ]


@pytest.mark.parametrize("version", ["3.6.0", "3.9.7", "3.8.0+git1"])
def test_a_triton_inside_the_range_is_taken_unimported(tmp_path, version):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f'__version__ = "{version}"\nraise SystemExit("imported")\n')
    lines = shown(SHOW, PYTHONPATH=str(tmp_path))
    assert lines[0] == "True False" and lines[1].startswith("triton (") and lines[2:4] == ["None", "False"]


def test_without_triton_the_reference_serves_and_says_why():
    lines = shown("import sys; sys.modules['triton'] = None\n" + SHOW)
    reason = "Triton is not installed"
    assert lines[:3] == ["False True", f"reference ({reason})", reason]
    assert lines[4].endswith(f"has no kernel for dropout_fwd: {reason}")


LAZY = """
import sys, torch, gpt_kernels
x = torch.ones(2, 8)
with gpt_kernels.use_backend("triton", "dropout_fwd"):
    before = "triton" in sys.modules
    gpt_kernels.dropout(x, 0.5)
print(before, "triton" in sys.modules, gpt_kernels.where("dropout_fwd")["CUDA"])
"""


@needs_triton
def test_triton_is_imported_at_the_first_call():
    done = python(LAZY, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False True reference (TRITON_INTERPRET is set")
