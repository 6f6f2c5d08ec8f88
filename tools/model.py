"""What a loop of machine code may cost on a GPU that is not there: bounds, and a model.

Three kinds of number, in falling order of trust:
  facts    counts in the SASS: instructions, spills, access widths, registers; occupancy follows from them;
  bounds   work of a pipe over its documented rate, or Little's law on the loads in flight. They hold if every instruction
           listed is executed and every global load misses L1;
  model    an in-order replay of stall counts and scoreboards on one quarter of an SM, with assumed latencies. It ranks
           two versions of one kernel; differences under 15 % mean nothing, and it predicts no clock.
None of them is a measurement. Not modelled: bank conflicts, clocks, L2 hits and TLB, launch and tail, named barriers, what
TMA writes, branches not taken, idle lanes (give `useful` bytes), the shapes of tcgen05 (counted only).
"""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass

from gpt_kernels.architectures import Nvidia

from .loops import in_flight, wide_share
from .sass import Instruction, Kernel

LATENCY = {"mufu": 20, "conv": 20, "shfl": 24, "ldmatrix": 33, "other": 25}  # cycles to the scoreboard's release
READ_RELEASE = 12  # cycles until a source register may be written again
QUEUE = 8  # instructions that wait in a queued pipe before issue stalls


# ---- bounds ----


def pipes(gpu: Nvidia, code: list[Instruction]) -> dict[str, float]:
    """Cycles of an SM that a warp's pass takes on each pipe: work / rate."""
    n = collections.Counter(i.kind for i in code)
    paired = sum(i.base in ("FADD2", "FMUL2", "FFMA2") for i in code)
    memory = [i for i in code if i.kind in ("shared", "global", "local")]
    return {
        "issue": len(code) / 4,
        "tensor": sum(i.fma / gpu.tensor / (gpu.sync if i.sync else 1) for i in code),
        "shared": sum(max(1, i.shared / gpu.shared_rate) for i in memory)
        + sum(i.shared / gpu.shared_rate for i in code if i.kind == "tensor") + n["shfl"],
        "mufu": (n["mufu"] + n["conv"]) * 32 / gpu.mufu,
        "fp32": (n["fp32"] + n["imad"] + paired) * 32 / gpu.fp32,
        "imad": n["imad"] * 32 / gpu.imad,
        "alu": n["alu"] * 32 / gpu.alu,
        "l2": sum(i.bytes for i in code if i.kind == "global") * 32 / gpu.l2_rate,
    }  # fmt: skip


# ---- model ----


def replay(
    gpu: Nvidia, code: list[Instruction], warps: int, cta_warps: int, dram: float | None = None, passes: int = 8
) -> float:
    """Cycles that a pass of `code` takes with so many warps on a quarter of an SM, cta_warps of them sharing a barrier.

    dram: the share of the moved bytes that DRAM must move; None where global loads hit in L2.
    """
    latency = gpu.l2_latency if dram is None else gpu.dram_latency
    memory = gpu.l2_rate / 4 if dram is None else gpu.dram / 4 / max(dram, 1e-9)  # bytes per clock
    steps = []  # (instruction, pipe, cycles on it, cycles that may queue there, latency, is a barrier, left outstanding)
    for i in code:
        pipe, cost, queued, after = {
            "mufu": ("mufu", 128 / gpu.mufu, QUEUE, LATENCY["mufu"]),
            "conv": ("mufu", 128 / gpu.mufu, QUEUE, LATENCY["conv"]),
            "fp32": ("fp32", 128 / gpu.fp32, 0, 0),
            "imad": ("fp32", 128 / gpu.imad, 0, 0),
            "alu": ("alu", 128 / gpu.alu, 0, 0),
            "shfl": ("shared", 4, QUEUE, LATENCY["shfl"]),
            "global": ("memory", i.bytes * 32 / memory, QUEUE, latency),
            "local": ("shared", max(4, i.shared * 4 / gpu.shared_rate), QUEUE, gpu.shared_latency + 8),
            "shared": (
                "shared",
                max(4, i.shared * 4 / gpu.shared_rate),
                QUEUE,
                LATENCY["ldmatrix"] if i.base == "LDSM" else gpu.shared_latency,
            ),
            "tensor": ("tensor", i.fma * 4 / gpu.tensor / (gpu.sync if i.sync else 1), 0 if i.sync else QUEUE, 0),
        }.get(i.kind, ("", 0, 0, LATENCY["other"]))
        barrier = i.base == "BAR" and ".SYNC" in i.op and bool(re.match(r"0x0\s*$", i.args))
        left = re.search(r"(?:SB\d|gsb0), 0x([0-9a-f]+)", i.args) if i.base in ("DEPBAR", "WARPGROUP") else None
        steps.append((i, pipe, cost, cost * queued, after, barrier, int(left[1], 16) if left else None))

    clock, free = 0.0, collections.Counter()
    at, ready, waiting = [0] * warps, [3.0 * w for w in range(warps)], [False] * warps
    boards = [[0.0] * 7 for _ in range(warps)]
    copies, products, copying = [[] for _ in range(warps)], [[] for _ in range(warps)], [0.0] * warps
    laps, total = [[] for _ in range(warps)], passes * len(steps)

    def earliest(w: int) -> float:
        i, pipe, _, queued, _, _, left = steps[at[w] % len(steps)]
        t = max([ready[w], *(boards[w][b] for b in range(6) if i.wait >> b & 1)])
        if pipe:
            t = max(t, free[pipe] - queued)
        if left is not None:
            done = (products if i.base == "WARPGROUP" else copies)[w]
            if len(done) > left:
                t = max(t, done[len(done) - left - 1])
        return t

    while able := [w for w in range(warps) if at[w] < total and not waiting[w]]:
        when, _, w = min((earliest(w), ready[w], w) for w in able)  # of those that could go, the one that waits longest
        t = max(when, clock)
        i, pipe, cost, _, after, barrier, _ = steps[at[w] % len(steps)]
        clock, ready[w], end = t + 1, t + max(i.stall, 1), t
        if pipe:
            free[pipe] = end = max(free[pipe], t) + cost
        if i.write < 6 and i.base != "LDGDEPBAR":
            boards[w][i.write] = max(boards[w][i.write], end + after)
        if i.read < 6:
            boards[w][i.read] = max(boards[w][i.read], end - cost + READ_RELEASE)
        if i.base == "LDGSTS":
            copying[w] = max(copying[w], end + after)
        elif i.base == "LDGDEPBAR":
            copies[w].append(copying[w])
        elif i.kind == "tensor" and "gsb0" in i.args:
            products[w].append(end)
        at[w] += 1
        if at[w] % len(steps) == 0:
            laps[w].append(ready[w])
        if barrier:
            waiting[w] = True
            first = w // cta_warps * cta_warps
            cta = range(first, min(warps, first + cta_warps))
            if all(waiting[x] or at[x] >= total for x in cta):
                for x in cta:
                    waiting[x], ready[x] = False, max(ready[x], t + 10)
    skip = passes // 2 - 1  # warm-up
    return sum((lap[-1] - lap[skip]) / (passes - 1 - skip) for lap in laps) / warps


# ---- a region's figures ----


@dataclass(frozen=True)
class Region:
    """A region's figures; shares are of the tensor cores' dense rate where there are products, else of DRAM's bandwidth."""

    instructions: int
    mix: dict[str, int]
    matrix: dict[str, int]
    spills: int
    wide: float
    stalls: int  # the issue estimate of one warp alone: its stall counts added up
    pipes: dict[str, float]  # cycles of an SM per warp and pass
    binding: str
    in_flight_sm: int  # bytes of global loads
    little_bytes: int  # what Little's law asks for at DRAM's full bandwidth
    tensor_per_other: float | None = None  # tensor instructions
    per_mflop: float | None = None  # instructions
    bound: float | None = None
    no_overlap: float | None = None  # tensor time over tensor time plus the busiest of issue, mufu, fp32 and alu
    model: float | None = None


def region(kernel: Kernel, code: list[Instruction], warps: int, ctas: int, useful: float = 1.0, model: bool = True) -> Region:
    """warps: of a CTA that run the code; useful: share of the moved bytes that the algorithm asks for; model: replay too."""
    gpu, kinds, pipe = kernel.gpu, collections.Counter(i.kind for i in code), pipes(kernel.gpu, code)
    fma, quarter = sum(i.fma for i in code), max(1, round(warps * ctas / 4))
    moves = [i for i in code if i.kind == "global"]
    loaded = sum(i.bytes for i in moves if i.base.startswith(("LD", "ATOM")))
    flying, little = in_flight(code) * warps * ctas * 32, gpu.dram * gpu.dram_latency
    busiest, share = max(pipe.values()), {}
    if fma:
        other = max(pipe["mufu"], pipe["fp32"], pipe["alu"], (len(code) - kinds["tensor"]) / 4)
        bound = fma / gpu.tensor / busiest
        share = {
            "tensor_per_other": kinds["tensor"] / max(1, len(code) - kinds["tensor"]),
            "per_mflop": len(code) / (2 * fma / 1e6),
            "bound": bound,
            "no_overlap": min(bound, fma / gpu.tensor / (pipe["tensor"] + other)),
        }
        if model:
            cycles = replay(gpu, code, quarter, max(1, warps // 4))
            share["model"] = min(bound, fma / gpu.tensor * quarter * 4 / cycles)
    elif moves and not kinds["tcgen05"]:
        moved = sum(i.bytes for i in moves) * 32  # by a warp
        bound = min(1.0, useful * moved / busiest / gpu.dram)
        if loaded:  # Little's law on the loads; stores ride along
            bound = min(bound, flying / little * useful * moved / (loaded * 32))
        share = {"bound": bound}
        if model:
            cycles = replay(gpu, code, quarter, max(1, warps // 4), useful)
            share["model"] = min(bound, useful * moved * warps * ctas / cycles / gpu.dram)
    matrix = collections.Counter(".".join(i.op.split(".")[:2]) for i in code if i.kind in ("tensor", "tcgen05"))
    return Region(
        len(code), dict(kinds.most_common()), dict(matrix), kinds["local"], wide_share(code),
        sum(max(i.stall, 1) for i in code), {k: v for k, v in pipe.items() if v}, max(pipe, key=pipe.__getitem__),
        flying, round(little), **share,
    )  # fmt: skip
