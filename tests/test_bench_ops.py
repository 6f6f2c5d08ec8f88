"""make bench's way of running the benchmark's cases: under pytest-benchmark."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def bench(*flags):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks/bench_ops.py", "--quick", *flags]
    # inside a worker of pytest-xdist, pytest-benchmark would measure nothing
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_micro_benchmarks(tmp_path):
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "out.json"
    done = bench("-k", "rms_norm and 1x64 and fwd and not bwd", "--backends", "eager,ours,reference", "--dtypes", "float32",
                 "--benchmark-max-time=0.01", "--benchmark-min-rounds=3", f"--benchmark-json={file}")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(file.read_text())["benchmarks"]
    assert {b["group"] for b in benchmarks} == {"rms_norm 1x64 float32 fwd"}
    assert [b["params"]["backend"] for b in benchmarks] == ["eager", "ours", "reference"]
    ours = benchmarks[1]["extra_info"]
    assert ours["served"].startswith("cpu") and ours["GB/s"] > 0 and ours["bytes"] == 512


def test_micro_benchmarks_refuse_an_unknown_backend():
    done = bench("--backends", "vulkan", "--collect-only")
    assert done.returncode == 4 and "--backends: unknown 'vulkan'" in done.stdout + done.stderr
