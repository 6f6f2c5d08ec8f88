"""python -m gpt_kernels tune: measure the launch parameters of every kernel on this GPU, and remember the winners."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .. import dispatch
from ..cases import SIZES, Sizes, step
from ..errors import UserError
from ..names import DTYPES as NAMES
from ..table import print_table
from . import INTERPRETED, absence, common
from .slots import launcher
from .tuned import Parameters, Tuned, tuned
from .tuning import Timer, Tunable, asked, event_timer, gpu, measure

DTYPES = {name: getattr(torch, name) for name in NAMES}


def tune(op: str | None, dtype: str | None, sizes: str) -> int:
    """The command. Raises UserError where there is nothing to measure on."""
    if reason := absence():
        raise UserError(reason)
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: the interpreter's times say nothing about a GPU")
    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU, and a CPU's times say nothing about one")
    current = torch.device("cuda", torch.cuda.current_device())
    if reason := common.unserved("attention", common.target(current)):
        raise UserError(f"{torch.cuda.get_device_name(current)}: {reason}")
    arch = common.arch(current)
    device = gpu(arch)
    assert device is not None
    chosen_sizes = SIZES.values() if sizes == "all" else [SIZES[sizes]]
    dtypes = DTYPES.values() if dtype is None else [DTYPES[dtype]]
    jobs = discover(arch, dtypes, chosen_sizes, op)
    store, begin = tuned(device, arch), time.perf_counter()
    rows = run(jobs, arch, device, event_timer(device), store)
    title = f"{torch.cuda.get_device_name(device)}, {arch}"
    print_table(["kernel", "for", "default ms", "best ms", "", "parameters"], rows, title)
    print(f"{len(jobs)} kernels in {time.perf_counter() - begin:.0f} s; kept in {store.path}")
    return 0


def discover(
    arch: str, dtypes: Iterable[torch.dtype], sizes: Iterable[Sizes], op: str | None = None
) -> list[tuple[Tunable, dict[str, Any]]]:
    """Which parameters a training step of these sizes asks for on `arch`: found by recording its launches, without a GPU."""
    with common.recording(arch), asked() as questions:
        for dtype in dtypes:
            for size in sizes:
                for name, args in step(size, dtype, "meta"):
                    if (op is None or name.startswith(op)) and dispatch.kernel_of(name, "triton"):
                        launcher(name)(*args)
    return list(questions.values())


def run(
    jobs: Sequence[tuple[Tunable, dict[str, Any]]], arch: str, device: torch.device, timer: Timer, store: Tuned
) -> list[tuple[str, ...]]:
    """Measure every job and store each winner at once, so that Ctrl-C loses nothing; returns the table's rows."""
    rows: list[tuple[str, ...]] = []
    for tunable, key in _progress(jobs):
        what = ", ".join(f"{name} {str(value).removeprefix('torch.')}" for name, value in key.items())
        try:
            result = measure(tunable, arch, key, device, timer)
        except RuntimeError as error:
            rows.append((tunable.name, what, "-", "-", "-", str(error)))
            continue
        store.add(tunable.name, key, result.best, result.default_ms, result.best_ms)
        tunable.forget()
        ratio = f"{result.default_ms / result.best_ms:.2f}x"
        rows.append((tunable.name, what, f"{result.default_ms:.4g}", f"{result.best_ms:.4g}", ratio, _shown(result.best)))
    return rows


def _shown(parameters: Parameters) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def _progress(jobs: Sequence) -> Iterable:
    try:
        from tqdm import tqdm
    except ImportError:
        return jobs
    return tqdm(jobs, desc="tune", unit="kernel", disable=None)
