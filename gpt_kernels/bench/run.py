"""The command: each target measured in a process of its own, one result written, whole or not at all, however the run ends.

A whole model's peak memory is measured when its target is done, each variant in a process of its own, from the same seed: what
malloc keeps of one variant neither adds to the next one's nor serves it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import pathlib
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import arguments, cache, process
from ..errors import UserError, need
from ..process import RunFailed, events
from .result import SCHEMA, dumps
from .settings import GROUPS, OUT, PRODUCTS, TARGETS, Settings

PACKAGES = ("rich", "matplotlib", "numpy", "jinja2", "transformers")


def cases(target: str, settings: Settings) -> Iterator[Any]:
    module, function = TARGETS[target]
    made = getattr(importlib.import_module(module, __package__), function)(settings)
    return itertools.islice(made, settings.cases)


# ---- the worker: one target ----


def worker(job: dict[str, Any], send: Callable[..., None]) -> None:
    """A target's rows, or the memory of one variant of one of its cases."""
    from .measure import Limits, configure, measure, memory_apart

    settings = Settings(**job["settings"])
    configure(settings, models=TARGETS[job["run"]][0] == ".models")
    if "variant" in job:
        case = next(itertools.islice(cases(job["run"], settings), job["case"], None))
        send(memory=memory_apart(case, job["variant"]))
        return
    from .environment import environment

    send(environment=environment())
    for number, case in enumerate(cases(job["run"], settings)):
        limits = Limits(case.dtype)
        for direction in case.directions:
            send(doing=f"{case.op} {case.shape} {str(case.dtype).removeprefix('torch.')} {direction}")
            row = {"target": job["run"]} | measure(case, direction, limits, settings)
            send(row=row, **{"apart": number} if case.apart else {})


# ---- the parent ----


def check(settings: Settings) -> list[str]:
    """Completes the settings; returns the targets. Raises UserError for what cannot be."""
    arguments.check(settings)
    if not settings.dtypes:
        raise UserError("--dtypes: none is left")
    need("bench", *PACKAGES)
    settings.device = arguments.chosen_device(settings.device)
    process.out_folder(settings.out)
    return list(dict.fromkeys(t for name in settings.targets for t in GROUPS.get(name, (name,))))


def command(settings: Settings) -> str:
    """What was typed, without --out: that may name a folder of the machine."""
    return shlex.join(["python", "-m", "gpt_kernels", "bench", *arguments.typed(dataclasses.replace(settings, out=OUT))])


def scrub(text: str) -> str:
    """Without the folders of this machine: reports are there to be shown."""
    folders = {str(pathlib.Path(__file__).resolve().parents[2]): ".", tempfile.gettempdir(): "(tmp)"}
    if (home := cache.home()) is not None:
        folders[str(home)] = "~"
    for folder, name in folders.items():
        text = text.replace(folder, name) if len(folder) > 1 else text
    return text


def bench(settings: Settings) -> int:
    """Everything, from the first row to the report; returns the exit code. Ctrl-C ends it with the rows there are."""
    process.kill_is_ctrl_c()
    typed = command(settings)
    targets = check(settings)
    from . import report

    began = time.monotonic()
    out, partial = pathlib.Path(settings.out), pathlib.Path(settings.out, "bench.partial.json")
    result: dict[str, Any] = {"schema": SCHEMA, "command": typed, "environment": {}, "rows": [], "failed": {}}

    def state(interrupted: bool) -> dict[str, Any]:
        """The result as if it ended now."""
        ended = {"interrupted": interrupted, "seconds": round(time.monotonic() - began, 1)}
        return result | ended | {"limits": medians(result["rows"])}

    def keep() -> None:
        try:
            process.write(partial, dumps(state(True)))
        except OSError as error:  # said now, when there may be time to make room
            print(f"\n{partial}: {error.strerror}", file=sys.stderr, flush=True)

    def work() -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="gpt_kernels-bench-", ignore_cleanup_errors=True) as folder:
                collect(targets, settings, folder, result, keep)
        except KeyboardInterrupt:
            print("\nstopped; the rows there are:", file=sys.stderr, flush=True)
            raise

    def write(interrupted: bool) -> None:
        ended = state(interrupted)
        try:
            written = report.write(ended, out)
            partial.unlink(missing_ok=True)
        finally:  # where the disk is full, this is all there is
            report.show(ended)
        print(written, flush=True)

    if process.reported(work, write, worth=lambda: bool(result["rows"])):
        return 130
    return int(bool(result["failed"]) or any(row["mismatch"] for row in result["rows"]))


def collect(targets: list[str], settings: Settings, folder: str, result: dict[str, Any], keep: Callable[[], None]) -> None:
    """Adds to the result, and calls keep() when a target is done: a machine that dies takes one target with it."""
    say = progress()
    for target in targets:
        job = {"run": target, "settings": dataclasses.asdict(settings)}
        apart: list[tuple[dict, int]] = []  # rows without memory, and the numbers of their cases
        try:
            with contextlib.closing(events(__name__, job, folder)) as stream:
                for event in stream:
                    if "doing" in event:
                        say(event["doing"])
                    elif "row" in event:
                        result["rows"].append(event["row"])
                        apart += [(event["row"], event["apart"])] if "apart" in event else []
                    else:
                        if not result["environment"]:
                            warn_of_others(event["environment"])
                        result["environment"] = result["environment"] or event["environment"]
        except RunFailed as error:
            result["failed"][target] = scrub(str(error))
            print(error, file=sys.stderr, flush=True)
        for row, number in apart:
            for name in (name for name in row.get("variants", {}) if name != PRODUCTS):
                say(f"{row['op']} {row['shape']} {row['dtype']} {row['direction']}, memory of {name}")
                add_memory(row, name, job | {"case": number, "variant": name}, folder)
        if result["rows"]:
            keep()
    say("")


def warn_of_others(environment: dict[str, Any]) -> None:
    """At the start, when there is time to stop it."""
    busy, cores, threads = (environment.get(name) for name in ("processors in use by others", "cores", "threads"))
    if busy and cores and threads and "gpu" not in environment and threads > cores - busy + 0.3:
        print(
            f"other work uses {busy} of {cores} processors, {threads} threads are to be timed: the times will be too long",
            file=sys.stderr,
            flush=True,
        )


def add_memory(row: dict[str, Any], name: str, job: dict[str, Any], folder: str) -> None:
    """A variant's peak memory from a process of its own; where that fails, the row says why there is none."""
    try:
        with contextlib.closing(events(__name__, job, folder)) as stream:
            (row["variants"][name]["memory"],) = (event["memory"] for event in stream)
    except RunFailed as error:
        first, *log = scrub(str(error)).strip().splitlines()
        row["absent"][f"memory of {name}"] = ": ".join([first.removesuffix(":"), *map(str.strip, log[-1:])])


def progress() -> Callable[[str], None]:
    """What is being measured, on standard error: one line that is rewritten on a terminal, lines elsewhere."""
    terminal, counter = sys.stderr.isatty(), itertools.count(1)

    def say(text: str) -> None:
        if terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            print(f"\r\033[K{text[:width]}", end="", file=sys.stderr, flush=True)
        elif text:
            print(f"{next(counter):4} {text}", file=sys.stderr, flush=True)

    return say


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The limits of the run: "copy", and "gemm float32" etc."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if not row["mismatch"]:
            found.setdefault("copy", []).append(row["limits"]["copy"])
            found.setdefault(f"gemm {row['dtype']}", []).append(row["limits"]["gemm"])
    return {name: statistics.median(values) for name, values in found.items()}
