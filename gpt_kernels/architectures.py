"""The GPU architectures that we know, one row each: what setup.py builds for, what launch parameters are chosen for, what the
tools read machine code of.

setup.py loads this file by its path, before there is a torch: it imports nothing but the standard library.
"""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """One that launch parameters were chosen for; others are taken for the nearest one, by `family`."""

    gpu: str  # one of its GPUs, for the machine code read where there is none
    processors: int
    shared: int  # KB of shared memory that a block may have
    matrix: str  # instruction of its 16-bit products; none where we do not read its machine code
    wave: int = field(default=32, kw_only=True)  # lanes that run together


@dataclass(frozen=True)
class Nvidia(Architecture):
    """Rates per clock and SM. From NVIDIA's architecture papers, data sheets and the CUDA programming guide's throughput and
    compute-capability tables; latencies from Luo et al. (arXiv 2402.13499, 2501.12084), that of DRAM under load an estimate."""

    ghz: float
    tensor: int  # dense bf16 multiply-adds into fp32
    sync: float  # the share of it that mma.sync reaches
    fp32: int  # lanes
    bandwidth: float  # DRAM bytes/s
    warps: int  # resident
    ctas: int
    l2_latency: int  # cycles
    l2_mb: int
    # alike in all of them: lanes, bytes, registers, cycles
    imad: int = 64
    alu: int = 64
    mufu: int = 16
    shared_rate: int = 128
    l2_rate: int = 64
    registers: int = 65536
    shared_latency: int = 29

    @property
    def dram_latency(self) -> float:
        return 650 * self.ghz  # ns under load

    @property
    def dram(self) -> float:
        """Bytes per clock and SM."""
        return self.bandwidth / self.processors / (self.ghz * 1e9)


ARCHITECTURES: dict[str, Architecture] = {
    "sm_80": Nvidia("A100", 108, 163, "HMMA", 1.41, 1024, 1.0, 64, 2.039e12, 64, 32, 262, 40),
    "sm_86": Nvidia("A40", 84, 99, "HMMA", 1.74, 512, 1.0, 128, 0.696e12, 48, 16, 262, 6),
    "sm_89": Nvidia("RTX 4090", 128, 99, "HMMA", 2.52, 256, 1.0, 128, 1.008e12, 48, 24, 273, 72),
    "sm_90": Nvidia("H100", 132, 227, "HGMMA", 1.83, 2048, 0.62, 128, 3.35e12, 64, 32, 273, 50),
    "sm_100": Nvidia("B200", 148, 227, "UTCHMMA", 1.85, 4096, 0.25, 128, 8.0e12, 64, 32, 300, 126),  # the least certain
    "sm_120": Nvidia("RTX 5090", 170, 99, "HMMA", 2.41, 256, 1.0, 128, 1.792e12, 48, 24, 300, 96),
    "gfx90a": Architecture("MI210", 104, 64, "v_mfma", wave=64),
    "gfx942": Architecture("MI300X", 304, 64, "v_mfma", wave=64),
    "gfx1100": Architecture("RX 7900 XTX", 48, 64, ""),
    "gfx1201": Architecture("RX 9070 XT", 32, 64, ""),
}
NVIDIA = {name: row for name, row in ARCHITECTURES.items() if isinstance(row, Nvidia)}
SMALLEST = min(NVIDIA, key=lambda name: NVIDIA[name].shared)
# csrc/cuda is built for each, in plain code, which later GPUs of its generation run, too
CUDA_ARCHS = tuple(name.removeprefix("sm_") for name in NVIDIA)
# those of csrc/cuda that choose their tiles by architecture (tile_arch): of PTX that is another for each generation
TILED_BY_ARCHITECTURE = "attention*.cu"


def number_of(code: str) -> int:
    """90 of "sm_90", "compute_90", "90a"."""
    found = re.fullmatch(r"(?:sm_|compute_)?(\d+)[af]?", code)
    if found is None:
        raise ValueError(f"{code!r} is no CUDA architecture: expected one like sm_90, compute_90, 90 or 90a")
    return int(found[1])


def runs(code: str, number: int) -> bool:
    """Whether a GPU of compute capability `number` runs machine code for `code`: of its own generation up to its number; of an
    `a` or `f`, of its number alone."""
    of = number_of(code)
    return of == number or (code[-1] not in "af" and of // 10 == number // 10 and of < number)


def passes(source: str, codes: Iterable[str]) -> dict[str, list[str]]:
    """{the PTX that nvcc goes by, "80" or "90a": those of `codes`, like sm_86 and compute_80, that it is made into}.

    nvcc's passes down to PTX take most of the time: one, for the oldest, serves every architecture, but where the source
    chooses tiles by architecture one for each generation.
    """
    tiled = fnmatch.fnmatch(source, TILED_BY_ARCHITECTURE)
    groups: dict[int, list[str]] = {}
    for code in codes:
        group = number_of(code) // 10 if tiled else 0
        groups.setdefault(group, []).append(code if tiled else code.rstrip("af"))
    return {min(group, key=number_of).partition("_")[2]: group for group in groups.values()}


def family(arch: str, shared: int | None = None) -> str | None:
    """The one of ARCHITECTURES that serves architecture `arch`, whose GPU gives a program `shared` KB of shared memory; None
    where Triton compiles for none of its kind.

    NVIDIA's: the first of the newest generation that is not newer, sm_100 for sm_103 and sm_110. Of a generation older than
    all, or where the GPU has less shared memory than that one asks for, sm_86: the first of those that ask for the least.
    """
    if arch in ARCHITECTURES:
        name = arch
    elif found := re.fullmatch(r"sm_(\d+)\d[af]?", arch):
        generations = {number_of(known) // 10: known for known in reversed(NVIDIA)}
        name = max((g, known) for g, known in [(0, SMALLEST), *generations.items()] if g <= int(found[1]))[1]
    elif found := re.fullmatch(r"gfx(\d+)([0-9a-f]{2})", arch):
        generation, member = int(found[1]), int(found[2], 16)
        if generation > 9:
            name = "gfx1201" if generation > 11 else "gfx1100"
        elif generation == 9 and member >= 0x40:
            name = "gfx942"
        elif arch in ("gfx908", "gfx90a"):
            name = "gfx90a"
        else:
            return None
    else:
        return None
    small = shared is not None and shared < ARCHITECTURES[name].shared and name in NVIDIA
    return SMALLEST if small else name
