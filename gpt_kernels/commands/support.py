"""The table of ops, dtypes and features, probed here, as Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Settings:
    pass


def run(settings: Settings) -> int:
    from ..info import support

    print(support())
    return 0
