"""Launch parameters: a table per op and architecture, and on the user's GPU measured ones where they were asked for.

A launcher asks its Tunable at every launch. The answer is the table's, `default`, without measuring; after `python -m
gpt_kernels tune` it is the candidate that won on this GPU (tuned.py). With GPT_KERNELS_AUTOTUNE=1 the first launch of each
kind on a GPU measures. Inputs are made up, never the user's; random state is left as it was; candidates take turns, with a
cold cache, and the default stays unless another one is clearly faster.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import INTERPRETED, common
from .tuned import Parameters, text, tuned

SWITCH = {"": False, "0": False, "off": False, "false": False, "no": False, "1": True, "on": True, "true": True, "yes": True}
CLEARLY = 0.98  # of the default's time: less than that is noise
ROUNDS = 3

Timer = Callable[[Callable[[], Any]], float]  # milliseconds of a call


def _autotune() -> bool:
    word = os.environ.get("GPT_KERNELS_AUTOTUNE", "").lower()
    if word not in SWITCH:
        raise ValueError(f"GPT_KERNELS_AUTOTUNE: expected 0 or 1, got {word!r}")
    return SWITCH[word]


AUTOTUNE = _autotune()
_hooks: list[Callable[[Tunable, dict[str, Any]], Parameters | None]] = []  # asked before anything else, innermost last
_measuring = threading.Lock()


@contextlib.contextmanager
def _hooked(hook: Callable[[Tunable, dict[str, Any]], Parameters | None]) -> Iterator[None]:
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


def measuring() -> bool:
    """Parameters are being tried or asked for, inside measure(), override() or asked()."""
    return bool(_hooks)


@dataclass(eq=False)
class Tunable:
    """The launch parameters of one kernel, chosen by shape without measuring.

    default(arch, **key): the table's answer. candidates(arch, **key): what is worth measuring on the user's GPU, default
    included. problem(device, **key): a function of no arguments that runs the op once on made-up inputs of that key.
    A key holds what the choice depends on: sizes (bucketed by the launcher where they vary), dtype, options.
    """

    name: str
    default: Callable[..., Parameters]
    candidates: Callable[..., list[Parameters]]
    problem: Callable[..., Callable[[], Any]]
    _chosen: dict[tuple, Parameters] = field(default_factory=dict)

    def __call__(self, arch: str, **key) -> Parameters:
        for hook in reversed(_hooks) if _hooks else ():
            parameters = hook(self, key)
            if parameters is not None:
                return parameters
        at = (arch, *key.values())
        chosen = self._chosen.get(at)
        return self._choose(arch, at, key) if chosen is None else chosen

    def _choose(self, arch: str, at: tuple, key: dict[str, Any]) -> Parameters:
        device = gpu(arch)
        chosen = self.default(arch, **key)
        if device is not None:
            measured = tuned(device, arch).find(self.name, key, self.offers(arch, **key))
            if measured is None and AUTOTUNE:
                measured = self._measure_now(arch, key, device)
                if measured is None:  # not now: the next launch may
                    return chosen
            if measured is not None:
                chosen = measured
        if not common.overridden():
            self._chosen[at] = chosen
        return chosen

    def _measure_now(self, arch: str, key: dict[str, Any], device: torch.device) -> Parameters | None:
        """The winner, measured and remembered; None during a graph's capture and while another measurement runs.

        That one may be waiting for this thread (autograd's), or be what called this launcher.
        """
        if torch.cuda.is_current_stream_capturing() or not _measuring.acquire(blocking=False):
            return None
        what = f"GPT_KERNELS_AUTOTUNE: {self.name} {text(key)}"
        try:
            result = measure(self, arch, key, device, event_timer(device))
        except Exception as error:  # an aid must not stop the program that it is to speed up
            warnings.warn(f"{what}: {error}", RuntimeWarning, stacklevel=4)
            return self.default(arch, **key)
        finally:
            _measuring.release()
        try:
            tuned(device, arch).add(self.name, key, result.best, result.default_ms, result.best_ms)
        except OSError as error:
            warnings.warn(f"{what}: not stored: {error}", RuntimeWarning, stacklevel=4)
        return result.best

    def settle(self, arch: str, parameters: Parameters, **key) -> None:
        """Answer with these for this key from now on."""
        if not common.overridden():
            self._chosen[(arch, *key.values())] = parameters

    def offers(self, arch: str, **key) -> list[Parameters]:
        """The default, then the other candidates, each once."""
        offered = [self.default(arch, **key), *self.candidates(arch, **key)]
        return list({text(parameters): parameters for parameters in offered}.values())

    def forget(self) -> None:
        """Choose anew from now on, after a measurement."""
        self._chosen.clear()

    @contextlib.contextmanager
    def override(self, parameters: Parameters) -> Iterator[None]:
        """Use these parameters inside the block, whatever the key, in every thread."""

        def hook(tunable, key):
            return parameters if tunable is self else None

        with _hooked(hook):
            yield


def gpu(arch: str) -> torch.device | None:
    """The GPU to measure on for launches on `arch`, the current one if it fits; None where none is being launched on."""
    if INTERPRETED or common.overridden() or not torch.cuda.is_available():
        return None
    current = torch.cuda.current_device()
    fitting = [i for i in (current, *range(torch.cuda.device_count())) if common._arch_of(i) == arch]
    return torch.device("cuda", fitting[0]) if fitting else None


@contextlib.contextmanager
def asked() -> Iterator[dict[tuple[str, str], tuple[Tunable, dict[str, Any]]]]:
    """Collect what launchers ask of any Tunable inside the block: (name, key's text) -> (tunable, key)."""
    questions: dict[tuple[str, str], tuple[Tunable, dict[str, Any]]] = {}

    def hook(tunable, key):
        questions.setdefault((tunable.name, text(key)), (tunable, key))

    with _hooked(hook):
        yield questions


# ---- measuring ----


@dataclass(frozen=True)
class Result:
    best: Parameters
    default_ms: float
    best_ms: float
    failed: dict[str, str]  # parameters -> why they cannot be used here


def measure(tunable: Tunable, arch: str, key: dict[str, Any], device: torch.device, timer: Timer) -> Result:
    """Time the candidates of one key in turn. Raises RuntimeError where the default itself cannot be measured."""
    offers = tunable.offers(arch, **key)
    times: dict[int, list[float]] = {i: [] for i in range(len(offers))}
    failed: dict[str, str] = {}
    here = threading.get_ident()
    trial: list[Parameters] = []
    uses = []

    def hook(asking, _):
        if asking is tunable and threading.get_ident() == here:  # other threads launch with what they had
            uses.append(trial[-1])
            return trial[-1]
        return None

    forked = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), torch.no_grad(), _on(device), _hooked(hook):
        trial.append(offers[0])
        call = tunable.problem(device, **key)
        for turn in range(ROUNDS):
            for i in list(times):
                trial[:], before = [offers[i]], len(uses)
                try:
                    if not turn:
                        call()  # compiles
                        if len(uses) == before:
                            raise RuntimeError("its problem() launches nothing that asks it for parameters")
                    times[i].append(timer(call))
                except Exception as error:  # too much shared memory, say: Triton tells when it compiles
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    if i == 0:
                        raise RuntimeError(f"the default cannot be measured: {reason}") from error
                    failed[text(offers[i])] = reason
                    del times[i]
    medians = {i: statistics.median(t) for i, t in times.items()}
    best = min(medians, key=lambda i: medians[i])
    best = best if medians[best] < CLEARLY * medians[0] else 0
    return Result(offers[best], medians[0], medians[best], failed)


def _host(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


SPINNING = 2e-3  # seconds of a call's host time: beyond it a queue may fill, and a call is what its host makes of it
CYCLES = 2e9  # a GPU's clock at most: slower ones spin longer


def event_timer(device: torch.device, warm: bool = False) -> Timer:
    """Median over calls on a cold L2, or each after another one, by CUDA events; about 20 ms of GPU time per round.

    Before each call the GPU spins for twice its host time: launched late, its kernels would wait for Python between the events.
    """
    cache_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    # written before each call: the call finds nothing of its inputs in cache
    flush = torch.empty(max(4 * cache_bytes, 256 << 20), dtype=torch.int8, device=device)

    def milliseconds(call: Callable[[], Any], calls: int, spin: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(calls)]
        for begin, end in events:
            flush.zero_()
            if warm:
                call()
            if spin:
                torch.cuda._sleep(spin)
            begin.record()
            call()
            end.record()
        events[-1][1].synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def timer(call: Callable[[], Any]) -> float:
        host = min(_host(call) for _ in range(2))
        spin = int(2 * host * CYCLES) if host < SPINNING else 0
        once = min(milliseconds(call, 2, spin))
        return statistics.median(milliseconds(call, min(50, max(7, int(20 / max(once, 1e-3)))), spin))

    return timer
