"""NVIDIA's machine code as instructions: what nvdisasm prints of a cubin, and the facts that need no more than that."""

from __future__ import annotations

import collections
import functools
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from gpt_kernels.architectures import NVIDIA, Nvidia, family

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
    def gpu(self) -> Nvidia:
        return NVIDIA[str(family(f"sm_{self.sm}"))]

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


def occupancy(gpu: Nvidia, registers: int, threads: int, shared: int) -> tuple[int, str]:
    """CTAs that fit on an SM, and what limits them."""
    warps = -(-threads // 32)
    limits = {
        "warps": gpu.warps // warps,
        "CTAs": gpu.ctas,
        # allocated by 8 registers of a thread, and to 4 warps at a time
        "registers": gpu.registers // (-(-max(registers, 16) // 8) * 8 * 32 * (-(-warps // 4) * 4)),
    }
    if shared:
        # the system takes a kilobyte beside each block's, and a processor has one more than a block may have
        limits["shared memory"] = (gpu.shared + 1) * 1024 // (shared + 1024)
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit
