"""The plumbing of the GPU kit (tools/gpu.py), on a CPU: stages, report, exit codes."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch

from gpt_kernels import dispatch, library, triton
from tools import gpu, gpu_calls, gpu_report, gpu_stages
from tools.gpu_stages import Stage

needs_triton = pytest.mark.skipif(triton.absence() is not None, reason=str(triton.absence()))


@needs_triton
@pytest.mark.skipif(triton.INTERPRETED, reason="about the other case")
def test_without_a_gpu_it_says_so_and_ends_with_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2 and "torch sees no GPU. TRITON_INTERPRET=1 python" in capsys.readouterr().err
    assert gpu.main(["--device", "cpu"]) == 2 and "TRITON_INTERPRET=1 goes with --device cpu" in capsys.readouterr().err
    monkeypatch.setattr(triton, "absence", lambda: "Triton is not installed")
    assert gpu.main([]) == 2 and "Triton is not installed" in capsys.readouterr().err


TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "first line"
def test_absent(): pytest.skip("no")
@pytest.fixture
def broken(): raise OSError("gone")
def test_error(broken): pass
"""


def test_pytest_stage(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    stage = gpu_stages.pytest_stage("name", [str(tmp_path), "-c", os.devnull, "-p", "no:cacheprovider"])
    assert (stage.status, stage.summary) == ("failed", "1 passed, 2 failed, 1 skipped")
    assert [line.split(": ")[0].rpartition("::")[2] for line in stage.failures] == ["test_bad", "test_error"]
    assert "first line" in stage.failures[0] and "gone" in stage.failures[1]
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_absent(): pytest.skip('no')\n")
    assert gpu_stages.pytest_stage("name", [str(tmp_path), "-c", os.devnull]).status == "skipped"
    (tmp_path / "test_it.py").write_text("def test_good(): pass\n")
    assert gpu_stages.pytest_stage("name", [str(tmp_path), "-c", os.devnull]).status == "passed"
    stage = gpu_stages.pytest_stage("name", ["--no-such-option"])
    assert stage.status == "failed" and "pytest ended with 4" in stage.summary and stage.failures


def test_a_stage_without_end_is_a_failure():
    done = gpu_stages.command([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    assert done.returncode == 124 and "no end after" in done.stderr


@pytest.mark.parametrize("code, status", [(0, "passed"), (9, "failed")])
def test_sanitizer(tmp_path, monkeypatch, code, status):
    """A stand-in that shows what it was asked for."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/sh\necho "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING"\necho "========= ERROR SUMMARY: {code} errors"\nexit {code}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stage = gpu_stages.sanitizer("cuda", "memcheck")
    assert (stage.status, stage.summary) == (status, f"ERROR SUMMARY: {code} errors")
    if code:
        asked = stage.failures[0]
        assert asked.startswith("--tool memcheck --error-exitcode 9") and asked.endswith("-m tools.gpu --slice cuda 1")
        assert not gpu_stages.sanitizer("cuda", "racecheck").failures[0].endswith("1")
        assert "--slice cuda --quick" in gpu_stages.sanitizer("cuda", "racecheck", True).failures[0]


def test_sanitizer_that_is_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_stages.sanitizer("cuda", "memcheck").summary == "compute-sanitizer is not on the PATH"
    assert gpu_stages.sanitizer("cpu", "memcheck").status == "skipped"


@pytest.mark.skipif(triton.INTERPRETED, reason="would interpret every kernel")
def test_slice_runs_every_call():
    assert gpu.main(["--slice", "cpu"]) == 0 and gpu.main(["--slice", "cpu", "--quick"]) == 0  # on the CPU's own kernels


@pytest.mark.skipif(triton.INTERPRETED, reason="asks for the CPU's own kernels")
def test_smoke_and_host_cost(capsys, monkeypatch):
    assert (
        gpu.main(["--smoke", "cpu", "cpu"]) == 0
        and capsys.readouterr().out == f"{len(dispatch.ops())} of {len(dispatch.ops())} ops\n"
    )
    assert gpu.main(["--host", "cpu", "cpu"]) == 0 and "no figures" in capsys.readouterr().out
    real = gpu_calls.op

    def broken(name):
        if name == "gelu_bwd":
            raise RuntimeError("no image\nfor this GPU")
        return real(name)

    monkeypatch.setattr(gpu_calls, "op", broken)
    assert gpu.main(["--smoke", "cpu", "cpu"]) == 1 and "gelu_bwd: RuntimeError: no image\n" in capsys.readouterr().err


@needs_triton
@pytest.mark.skipif(triton.INTERPRETED, reason="asks for the CPU's own kernels")
def test_a_minute_on_a_gpu(capsys, monkeypatch):
    """Its calls, on the CPU; the clocks are CUDA's, and are not asked."""
    from tools import gpu_minute

    monkeypatch.setattr(gpu_minute, "SHAPES", ((1, 2, 8, 16),))
    monkeypatch.setattr(gpu_minute, "ROWS", (4, 32))
    monkeypatch.setattr(gpu_minute, "DEVICE", {"dtype": torch.bfloat16})
    monkeypatch.setattr(gpu_minute, "milliseconds", lambda call, graph=True: (call(), 1e-3)[1])
    monkeypatch.setattr(gpu_minute, "host_microseconds", lambda call: (call(), 5.0)[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X")
    gpu_minute.main(["cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 + 2 + 6 and "host us cpu: layer_norm 5.0, gelu 5.0, attention 5.0" in lines
    # 2 products x 2 x 16 x 8 x 8 x 2 heads / 2 = 4096 flops in 1 us; 4 x 32 x 2 bytes in and out
    assert lines[1].startswith("attention B1 H2 T8 D16 causal torch: fwd 1.0 us 0.004096 TFLOP/s, bwd 1.0 us 0.01024")
    assert "softmax 4x32 cpu: fwd 1.0 us 0.000512 TB/s, bwd 1.0 us 0.000768 TB/s" in lines


ROW = {
    "op": "dropout", "shape": "1x64", "dtype": "float32", "direction": "fwd", "mismatch": None, "ratio": 2.0,
    "variants": {"eager": {"seconds": 2e-3, "spread": 1e-5, "memory": 2**21},
                 "ours": {"seconds": 1e-3, "spread": 1e-5, "memory": 2**20}},
}  # fmt: skip


def test_benchmark(monkeypatch):
    answer = types.SimpleNamespace(rows=[ROW], code=0)

    def command(arguments, **_):
        assert arguments[1:5] == ["-m", "gpt_kernels", "bench", "dropout"]
        if answer.rows is not None:
            with open(os.path.join(arguments[arguments.index("--out") + 1], "bench.json"), "w") as file:
                json.dump({"rows": answer.rows}, file)
        return types.SimpleNamespace(returncode=answer.code, stdout="", stderr="Traceback\nValueError: x")

    monkeypatch.setattr(gpu_stages, "command", command)
    stage = gpu_stages.benchmark("cuda", "dropout", quick=True)
    assert (stage.status, stage.summary, stage.rows) == ("passed", "1 rows", [ROW])
    rehearsed = gpu_stages.benchmark("cpu", "dropout", quick=True)
    assert rehearsed.summary == "1 rows, dry run on a CPU: no figures" and not rehearsed.rows
    answer.rows, answer.code = [ROW | {"mismatch": "output 0 is off"}], 1
    assert gpu_stages.benchmark("cuda", "dropout", False).failures == ["1x64 float32 fwd: output 0 is off"]
    answer.rows = None
    stage = gpu_stages.benchmark("cuda", "dropout", False)
    assert stage.status == "failed" and stage.failures == ["Traceback", "ValueError: x"]


@pytest.mark.parametrize("built, count", [(None, 1), ("sm_80 compute_80", 2)])
def test_stages_of_a_gpu(monkeypatch, built, count):
    """Which stages there are, without running them: sanitizer's tools, every benchmark, ConSan only when asked for; the
    tests once more where the CUDA kernels were built."""
    monkeypatch.setattr(library, "cuda_archs", lambda: built)
    served, benchmarks = gpu_calls.backends("cuda"), len(gpu_stages.TARGETS)
    plain, more = (gpu_stages.stages("cuda", False, consan, served) for consan in (False, True))
    assert len(plain) == 4 * count + len(gpu_stages.TOOLS) + benchmarks and len(more) == len(plain) + 1
    assert len(gpu_stages.stages("cpu", False, False, ["triton"])) == 5 + len(gpu_stages.TOOLS)
    assert len(gpu_stages.stages("cuda", False, True, served, ("op_tests", "benchmark"))) == count + benchmarks
    assert sum(len(gpu_stages.stages("cuda", False, False, served, (kind,))) for kind in gpu_stages.KINDS) == len(plain)


def test_the_backend_under_test_is_told(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_stages, "pytest_stage", lambda name, arguments, **more: asked.append((name, arguments, more)))
    gpu_stages.op_tests("cuda", True, "cuda"), gpu_stages.launch_tests("cuda", True, "cuda")
    (ops, arguments, variables), (launches, _, more) = asked
    assert (ops, launches) == ("op tests, cuda", "launch tests, cuda") and arguments[-1].startswith("cuda and")
    assert variables == {"GPT_KERNELS_TEST_DEVICE": "cuda", "GPT_KERNELS_TEST_BACKEND": "cuda"}
    assert more["GPT_KERNELS_TEST_BACKEND"] == "cuda" and more["GPT_KERNELS_RACE_LOOPS"] == "25"


def test_the_op_tests_are_those_of_the_backend_under_test():
    """A file that is forgotten does not run, and nothing is red."""
    assert {"tests/test_ops.py", "tests/test_magnitudes.py", "tests/test_gelu.py"} < set(gpu_stages.files_of_the_ops())


def test_the_other_backend_is_timed_beside_the_default(monkeypatch):
    asked = []
    failed = types.SimpleNamespace(returncode=1, stderr="")
    monkeypatch.setattr(gpu_stages, "command", lambda arguments, **variables: asked.append(arguments) or failed)
    for built in (None, "sm_80 compute_80"):
        monkeypatch.setattr(library, "cuda_archs", lambda built=built: built)
        gpu_stages.benchmark("cuda", "dropout", True)
    assert "--backends" not in asked[0] and asked[1][-2:] == ["--backends", "triton"]


def test_comparison_of_backends(tmp_path, monkeypatch):
    def row(ours, other, **more):
        seconds = {"eager": 3e-3, "compile": 2e-3, "ours": ours, "triton": other}
        return ROW | {"variants": {k: {"seconds": v, "spread": 0.0, "memory": 0} for k, v in seconds.items()}} | more

    monkeypatch.setattr(gpu_report, "fingerprint", lambda device: {"gpu": "X"})
    rows = [row(1e-3, 1.5e-3), row(9e-3, 9e-3, shape="2x2"), row(1, 1, shape="3x3", mismatch="off")]
    assert gpu.run("cuda", "", tmp_path, [lambda: Stage("benchmark", "passed", "", rows=rows)]) == 0
    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert "| op | dtype | direction | default | triton | PyTorch | fastest |" in text
    assert "| dropout 1x64 | float32 | fwd | 1 | 1.5 | 2 | default |" in text
    assert "| dropout 2x2 | float32 | fwd | 9 | 9 | 2 | PyTorch |" in text and "3x3 | float32 | fwd | 1e" not in text


def test_report(tmp_path, monkeypatch, capsys):
    facts = {"gpu": "NVIDIA Test 9000 / X", "torch": "2"}
    monkeypatch.setattr(gpu_report, "fingerprint", lambda device: facts)
    good = Stage("benchmark dropout", "passed", "1 rows", rows=[ROW])
    bad = Stage("op tests", "failed", "1 passed, 1 failed, 0 skipped", ["a::b: assert 1 == 2"])
    assert gpu.run("cuda", "", tmp_path, [lambda: good]) == 0
    (data,) = tmp_path.glob("*-nvidia-test-9000-x.json")
    report = json.loads(data.read_text())
    assert report["environment"] == facts and report["stages"][0]["rows"] == [ROW] and not report["dry_run"]
    text = data.with_suffix(".md").read_text()
    assert text.startswith("# gpt_kernels on NVIDIA Test 9000 / X\n\nAll stages passed.")
    assert "| dropout 1x64 | fwd | 2.00x (1 ms) |" in text and "2 / - / 1" in text
    assert gpu.run("cuda", "--quick --consan", tmp_path, [lambda: good, lambda: bad]) == 1
    text = data.with_suffix(".md").read_text()
    assert "FAILED: op tests. `python -m tools.gpu --quick --consan`" in text and "a::b: assert 1 == 2" in text
    assert "failed  op tests: 1 passed, 1 failed" in capsys.readouterr().out


def test_an_interrupted_run_still_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "fingerprint", lambda device: {"gpu": "X"})

    def stop():
        raise KeyboardInterrupt

    def after_the_first():
        (data,) = tmp_path.glob("*.json")
        assert json.loads(data.read_text())["verdict"] == "2 stages are not reached"
        stop()

    assert gpu.run("cuda", "", tmp_path, [lambda: Stage("a", "passed", ""), after_the_first, stop]) == 1
    (data,) = tmp_path.glob("*.json")
    assert [s["name"] for s in json.loads(data.read_text())["stages"]] == ["a", "interrupted"]


def test_dry_run_reports_no_figures(tmp_path):
    assert gpu.run("cpu", "", tmp_path, [lambda: Stage("a", "passed", "8 rows")]) == 0
    (text,) = (path.read_text() for path in tmp_path.glob("*-dry-run-cpu.md"))
    assert text.startswith("# gpt_kernels on dry run on a CPU: no figures\n\ndry run on a CPU: no figures.")
    assert torch.__version__ in text and "Benchmarks" not in text


def test_reports_name_no_folder_of_the_machine():
    assert gpu_stages.last_lines(f"x\n{gpu.ROOT}/tests/a.py\n{pathlib.Path.home()}/b") == ["x", "./tests/a.py", "~/b"]


@needs_triton
@pytest.mark.slow
def test_rehearsal(tmp_path):
    """The whole kit on a CPU with the interpreter: every stage that can runs."""
    arguments = [sys.executable, "-m", "tools.gpu", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(arguments, cwd=gpu.ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (data,) = tmp_path.glob("*.json")
    status = {s["name"]: s["status"] for s in json.loads(data.read_text())["stages"]}
    assert {status[s] for s in ("op tests, triton", "launch tests, triton", "benchmark dropout")} == {"passed"}
