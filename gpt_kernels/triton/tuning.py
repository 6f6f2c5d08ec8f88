"""Launch parameters: a table per op and architecture, and an override for measuring other candidates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Parameters = dict[str, Any]  # constexprs by name, num_warps, num_stages


@dataclass
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
    _override: list[Parameters] = field(default_factory=list)

    def __call__(self, arch: str, **key) -> Parameters:
        if self._override:
            return self._override[-1]
        at = (arch, *key.values())
        if at not in self._chosen:
            self._chosen[at] = self.default(arch, **key)
        return self._chosen[at]

    @contextlib.contextmanager
    def override(self, parameters: Parameters) -> Iterator[None]:
        """Use these parameters inside the block, whatever the key."""
        self._override.append(parameters)
        try:
            yield
        finally:
            self._override.pop()
