"""Where a kernel spends its time, read from its jumps: the innermost loops of its machine code, and how they move bytes."""

from __future__ import annotations

import collections
import re

from .sass import Instruction, Kernel

SPIN = 16  # a loop this short without work in it waits for something
WORK = {"tensor", "tcgen05", "tma", "fp32", "mufu", "global", "shared", "shfl"}


def _target(i: Instruction, labels: dict[str, int]) -> int | None:
    found = re.search(r"(\.L_x_\d+)|0x([0-9a-f]+)\s*$", i.args)
    return None if not found else labels.get(found[1]) if found[1] else int(found[2], 16)


def _flow(kernel: Kernel) -> tuple[dict[int, range], dict[int, list[int]]]:
    """Basic blocks by their first instruction, and their successors."""
    code, at = kernel.instructions, {i.address: n for n, i in enumerate(kernel.instructions)}
    # ptxas leaves some loops of sm_80 through CALL.REL.NOINC: followed like a branch
    jumps = {n: at[t] for n, i in enumerate(code) if i.base in ("BRA", "CALL") and (t := _target(i, kernel.labels)) in at}
    ends = {n for n, i in enumerate(code) if n in jumps or i.base in ("EXIT", "RET", "BRX")}
    starts = sorted({0, *jumps.values(), *(n + 1 for n in ends if n + 1 < len(code))})
    blocks = {s: range(s, e) for s, e in zip(starts, [*starts[1:], len(code)], strict=True)}
    successors = {}
    for start, block in blocks.items():
        last, i = block[-1], code[block[-1]]
        falls = last not in ends or i.predicate or i.op.startswith(("BRA.DIV", "BRA.CONV", "CALL"))
        falls = falls or re.search(r"U?P\d", i.args.split("`")[0])
        follow = ([jumps[last]] if last in jumps else []) + ([last + 1] if falls else [])
        successors[start] = [s for s in follow if s in blocks]
    return blocks, successors


def loops(kernel: Kernel) -> list[list[Instruction]]:
    """Innermost natural loops, those that only wait left out."""
    blocks, successors = _flow(kernel)
    predecessors = collections.defaultdict(list)
    for s, follow in successors.items():
        for t in follow:
            predecessors[t].append(s)
    dominators: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for s in list(blocks)[1:]:
            known = [dominators[p] for p in predecessors[s] if p in dominators]
            if known and (new := set.intersection(*known) | {s}) != dominators.get(s):
                dominators[s], changed = new, True
    bodies: dict[int, set[int]] = collections.defaultdict(set)
    for s, follow in successors.items():
        for head in follow:
            if head in dominators.get(s, ()):
                bodies[head].add(head)
                todo = [s]
                while todo:
                    if (b := todo.pop()) not in bodies[head]:
                        bodies[head].add(b)
                        todo += predecessors[b]

    def code(body: set[int]) -> list[Instruction]:
        return [kernel.instructions[n] for b in sorted(body) for n in blocks[b]]

    spins = [h for h, body in bodies.items() if len(c := code(body)) <= SPIN and not WORK & {i.kind for i in c}]
    waits = {b for h in spins for b in bodies[h]}
    real = {h: body - waits for h, body in bodies.items() if h not in spins}
    return [code(body) for h, body in sorted(real.items()) if not any(o != h and real[o] < body for o in real)]


def regions(kernel: Kernel) -> list[list[Instruction]]:
    """Loops with tensor or memory work, hottest first; else the whole kernel up to its last EXIT."""
    found = [loop for loop in loops(kernel) if any(i.kind in ("tensor", "tcgen05", "tma", "global") for i in loop)]

    def heat(loop):
        tensor = sum(i.kind == "tcgen05" for i in loop), sum(i.fma for i in loop) / len(loop)
        return *tensor, sum(i.bytes for i in loop if i.kind == "global")

    last = max((n for n, i in enumerate(kernel.instructions) if i.op == "EXIT"), default=len(kernel.instructions) - 1)
    return sorted(found, key=heat, reverse=True) or [kernel.instructions[: last + 1]]


def wide_share(code: list[Instruction]) -> float:
    """Share of the bytes to and from global memory that moves 16 or more at a time; 1 where TMA moves the tiles."""
    moved = [i.bytes for i in code if i.kind == "global"]
    if not moved or any(i.kind == "tma" for i in code):
        return 1.0
    return sum(b for b in moved if b >= 16) / sum(moved)


def in_flight(code: list[Instruction]) -> int:
    """Most bytes of global loads of a thread that are outstanding at once: issued, and not yet waited for."""
    out, peak, groups, group = collections.Counter(), 0, [], 0
    for i in code * 8:  # the deepest pipeline takes so many passes to fill
        for board in range(6):
            if i.wait >> board & 1:
                out[board] = 0
        if i.base == "DEPBAR" and (left := re.search(r"SB\d, 0x([0-9a-f]+)", i.args)):
            n = int(left[1], 16)
            groups = groups[len(groups) - n :] if n else []
        elif i.base == "LDGDEPBAR":
            groups, group = [*groups, group], 0
        elif i.base == "LDGSTS":
            group += i.bytes
        elif i.base in ("LDG", "LD") and i.write < 7:
            out[i.write] += i.bytes
        peak = max(peak, sum(out.values()) + sum(groups) + group)
    return peak
