"""Times eager, torch.compile and ours side by side, and prints each row as a share of what this machine can do.

A bench_<op>.py yields `Case`s and calls `run(cases)`. For each case and direction:
1. ours is checked against eager on the very inputs that are timed; a mismatch prints no number and the run exits with 1;
2. each variant's peak extra memory is taken in one call (high-water mark of the process above what it held before; on a
   GPU that of torch's allocator);
3. the variants are timed in turn, round by round, so that a slow minute of the machine hits all of them; medians are shown.
   On a GPU by CUDA events, with a cold L2.
The limits (copy bandwidth, rate of a matrix product: float32 on a CPU, bfloat16 on a GPU) are measured anew before each case.
% is the least time that the bytes and flops of the op's cost function need at these limits, over the time of ours; above
100 % the data came from cache.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the gpt_kernels of this checkout, installed or not

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
import torch._inductor.config  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

import gpt_kernels  # noqa: E402
from gpt_kernels.triton.common import arch  # noqa: E402
from gpt_kernels.triton.tuned import machine  # noqa: E402
from gpt_kernels.triton.tuning import event_timer  # noqa: E402

# largest error of ours over the largest value, beyond what eager itself errs; tests/ hold the kernels to much less
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
torch._functorch.config.donated_buffer = False  # else a compiled forward allows one backward only, and "bwd" repeats it
torch._inductor.config.compile_threads = 1  # no compiler processes beside the timing
VARIANTS = ("eager", "compile", "ours")
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")


@dataclass
class Case:
    """One op on one set of inputs. Inputs that require grad are differentiated in "bwd" and "fwd+bwd"."""

    op: str  # as in gpt_kernels.where(op + "_fwd")
    shape: str
    inputs: Sequence
    eager: Callable  # called with *inputs, returns a tensor
    ours: Callable
    cost: Callable[[bool], tuple[int, int]]  # backward -> (bytes, flops)
    directions: Sequence[str] = ("fwd", "fwd+bwd")
    random: bool = False  # eager draws other numbers: ours is checked against our reference from the same seed
    dtype: torch.dtype = field(init=False)

    def __post_init__(self):
        self.dtype = next(x.dtype for x in self.inputs if isinstance(x, Tensor) and x.is_floating_point())
        unknown = set(self.directions) - set(DIRECTIONS)
        if unknown:
            raise ValueError(f"Case: unknown direction {unknown.pop()!r}, expected one of {', '.join(DIRECTIONS)}")


def arguments(description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and shorter timing")
    parser.add_argument("--first", action="store_true", help="the first case alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", help="ours: this backend's kernels instead of the default's")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", metavar="FILE", help="also write environment, limits and rows to FILE")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return args


# ---- one direction of one variant, as a function without arguments ----


def closure(function: Callable, inputs: Sequence, direction: str, grad_out: Tensor | None) -> Callable[[], list[Tensor]]:
    """Returns the output ("fwd"), the gradients ("bwd", forward done once here) or both ("fwd+bwd")."""
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def forward():
        with torch.no_grad():
            return [function(*inputs)]

    def both():
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, wanted, grad_out)]

    if direction == "fwd":
        return forward
    if direction == "fwd+bwd":
        return both
    out = function(*inputs)
    return lambda: list(torch.autograd.grad(out, wanted, grad_out, retain_graph=True))


def check(case: Case, direction: str, grad_out: Tensor) -> str | None:
    """Why ours is wrong on the inputs to be timed, or None."""

    def results(function, inputs, grad_out):
        torch.manual_seed(0)
        return closure(function, inputs, direction, grad_out)()

    ours = results(case.ours, case.inputs, grad_out)
    if case.random:
        with gpt_kernels.use_backend("reference"):
            eager = truth = results(case.ours, case.inputs, grad_out)
    else:
        eager = results(case.eager, case.inputs, grad_out)
        # in float32 for 16-bit inputs: eager's own 16-bit sums over rows can be far off
        wide = [x.detach().float().requires_grad_(x.requires_grad) if is_16_bit(x) else x for x in case.inputs]
        truth = results(case.eager, wide, grad_out.float() if is_16_bit(grad_out) else grad_out)
    for i, (a, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        if a.shape != t.shape:
            return f"output {i} has shape {tuple(a.shape)}, eager's has {tuple(t.shape)}"
        if t.numel():
            limit = 2 * (e - t).abs().max().item() + TOLERANCE[case.dtype] * t.abs().max().item()
            error = (a - t).abs().max().item()
            if not error <= limit:  # also for NaN
                return f"output {i} is off by {error:.3e}, allowed {limit:.3e}"
    return None


def is_16_bit(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)


# ---- measuring ----


def on_gpu() -> bool:
    """Cases are made on torch's default device, which run() sets."""
    return torch.get_default_device().type == "cuda"


def peak_memory(call: Callable) -> int | None:
    """Bytes by which one call raises the memory in use at most; None where Linux's marks of a process are not there."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed blocks kept by malloc would hide what the call needs
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    line = next(s for s in pathlib.Path("/proc/self/status").read_text().splitlines() if s.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def interleaved(calls: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each variant, sample by sample, the variants in turn; tiny calls are repeated within a sample."""
    if on_gpu():
        return interleaved_on_gpu(calls)

    def sample(call, repeats):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    repeats, total = {}, 0.0
    for name, call in calls.items():
        call()
        once = min(sample(call, 1) for _ in range(2))
        repeats[name] = max(1, int(2e-4 / once))
        total += once * repeats[name]
    rounds = min(200, max(9, int(seconds * len(calls) / total)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        # the first rounds touch memory that the system has not handed out before, which costs more than many an op
        for counted in (False,) * 3 + (True,) * rounds:
            for name, call in calls.items():
                seconds_per_call = sample(call, repeats[name])
                if counted:
                    samples[name].append(seconds_per_call)
    finally:
        gc.enable()
    return samples


def interleaved_on_gpu(calls: dict[str, Callable], rounds: int = 9) -> dict[str, list[float]]:
    """The same by CUDA events: a sample is the median of some calls, each on a cold L2."""
    milliseconds = event_timer(torch.device("cuda", torch.cuda.current_device()))
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(milliseconds(call) * 1e-3)
    return samples


def measure_limits() -> dict[str, float]:
    """copy: bytes read plus bytes written per second, beyond cache; gemm: float32 flop per second, bfloat16 on a GPU."""
    elements, n, dtype = (1 << 28, 8192, torch.bfloat16) if on_gpu() else (1 << 25, 1024, torch.float32)
    source, target, a = torch.ones(elements), torch.empty(elements), torch.randn(n, n, dtype=dtype)
    target.fill_(0)  # page faults are not the copy's
    times = interleaved({"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, a)}, 0.1)
    work = {"copy": 2 * source.nbytes, "gemm": 2 * n**3}
    return {name: work[name] / statistics.median(times[name]) for name in work}


def environment() -> dict[str, object]:
    def commit():
        try:
            git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
            return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(s.split(":", 1)[1].strip() for s in lines if s.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    env = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": gpt_kernels.isa()}
    env |= {"torch": torch.__version__, "python": platform.python_version(), "gpt_kernels": gpt_kernels.__version__}
    if on_gpu():
        device = torch.device("cuda", torch.cuda.current_device())
        env |= {k: v for k, v in machine(device, arch(device)).items() if k in ("gpu", "arch", "driver", "triton")}
    return env | {
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
    }


# ---- a row, a table, a run ----


def measure(case: Case, direction: str, limits: dict[str, float], seconds: float, use_compile: bool) -> dict:
    row: dict = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "direction": direction}
    row["served"] = gpt_kernels.where(f"{case.op}_fwd")["CUDA" if on_gpu() else "CPU"]
    with torch.no_grad():
        out = case.eager(*case.inputs)
    grad_out = torch.randn_like(out) if out.dim() else torch.ones_like(out)
    calls = {name: closure(f, case.inputs, direction, grad_out) for name, f in (("eager", case.eager), ("ours", case.ours))}
    row["mismatch"] = check(case, direction, grad_out)
    if row["mismatch"]:
        return row
    if use_compile:
        torch._dynamo.reset()  # or the limit on recompilations makes later cases eager in silence
        try:
            calls["compile"] = closure(torch.compile(case.eager, dynamic=False), case.inputs, direction, grad_out)
            calls["compile"]()
        except Exception as error:  # whatever the compiler raises, the row says it
            calls.pop("compile", None)
            row["compile_error"] = (str(error).strip() or type(error).__name__).splitlines()[0]
    row["memory"] = {name: peak_memory(call) for name, call in calls.items()}
    samples = interleaved(calls, seconds)
    row["seconds"] = {name: statistics.median(s) for name, s in samples.items()}
    # half the distance between the quartiles
    row["spread"] = {name: (lambda q: (q[2] - q[0]) / 2)(statistics.quantiles(s, n=4)) for name, s in samples.items()}
    costs = [case.cost(backward) for backward in (False, True) if direction in ("fwd+bwd", "bwd" if backward else "fwd")]
    row["bytes"], row["flops"] = (sum(c) for c in zip(*costs, strict=True))
    ours = row["seconds"]["ours"]
    floors = {"copy": row["bytes"] / limits["copy"], "gemm": row["flops"] / limits["gemm"]}
    row["bound"] = max(floors, key=lambda name: floors[name])
    row["of_limit"] = floors[row["bound"]] / ours
    row["ratio"] = min(t for name, t in row["seconds"].items() if name != "ours") / ours
    return row


def cells(row: dict) -> list[str]:
    head = [row["op"], row["shape"], row["dtype"], row["direction"]]
    if row["mismatch"]:
        return [*head, "no numbers:", row["mismatch"], "", "", "", "", row["served"]]

    def ms(name):
        if name not in row["seconds"]:
            return "failed" if "compile_error" in row else "-"
        return f"{row['seconds'][name] * 1e3:.4g} ±{row['spread'][name] / row['seconds'][name]:.0%}"

    ours, memory = row["seconds"]["ours"], row["memory"]
    rate = f"{row['bytes'] / ours / 1e9:.1f} GB/s" if row["bound"] == "copy" else f"{row['flops'] / ours / 1e9:.0f} GFLOP/s"
    peaks = " / ".join("-" if memory.get(v) is None else f"{memory[v] / 2**20:.0f}" for v in VARIANTS)
    return [*head, *map(ms, VARIANTS), f"{row['ratio']:.2f}x", f"{rate} {row['of_limit']:.0%}", peaks, row["served"]]


def show(rows: list[dict], env: dict, limits: dict[str, float]) -> None:
    # wide enough for every column also where there is no terminal
    console = Console(width=None if sys.stdout.isatty() else 190)
    gemm = "bfloat16 gemm" if "gpu" in env else "sgemm"
    bounds = f"limits: copy {limits['copy'] / 1e9:.1f} GB/s, {gemm} {limits['gemm'] / 1e9:.0f} GFLOP/s (medians of the run)"
    table = Table(caption=", ".join(f"{key} {value}" for key, value in env.items()) + "\n" + bounds)
    heads = ("op", "shape", "dtype", "direction", "eager ms", "compile ms", "ours ms", "vs better", "ours, of limit")
    for head in (*heads, "peak MiB eager / compile / ours", "served by"):
        table.add_column(head, justify="right" if "ms" in head or head == "vs better" else "left")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for row in (r for r in rows if "compile_error" in r):
        console.print(f"torch.compile failed, {row['op']} {row['shape']} {row['dtype']}: {row['compile_error']}", markup=False)


def run(cases: Callable[[bool], Iterable[Case]], description: str | None = None) -> None:
    """The main function of a bench_<op>.py: `cases(quick)` yields what to time. Exits with 1 after any mismatch."""
    args = arguments(description)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    status, env, rows, marks = Console(stderr=True), environment(), [], []
    try:
        for case in itertools.islice(cases(args.quick), 1 if args.first else None):
            marks.append(measure_limits())
            for direction in case.directions:
                served = gpt_kernels.use_backend(args.backend) if args.backend else contextlib.nullcontext()
                with served, status.status(f"{case.op} {case.shape} {case.dtype} {direction}"):
                    rows.append(measure(case, direction, marks[-1], 0.2 if args.quick else 1.0, not args.no_compile))
    except KeyboardInterrupt:
        status.print("interrupted: these rows were finished")
    limits = {name: statistics.median(m[name] for m in marks) for name in ("copy", "gemm")} if marks else measure_limits()
    show(rows, env, limits)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"environment": env, "limits": limits, "rows": rows}, indent=1) + "\n")
    if any(row["mismatch"] for row in rows):
        sys.exit(1)
