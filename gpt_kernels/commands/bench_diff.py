"""Is B slower than A, beyond noise?"""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import fraction, option


@dataclass
class Settings:
    a: str = option(metavar="A.json")
    b: str = option(metavar="B.json")
    threshold: float = option(0.05, "smallest change that counts", type=fraction)
    alpha: float = option(0.01, "share of false alarms", type=fraction)


def run(settings: Settings) -> int:
    from ..bench.diff import diff

    return diff(settings.a, settings.b, settings.threshold, settings.alpha)
