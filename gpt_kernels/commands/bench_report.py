"""Tables and plots of a result."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import option
from ..bench.settings import OUT


@dataclass
class Settings:
    result: str = option(metavar="FILE.json")
    out: str = option(OUT, "for bench.csv, report.html and plots", metavar="DIR")


def run(settings: Settings) -> int:
    from ..bench.report import rewrite

    rewrite(settings.result, settings.out)
    return 0
