"""The GPU kit: make gpu, or python -m benchmarks.gpu. Not yet executed by us on a GPU.

Runs on a machine with a GPU: one call per op first, then the op tests on the device, the tests of tests/gpu (graph capture,
streams, races, memory), compute-sanitizer where it is installed, what a call costs the host, and every benchmark against eager
and torch.compile; all of it on the Triton kernels and, where they were built, on the CUDA C++ kernels, with both beside PyTorch
in a table. Writes one JSON and one Markdown
report into benchmarks/results/, to be pasted into an issue whatever it says. Exit codes: 0 all passed, 1 something failed,
2 no GPU. `--device cpu` with TRITON_INTERPRET=1 rehearses the kit itself on a CPU, and reports no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

from gpt_kernels import cache, dispatch, triton
from gpt_kernels.bench.environment import ROOT, environment
from gpt_kernels.bench.report import markdown as row_table
from gpt_kernels.bench.run import TARGETS, scrub
from gpt_kernels.names import families
from gpt_kernels.streams import streams

TOOLS = ("memcheck", "racecheck", "synccheck")
DRY = "dry run on a CPU: no figures"
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


# ---- stages: each a function of the device, most also of the backend ----


def backends(device: str) -> list[str]:  # the last serves by default
    return ["triton", *["cuda"] * bool(device == "cuda" and dispatch.cuda_archs())]


def smoke(device: str, backend: str) -> Stage:
    """One call per op, in a process of its own, forward and backward: what fails here would fail everywhere below."""
    name = f"smoke, {backend}"
    done = command([sys.executable, "-m", "benchmarks.gpu", "--smoke", device, backend])
    lines = done.stdout.strip().splitlines()
    summary = lines[-1] if lines else f"ended with {done.returncode}"
    return Stage(name, "failed" if done.returncode else "passed", summary, last_lines(done.stderr) if done.returncode else [])


def run_smoke(device: str, backend: str) -> int:
    """Prints what was called; failures, one line each, on stderr."""
    failed, done = [], set()
    with dispatch.use_backend(backend):
        for name, args in first_calls(backend, device):
            done.add(name)
            try:
                op(name)(*args)
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # each op is asked
                failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    streams = dispatch.cuda_library.gpt_kernels_cuda_streams() if backend == "cuda" and dispatch.cuda_library else None
    bound = f", torch's streams from {pathlib.Path(streams.decode()).name}" if streams else ""
    print("\n".join(failed), file=sys.stderr)
    print(f"{len(done) - len(failed)} of {len(done)} ops{bound}")
    return bool(failed)


def host_cost(device: str, backend: str) -> Stage:
    """Microseconds until a call of a small problem returns, the GPU not waited for: what a model of small layers pays."""
    name = f"host cost, {backend}"
    done = command([sys.executable, "-m", "benchmarks.gpu", "--host", device, backend])
    return Stage(name, "failed" if done.returncode else "passed", done.stdout.strip() or "nothing",
                 last_lines(done.stderr) if done.returncode else [])  # fmt: skip


def run_host_cost(device: str, backend: str) -> int:
    loops, seen = (3, {}) if device == "cpu" else (200, {})
    with torch.no_grad(), dispatch.use_backend(backend):
        for name, args in first_calls(backend, device):
            rounds = []
            for _ in range(6):  # the first compiles
                begin = time.perf_counter()
                for _ in range(loops):
                    op(name)(*args)
                rounds.append((time.perf_counter() - begin) / loops)
                if device == "cuda":
                    torch.cuda.synchronize()
            seen[name] = min(rounds[1:]) * 1e6
    figures = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in seen.items())
    print(DRY if device == "cpu" else f"{figures} us")
    return 0


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


def op_tests(device: str, quick: bool, backend: str) -> Stage:
    """The tests that every backend passes, with every tensor on the device."""
    name = f"op tests, {backend}"
    if device == "cpu":
        return pytest_stage(name, ["tests/test_dropout.py", "-k", "triton and (bad_input or gradient)"])
    files = [f"tests/test_{op}.py" for op in families()]
    chosen = ["-k", f"{backend} and (truth or float64 or bad_input)"] if quick else ["-k", backend]
    return pytest_stage(name, [*files, *chosen], GPT_KERNELS_TEST_DEVICE=device, GPT_KERNELS_TEST_BACKEND=backend)


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
    watched = [sys.executable, "-m", "benchmarks.gpu", "--slice", device, *["--quick"] * quick]
    arguments = [path, "--tool", tool, "--error-exitcode", "9", *watched]
    done = command(arguments, **uncached)
    found = re.findall(r"^=+ *((?:ERROR|RACECHECK) SUMMARY.*)$", done.stdout + done.stderr, re.M)
    summary = found[-1] if found else f"ended with {done.returncode}"
    return Stage(name, "failed" if done.returncode else "passed", summary, last_lines(done.stdout) if done.returncode else [])


def op(name: str) -> Callable:
    return getattr(getattr(torch.ops, dispatch.NAMESPACE), name).default


def calls_of(backend: str, dtype: torch.dtype, device: str) -> Iterator[tuple[str, str, tuple]]:
    """(what, op, arguments): small calls of every op with every kind of argument."""
    sys.path.insert(0, str(ROOT / "tests"))
    from kernel_calls import every_call, with_kernel

    return with_kernel(backend, every_call(dtype, device))


def first_calls(backend: str, device: str) -> Iterator[tuple[str, tuple]]:
    """(op, arguments) once per op, and no call of another kind, each of which Triton would compile."""
    left = {name for name in dispatch.ops() if backend in dispatch._ops[name].kernels}
    for _, name, args in calls_of(backend, torch.bfloat16, device):
        if name in left:
            yield name, args
            left.discard(name)
        if not left:
            return


def run_slice(device: str, quick: bool) -> None:
    """What the sanitizer watches."""
    for backend in backends(device):
        with dispatch.use_backend(backend) if device == "cuda" else contextlib.nullcontext():
            every = (call[1:] for dtype in (torch.float32, torch.bfloat16) for call in calls_of(backend, dtype, device))
            for name, args in first_calls(backend, device) if quick else every:
                op(name)(*args)
    if device == "cuda":
        torch.cuda.synchronize()


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


def stages(device: str, quick: bool, consan: bool) -> list[Callable[[], Stage]]:
    chosen: list[Callable[[], Stage]] = [functools.partial(smoke, device, backend) for backend in backends(device)]
    for backend in backends(device):
        chosen += [functools.partial(test, device, quick, backend) for test in (op_tests, launch_tests)]
        chosen.append(functools.partial(host_cost, device, backend))
    if consan:
        chosen.append(functools.partial(launch_tests, device, True, "triton", TRITON_INSTRUMENTATION_MODE="consan"))
    chosen += [functools.partial(sanitizer, device, tool, quick) for tool in TOOLS]
    targets = TARGETS if device == "cuda" else ("dropout",)
    return chosen + [functools.partial(benchmark, device, target, quick or device == "cpu") for target in targets]


# ---- the report ----


def fingerprint(device: str) -> dict[str, object]:
    with torch.device(device):
        facts = environment()
    facts |= {
        "triton": triton.version(),
        "cuda kernels": dispatch.cuda_archs() or dispatch.cuda_error,
        "interpreted": triton.INTERPRETED,
    }
    return facts


def comparison(rows: list[dict]) -> str:
    """Each shape's milliseconds by backend and the better of eager and torch.compile: from it an op's default is chosen."""
    others = [name for name in dispatch.BACKENDS if any(name in row["variants"] for row in rows)]
    lines = [
        "| op | dtype | direction | default | " + " | ".join(others) + " | PyTorch | fastest |",
        "|---" * (6 + len(others)) + "|",
    ]
    for row in (row for row in rows if not row["mismatch"]):
        seconds = {name: variant["seconds"] for name, variant in row["variants"].items()}
        times = {"default": seconds["ours"]} | {name: seconds[name] for name in others if name in seconds}
        times["PyTorch"] = min(seconds[name] for name in ("eager", "compile") if name in seconds)
        cells = [f"{times[name] * 1e3:.3g}" if name in times else "-" for name in ("default", *others, "PyTorch")]
        what = f"| {row['op']} {row['shape']} | {row['dtype']} | {row['direction']} | "
        lines.append(what + " | ".join(cells) + f" | {min(times, key=times.__getitem__)} |")
    return "\n".join(lines)


def markdown(report: dict) -> str:
    facts, done = report["environment"], report["stages"]
    title = DRY if report["dry_run"] else facts.get("gpu", "GPU")
    lines = [f"# gpt_kernels on {title}", "", f"{report['verdict']}. `python -m benchmarks.gpu {report['arguments']}`", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    lines += ["| stage | | | seconds |", "|---|---|---|---|"]
    lines += [f"| {s['name']} | {s['status']} | {s['summary']} | {s['seconds']:.0f} |" for s in done]
    for s in (s for s in done if s["failures"]):
        lines += ["", f"## {s['name']}", "", "```", *s["failures"], "```"]
    rows = [row for s in done for row in s["rows"]]
    if rows:
        lines += ["", "## Benchmarks", "", "How often faster than the better of eager and `torch.compile`, and our time.", ""]
        lines.append(row_table(rows))
    if any(backend in row["variants"] for row in rows for backend in dispatch.BACKENDS):
        lines += ["", "## Which backend", "", comparison(rows)]
    return "\n".join(lines) + "\n"


def write(report: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """<date>-<gpu>.json and .md"""
    gpu = "dry-run-cpu" if report["dry_run"] else str(report["environment"].get("gpu", "gpu"))
    name = f"{report['date']}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    cache.write_atomically(paths[0], (json.dumps(report, indent=1) + "\n").encode(), mode=0o644)
    cache.write_atomically(paths[1], markdown(report).encode(), mode=0o644)
    return paths


def run(
    device: str, quick: bool, consan: bool, folder: pathlib.Path, chosen: Sequence[Callable[[], Stage]] | None = None
) -> int:
    facts, done = fingerprint(device), []
    for stage in stages(device, quick, consan) if chosen is None else chosen:
        begin = time.perf_counter()
        try:
            result = stage()
        except KeyboardInterrupt:
            done.append(Stage("interrupted", "failed", "the stages above were finished"))
            break
        result.seconds = time.perf_counter() - begin
        done.append(result)
        print(f"{result.status:8}{result.name}: {result.summary} ({result.seconds:.0f} s)", flush=True)
        for line in result.failures:
            print(f"        {line}", flush=True)
    failed = [s.name for s in done if s.status == "failed"]
    report = {
        "kit": "gpt_kernels",
        "dry_run": device == "cpu",
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "arguments": " ".join([f"--device {device}", *["--quick"] * quick, *["--consan"] * consan]),
        "verdict": f"FAILED: {', '.join(failed)}" if failed else DRY if device == "cpu" else "All stages passed",
        "environment": facts,
        "stages": [asdict(s) for s in done],
    }
    print("report:", *write(report, folder))
    return bool(failed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse the kit, no figures")
    parser.add_argument("--quick", action="store_true", help="a slice of each stage")
    parser.add_argument(
        "--consan", action="store_true", help="also the launch tests under Triton's concurrency sanitizer (slow)"
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="for the reports (default: benchmarks/results)")
    few = max(1, min(8, (os.cpu_count() or 1) // 2))
    parser.add_argument("--jobs", type=int, default=few, metavar="N", help="processes for the tests (default: %(default)s)")
    parser.add_argument("--slice", metavar="DEVICE", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", nargs=2, metavar=("DEVICE", "BACKEND"), help=argparse.SUPPRESS)
    parser.add_argument("--host", nargs=2, metavar=("DEVICE", "BACKEND"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        return run_smoke(*args.smoke)
    if args.host:
        return run_host_cost(*args.host)
    jobs[:] = ["-n", str(args.jobs)] if args.jobs > 1 and importlib.util.find_spec("xdist") else []
    if args.slice:
        run_slice(args.slice, args.quick)
        return 0

    def refuse(message: str) -> int:
        print(f"benchmarks.gpu: {message}", file=sys.stderr)
        return 2

    if reason := triton.absence():
        return refuse(reason)
    if args.device == "cuda" and not torch.cuda.is_available():
        return refuse(
            "torch sees no GPU. TRITON_INTERPRET=1 python -m benchmarks.gpu --device cpu rehearses the kit without one"
        )
    if (args.device == "cpu") != triton.INTERPRETED:
        return refuse("TRITON_INTERPRET=1 goes with --device cpu, and only with it")
    folder = args.out or ROOT / "benchmarks" / ("results" if args.device == "cuda" else "out")
    with streams():  # hours of stages do not end with who reads of them
        return run(args.device, args.quick, args.consan, folder)


if __name__ == "__main__":
    sys.exit(main())
