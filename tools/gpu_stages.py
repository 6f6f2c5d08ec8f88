"""The stages of the GPU kit (tools/gpu.py): each is a function of the device, most also of the backend."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gpt_kernels.bench.environment import ROOT
from gpt_kernels.bench.run import TARGETS, scrub

from .gpu_calls import DRY, backends

TOOLS = ("memcheck", "racecheck", "synccheck")
HOURS = 3600
jobs: list[str] = []  # pytest's options for several processes


@dataclass
class Stage:
    name: str
    status: str  # passed, failed or skipped
    summary: str
    failures: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)  # of benchmarks: as python -m gpt_kernels bench writes them
    seconds: float = 0.0


def command(arguments: Sequence[str], timeout: float = 2 * HOURS, **variables: str) -> subprocess.CompletedProcess:
    """Runs in the repository's root; output is captured, a timeout is exit code 124."""
    try:
        return subprocess.run(
            [*arguments],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, 124, "", f"no end after {timeout:.0f} s")


def smoke(device: str, backend: str) -> Stage:
    """One call per op, in a process of its own, forward and backward: what fails here would fail everywhere below."""
    name = f"smoke, {backend}"
    done = command([sys.executable, "-m", "tools.gpu", "--smoke", device, backend])
    lines = done.stdout.strip().splitlines()
    summary = lines[-1] if lines else f"ended with {done.returncode}"
    return Stage(name, "failed" if done.returncode else "passed", summary, last_lines(done.stderr) if done.returncode else [])


def host_cost(device: str, backend: str) -> Stage:
    """Microseconds until a call of a small problem returns, the GPU not waited for: what a model of small layers pays."""
    name = f"host cost, {backend}"
    done = command([sys.executable, "-m", "tools.gpu", "--host", device, backend])
    return Stage(
        name,
        "failed" if done.returncode else "passed",
        done.stdout.strip() or "nothing",
        last_lines(done.stderr) if done.returncode else [],
    )


def pytest_stage(name: str, arguments: Sequence[str], **variables: str) -> Stage:
    """A run of pytest, read from its XML: counts, and one line for each failure."""
    with tempfile.TemporaryDirectory() as folder:
        xml = pathlib.Path(folder) / "junit.xml"
        done = command([sys.executable, "-m", "pytest", "-q", f"--junitxml={xml}", *jobs, *arguments], **variables)
        if not xml.exists():
            return Stage(name, "failed", f"pytest ended with {done.returncode}", last_lines(done.stderr or done.stdout))
        cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    failures = [
        f"{case.get('classname')}::{case.get('name')}: {((child.get('message') or '').splitlines() or ['?'])[0]}"
        for case in cases
        for child in case
        if child.tag in ("failure", "error")
    ]
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    summary = f"{len(cases) - skipped - len(failures)} passed, {len(failures)} failed, {skipped} skipped"
    bad = failures or done.returncode not in (0, 5)
    return Stage(name, "failed" if bad else "passed" if len(cases) > skipped else "skipped", summary, failures)


def files_of_the_ops() -> list[str]:
    sys.path.insert(0, str(ROOT / "tests"))
    from grids import on_the_backend_under_test

    return [f"tests/{file.name}" for file in sorted((ROOT / "tests").glob("test_*.py")) if on_the_backend_under_test(file)]


def op_tests(device: str, quick: bool, backend: str) -> Stage:
    """The tests that every backend passes, with every tensor on the device."""
    name = f"op tests, {backend}"
    if device == "cpu":
        return pytest_stage(name, ["tests/test_dropout.py", "-k", "triton and (bad_input or gradient)"])
    chosen = ["-k", f"{backend} and (truth or float64 or bad_input)"] if quick else ["-k", backend]
    return pytest_stage(name, [*files_of_the_ops(), *chosen], GPT_KERNELS_TEST_DEVICE=device, GPT_KERNELS_TEST_BACKEND=backend)


def launch_tests(device: str, quick: bool, backend: str, **variables: str) -> Stage:
    """Graph capture and replay, no synchronisation, streams, devices, the same bits 250 times, memory given back."""
    loops = "2" if device == "cpu" else "25" if quick else "250"
    rehearse = {"GPT_KERNELS_REHEARSE": "1"} if device == "cpu" else {}
    variables |= {"GPT_KERNELS_RACE_LOOPS": loops, "GPT_KERNELS_TEST_BACKEND": backend}
    return pytest_stage(f"launch tests, {backend}", ["tests/gpu"], **rehearse, **variables)


def sanitizer(device: str, tool: str, quick: bool = False) -> Stage:
    """compute-sanitizer over every op with every kind of argument, small; quick: one call per op."""
    name, path = f"compute-sanitizer {tool}", shutil.which("compute-sanitizer")
    if device == "cpu":
        return Stage(name, "skipped", "no GPU")
    if path is None:
        return Stage(name, "skipped", "compute-sanitizer is not on the PATH")
    # without torch's caching allocator a tensor's end is an allocation's end
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    watched = [sys.executable, "-m", "tools.gpu", "--slice", device, *["--quick"] * quick]
    arguments = [path, "--tool", tool, "--error-exitcode", "9", *watched]
    done = command(arguments, **uncached)
    found = re.findall(r"^=+ *((?:ERROR|RACECHECK) SUMMARY.*)$", done.stdout + done.stderr, re.M)
    summary = found[-1] if found else f"ended with {done.returncode}"
    return Stage(name, "failed" if done.returncode else "passed", summary, last_lines(done.stdout) if done.returncode else [])


def benchmark(device: str, target: str, quick: bool) -> Stage:
    """python -m gpt_kernels bench TARGET, with every backend that does not serve by default beside the one that does."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quick"] * quick + ["--cases", "1", "--no-compile"] * (device == "cpu")
        others = ",".join(backends(device)[:-1])
        flags += ["--backends", others] if others else []
        arguments = ["-m", "gpt_kernels", "bench", target, "--device", device, "--out", folder, *flags]
        done = command([sys.executable, *arguments])
        path = pathlib.Path(folder, "bench.json")
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
    wrong = [f"{r['shape']} {r['dtype']} {r['direction']}: {r['mismatch']}" for r in rows if r["mismatch"]]
    failures = wrong or (last_lines(done.stderr) if done.returncode else [])
    summary = f"{len(rows)} rows" if device != "cpu" else f"{len(rows)} rows, {DRY}"
    rows = [] if device == "cpu" else rows
    return Stage(
        f"benchmark {target}",
        "failed" if done.returncode or not rows and device != "cpu" else "passed",
        summary,
        failures,
        rows,
    )


def last_lines(text: str, count: int = 12) -> list[str]:
    return [scrub(line) for line in text.strip().splitlines()[-count:]]


KINDS = ("smoke", "op_tests", "launch_tests", "host_cost", "sanitizer", "benchmark")


def stages(
    device: str, quick: bool, consan: bool, served: Sequence[str], kinds: Sequence[str] = KINDS
) -> list[Callable[[], Stage]]:
    """Those of these kinds; on each of these backends, but for the sanitizer and the benchmarks, which have them all."""
    chosen: list[functools.partial[Stage]] = [functools.partial(smoke, device, backend) for backend in served]
    for backend in served:
        chosen += [functools.partial(test, device, quick, backend) for test in (op_tests, launch_tests)]
        chosen.append(functools.partial(host_cost, device, backend))
    if consan:
        chosen.append(functools.partial(launch_tests, device, True, "triton", TRITON_INSTRUMENTATION_MODE="consan"))
    chosen += [functools.partial(sanitizer, device, tool, quick) for tool in TOOLS]
    targets = TARGETS if device == "cuda" else ("dropout",)
    chosen += [functools.partial(benchmark, device, target, quick or device == "cpu") for target in targets]
    return [stage for stage in chosen if stage.func.__name__ in kinds]
