"""Versions, instruction set, which backend serves each op and why, compilers, caches."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import option


@dataclass
class Settings:
    json: bool = option(False, "the same as JSON")


def run(settings: Settings) -> int:
    from ..info import print_info

    print_info(as_json=settings.json)
    return 0
