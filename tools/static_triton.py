"""The Triton kernels compiled for every GPU on this machine: what `python -m tools.static` reads.

A launcher's launches are recorded for an architecture (gpt_kernels.triton.common.recording) and compiled as Triton's JIT would
there, by the JIT itself.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.6 to 3.9 do when it is unset; 3.9 warns then

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gpt_kernels.architectures import ARCHITECTURES, family
from gpt_kernels.triton import INTERPRETED
from gpt_kernels.triton.common import Launch

from . import amdgcn, loops, model, sass
from .gates import Facts, Row
from .problems import Case
from .problems import matrix as matrix  # static.py asks each backend for its own


def version() -> str:
    return triton.__version__


# ---- compiling ----


@dataclass(frozen=True)
class _Pretended:
    """A driver for Triton's JIT of a GPU that is not there: it names the target, and its kernels are never loaded."""

    arch: str

    def get_current_target(self) -> GPUTarget:
        wave = ARCHITECTURES[str(family(self.arch))].wave
        nvidia = self.arch.startswith("sm_")
        return GPUTarget("cuda", int(self.arch[3:]), wave) if nvidia else GPUTarget("hip", self.arch, wave)

    def get_current_device(self) -> str:
        return self.arch  # the JIT keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def pretending(arch: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Pretended(arch))
    try:
        yield
    finally:
        driver._active = before


def compile_launch(launch: Launch, arch: str):
    """The launch's kernel, specialised and compiled by Triton's JIT as on a GPU of that architecture."""
    if INTERPRETED:
        raise RuntimeError("compile_launch: TRITON_INTERPRET is set, kernels are interpreted and cannot be compiled")
    with pretending(arch):
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.parameters)


# ---- rows ----


def facts(compiled, arch: str) -> Facts:
    products = "tt.dot" in compiled.asm["ttir"]
    if arch.startswith("gfx"):
        needs = compiled.metadata
        return amdgcn.facts(compiled.asm["amdgcn"], ARCHITECTURES[str(family(arch))], needs.num_warps, needs.shared, products)
    kernel = _read(compiled.asm["cubin"])
    threads = kernel.threads or compiled.metadata.num_warps * 32
    ctas, limit = sass.occupancy(kernel.gpu, kernel.registers, threads, compiled.metadata.shared)
    return Facts(kernel.registers, kernel.spills, compiled.metadata.shared, kernel.code, threads, ctas, limit, kernel.matrix,
                 loops.wide_share(loops.regions(kernel)[0]), products)  # fmt: skip


@functools.lru_cache(maxsize=64)
def _read(cubin: bytes) -> sass.Kernel:
    (kernel,) = sass.read(cubin)
    return kernel


def _reason(e: BaseException) -> str:
    """The last line of the innermost cause: above it Triton quotes the source around it."""
    while e.__cause__ is not None:
        e = e.__cause__
    return next((line.strip() for line in reversed(str(e).splitlines()) if line.strip(" ^")), "")


def rows(case: Case, whose: str = "ours", figures: bool = False) -> list[Row]:
    """Compile a case's launches, each specialisation once. figures: read the hot regions, too."""
    try:
        launches = case.launches() if whose == "ours" else case.liger_launches()
    except RuntimeError as e:
        return [Row(case, whose, "(launcher)", version(), error=f"does not launch: {e}")]
    found: list[Row] = []
    kernels, names = [], collections.Counter()
    for launch in launches:
        try:
            compiled = compile_launch(launch, case.arch)
        except Exception as e:  # whatever the compiler throws belongs in the table, beside the kernels that do compile
            name, compiled = launch.kernel.__name__, None
            row = Row(case, whose, name, version(), error=f"does not compile: {type(e).__name__}: {_reason(e)}")
        else:
            name = compiled.name
            hot = _regions(launch, compiled, case) if figures else ()
            row = Row(case, whose, name, version(), facts(compiled, case.arch), regions=hot)
        if compiled is not None and any(compiled is other for other in kernels):
            continue  # the JIT has it already
        kernels.append(compiled)
        names[name] += 1
        if names[name] > 1:
            row = replace(row, kernel=f"{name}#{names[name]}")
        found.append(row)
    return found


def useful(launch: Launch, columns: int) -> float:
    """The share of a row's lanes that are inside it: rows are padded to whole blocks, our norms' to whole chunks."""
    block = next((launch.parameters[n] for n in ("BLOCK_N", "CHUNK", "BLOCK_SIZE") if n in launch.parameters), None)
    return columns / (-(-columns // block) * block) if block and columns else 1.0


def _regions(launch: Launch, compiled, case: Case) -> tuple[model.Region, ...]:
    if "cubin" not in compiled.asm:
        return ()
    f, kernel = facts(compiled, case.arch), _read(compiled.asm["cubin"])
    grid = functools.reduce(lambda a, b: a * b, launch.grid)
    ctas = max(1, min(f.ctas, -(-grid // ARCHITECTURES[case.arch].processors)))
    warps = launch.parameters.get("num_warps", 4)  # of the loops; specialised warps beside them wait and copy
    share = useful(launch, case.problem.of.columns)
    return tuple(model.region(kernel, code, warps, ctas, share) for code in loops.regions(kernel))
