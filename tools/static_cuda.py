"""The kernels of csrc/cuda compiled by nvcc on this machine: what `python -m tools.static --backend cuda` reads.

A case is a source file on an architecture, its rows are the kernels in it, by their template arguments. Shared memory is what
a kernel declares: what a launcher adds is not in the machine code, and is counted by the simulator (csrc/sim).
"""

from __future__ import annotations

import functools
import pathlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec

from gpt_kernels.architectures import NVIDIA, Nvidia, passes
from gpt_kernels.cases import Compiled

from . import loops, model, sass
from .gates import Facts, Row
from .problems import Problem

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
PR_ARCHS = ("sm_80", "sm_90")
# kernel -> least share of a hot loop's bytes that moves 16 at a time; the rest are scalars per row. Other kernels take rows off
# the 16-byte boundaries, or columns of the partial sums; those of softmax and cross_entropy have their ends element by element
# in the same code, and are counted where they run (tests/test_cuda_sim_rows.py)
WIDE = {
    r"norm_fwd<.*, true>": 0.94,
    r"norm_bwd<": 0.94,
    r"norm_bwd_row<.*, true>": 0.99,
    r"g[el]*lu_(fwd|bwd)<.*, true>": 0.99,
    r"rotary<.*, true>": 0.99,
    r"attention_fwd<.*, true>": 0.99,
    r"attention_bwd<.*, true>": 0.97,
    r"dropout_fwd<.*, true>": 0.85,
}
# kernel -> instructions that it is built around
HOLDS = {
    r"attention_(fwd|bwd|dbias)<(bf16|f16)": ("HMMA", "LDGSTS", "LDSM"),
    r"attention_(fwd|bwd|dbias)<float": ("FFMA", "HMMA", "LDGSTS"),  # HMMA of TF32, where it is asked for
    r"norm_(fwd|bwd)<": ("LDG", "STG", "SHFL"),
    r"g[el]*lu_(fwd|bwd)<": ("MUFU",),
    r"rotary<.*, true>": ("LDG", "STG", "FFMA"),
    r"(softmax|cross_entropy)_\w+<.*, true, 0, 0>": ("LDGSTS", "LDS", "STG", "SHFL", "MUFU"),
    r"(softmax|cross_entropy)_\w+<.*, [2-9](, \d)?>": ("LDG", "STG"),
}
# kernel -> bytes of shared memory that it may declare beside a row: row_scratch of csrc/cuda/row.cuh. From sm_90 on a cubin
# also tells of the kilobyte that the system takes
DECLARES = {r"(softmax|cross_entropy)_\w+<.*, true, 0, 0>": 768}


@dataclass(frozen=True)
class Source:
    name: str  # the file's stem
    arch: str

    dtype = ""  # a file has them all: they are in the kernels' names

    @property
    def id(self) -> str:
        return f"{self.name}-{self.arch}"

    @property
    def problem(self) -> Problem:
        return Problem(self.name, Compiled("cu", lambda new: None, wide=0.0))


def sources() -> list[str]:
    """Files that have kernels."""
    return sorted(p.stem for p in FOLDER.glob("*.cu") if "GK_REGISTER" in p.read_text())


def matrix(subset: str, archs=()) -> list[Source]:
    chosen = archs or (PR_ARCHS if subset == "pr" else NVIDIA)
    return [Source(name, arch) for arch in NVIDIA if arch in chosen for name in sources()]


@functools.cache
def version() -> str:
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def compile_source(path: pathlib.Path, arch: str) -> bytes:
    """A cubin. Raises RuntimeError with nvcc's words; a warning is an error."""
    # as setup.py does
    ptx = next(ptx for ptx, codes in passes(path.name, NVIDIA).items() if arch in codes)
    torch = pathlib.Path(find_spec("torch").origin).parent
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        command = [
            NVCC, "-std=c++17", "-O3", f"-gencode=arch=compute_{ptx},code={arch}", "-cubin", "-Werror", "all-warnings",
            "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", '-DGK_CUDA_ARCHS=""',
            "-isystem", str(torch / "include"), str(path), "-o", cubin.name,
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr[-4000:])
        return pathlib.Path(cubin.name).read_bytes()


def names(kernels: list[sass.Kernel]) -> list[str]:
    """norm_fwd<bf16, float, true>"""
    symbols = "\n".join(k.name for k in kernels)
    said = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True).stdout
    # an enum's value is told as (gk::Pass)1
    return [re.sub(r"^void |gk::|\(.*", "", re.sub(r"\(gk::\w+\)", "", name)) for name in said.splitlines()]


def dq_stream(gpu: Nvidia, name: str, ctas: int) -> str:
    """Of attention's backward pass, whose model counts no L2: each block of keys reads and writes its threads' own float32
    sums of dq, all T x D of them. Up to which T do the sums of all blocks that are on the GPU at once stay in its L2?"""
    D = int(re.search(r"<\w+, (\d+)", name)[1])
    tokens = gpu.l2_mb * 2**20 // (gpu.processors * max(1, ctas) * 4 * D)
    return f"dq's sums: {8 * D} T bytes per block of keys, in L2 up to T = {tokens}"


def rows(case: Source, whose: str = "ours", figures: bool = False) -> list[Row]:
    try:
        kernels = sass.read(compile_source(FOLDER / f"{case.name}.cu", case.arch))
    except RuntimeError as e:
        return [Row(case, whose, "(file)", version(), error=f"does not compile: {e}")]
    found = []
    for name, kernel in sorted(zip(names(kernels), kernels, strict=True), key=lambda pair: pair[0]):
        hot, threads = loops.regions(kernel), kernel.threads or 128
        ctas, limit = sass.occupancy(kernel.gpu, kernel.registers, threads, kernel.shared)
        facts = Facts(kernel.registers, kernel.spills, kernel.shared, kernel.code, threads, ctas, limit, kernel.matrix,
                      loops.wide_share(hot[0]), False)  # fmt: skip
        has = {i.base for i in kernel.instructions}
        lacks = [f"has no {op}" for p, ops in HOLDS.items() if re.match(p, name) for op in ops if op not in has]
        declared = facts.shared - (1024 if int(case.arch[3:]) >= 90 else 0)
        if any(re.match(p, name) and declared > most for p, most in DECLARES.items()):
            lacks.append(f"declares {declared} bytes of shared memory: more than are left beside a row")
        least = next((share for p, share in WIDE.items() if re.match(p, name)), 0.0)
        if facts.wide < least:
            lacks.append(f"moves {facts.wide:.0%} of its bytes 16 at a time, expected {least:.0%}")
        regions = tuple(model.region(kernel, code, threads // 32, max(1, ctas), 1.0) for code in hot) if figures else ()
        states = dq_stream(kernel.gpu, name, ctas) if name.startswith("attention_bwd<") else ""
        found.append(Row(case, whose, name, version(), facts, regions=regions, lacks=tuple(lacks), states=states))
    return found
