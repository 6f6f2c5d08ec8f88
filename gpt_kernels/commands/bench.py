"""Time and memory of our kernels beside eager, torch.compile and peers; a report.

Targets: the ops, sweep (attention over sequence lengths), gpt (a training step), decode (generation). `bench diff A.json
B.json` compares two results, `bench report FILE.json` writes tables and plots anew from one.
"""

from __future__ import annotations

from ..bench.settings import Settings


def run(settings: Settings) -> int:
    from ..bench.run import bench

    return bench(settings)
