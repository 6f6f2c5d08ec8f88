"""bench diff A B: is B slower than A, or is it noise?

A row is slower when the times of ours are, and so is their ratio to eager's median in the same run: the machine's drift
between two runs moves both, a regression moves ours alone, and a faster eager is none. Each is a Mann-Whitney test on the
samples of the two runs; the larger p value counts, corrected for the number of rows (Benjamini, Hochberg). The smaller of the
two changes must also be beyond the threshold, and its bootstrapped interval must exclude no change.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import need
from ..table import print_table
from .report import disturbance, duration
from .result import load

MEMORY_STEP = 1 << 20  # bytes; less is what an allocator rounds
IDENTITY = ("cpu", "gpu", "threads", "isa", "torch", "triton", "variables")  # of an environment


@dataclass
class Change:
    """One row in both results: the ratio of medians B / A, its interval, and what is made of it."""

    name: str
    before: float
    after: float
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0
    p: float = 1.0
    eager: float | None = None  # eager's own ratio: what the machine did
    verdict: str = "same"

    @property
    def regression(self) -> bool:
        return self.verdict in ("slower", "wrong", "more memory")


def key(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['shape']} {row['dtype']} {row['direction']}"


def tested(a: Sequence[float], b: Sequence[float], alpha: float) -> tuple[float, float, float, float]:
    """(ratio of medians b / a, its interval, p of a Mann-Whitney test)"""
    import numpy
    from scipy import stats

    def ratio(x, y, axis=-1):
        return numpy.median(y, axis=axis) / numpy.median(x, axis=axis)

    p = float(stats.mannwhitneyu(a, b, alternative="two-sided").pvalue)
    interval = stats.bootstrap(
        (a, b), ratio, n_resamples=2000, confidence_level=1 - alpha, method="percentile", rng=numpy.random.default_rng(0)
    ).confidence_interval
    return float(ratio(a, b)), float(interval.low), float(interval.high), p


def compare(a: dict[str, Any], b: dict[str, Any], threshold: float, alpha: float) -> list[Change]:
    from scipy import stats

    old, new = ({key(row): row for row in result["rows"]} for result in (a, b))
    changes, unsure = [], []
    for name in (name for name in old if name in new):
        rows = old[name], new[name]
        if any(row["mismatch"] for row in rows):
            verdict = "wrong" if new[name]["mismatch"] and not old[name]["mismatch"] else "no numbers"
            changes.append(Change(name, 0.0, 0.0, verdict=verdict))
            continue
        ours = [row["variants"]["ours"] for row in rows]
        eager = [row["variants"].get("eager", {}).get("seconds") for row in rows]
        change = Change(name, ours[0]["seconds"], ours[1]["seconds"], ours[1]["seconds"] / ours[0]["seconds"])
        changes.append(change)
        memory = [v["memory"] for v in ours]
        if None not in memory and memory[1] - memory[0] > max(MEMORY_STEP, threshold * memory[0]):
            change.verdict = "more memory"
        samples = [v.get("samples", []) for v in ours]
        if min(map(len, samples)) < 2:
            change.verdict = "too few samples" if change.verdict == "same" else change.verdict
            continue
        tests = [tested(samples[0], samples[1], alpha)]
        if None not in eager:
            change.eager = eager[1] / eager[0]
            tests.append(tested([s / eager[0] for s in samples[0]], [s / eager[1] for s in samples[1]], alpha))
        # the test that says less has the word: one that says faster beside one that says slower leaves nothing
        change.ratio, change.low, change.high, _ = min(tests, key=lambda t: abs(t[0] - 1))
        change.p = max(t[3] for t in tests) if len({t[0] > 1 for t in tests}) == 1 else 1.0
        unsure.append(change)
    adjusted = stats.false_discovery_control([change.p for change in unsure]) if unsure else []
    for change, p in zip(unsure, adjusted, strict=True):
        change.p = float(p)
        if change.p < alpha and not change.low <= 1 <= change.high:
            if change.ratio > 1 + threshold:
                change.verdict = "slower"
            elif change.ratio < 1 / (1 + threshold) and change.verdict == "same":
                change.verdict = "faster"
    return changes


def diff(a: str, b: str, threshold: float, alpha: float) -> int:
    """The command: prints what changed; 1 for a regression, else 0."""
    need("bench", "scipy", "numpy")
    results = load(a), load(b)
    changes = compare(*results, threshold, alpha)
    for name in IDENTITY:
        values = [result["environment"].get(name) for result in results]
        if values[0] != values[1]:
            print(f"not the same {name}: {values[0]} and {values[1]}")
    for path, result in zip((a, b), results, strict=True):
        if (line := disturbance(result)).startswith("DISTURBED"):
            print(f"{path}: {line}")
    names = [{key(row) for row in result["rows"]} for result in results]
    for path, only in ((a, names[0] - names[1]), (b, names[1] - names[0])):
        if only:
            print(f"only in {path}: {len(only)} rows, {min(only)} the first")
    shown = [change for change in changes if change.verdict not in ("same", "no numbers")]
    if shown:
        header = ["row", "A", "B", "B / A", "interval", "p", "eager B / A", ""]
        rows = [
            (
                c.name,
                duration(c.before),
                duration(c.after),
                f"{c.ratio:.2f}",
                f"{c.low:.2f} to {c.high:.2f}",
                f"{c.p:.1g}",
                "-" if c.eager is None else f"{c.eager:.2f}",
                c.verdict,
            )
            for c in shown
        ]
        print_table(header, rows, right=range(1, len(header)))
    counted = collections.Counter(change.verdict for change in changes)
    print(f"{len(changes)} rows in both: {', '.join(f'{n} {verdict}' for verdict, n in counted.items()) or 'none'}")
    return int(any(change.regression for change in changes))
