"""AMD's machine code as text: registers, the hot loop, how wide its accesses are."""

from __future__ import annotations

import collections
import re

from gpt_kernels.architectures import Architecture

from .gates import Facts

WAVES = 32  # that a processor can hold: 8 on each of its 4 units, of 512 registers a lane
WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def moves(lines: list[str]) -> list[int]:
    """Bytes of a thread per access to global memory."""
    found = (re.match(r"\s+(?:global|buffer)_(?:load|store)_(\w+)", line) for line in lines)
    return [WIDTHS.get(move[1], 2) for move in found if move]


def regions(text: str) -> list[list[str]]:
    """Innermost loops, the one with most bytes first; else the whole kernel. A loop: from a label to the last branch back."""
    lines, labels, spans = text.splitlines(), {}, {}
    for n, line in enumerate(lines):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = n
        elif (jump := re.match(r"\s+s_c?branch\w*\s+(\.LBB\w+)", line)) and jump[1] in labels:
            spans[labels[jump[1]]] = n
    inner = [lines[a:b] for a, b in spans.items() if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans.items())]
    return sorted(filter(moves, inner), key=lambda loop: sum(moves(loop)), reverse=True) or [lines]


def facts(text: str, arch: Architecture, warps: int, shared: int, products: bool) -> Facts:
    def note(name: str) -> int:
        return int(re.search(rf"{name}\s*[:=]\s*(\d+)", text)[1])

    registers = note(r"\.vgpr_count")
    moved = moves(regions(text)[0])
    limits = {"waves": WAVES // warps, "registers": 512 // (-(-registers // 8) * 8) * 4 // warps}
    if shared:
        limits["shared memory"] = arch.shared * 1024 // shared
    limit = min(limits, key=limits.__getitem__)
    return Facts(
        # scratch memory in words; scalar registers spill into lanes of vector registers, at no access
        registers, note(r"\.private_segment_fixed_size") // 4, shared, note("codeLenInByte"), warps * arch.wave,
        limits[limit], limit, dict(collections.Counter(re.findall(r"\b(v_mfma)_", text))),
        sum(b for b in moved if b >= 16) / sum(moved) if moved else 1.0, products,
    )  # fmt: skip
