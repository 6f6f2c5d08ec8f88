"""One row of the benchmark: a case in one direction, every variant of it on the same inputs.

1. every variant is held against the op in float64, on the very inputs that are timed, and its error stands in the row,
   eager's too. Ours must be right by accuracy.py: else it gets no number and the run ends with 1. Another that is far from
   it gets no number either, and the row says so. What float64 has no room for (TRUTH_BYTES) is held against float32, as the
   row says;
2. each variant's first call, which compiles and tunes, is timed by itself, then the peak extra memory of two calls is taken
   (high-water mark of the process above what it held before; on a GPU that of torch's allocator). A whole model's is taken in a
   process of its own, see run.py: what malloc keeps from the variants before it can be as much as a step needs;
3. the variants are timed in turn, round by round, so that a slow minute of the machine hits all of them: right after a call of
   their own (warm), and with the caches overwritten before each call (cold). The row's seconds are the warm ones on a CPU,
   where a model finds its activations in cache, and the cold ones on a GPU, by CUDA events, as triton.testing.do_bench has it.
The limits are copy bandwidth and the rate of a matrix product in the case's dtype. Both are measured before each case. A slow
minute hits them too, so the one that bounds the row (both, where either may) is sampled again among the row's own rounds,
evenly and LIMIT_SAMPLES times at most, and the row is compared with the median of these samples. Tiny rows, which neither
limit bounds, keep those of their case. Share of the limit is the least time that the bytes and flops of the op's cost function
need at these limits, over the time of ours; above 100 % the data came from cache.

An op's worker holds its heap (memory.hold_heap): else one variant pays now and then for what another has freed, 5 ms for 70 MB
given back to the system, and the next one for getting it again, beside calls of 2 ms. Above 32 MB, what the heap has no room
for is mapped and unmapped at each call, as ever. Whole models run with the allocator as it is: a step after one of the same
variant finds what that one left, after another's it may have to get a gigabyte from the system.

A sample that other work on the machine disturbed is taken again, and a row that stayed disturbed says so (contention.py). On a
GPU the host's time per call stands beside the device's: small calls cost what their host costs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import gpt_kernels

from .. import process
from ..accelerate import SLOTS
from ..accuracy import FAR, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, judge, relative_error
from ..dispatch import ops
from ..memory import hold_heap
from ..triton.tuning import event_timer
from . import contention, peers
from .contention import Samples
from .settings import Settings

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
TINY = 1 << 16  # bytes that must move: below it a call costs what calling costs
SLOW = 0.5  # seconds per call, from which on there are fewer rounds
COLD_ROUNDS = 5
LIMIT_SAMPLES = 9  # among a row's rounds: a copy beyond cache takes longer than most of what is compared with it
NEAR = 3  # within this factor of the limit that bounds, the other may bound when the row is timed: shared machines drift so far
MOST_SAMPLES = 32  # kept of a variant, for bench diff
TRUTH_BYTES = 1 << 30  # of an op's inputs in float64: its results and what it keeps for backward may be ten times as much


@dataclass
class Variant:
    """One way to do it: a call without arguments, and what must be in force around it but is none of its time."""

    call: Callable[[], Any]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    brief: bool = False  # where it is slow, once is enough


@dataclass
class Trial:
    """A case in one direction, ready to be timed."""

    variants: dict[str, Variant]
    bytes: int  # that must move, and flops, of `units` of work
    flops: int
    absent: dict[str, str] = field(default_factory=dict)  # variant -> why it has no numbers
    mismatch: str | None = None  # why ours has none, and the whole row with it
    units: int = 1  # that one call does: its time, bytes and flops are divided by them
    first: dict[str, float] = field(default_factory=dict)  # variant -> seconds of the call that checked it
    errors: dict[str, list[float]] = field(default_factory=dict)  # variant -> of the output and the gradients, relative
    truth: str | None = None  # what the errors are against


@dataclass(eq=False)
class Case:
    """One op on one set of inputs. Inputs that require grad are differentiated in "bwd" and "fwd+bwd"."""

    op: str  # as in gpt_kernels.where(op + "_fwd")
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], Sequence]  # made when it is measured
    eager: Callable  # called with the inputs, returns a tensor
    ours: Callable
    cost: Callable[..., tuple[int, int]]  # (inputs, backward) -> (bytes, flops)
    directions: Sequence[str] = ("fwd", "fwd+bwd")
    # variant -> returns its function of the inputs, or raises peers.Absent or ImportError with the reason
    others: dict[str, Callable[[], Callable]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # for peers
    random: bool = False  # eager draws other numbers: ours is checked against our reference from the same seed
    main: bool = False  # one of those that the README shows
    length: int | None = None  # of the sequence, where lengths are swept over
    naive: bool = False  # our reference beside ours
    opaque: str = ""  # why there is nothing in it for torch.compile
    apart: ClassVar[bool] = False  # its memory is measured here, beside its time

    def __post_init__(self):
        unknown = set(self.directions) - set(DIRECTIONS)
        if unknown:
            raise ValueError(f"Case: unknown direction {unknown.pop()!r}, expected one of {', '.join(DIRECTIONS)}")

    def served(self) -> str:
        return str(gpt_kernels.where(f"{self.op}_fwd")["CUDA" if on_gpu() else "CPU"])

    def trial(self, direction: str, settings: Settings) -> Trial:
        torch.manual_seed(0)  # the same inputs in every run
        inputs = self.inputs()
        with torch.no_grad():
            out = self.eager(*inputs)
        grad_out = torch.randn_like(out) if out.dim() else torch.ones_like(out)
        del out
        held = Judge(self, inputs, direction, grad_out)
        costs = [self.cost(inputs, b) for b in (False, True) if direction in ("fwd+bwd", "bwd" if b else "fwd")]
        moved, flops = (sum(c) for c in zip(*costs, strict=True))

        def variant(function, **more):
            return Variant(closure(function, inputs, direction, grad_out), **more)

        trial = Trial({}, moved, flops, truth=held.against)
        trial.mismatch = held.look("ours", self.ours, trial)
        if trial.mismatch:
            return trial
        trial.errors["reference" if self.random else "eager"] = held.eager_errors
        trial.variants = {"eager": variant(self.eager), "ours": variant(self.ours)}
        if settings.compile and not self.opaque:
            try:
                torch._dynamo.reset()  # or the limit on recompilations makes later cases eager in silence
                compiled = torch.compile(self.eager, dynamic=False)
                # its draws are its own
                if not self.random and (reason := held.look("compile", compiled, trial, FAR)):
                    raise peers.Absent(f"wrong: {reason}")
                trial.variants["compile"] = variant(compiled)
            except Exception as error:
                trial.absent["compile"] = first_line(error)
        elif settings.compile:
            trial.absent["compile"] = self.opaque
        if settings.accelerate and self.op in SLOTS:
            around = functools.partial(gpt_kernels.accelerated, ops=(self.op,))
            try:
                with around():
                    if not self.random and (reason := held.look("accelerate", self.eager, trial)):
                        raise peers.Absent(f"wrong: {reason}")
                    trial.variants["accelerate"] = variant(self.eager, around=around)
            except Exception as error:
                trial.absent["accelerate"] = first_line(error)
        others = self.others | peers.functions(settings.against, self.op, self.options)
        for name, make in others.items():
            try:
                function = make()
                if not self.random and (reason := held.look(name, function, trial, FAR)):
                    raise peers.Absent(f"wrong: {reason}")
                trial.variants[name] = variant(function, brief=True)
            except Exception as error:  # whatever somebody else's code raises, the row says it
                trial.absent[name] = first_line(error)
        for name in dict.fromkeys((*settings.backends, *("reference",) * self.naive)):
            # autograd saves the forward's results for the backward, so both run on that backend
            around = functools.partial(gpt_kernels.use_backend, name, *(op for op in ops() if op.startswith(f"{self.op}_")))
            try:
                if name == "reference" and (reason := too_large(self, inputs, direction)):
                    raise peers.Absent(reason)
                with around():
                    if reason := held.look(name, self.ours, trial, within=None if name == "reference" else 1.0):
                        raise peers.Absent(f"wrong: {reason}")
                    trial.variants[name] = variant(self.ours, around=around, brief=True)
            except Exception as error:
                trial.absent[name] = first_line(error)
        return trial


def grid(settings: Settings, sizes: dict[str, tuple[int, int]]) -> Iterator[tuple[int, int, torch.dtype, bool]]:
    """(rows, columns, dtype, main) of an op over rows. "main" in every dtype, the others in the first; --quick takes "tiny" and
    "main"; "huge" needs --huge. A GPU gets eight times the rows, beyond its cache, where the size is not about being small."""
    for kind, (M, N) in sizes.items():
        if (settings.quick and kind not in ("tiny", "main")) or (kind == "huge" and not settings.huge):
            continue
        scale = 8 if settings.device == "cuda" and kind in ("main", "more") else 1
        for name in settings.dtypes if kind in ("main", "huge") else settings.dtypes[:1]:
            yield M * scale, N, getattr(torch, name), kind == "main"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def too_large(case: Case, inputs: Sequence, direction: str) -> str | None:
    """Why the reference, which keeps every pair of query and key, is not run."""
    if case.op != "attention":
        return None
    B, T, H, _ = inputs[0].shape
    scores = B * H * T * inputs[1].shape[1] * torch.promote_types(case.dtype, torch.float32).itemsize
    needed, free = scores * (8 if direction == "fwd" else 11), free_memory()
    return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free" if free is not None and needed > 0.7 * free else None


def free_memory() -> int | None:
    if on_gpu():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


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


class Judge:
    """Holds a function's results on the inputs to be timed against the op in float64; the truth and eager are computed once."""

    def __init__(self, case: Case, inputs: Sequence, direction: str, grad_out: Tensor):
        self.case, self.inputs, self.direction, self.grad_out = case, inputs, direction, grad_out
        wide = torch.float64 if 8 * sum(x.numel() for x in inputs if is_float(x)) <= TRUTH_BYTES else torch.float32
        self.against = f"the op in {str(wide).removeprefix('torch.')}"
        # who draws other numbers than ours is no measure of it: our reference draws the same from the same seed
        around = gpt_kernels.use_backend("reference") if case.random else contextlib.nullcontext()
        function = case.ours if case.random else case.eager
        with around:
            self.eager = self.results(function)
            given = [x.detach().to(wide).requires_grad_(x.requires_grad) if is_float(x) else x for x in inputs]
            self.truth = [t.double() for t in self.results(function, given, grad_out.to(wide))]
        self.eager_errors = [relative_error(e, t) for e, t in zip(self.eager, self.truth, strict=True)]

    def results(self, function: Callable, inputs: Sequence | None = None, grad_out: Tensor | None = None) -> list[Tensor]:
        torch.manual_seed(0)
        grad_out = self.grad_out if grad_out is None else grad_out
        found: list[Tensor] = []

        def call():
            found.extend(closure(function, self.inputs if inputs is None else inputs, self.direction, grad_out)())

        self.taken = one_call(call)
        return found

    def look(self, name: str, function: Callable, trial: Trial, within: float | None = 1.0) -> str | None:
        """What is wrong with it: that it errs by more than `within` times what accuracy.py allows ours; nothing with None. Its
        errors and the seconds of this call go into the trial."""
        results = self.results(function)
        trial.first[name] = self.taken
        # the parameters of a norm are rows
        factors = [WEIGHT_GRADIENT if x.dim() == 1 else INPUT_GRADIENT for x in self.inputs if is_float(x) and x.requires_grad]
        factors = factors if self.direction == "bwd" else [FORWARD, *factors]
        trial.errors[name] = []
        for i, (a, e, t, factor) in enumerate(zip(results, self.eager, self.truth, factors[: len(results)], strict=True)):
            if a.shape != t.shape:
                return f"output {i} has shape {tuple(a.shape)}, eager's has {tuple(t.shape)}"
            trial.errors[name].append(relative_error(a, t))
            found = judge(a, t, e, factor)
            if found.wrong and within is not None and (within == 1.0 or not found.error <= within * found.allowed):
                return f"output {i}: {found.wrong}"
        return None


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


# ---- measuring ----


def on_gpu() -> bool:
    """Cases are made on torch's default device, which run.py sets."""
    return torch.get_default_device().type == "cuda"


def peak_memory(call: Callable) -> int | None:
    """Bytes by which one call raises the memory in use at most; None where Linux's marks of a process are not there."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    return process.rise(call)


def least_peak(call: Callable) -> int | None:
    """The lesser of two: what malloc has left in pieces only adds to it."""
    return min((m for _ in range(2) if (m := peak_memory(call)) is not None), default=None)


def memory_apart(case: Any, name: str) -> int | None:
    """For a process that does nothing else. case: a models.ModelCase."""
    variant = case.alone(name)
    with variant.around():
        variant.call()  # compiles, and makes what stays from call to call
        return least_peak(variant.call)


def stopwatch(call: Callable, repeats: int = 1) -> float:
    """Seconds per call by the host's clock; on a GPU nothing waits for the device."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def one_call(call: Callable) -> float:
    """Seconds until it is done, on a GPU too."""
    begin = time.perf_counter()
    call()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def interleaved(
    variants: dict[str, Variant],
    seconds: float,
    known: dict[str, float] | None = None,
    beside: dict[str, Callable] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each variant, sample by sample, the variants in turn; tiny calls are repeated within a sample. On a
    CPU a sample comes after an untimed call of the same variant, unless that is brief and slow.

    known: about how long a call of each takes; the slow ones are not called once more to find out.
    beside: limits' calls, sampled at the beginning of LIMIT_SAMPLES of the rounds at most.
    """
    beside = beside or {}
    if on_gpu():
        return interleaved_on_gpu({name: Variant(call) for name, call in beside.items()} | variants, known=known)
    repeats, once, rounds = {}, dict(known or {}), {}
    for name, variant in variants.items():
        if once.get(name, 0.0) < SLOW:
            with variant.around():
                once[name] = min(stopwatch(variant.call) for _ in range(2))
        repeats[name] = max(1, int(2e-4 / once[name]))
    lap = sum(once[name] * repeats[name] for name in variants)
    usual = min(200, max(5 if max(once.values()) > SLOW else 9, int(seconds * len(variants) / lap)))
    for name, variant in variants.items():
        rounds[name] = 1 if variant.brief and once[name] > SLOW else usual
    samples = {name: Samples() for name in (*beside, *variants)}
    stride = -(-usual // LIMIT_SAMPLES)
    # the first rounds touch memory that the system has not handed out before, which costs more than many an op
    unseen = 0 if lap > SLOW else 3
    gc.collect()
    gc.disable()
    try:
        for n in range(-unseen, usual):
            if beside and n >= 0 and n % stride == 0:
                for name, call in beside.items():
                    samples[name].take(functools.partial(stopwatch, call))
            for name, variant in variants.items():
                if n < rounds[name]:
                    again = functools.partial(once_more, variant.call, repeats[name], warm=rounds[name] > 1)
                    with variant.around():
                        if n < 0:
                            again()
                        else:
                            samples[name].take(again)
    finally:
        gc.enable()
    return dict(samples)


def once_more(call: Callable, repeats: int, warm: bool) -> float:
    """A sample on a CPU: seconds per call, after an untimed one if it is to be warm."""
    if warm:
        call()
    return stopwatch(call, repeats)


def interleaved_on_gpu(
    variants: dict[str, Variant], rounds: int = 9, warm: bool = False, known: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """The same by CUDA events: a sample is the median of some calls, each on a cold L2, or right after another one. A call that
    is known to be slow is timed by the clock, once a sample: no cache holds what it needs."""
    slow = {name for name in variants if known and known.get(name, 0.0) > SLOW}
    milliseconds = event_timer(torch.device("cuda", torch.cuda.current_device()), warm=warm)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(5 if slow else rounds):
        for name, variant in variants.items():
            with variant.around():
                samples[name].append(one_call(variant.call) if name in slow else milliseconds(variant.call) * 1e-3)
    return samples


@functools.cache
def cache_bytes() -> int:
    """The last-level cache's size as Linux tells it, else a guess."""
    try:
        text = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, ValueError, KeyError):
        return 64 << 20


def other_temperature(variants: dict[str, Variant], once: dict[str, float]) -> dict[str, float]:
    """Median seconds with cold caches on a CPU, where the samples are warm; on a GPU with a warm L2, where they are cold."""
    quick = {name: v for name, v in variants.items() if once[name] <= SLOW}  # beyond it, no cache holds what a call needs
    if on_gpu():
        return {name: statistics.median(s) for name, s in interleaved_on_gpu(quick, 3, warm=True).items()}
    cold = {name: Samples() for name in quick}
    other = torch.ones(min(2 * cache_bytes(), 1 << 30) // 4) if quick else None
    for _ in range(COLD_ROUNDS):
        for name, variant in quick.items():
            with variant.around():

                def after_others(call=variant.call) -> float:
                    other.add_(1.0)  # type: ignore[union-attr]
                    return stopwatch(call)

                cold[name].take(after_others)
    return {name: statistics.median(s) for name, s in cold.items()}


def host_seconds(call: Callable, about: float) -> float:
    """What a call costs the host, a GPU's queue being empty: few calls, or it fills and the host waits for the device."""
    repeats, taken = max(1, min(20, int(2e-3 / max(about, 1e-6)))), []
    for _ in range(3):
        torch.cuda.synchronize()
        taken.append(stopwatch(call, repeats))
    return min(taken)


class Limits:
    """What the machine can do: "copy", bytes read plus bytes written per second, beyond cache; "gemm", flop per second of a
    square product in dtype. `rates` are those of now; `calls`, each of so much `work`, are there to be sampled again."""

    def __init__(self, dtype: torch.dtype):
        elements, n = (1 << 28, 8192) if on_gpu() else (1 << 25, 1024)
        source, target = torch.ones(elements), torch.empty(elements)
        target.fill_(0)  # page faults are not the copy's
        calls: dict[str, Callable] = {"copy": lambda: target.copy_(source)}
        # a CPU may have no units for a 16-bit dtype: then float32's rate is the limit of ours, too
        for d in {dtype} if on_gpu() else {dtype, torch.float32}:
            a = torch.randn(n, n).to(d)
            calls[f"gemm {d}"] = functools.partial(torch.mm, a, a)
        samples = interleaved({name: Variant(call) for name, call in calls.items()}, 0.05)
        seconds = {name: statistics.median(s) for name, s in samples.items()}
        self.calls = {"copy": calls.pop("copy"), "gemm": calls[min(calls, key=lambda name: seconds[name])]}
        self.work = {"copy": 2 * source.nbytes, "gemm": 2 * n**3}
        self.rates = {"copy": self.work["copy"] / seconds.pop("copy"), "gemm": self.work["gemm"] / min(seconds.values())}


# ---- a row ----


def half_interquartile(samples: Sequence[float]) -> float:
    q = statistics.quantiles(samples, n=4) if len(samples) > 1 else [0.0, 0.0, 0.0]
    return (q[2] - q[0]) / 2


def thinned(samples: Sequence[float]) -> list[float]:
    """At most MOST_SAMPLES of them, evenly over the run."""
    step = max(1.0, len(samples) / MOST_SAMPLES)
    return [float(f"{samples[int(i * step)]:.5g}") for i in range(int(len(samples) / step))]


def floors(trial: Trial, rates: dict[str, float]) -> dict[str, float]:
    """The least seconds for its bytes and its flops."""
    return {"copy": trial.bytes / rates["copy"], "gemm": trial.flops / rates["gemm"]}


def disturbance(samples: dict[str, list[float]], stolen: float) -> dict[str, Any]:
    """What a row says of it: nothing where nothing was."""
    watched = [s for s in samples.values() if isinstance(s, Samples)]
    if not watched:  # a GPU's
        return {}
    worst = 1.0 if stolen > contention.ALLOWED else max(s.share for s in watched)
    facts = {"disturbed": round(worst, 3), "stolen": round(stolen, 2), "repeated": sum(s.repeated for s in watched)}
    return {name: value for name, value in facts.items() if value}


def measure(case: Any, direction: str, limits: Limits, settings: Settings) -> dict[str, Any]:
    """case: a Case or a models.ModelCase."""
    row: dict[str, Any] = {name: getattr(case, name) for name in ("op", "shape", "main", "length")}
    row |= {"dtype": str(case.dtype).removeprefix("torch."), "direction": direction, "served": case.served()}
    trial = case.trial(direction, settings)
    row |= {"mismatch": trial.mismatch, "absent": trial.absent}
    if trial.mismatch:
        return row
    figures: dict[str, dict[str, Any]] = {}
    about: dict[str, float] = {}  # seconds of a call
    for name, variant in list(trial.variants.items()):
        try:
            with variant.around():
                first = one_call(variant.call)
                figures[name] = {"first": trial.first.get(name, first), "memory": None}
                if case.apart:
                    about[name] = one_call(variant.call)
                else:
                    begin = time.perf_counter()
                    figures[name]["memory"] = least_peak(variant.call)
                    about[name] = (time.perf_counter() - begin) / 2
        except Exception as error:  # only ours must work; the row says what became of the others
            if name == "ours":
                raise
            trial.absent[name] = first_line(error)
            del trial.variants[name]
            figures.pop(name, None)
    tiny, least = trial.bytes < TINY, floors(trial, limits.rates)
    beside = {name: limits.calls[name] for name in least if not tiny and NEAR * least[name] >= max(least.values())}
    ticks = contention.ticks()
    samples = interleaved(trial.variants, settings.seconds, about, beside)
    row |= disturbance(samples, contention.stolen(ticks))
    rates = {name: [limits.work[name] / s for s in samples.pop(name)] for name in beside}
    median = {name: statistics.median(s) for name, s in samples.items()}
    other = other_temperature(trial.variants, median)
    kept, measured_too = ("cold", "warm") if on_gpu() else ("warm", "cold")
    row["timed"] = kept
    for name, variant in trial.variants.items():
        per = [s / trial.units for s in samples[name]]
        figures[name] |= {
            "seconds": statistics.median(per),
            "spread": half_interquartile(per),
            measured_too: other[name] / trial.units if name in other else None,
            "samples": thinned(per),
        }
        if on_gpu():
            with variant.around():
                figures[name]["host"] = host_seconds(variant.call, about[name]) / trial.units
        if tiny:
            figures[name]["launch"] = figures[name]["host" if on_gpu() else "seconds"]
    for name, errors in trial.errors.items():
        if name in figures:
            figures[name]["errors"] = errors
    row |= {"truth": trial.truth} if trial.truth else {}
    row |= {"variants": figures, "bytes": trial.bytes, "flops": trial.flops, "tiny": tiny}
    row["limits"] = limits.rates | {name: statistics.median(r) for name, r in rates.items()}
    row["limits_spread"] = {name: half_interquartile(r) for name, r in rates.items()}  # of those sampled beside the variants
    ours, least = figures["ours"]["seconds"], floors(trial, row["limits"])
    row["bound"] = max(least, key=lambda name: least[name])
    row["of_limit"] = least[row["bound"]] / ours
    rivals = [figures[name]["seconds"] for name in ("eager", "compile") if name in figures]
    row["ratio"] = min(rivals) / ours if rivals else None
    return row


def configure(settings: Settings, models: bool = False) -> None:
    """This process measures and does nothing else: ops, or whole models."""
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.donated_buffer = False  # else a compiled forward allows one backward only, and "bwd" repeats it
    torch._inductor.config.compile_threads = 1  # no compiler processes beside the timing
    if settings.reuse:
        gpt_kernels.reuse_memory()
    elif not models:
        hold_heap()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.device != "cpu":  # its mode would cost every call of torch from Python microseconds
        torch.set_default_device(settings.device)
