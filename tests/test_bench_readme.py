"""README's numbers are those of the committed results, plots included; and make bench's way of running the same cases."""

import json
import os
import pathlib
import re
import subprocess
import sys

import bench_tools
import pytest

from benchmarks import readme
from gpt_kernels.bench import plots, run

ROOT = pathlib.Path(__file__).parents[1]


def test_readme_is_what_the_committed_results_say():
    block = readme.README.read_text().split(readme.BEGIN)[1].split(readme.END)[0]
    names = re.findall(r"`benchmarks/results/([\w.-]+\.json)`", block)
    files = [ROOT / "benchmarks/results" / name for name in names]
    result, reuse, demo = run.load(files[0]), run.load(files[1]), json.loads(files[2].read_text())
    drawn = [plot for plot in readme.PLOTS if plots.PLOTS[plot](result) is not None]
    renew = " ".join(["python -m benchmarks.readme", *(f"benchmarks/results/{name}" for name in names)])
    assert readme.numbers(result, reuse, demo, tuple(names), drawn) == block, renew
    pictures = re.findall(r"\]\((benchmarks/results/plots/[\w-]+\.svg)\)", block)
    assert [pathlib.Path(p).stem for p in pictures] == drawn and all((ROOT / p).stat().st_size < 60_000 for p in pictures)


def test_numbers_of_a_whole_result():
    demo = json.loads(next((ROOT / "benchmarks/results").glob("*demo*.json")).read_text())
    result, reuse = bench_tools.result(), bench_tools.result()
    for row in reuse["rows"]:
        row |= {} if row["mismatch"] else {"bytes": readme.LARGE, "bound": "copy", "of_limit": 0.875}
    text = readme.numbers(result, reuse, demo, ("a.json", "r.json", "d.json"), ["speed", "length-memory"])
    assert "`python -m gpt_kernels bench all --quick`: how often faster" in text and "in the same run copy 20 GB/s" in text
    assert "| layer_norm 8192x768, fwd | 2.00x" in text and "T^2.00 (to T = 8192)" in text
    assert "![Time of the others over ours](benchmarks/results/plots/speed.svg)" in text
    assert "On tiny inputs a call costs 992 µs to 992 µs; in 0 of 1 such rows" in text and not re.search(" $", text, re.M)
    assert re.search(r"\| layer_norm 8192x768, fwd \| (\d+ %|-) / 88 %", text)
    assert readme.small([]) == ""


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
