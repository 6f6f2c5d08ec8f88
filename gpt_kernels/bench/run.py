"""The command: each target measured in a process of its own, one result written, whole or not at all, however the run ends.

A whole model's peak memory is measured when its target is done, each variant in a process of its own, from the same seed: what
malloc keeps of one variant neither adds to the next one's nor serves it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import cache
from ..cli import FAMILIES, UserError
from ..worker import RunFailed, events, start
from .measure import Settings

TARGETS = {op: (op, "cases") for op in FAMILIES} | {
    "sweep": ("attention", "sweep"),
    "gpt": ("models", "gpt"),
    "decode": ("models", "decode"),
}
GROUPS = {"all": tuple(TARGETS), "ops": FAMILIES}
SCHEMA = 1
LARGEST = 64 << 20  # bytes of a result: a row has some thousand
PACKAGES = ("rich", "matplotlib", "numpy", "jinja2", "transformers")


def need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'gpt-kernels[bench]'")


def cases(target: str, settings: Settings) -> Iterator[Any]:
    module, function = TARGETS[target]
    made = getattr(importlib.import_module(f"{__package__}.{module}"), function)(settings)
    return itertools.islice(made, settings.cases)


# ---- the worker: one target ----


def worker(job_path: str) -> int:
    """Entry point of `bench-worker`: a target's rows, or the memory of one variant of one of its cases."""
    from .measure import Limits, configure, measure, memory_apart

    job, send = start(job_path)
    settings = Settings(**job["settings"])
    configure(settings, models=TARGETS[job["run"]][0] == "models")
    if "variant" in job:
        case = next(itertools.islice(cases(job["run"], settings), job["case"], None))
        send(memory=memory_apart(case, job["variant"]))
        return 0
    from .environment import environment

    send(environment=environment())
    for number, case in enumerate(cases(job["run"], settings)):
        limits = Limits(case.dtype)
        for direction in case.directions:
            send(doing=f"{case.op} {case.shape} {str(case.dtype).removeprefix('torch.')} {direction}")
            row = {"target": job["run"]} | measure(case, direction, limits, settings)
            send(row=row, **{"apart": number} if case.apart else {})
    return 0


# ---- the parent ----


def check(settings: Settings) -> list[str]:
    """Completes the settings; returns the targets. Raises UserError for what cannot be."""
    import torch

    from ..dispatch import BACKENDS
    from .measure import TOLERANCE
    from .peers import PEERS

    def choice(flag: str, given: Any, known: Any) -> None:
        for name in given:
            if name not in known:
                raise UserError(f"{flag}: unknown {name!r}, expected {', '.join(known)}")

    choice("target", settings.targets, (*GROUPS, *TARGETS))
    choice("--against", settings.against, PEERS)
    choice("--backends", settings.backends, BACKENDS)
    choice("--dtypes", settings.dtypes, [str(d).removeprefix("torch.") for d in TOLERANCE if d != torch.float64])
    if not settings.dtypes:
        raise UserError("--dtypes: none is left")
    need(*PACKAGES)
    if settings.device == "auto":
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no GPU here")
    out = pathlib.Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    return list(dict.fromkeys(t for name in settings.targets for t in GROUPS.get(name, (name,))))


def plain(value: Any) -> Any:
    """A flag's value as it is typed."""
    return ",".join(value) if isinstance(value, (list, tuple)) else value


def command(settings: Settings) -> str:
    """What was typed, without --out: that may name a folder of the machine."""
    words = ["python", "-m", "gpt_kernels", "bench", *settings.targets]
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if f.name in ("targets", "out") or plain(value) == plain(default):
            continue
        if isinstance(value, bool):
            words.append(f"--{f.name}" if value else f"--no-{f.name}")
        else:
            words += [f"--{f.name}", str(plain(value))]
    return shlex.join(words)


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends it as cleanly as Ctrl-C
    typed = command(settings)
    targets = check(settings)
    from . import report

    began, status, failure = time.monotonic(), 0, None
    out, partial = pathlib.Path(settings.out), pathlib.Path(settings.out, "bench.partial.json")
    result: dict[str, Any] = {"schema": SCHEMA, "command": typed, "environment": {}, "rows": [], "failed": {}}

    def state() -> dict[str, Any]:
        """The result as if it ended now."""
        ended = {"interrupted": status == 130, "seconds": round(time.monotonic() - began, 1)}
        return result | ended | {"limits": medians(result["rows"])}

    def keep() -> None:
        try:
            write_text(partial, dumps(state() | {"interrupted": True}))
        except OSError as error:  # said now, when there may be time to make room
            print(f"\n{partial}: {error.strerror}", file=sys.stderr, flush=True)

    try:
        with tempfile.TemporaryDirectory(prefix="gpt_kernels-bench-", ignore_cleanup_errors=True) as folder:
            collect(targets, settings, folder, result, keep)
    except KeyboardInterrupt:
        status = 130
        print("\nstopped; the rows there are:", file=sys.stderr, flush=True)
    except Exception as error:
        if not result["rows"]:
            raise
        status, failure = 130, error
    # a second Ctrl-C must not cut the files in half
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = state()
        try:
            written = report.write(result, out)
            partial.unlink(missing_ok=True)
        finally:  # where the disk is full, this is all there is
            report.show(result)
        print(written, flush=True)
    finally:
        signal.signal(signal.SIGINT, previous)
    if failure is not None:
        raise failure
    return status or int(bool(result["failed"]) or any(row["mismatch"] for row in result["rows"]))


def collect(
    targets: list[str], settings: Settings, folder: str, result: dict[str, Any], keep: Callable[[], None]
) -> None:  # fmt: skip
    """Adds to the result, and calls keep() when a target is done: a machine that dies takes one target with it."""
    say = progress()
    for target in targets:
        job = {"run": target, "settings": dataclasses.asdict(settings)}
        apart: list[tuple[dict, int]] = []  # rows without memory, and the numbers of their cases
        try:
            with contextlib.closing(events("bench-worker", job, folder)) as stream:
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
            for name in row.get("variants", {}):
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
            file=sys.stderr, flush=True,
        )  # fmt: skip


def add_memory(row: dict[str, Any], name: str, job: dict[str, Any], folder: str) -> None:
    """A variant's peak memory from a process of its own; where that fails, the row says why there is none."""
    try:
        with contextlib.closing(events("bench-worker", job, folder)) as stream:
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


# ---- results on disk ----


def dumps(result: dict[str, Any]) -> str:
    """JSON with a row per line: readable, and a diff of two says which rows changed."""
    rest = {name: value for name, value in result.items() if name != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in result["rows"])
    return json.dumps(rest, indent=1)[:-2] + ',\n "rows": [\n' + rows + "\n ]\n}\n"


def load(path: str | os.PathLike) -> dict[str, Any]:
    """A result's JSON. Raises UserError for anything else."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{path}: more than {LARGEST >> 20} MiB, not a result of python -m gpt_kernels bench")
        result = json.loads(data)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: no JSON of ours: nested too deeply") from None
    if not isinstance(result, dict) or not {"schema", "rows", "environment", "limits"} <= result.keys():
        raise UserError(f"{path}: not a result of python -m gpt_kernels bench")
    if result["schema"] != SCHEMA:
        raise UserError(f"{path}: its schema is {result['schema']!r:.80}, expected {SCHEMA}")
    try:
        validate(result)
    except ValueError as error:
        raise UserError(f"{path}: not a result of python -m gpt_kernels bench: {error}") from None
    return result


def number(value: Any) -> bool:
    """Finite, and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1e300


def positive(value: Any) -> bool:
    return number(value) and value > 0


def mapping(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def kind(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def or_none(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


TEXT = kind(str)
# what a report reads: fields that must be there, those that may
RESULT = {"command": TEXT, "environment": mapping(kind(str, int, float, type(None))), "rows": kind(list),
          "failed": mapping(TEXT), "interrupted": kind(bool), "seconds": number, "limits": mapping(positive)}  # fmt: skip
ROW = {"target": one_of(*TARGETS), "op": one_of(*FAMILIES, "gpt", "decode"), "shape": TEXT, "dtype": TEXT, "direction": TEXT,
       "main": kind(bool), "length": or_none(lambda v: positive(v) and isinstance(v, int)), "served": TEXT,
       "mismatch": or_none(TEXT), "absent": mapping(TEXT)}  # fmt: skip
MEASURED = {"timed": one_of("warm", "cold"), "variants": mapping(kind(dict)), "bytes": positive, "flops": number,
            "tiny": kind(bool), "limits": mapping(positive), "bound": one_of("copy", "gemm"), "of_limit": positive,
            "ratio": or_none(positive)}  # fmt: skip
VARIANT = {"seconds": positive, "spread": number, "memory": or_none(number),
           "samples": lambda v: isinstance(v, list) and all(map(positive, v))}  # fmt: skip
ROW_MAY = {"disturbed": number, "stolen": number, "repeated": number}
MAY = {"host": positive, "warm": or_none(positive), "cold": or_none(positive), "first": number, "launch": positive}


def validate(result: dict[str, Any]) -> None:
    """Raises ValueError naming the first field that is missing or is not what bench writes."""

    def check(what: Any, where: str, must: dict, may: dict | None = None) -> None:
        if not isinstance(what, dict):
            raise ValueError(f"{where} is {what!r:.80}")
        for name, test in {**must, **(may or {})}.items():
            if name not in what and name in must:
                raise ValueError(f"{where} has no {name}")
            if name in what and not test(what[name]):
                raise ValueError(f"{where}: {name} is {what[name]!r:.80}")

    check(result, "it", RESULT)
    for i, row in enumerate(result["rows"]):
        check(row, f"row {i}", ROW, ROW_MAY)
        if row["mismatch"] is not None:
            row["variants"] = {}
            continue
        check(row, f"row {i}", MEASURED)
        for limits, names in ((row["limits"], ("copy", "gemm")), (result["limits"], ("copy", f"gemm {row['dtype']}"))):
            check(limits, f"the limits of row {i}", dict.fromkeys(names, positive))
        check(row["variants"], f"row {i}", {"ours": kind(dict)})
        for name, figures in row["variants"].items():
            check(figures, f"row {i}, {name}", VARIANT, MAY)


def write_text(path: pathlib.Path, text: str | bytes) -> None:
    cache.write_atomically(path, text if isinstance(text, bytes) else text.encode(errors="replace"), mode=0o644)
