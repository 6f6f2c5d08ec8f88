"""The GPU kit: make gpu, or python -m tools.gpu. Executed by us on one kind of GPU: docs/gpu.md.

Runs on a machine with a GPU: one call per op first, then the op tests on the device, the tests of tests/gpu (graph capture,
streams, races, memory), compute-sanitizer where it is installed, what a call costs the host, and every benchmark against eager
and torch.compile; all of it on the Triton kernels and, where they were built, on the CUDA C++ kernels, with both beside PyTorch
in a table. Writes one JSON and one Markdown report into benchmarks/results/, to be pasted into an issue whatever it says. Exit
codes: 0 all passed, 1 something failed, 2 no GPU. `--device cpu` with TRITON_INTERPRET=1 rehearses the kit itself on a CPU, and
reports no figures.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from gpt_kernels import triton
from gpt_kernels.bench.environment import ROOT
from gpt_kernels.streams import streams

from . import gpu_calls, gpu_report, gpu_stages
from .gpu_calls import DRY, backends
from .gpu_stages import KINDS, Stage, stages


def run(device: str, arguments: str, folder: pathlib.Path, chosen: Sequence[Callable[[], Stage]]) -> int:
    """Each stage's result is in the report as soon as it is known: a lease that ends leaves what was read so far."""
    facts, done, paths = gpu_report.fingerprint(device), [], []
    for stage in chosen:
        begin = time.perf_counter()
        try:
            result = stage()
        except KeyboardInterrupt:
            result = Stage("interrupted", "failed", "the stages above were finished")
        result.seconds = time.perf_counter() - begin
        done.append(result)
        print(f"{result.status:8}{result.name}: {result.summary} ({result.seconds:.0f} s)", flush=True)
        for line in result.failures:
            print(f"        {line}", flush=True)
        failed = [s.name for s in done if s.status == "failed"]
        left = len(chosen) - len(done)
        good = f"{left} stages are not reached" if left else DRY if device == "cpu" else "All stages passed"
        report = {
            "kit": "gpt_kernels",
            "dry_run": device == "cpu",
            "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
            "arguments": arguments,
            "verdict": f"FAILED: {', '.join(failed)}" if failed else good,
            "environment": facts,
            "stages": [asdict(s) for s in done],
        }
        paths = gpu_report.write(report, folder)
        if result.name == "interrupted":
            break
    print("report:", *paths)
    return bool(failed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse the kit, no figures")
    parser.add_argument("--quick", action="store_true", help="a slice of each stage")
    parser.add_argument(
        "--consan", action="store_true", help="also the launch tests under Triton's concurrency sanitizer (slow)"
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="STAGE", help=f"these alone, of {', '.join(KINDS)}")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=("triton", "cuda"),
        metavar="BACKEND",
        help="in smoke, tests and host cost these alone, of triton and cuda (default: all that are here)",
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="for the reports (default: benchmarks/results)")
    few = max(1, min(8, (os.cpu_count() or 1) // 2))
    parser.add_argument("--jobs", type=int, default=few, metavar="N", help="processes for the tests (default: %(default)s)")
    parser.add_argument("--slice", metavar="DEVICE", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", nargs=2, metavar=("DEVICE", "BACKEND"), help=argparse.SUPPRESS)
    parser.add_argument("--host", nargs=2, metavar=("DEVICE", "BACKEND"), help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else [*argv]
    args = parser.parse_args(argv)
    if args.smoke:
        return gpu_calls.run_smoke(*args.smoke)
    if args.host:
        return gpu_calls.run_host_cost(*args.host)
    gpu_stages.jobs[:] = ["-n", str(args.jobs)] if args.jobs > 1 and importlib.util.find_spec("xdist") else []
    if args.slice:
        gpu_calls.run_slice(args.slice, args.quick)
        return 0

    def refuse(message: str) -> int:
        print(f"tools.gpu: {message}", file=sys.stderr)
        return 2

    if reason := triton.absence():
        return refuse(reason)
    if args.device == "cuda" and not torch.cuda.is_available():
        return refuse("torch sees no GPU. TRITON_INTERPRET=1 python -m tools.gpu --device cpu rehearses the kit without one")
    if (args.device == "cpu") != triton.INTERPRETED:
        return refuse("TRITON_INTERPRET=1 goes with --device cpu, and only with it")
    folder = args.out or ROOT / "benchmarks" / ("results" if args.device == "cuda" else "out")
    chosen = stages(args.device, args.quick, args.consan, args.backends or backends(args.device), args.only or KINDS)
    if not chosen:
        return refuse("no stage is left to run")
    with streams():  # hours of stages do not end with who reads of them
        return run(args.device, " ".join(argv), folder, chosen)


if __name__ == "__main__":
    sys.exit(main())
