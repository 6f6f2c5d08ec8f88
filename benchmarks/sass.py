"""What a kernel's machine code says about it, on a machine without a GPU: `python -m benchmarks.sass k.cubin`.

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

import argparse
import collections
import functools
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

# ---- assumptions ----


@dataclass(frozen=True)
class GPU:
    """Rates per clock and SM. From NVIDIA's architecture papers, data sheets and the CUDA programming guide's throughput and
    compute-capability tables; latencies from Luo et al. (arXiv 2402.13499, 2501.12084), that of DRAM under load an estimate."""

    name: str
    sms: int
    ghz: float
    tensor: int  # dense bf16 multiply-adds into fp32
    sync: float  # the share of it that mma.sync reaches
    fp32: int  # lanes
    bandwidth: float  # DRAM bytes/s
    shared_kb: int  # per SM
    warps: int  # resident
    ctas: int
    l2_latency: int  # cycles
    l2_mb: int
    # alike in all of them: lanes, bytes, registers, cycles
    imad: int = 64
    alu: int = 64
    mufu: int = 16
    shared: int = 128
    l2: int = 64
    registers: int = 65536
    shared_latency: int = 29

    @property
    def dram_latency(self) -> float:
        return 650 * self.ghz  # ns under load

    @property
    def dram(self) -> float:
        """Bytes per clock and SM."""
        return self.bandwidth / self.sms / (self.ghz * 1e9)


GPUS = {
    80: GPU("A100", 108, 1.41, 1024, 1.0, 64, 2.039e12, 164, 64, 32, 262, 40),
    86: GPU("A40", 84, 1.74, 512, 1.0, 128, 0.696e12, 100, 48, 16, 262, 6),
    89: GPU("RTX 4090", 128, 2.52, 256, 1.0, 128, 1.008e12, 100, 48, 24, 273, 72),
    90: GPU("H100", 132, 1.83, 2048, 0.62, 128, 3.35e12, 228, 64, 32, 273, 50),
    100: GPU("B200", 148, 1.85, 4096, 0.25, 128, 8.0e12, 228, 64, 32, 300, 126),  # the least certain
    120: GPU("RTX 5090", 170, 2.41, 256, 1.0, 128, 1.792e12, 100, 48, 24, 300, 96),
}
LATENCY = {"mufu": 20, "conv": 20, "shfl": 24, "ldmatrix": 33, "other": 25}  # cycles to the scoreboard's release
READ_RELEASE = 12  # cycles until a source register may be written again
QUEUE = 8  # instructions that wait in a queued pipe before issue stalls
SPIN = 16  # a loop this short without work in it waits for something

MMA_SHAPES = {
    "16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "16864": (16, 8, 64), "884": (8, 8, 4)
}  # fmt: skip
WIDTHS = {"128": 16, "64": 8, "256": 32, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "ENL2": 32}
CLASSES = {
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2 FSWZADD",
    "mufu": "MUFU",
    "imad": "IMAD",
    "shfl": "SHFL",
    "local": "LDL STL",
    "conv": "F2F F2I I2F FRND POPC FLO",  # a quarter-rate unit; F2FP and I2FP are alu
    "global": "LDG STG LDGSTS ATOMG RED REDG LD ST ATOM",
    "shared": "LDS STS LDSM STSM ATOMS",
    "sync": "BAR DEPBAR LDGDEPBAR SYNCS WARPGROUP MEMBAR FENCE ERRBAR ELECT ARRIVES CCTL ACQBULK",
    "ctrl": "BRA EXIT BSSY BSYNC NOP CALL RET BREAK BRX JMP WARPSYNC YIELD NANOSLEEP BPT KILL",
    "other": "S2R S2UR CS2R LDC LDCU ULDC R2UR VOTE VOTEU MATCH REDUX P2R R2P USETMAXREG",
}
CLASS_OF = {op: name for name, ops in CLASSES.items() for op in ops.split()}
WORK = {"tensor", "tcgen05", "tma", "fp32", "mufu", "global", "shared", "shfl"}


# ---- reading ----


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    op: str
    args: str
    stall: int  # cycles before the warp may issue its next one
    write: int  # scoreboard that its result releases, 7 for none; `read`: that its sources release
    read: int
    wait: int  # scoreboards it waits for, as bits
    kind: str  # a key of CLASSES, or tensor, tcgen05, tma, uniform, alu
    bytes: int = 0  # moved by a thread
    fma: float = 0.0  # bf16 multiply-adds of a warp
    sync: bool = False  # mma.sync
    shared: float = 0.0  # bytes of a warp through shared memory and L1

    @property
    def base(self) -> str:
        return self.op.split(".")[0]


@dataclass(frozen=True)
class Kernel:
    name: str
    sm: int
    instructions: list[Instruction]
    labels: dict[str, int]
    threads: int  # of a CTA, where the kernel bounds them
    registers: int
    shared: int  # static bytes
    code: int  # bytes

    @property
    def gpu(self) -> GPU:
        return GPUS.get(self.sm) or GPUS[self.sm // 10 * 10]

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return sum(i.kind == "local" for i in self.instructions)

    @property
    def matrix(self) -> dict[str, int]:
        """Tensor-core instructions by kind."""
        return dict(collections.Counter(i.base for i in self.instructions if i.kind in ("tensor", "tcgen05")))


_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][\w.]*)(.*?);?\s*/\* 0x[0-9a-f]{16} \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/"
)
_BLOCK_END = r"(?=\n//-{10}|\Z)"


@functools.cache
def tool(name: str) -> str:
    """nvdisasm or cuobjdump: on PATH, or in the installed Triton."""
    wheel = (pathlib.Path(p) / "triton/backends/nvidia/bin" / name for p in sys.path)
    found = shutil.which(name) or next((str(p) for p in wheel if p.exists()), None)
    if found is None:
        raise FileNotFoundError(f"{name} not found: neither on PATH nor in an installed Triton (pip install triton)")
    return found


def decode(address: str, predicate: str | None, op: str, args: str, control: str) -> Instruction:
    parts, bits, predicate, args = op.split("."), int(control, 16) >> 41, (predicate or "").strip(), args.strip()
    base, never = parts[0], predicate in ("@!PT", "@!UPT")
    fma, shared, sync, size = 0.0, 0.0, False, 0
    if base in ("HMMA", "IMMA", "QMMA", "OMMA", "DMMA"):
        kind, sync = "tensor", True
        m, n, k = MMA_SHAPES.get(next((p for p in parts if p in MMA_SHAPES), ""), (0, 0, 0))
        fma = m * n * k * (2 if "TF32" in parts else 0.5 if base in ("IMMA", "QMMA") else 1)  # in the time of a bf16 one
    elif base in ("HGMMA", "QGMMA", "IGMMA"):
        kind, (m, n, k) = "tensor", map(int, parts[1].split("x"))
        width = 1 if base != "HGMMA" else 4 if "TF32" in parts else 2
        fma = m * n * k / 4 * width / 2  # a warp's quarter of the warpgroup's
        a_shared = args.split(",")[1].strip().startswith("gdesc")
        shared = (n + m * a_shared) * k * width / 4
    elif base.startswith("UTC") and "MMA" in base:
        kind = "tcgen05"
    elif base.startswith(("UTMA", "UBLKCP")):
        kind = "tma"
    else:
        kind = CLASS_OF.get(base) or ("uniform" if base[0] == "U" else "alu")
    if never:
        kind, fma, shared = "ctrl", 0.0, 0.0
    elif kind in ("global", "shared", "local"):
        if base in ("LDSM", "STSM"):
            size = 4 * int(parts[-1]) if parts[-1] in "24" else 4
        else:
            size = next((WIDTHS[p] for p in parts[1:] if p in WIDTHS), 4)
        shared = size * 32
    return Instruction(int(address, 16), predicate, op, args, bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63,
                       kind, size, fma, sync, shared)  # fmt: skip


def _labels(body: str) -> dict[str, int]:
    labels, open_ = {}, []
    for line in body.splitlines():
        if line.startswith(".L"):
            open_.append(line.rstrip(":"))
        elif open_ and (at := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line)):
            labels.update(dict.fromkeys(open_, int(at[1], 16)))
            open_ = []
    return labels


def read(cubin: bytes | pathlib.Path) -> list[Kernel]:
    """The kernels of a cubin. Raises ValueError where there is none."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin if isinstance(cubin, bytes) else cubin.read_bytes())
        file.flush()
        text, usage = (
            subprocess.run([tool(name), flag, file.name], capture_output=True, text=True).stdout
            for name, flag in (("nvdisasm", "-hex"), ("cuobjdump", "-res-usage"))
        )
    target, kernels = re.search(r"(?:\.target\s+sm_|EF_CUDA_SM)(\d+)", text), []
    for found in re.finditer(rf"\n\.text\.(\S+?):\n(.*?){_BLOCK_END}", text, re.S):
        name, body = found.groups()
        instructions = [decode(*groups) for groups in _LINE.findall(body)]
        info = re.search(rf'\.nv\.info\.{re.escape(name)},?".*?{_BLOCK_END}', text, re.S)
        bound = info and re.search(r"EIATTR_(?:REQNTID|MAX_THREADS)(.*?)(?=//-----|\Z)", info[0], re.S)
        threads = math.prod(int(x, 16) for x in re.findall(r"\.word\s+(0x[0-9a-f]+)", bound[1])) if bound else 0
        used = re.search(rf"Function {re.escape(name)}:\s*\n\s*REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)
        registers, shared = map(int, used.groups()) if used else (0, 0)
        code = instructions[-1].address + 16 if instructions else 0
        kernels.append(Kernel(name, int(target[1]), instructions, _labels(body), threads, registers, shared, code))
    if not kernels:
        raise ValueError("no kernel found: not a cubin, or nvdisasm is older than its architecture")
    return kernels


# ---- regions ----


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


# ---- facts ----


def wide_share(code: list[Instruction]) -> float:
    """Share of the bytes to and from global memory that moves 16 or more at a time; 1 where TMA moves the tiles."""
    moved = [i.bytes for i in code if i.kind == "global"]
    if not moved or any(i.kind == "tma" for i in code):
        return 1.0
    return sum(b for b in moved if b >= 16) / sum(moved)


def occupancy(gpu: GPU, registers: int, threads: int, shared: int) -> tuple[int, str]:
    """CTAs that fit on an SM, and what limits them."""
    warps = -(-threads // 32)
    limits = {
        "warps": gpu.warps // warps,
        "CTAs": gpu.ctas,
        # allocated by 8 registers of a thread, and to 4 warps at a time
        "registers": gpu.registers // (-(-max(registers, 16) // 8) * 8 * 32 * (-(-warps // 4) * 4)),
    }
    if shared:
        limits["shared memory"] = gpu.shared_kb * 1024 // (shared + 1024)
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit


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


# ---- bounds ----


def pipes(gpu: GPU, code: list[Instruction]) -> dict[str, float]:
    """Cycles of an SM that a warp's pass takes on each pipe: work / rate."""
    n = collections.Counter(i.kind for i in code)
    paired = sum(i.base in ("FADD2", "FMUL2", "FFMA2") for i in code)
    memory = [i for i in code if i.kind in ("shared", "global", "local")]
    return {
        "issue": len(code) / 4,
        "tensor": sum(i.fma / gpu.tensor / (gpu.sync if i.sync else 1) for i in code),
        "shared": sum(max(1, i.shared / gpu.shared) for i in memory)
        + sum(i.shared / gpu.shared for i in code if i.kind == "tensor") + n["shfl"],
        "mufu": (n["mufu"] + n["conv"]) * 32 / gpu.mufu,
        "fp32": (n["fp32"] + n["imad"] + paired) * 32 / gpu.fp32,
        "imad": n["imad"] * 32 / gpu.imad,
        "alu": n["alu"] * 32 / gpu.alu,
        "l2": sum(i.bytes for i in code if i.kind == "global") * 32 / gpu.l2,
    }  # fmt: skip


# ---- model ----


def replay(gpu: GPU, code: list[Instruction], warps: int, cta_warps: int, dram: float | None = None, passes: int = 8) -> float:
    """Cycles that a pass of `code` takes with so many warps on a quarter of an SM, cta_warps of them sharing a barrier.

    dram: the share of the moved bytes that DRAM must move; None where global loads hit in L2.
    """
    latency = gpu.l2_latency if dram is None else gpu.dram_latency
    memory = gpu.l2 / 4 if dram is None else gpu.dram / 4 / max(dram, 1e-9)  # bytes per clock
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
            "local": ("shared", max(4, i.shared * 4 / gpu.shared), QUEUE, gpu.shared_latency + 8),
            "shared": ("shared", max(4, i.shared * 4 / gpu.shared), QUEUE,
                       LATENCY["ldmatrix"] if i.base == "LDSM" else gpu.shared_latency),
            "tensor": ("tensor", i.fma * 4 / gpu.tensor / (gpu.sync if i.sync else 1), 0 if i.sync else QUEUE, 0),
        }.get(i.kind, ("", 0, 0, LATENCY["other"]))  # fmt: skip
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cubin", type=pathlib.Path)
    parser.add_argument("-k", "--kernel", default="", help="part of the kernel's name")
    parser.add_argument("--threads", type=int, default=0, help="of a CTA (default: what the cubin says, else 128)")
    parser.add_argument("--shared", type=int, default=0, help="bytes per CTA with the dynamic part, which no cubin tells")
    parser.add_argument("--loop-warps", type=int, default=0, help="warps of a CTA that run the loops, where not all do")
    parser.add_argument("--ctas", type=int, default=0, help="CTAs that the grid gives an SM, where more would fit")
    parser.add_argument("--useful", type=float, default=1.0, help="share of the moved bytes that the algorithm asks for")
    args = parser.parse_args()
    try:
        kernels = read(args.cubin)
    except (OSError, ValueError) as e:
        parser.error(f"{args.cubin}: {e}")
    kernel = next((k for k in kernels if args.kernel in k.name), None)
    if kernel is None:
        parser.error(f"--kernel: {args.kernel!r} is in none of {', '.join(k.name for k in kernels)}")
    threads = args.threads or kernel.threads or 128
    fit, limit = occupancy(kernel.gpu, kernel.registers, threads, args.shared or kernel.shared)
    ctas = min(fit, args.ctas) if args.ctas else fit
    print(f"{kernel.name}: sm_{kernel.sm} ({kernel.gpu.name}), {kernel.registers} registers, {kernel.spills} spills, "
          f"{kernel.code} bytes of code, {ctas} CTAs of {threads} threads on an SM (limit: {limit})")  # fmt: skip
    for code in regions(kernel):
        print(f"-- from {code[0].address:#x}")
        for name, value in asdict(region(kernel, code, args.loop_warps or threads // 32, max(1, ctas), args.useful)).items():
            print(f"   {name:16} {value:.3g}" if isinstance(value, float) else f"   {name:16} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
