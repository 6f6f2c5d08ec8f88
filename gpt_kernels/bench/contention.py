"""Did other work on the machine keep a sample waiting? Its time does not tell: 24 ms ±0 % is also what half a processor gives.

Linux counts for each thread how long it stood ready on a run queue without a processor (the second field of
/proc/self/task/*/schedstat): some microseconds on a quiet machine, else what CPU time lacks to wall time times threads. A call
that joins its threads is late by the longest wait of one. A sample with a wait beyond ALLOWED of it is taken again, at most
AGAIN times, and in all about as often as there are samples; then the least disturbed one stays, and counts as disturbed. What
a hypervisor takes is no wait of ours: /proc/stat tells it, in ticks, for a whole row.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

ALLOWED = 0.05  # of a sample
WAKING = 1e-4  # seconds: less is what waking the threads of a pool can take
AGAIN = 2
STAYED = 0.25  # share of disturbed samples from which on a row's median is not to be trusted


def waits() -> dict[str, int]:
    """Nanoseconds of waiting by thread; {} where the system does not count them."""
    found = {}
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError, ValueError, IndexError):  # a thread may end meanwhile
                with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
                    found[thread] = int(file.read().split()[1])
    return found


def longest(before: dict[str, int], after: dict[str, int]) -> float:
    """Seconds that some thread waited between the two."""
    return max((ns - before.get(thread, 0) for thread, ns in after.items()), default=0) * 1e-9


class Samples(list):
    """Seconds per call; how many of them stayed disturbed, and how many were taken again."""

    def __init__(self, values=()):
        super().__init__(values)
        self.disturbed = self.repeated = 0

    def take(self, call: Callable[[], float]) -> None:
        """Adds what call(), a stopwatch around the work, says."""
        best = (float("inf"), 0.0)
        for attempt in range(1 + AGAIN):
            self.repeated += attempt > 0
            before, begin = waits(), time.perf_counter()
            seconds = call()
            wall = time.perf_counter() - begin
            waited = longest(before, waits())
            best = min(best, (waited / max(wall, 1e-9) if waited > WAKING else 0.0, seconds))
            if best[0] <= ALLOWED or self.repeated >= len(self) + AGAIN:
                break
        self.append(best[1])
        self.disturbed += best[0] > ALLOWED

    @property
    def share(self) -> float:
        """Of them, that stayed disturbed."""
        return self.disturbed / max(1, len(self))


def ticks() -> list[int]:
    """Of all processors since the start: user, nice, system, idle, waiting for a disk, two kinds of interrupts, stolen."""
    try:
        with open("/proc/stat") as file:
            return [int(field) for field in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return []


def stolen(before: list[int]) -> float:
    """The share of all processors that a hypervisor took since these ticks()."""
    passed = [b - a for a, b in zip(before, ticks(), strict=False)]
    return passed[7] / sum(passed) if len(passed) == 8 and sum(passed) > 0 else 0.0


def others(seconds: float = 0.2) -> float | None:
    """Processors in use by others, while this process sleeps; None where the system does not tell."""
    before = ticks()
    time.sleep(seconds)
    passed = [b - a for a, b in zip(before, ticks(), strict=False)]
    if len(passed) < 5 or sum(passed) <= 0:
        return None
    return round((1 - sum(passed[3:5]) / sum(passed)) * (os.cpu_count() or 1), 1)
