"""Every kernel for every GPU compiled on this machine, and what its machine code says: `python -m benchmarks.static`.

A launcher's launches are recorded for an architecture (gpt_kernels.triton.common.recording) and compiled as Triton's JIT would
there, by the JIT itself; --backend cuda compiles csrc/cuda (benchmarks/static_cuda.py). Facts, bounds and the model are those
of benchmarks/sass.py: nothing here was executed, nothing here is performance. A kernel that does not compile, does not fit,
spills, misses its tensor cores or its 16-byte accesses, or needs more than the backend's file in benchmarks/budgets allows it
fails the run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.6 to 3.9 do when it is unset; 3.9 warns then

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gpt_kernels.triton import INTERPRETED, absence
from gpt_kernels.triton.common import FAMILIES, Launch, family

from . import sass
from .static_cases import ARCHS, PROBLEMS, Case, matrix

BASELINE = pathlib.Path(__file__).parent / "budgets" / "triton.json"
MATRIX = {
    "sm_80": "HMMA", "sm_86": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA",
    "gfx90a": "v_mfma", "gfx942": "v_mfma",
}  # of 16-bit products # fmt: skip
# a budget's figure may grow by a tenth, or by the step in which it is handed out
STEPS = {"registers": 8, "shared": 0, "code": 256}
# pattern of "Triton's version, case, kernel" -> why its spills are tolerated
SPILLS = {
    "3.9.0 attention-B4H16T2048D128-(bf16|fp16)-sm_80 attention_bwd_dkv_kernel": "18, none in the loop over queries; "
    "without any, at 32x64, shared memory binds: bound 0.58 instead of 0.83",
    "3.9.0 attention-B2H8T1024D256-bf16-sm_90 attention_bwd_dkv_kernel": "109, 12 in the loop: descriptors of the keys' and "
    "values' 64 pieces, which ptxas keeps; 58 at 16x64, where the model is 0.30 instead of 0.49",
    "3.9.0 attention-B4H16T2048D128-fp32-sm_80 attention_bwd_dq_kernel": "3: multiply-adds keep whole rows of the operands in "
    "registers, and 16x16 by 8 warps is the smallest tile",
    "3.7.1 attention-B2H8T1024D256-bf16-sm_90 attention_bwd_dkv_kernel": "10, four in loops; 16x64 has none, and a model of "
    "0.31 instead of 0.52",
    "3.7.1 attention-B2H8T1024D256-bf16-sm_90 attention_bwd_dq_kernel": "47, 22 in the loop over masked blocks; 8 warps have "
    "none, and a model of 0.48 instead of 0.86",
    "3.7.1 rms_norm-8192x768-bf16-sm_100 norm_bwd_kernel": "3, none in a loop",
    "3.7.1 layer_norm-8192x1280-bf16-sm_100 norm_bwd_kernel": "9, 6 in the loop, model 0.96; by 8 warps 5, and 0.83",
    "3.7.1 attention-B4H16T1024D80-bf16-sm_80 attention_bwd_dkv_kernel": "6, none in a loop",
    "3.7.1 attention-B8H12T1024D64-dropout-bf16-sm_80 attention_fwd_kernel": "2, none in a loop",
    r"3.7.1 layer_norm-2048x12288-bf16-sm_1[02]0 norm_bwd_kernel": "5 and 21, the row of three chunks that 16 warps just hold",
    r"3.7.1 rms_norm-8192x768-(bf16|fp16)-sm_(86|89|100) norm_bwd_kernel": "3",
    "3.7.1 rms_norm-8192x1280-bf16-sm_80 norm_fwd_kernel": "2",
    "3.7.1 softmax-8191x1023-unaligned-bf16-sm_120 softmax_bwd_kernel": "2",
    r"3.7.1 attention-B4H16T2048D128-(bf16|fp16)-sm_8[69] attention_bwd_dkv_kernel": "2",
    r"3.7.1 attention-B8H12T1024D64-dropout-bf16-sm_8[69] attention_bwd_dq_kernel": "2",
    "3.7.1 attention-B32H32k8T1k4096D128-bf16-sm_120 attention_fwd_kernel": "2",
    "3.7.1 attention-B3H5T1023D64-unaligned-bf16-sm_100 attention_bwd_dkv_kernel": "4, of a tile that goes through registers",
    "3.7.1 attention-B2H8T1024D256-bf16-sm_100 attention_bwd_dkv_kernel": "19, in the 128 registers that 16 "
    "warps leave; on sm_90 it has 10",
    # the tables are chosen by 3.7's and 3.9's machine code
    r"3.6.0 attention-B4H16T(2048D128|1024D80)-(bf16|fp16)-sm_80 attention_bwd_(dkv|dq)_kernel": "2 to 9, none in a loop",
    r"3.6.0 attention-B4H16T2048D128-(bf16|fp16)-sm_90 attention_bwd_dkv_kernel": "5, one in a loop of 427 instructions",
    "3.6.0 attention-B2H8T1024D256-bf16-sm_90 attention_bwd_dq_kernel": "53, 27 in the loop over masked blocks",
    r"3.6.0 attention-\S+-sm_100 attention_(fwd|bwd_dkv)_kernel": "2 to 14, none in a loop",
    r"3.6.0 layer_norm-8192x(768-fp16|1280-bf16)-sm_100 norm_bwd_kernel": "3 and 9, 2 in the loop over rows",
    "3.6.0 layer_norm-8192x768-bf16-sm_120 norm_bwd_kernel": "6 in the loop over rows",
    r"3.6.0 cross_entropy-\S+-sm_100 reduce_kernel": "9 in the one program that adds up the rows' losses",
    "softmax-sm_120 softmax_fwd<(bf16, bf16|f16, f16), false, true, 4, 0>": "CUDA C++: 14, a row of four kept chunks in the 64 "
    "registers that two blocks of 512 threads leave; the other architectures, of the same PTX, have none",
    "attention_bwd-sm_8[69] attention_bwd<b?f16, 128, true>": "CUDA C++: never launched there, it needs more than 99 KB",
    "attention_bwd-sm_8[69] attention_bwd<bf16, 64, true>": "CUDA C++: 42, 19 of them in the loop, model 0.92; float16 "
    "and sm_80, of the same PTX, have none",
}
# the same -> why nothing is asked of the width of its accesses
NARROW = {
    r"cross_entropy-16x128256-\S+ cross_entropy_fwd_long_kernel#4": "adds up the partial sums of split rows: reads no row",
    r"D80-bf16-sm_(86|89|120) attention_bwd_dkv_kernel": "73 %: 16 of its columns, of 32 rows, are 8 bytes of a thread",
    r"3.6.0 attention-B8H12T1024D64-\S*sm_(80|86|89|120) attention_bwd_dkv_kernel": "50 %: it copies lse and delta by cp.async "
    "in the layout of the products, 8 bytes at a time and by every warp",
    r"3.6.0 attention-B4H16T1024D80-bf16-sm_80 attention_bwd_dkv_kernel": "the same",
    r"full-bias-\S+-gfx\w+ attention_bwd_dbias_kernel": "stores the bias's gradient as mfma leaves it, 8 bytes to a lane",
}


# ---- compiling ----


@dataclass(frozen=True)
class _Pretended:
    """A driver for Triton's JIT of a GPU that is not there: it names the target, and its kernels are never loaded."""

    arch: str

    def get_current_target(self) -> GPUTarget:
        wave = FAMILIES[str(family(self.arch))].wave
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


# ---- facts ----


@dataclass(frozen=True)
class Facts:
    registers: int
    spills: int
    shared: int  # bytes, static and dynamic
    code: int  # bytes
    threads: int
    ctas: int  # that fit on a processor
    limit: str
    matrix: dict[str, int]
    wide: float  # share of the hot region's bytes that moves 16 or more at a time
    products: bool  # it has any, on tensor cores or off


def facts(compiled, arch: str) -> Facts:
    products = "tt.dot" in compiled.asm["ttir"]
    if arch.startswith("gfx"):
        return _amd_facts(compiled.asm["amdgcn"], compiled.metadata, products)
    kernel = _read(compiled.asm["cubin"])
    threads = kernel.threads or compiled.metadata.num_warps * 32
    ctas, limit = sass.occupancy(kernel.gpu, kernel.registers, threads, compiled.metadata.shared)
    return Facts(kernel.registers, kernel.spills, compiled.metadata.shared, kernel.code, threads, ctas, limit, kernel.matrix,
                 sass.wide_share(sass.regions(kernel)[0]), products)  # fmt: skip


@functools.lru_cache(maxsize=64)
def _read(cubin: bytes) -> sass.Kernel:
    (kernel,) = sass.read(cubin)
    return kernel


_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def _amd_moves(lines: list[str]) -> list[int]:
    """Bytes of a thread per access to global memory."""
    moves = (re.match(r"\s+(?:global|buffer)_(?:load|store)_(\w+)", line) for line in lines)
    return [_AMD_WIDTHS.get(move[1], 2) for move in moves if move]


def _amd_regions(text: str) -> list[list[str]]:
    """Innermost loops, the one with most bytes first; else the whole kernel. A loop: from a label to the last branch back."""
    lines, labels, spans = text.splitlines(), {}, {}
    for n, line in enumerate(lines):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = n
        elif (jump := re.match(r"\s+s_c?branch\w*\s+(\.LBB\w+)", line)) and jump[1] in labels:
            spans[labels[jump[1]]] = n
    inner = [lines[a:b] for a, b in spans.items() if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans.items())]
    return sorted(filter(_amd_moves, inner), key=lambda loop: sum(_amd_moves(loop)), reverse=True) or [lines]


def _amd_facts(text: str, metadata, products: bool) -> Facts:
    def note(name: str) -> int:
        return int(re.search(rf"{name}\s*[:=]\s*(\d+)", text)[1])

    registers, threads = note(r"\.vgpr_count"), metadata.num_warps * 64
    moved = _amd_moves(_amd_regions(text)[0])
    limits = {"waves": 8 * 4 // metadata.num_warps, "registers": 512 // (-(-registers // 8) * 8) * 4 // metadata.num_warps}
    if metadata.shared:
        limits["shared memory"] = 65536 // metadata.shared
    limit = min(limits, key=limits.__getitem__)
    return Facts(
        # scratch memory in words; scalar registers spill into lanes of vector registers, at no access
        registers, note(r"\.private_segment_fixed_size") // 4, metadata.shared, note("codeLenInByte"), threads,
        limits[limit], limit, dict(collections.Counter(re.findall(r"\b(v_mfma)_", text))),
        sum(b for b in moved if b >= 16) / sum(moved) if moved else 1.0, products,
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One kernel of a case: its facts, or why there are none; the hot region's figures where they were asked for."""

    case: Case
    whose: str
    kernel: str
    facts: Facts | None = None
    error: str = ""
    regions: tuple[sass.Region, ...] = ()
    lacks: tuple[str, ...] = ()  # what else was asked of it, in words
    states: str = ""  # what the figures do not tell

    @property
    def id(self) -> str:
        return f"{self.case.id} {self.kernel}"

    def excepted(self, table: dict[str, str]) -> bool:
        return any(re.search(pattern, f"{triton.__version__} {self.id}") for pattern in table)

    def faults(self) -> list[str]:
        """What is wrong with it, on any Triton."""
        if self.facts is None:
            return [self.error]
        f, arch, problem, found = self.facts, self.case.arch, self.case.problem, list(self.lacks)
        if f.shared > FAMILIES[arch].shared * 1024:
            found.append(f"needs {f.shared} bytes of shared memory, {arch} has {FAMILIES[arch].shared} KB")
        if not f.ctas:
            found.append(f"does not fit on a processor: {f.limit}")
        if f.spills and not self.excepted(SPILLS):
            found.append(f"spills: {f.spills} accesses to local memory")
        want = problem.matrix if problem.matrix and arch.startswith("sm_") else MATRIX[arch]
        if f.products and self.case.dtype != "fp32" and want not in f.matrix:
            found.append(f"has products but no {want}, only {f.matrix or 'scalar ones'}")
        if problem.aligned and f.wide < problem.wide and not self.excepted(NARROW):
            found.append(f"moves {f.wide:.0%} of its bytes 16 at a time, expected {problem.wide:.0%}")
        return found

    def budget(self) -> dict[str, int]:
        return {name: getattr(self.facts, name) for name in ("registers", "shared", "code", "spills")}

    def overruns(self, baseline: dict) -> list[str]:
        """Where it needs more than the baseline's figures and their slack."""
        if self.facts is None:
            return []
        allowed = baseline["kernels"].get(self.id)
        if allowed is None:
            return ["is not in the baseline: --write-baseline"]
        return [
            f"{name} {value}, the baseline has {allowed[name]}"
            for name, value in self.budget().items()
            if value > allowed[name] + (max(allowed[name] // 10, STEPS[name]) if name in STEPS else 0)
        ]

    def changes(self, baseline: dict) -> str:
        before = baseline["kernels"].get(self.id) if self.facts else None
        now = self.budget() if before else {}
        return ", ".join(f"{name} {before[name]} -> {value}" for name, value in now.items() if value != before[name])


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
        return [Row(case, whose, "(launcher)", error=f"does not launch: {e}")]
    found: list[Row] = []
    kernels, names = [], collections.Counter()
    for launch in launches:
        try:
            compiled = compile_launch(launch, case.arch)
        except Exception as e:  # whatever the compiler throws belongs in the table, beside the kernels that do compile
            name, compiled = launch.kernel.__name__, None
            row = Row(case, whose, name, error=f"does not compile: {type(e).__name__}: {_reason(e)}")
        else:
            name = compiled.name
            row = Row(
                case, whose, name, facts(compiled, case.arch), regions=_regions(launch, compiled, case) if figures else ()
            )
        if compiled is not None and any(compiled is other for other in kernels):
            continue  # the JIT has it already
        kernels.append(compiled)
        names[name] += 1
        if names[name] > 1:
            row = Row(case, whose, f"{name}#{names[name]}", row.facts, row.error, row.regions)
        found.append(row)
    return found


def useful(launch: Launch, columns: int) -> float:
    """The share of a row's lanes that are inside it: rows are padded to whole blocks, our norms' to whole chunks."""
    block = next((launch.parameters[n] for n in ("BLOCK_N", "CHUNK", "BLOCK_SIZE") if n in launch.parameters), None)
    return columns / (-(-columns // block) * block) if block and columns else 1.0


def _regions(launch: Launch, compiled, case: Case) -> tuple[sass.Region, ...]:
    if "cubin" not in compiled.asm:
        return ()
    f, kernel = facts(compiled, case.arch), _read(compiled.asm["cubin"])
    grid = functools.reduce(lambda a, b: a * b, launch.grid)
    ctas = max(1, min(f.ctas, -(-grid // FAMILIES[case.arch].processors)))
    warps = launch.parameters.get("num_warps", 4)  # of the loops; specialised warps beside them wait and copy
    share = useful(launch, case.problem.columns)
    return tuple(sass.region(kernel, code, warps, ctas, share) for code in sass.regions(kernel))


# ---- baseline ----


def compiler(backend: str) -> str:
    """Its version."""
    if backend == "triton":
        return triton.__version__
    from . import static_cuda

    return static_cuda.version()


def load_baseline(backend: str = "triton") -> dict:
    path = BASELINE.with_name(f"{backend}.json")
    return json.loads(path.read_text()) if path.exists() else {backend: compiler(backend), "kernels": {}}


def comparable(baseline: dict) -> bool:
    """The figures of one compiler say nothing of another's."""
    (backend,) = baseline.keys() - {"kernels"}
    return baseline[backend].split(".")[:2] == compiler(backend).split(".")[:2]


def write_baseline(found: Iterable[Row], kept: dict, backend: str = "triton") -> None:
    """One kernel a line, so that a diff reads; `kept` stays beside what was found."""
    kernels = {**kept, **{r.id: r.budget() for r in found if r.facts}}
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(kernels[k])}" for k in sorted(kernels))
    BASELINE.parent.mkdir(exist_ok=True)
    path = BASELINE.with_name(f"{backend}.json")
    path.write_text(f'{{\n "{backend}": "{compiler(backend)}",\n "kernels": {{\n{lines}\n }}\n}}\n')


# ---- table ----


def _figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _occupancy(f: Facts, arch: str) -> str:
    """Resident warps of those that a processor can hold; of AMD's, waves."""
    warp, most = (64, 32) if arch.startswith("gfx") else (32, sass.GPUS[int(arch[3:])].warps)
    return f"{f.ctas * f.threads / warp / most:.0%}"


def show(row: Row, baseline: dict) -> dict[str, str]:
    """A row's cells by column; of its regions the hottest."""
    cells = {"whose": row.whose, "problem": row.case.problem.id, "dtype": row.case.dtype, "arch": row.case.arch,
             "kernel": row.kernel}  # fmt: skip
    if row.facts is None:
        return {**cells, "notes": row.error if row.whose != "ours" else ""}
    f, hot = row.facts, next(iter(row.regions), None)
    cells |= {"regs": str(f.registers), "spills": str(f.spills), "smem KB": f"{f.shared / 1024:.3g}",
              "CTAs x threads": f"{f.ctas}x{f.threads}",
              "occupancy": _occupancy(f, row.case.arch), "limit": f.limit, "code KB": f"{f.code / 1024:.1f}",
              "16 B": f"{f.wide:.0%}", "matrix": " ".join(f"{n} {op}" for op, n in f.matrix.items())}  # fmt: skip
    if hot:
        cells |= {
            "hot loop": str(hot.instructions),
            "mix": " ".join(f"{n} {kind}" for kind, n in list(hot.mix.items())[:4]),
            "tensor/other": _figure(hot.tensor_per_other),
            "ins/MF": _figure(hot.per_mflop, 0),
            "issue": str(hot.stalls),
            "KB in flight (Little)": f"{hot.in_flight_sm / 1024:.1f} ({hot.little_bytes / 1024:.1f})",
            "binds": hot.binding,
            "bound": _figure(hot.bound),
            "no overlap": _figure(hot.no_overlap),
            "model": _figure(hot.model),
        }
    cells["notes"] = "; ".join(filter(None, (row.changes(baseline) if comparable(baseline) else "", row.states)))
    return cells


def header(shown: list[dict[str, str]]) -> list[str]:
    """The columns that have anything in them, in order."""
    longest = max(shown, key=len)
    return [name for name in longest if any(cells.get(name) for cells in shown)]


def markdown(shown: list[dict[str, str]]) -> str:
    names = header(shown)
    lines = [names, ["---"] * len(names), *([cells.get(n, "") for n in names] for cells in shown)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=["triton", "cuda"], default="triton")
    parser.add_argument("--subset", choices=["pr", "full"], default="pr", help="pr: main problems in bf16, or sm_80 and sm_90")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this architecture (may be repeated)")
    parser.add_argument(
        "--op", action="append", choices=sorted({p.op for p in PROBLEMS}), help="only this op (may be repeated)"
    )
    parser.add_argument("--problem", metavar="TEXT", default="", help="only problems whose name has TEXT")
    parser.add_argument("--against", choices=["liger"], help="the same problems' kernels of an installed peer beside ours")
    parser.add_argument("--facts", action="store_true", help="no bounds and model: faster")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="also write every figure to FILE")
    parser.add_argument("--markdown", metavar="FILE", type=pathlib.Path, help="also write the table to FILE")
    parser.add_argument("--write-baseline", action="store_true", help="renew the budget with what was compiled")
    args = parser.parse_args()
    cuda = args.backend == "cuda"
    if (reason := absence()) is not None and not cuda:
        parser.error(reason)
    if INTERPRETED and not cuda:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    if args.against and cuda:
        parser.error(f"--against {args.against}: it has no kernels in CUDA C++")
    if args.against:
        try:
            import liger_kernel.ops  # noqa: F401
        except ImportError as e:
            parser.error(f"--against {args.against}: {e} (pip install liger-kernel)")
    make, read = matrix, rows
    if cuda:
        from . import static_cuda

        if static_cuda.NVCC is None:
            parser.error("no nvcc on the PATH")
        make, read = static_cuda.matrix, static_cuda.rows
    cases = [
        case
        for case in make(args.subset, args.arch or ())
        if (not args.op or case.problem.op in args.op) and args.problem in case.problem.id
    ]
    if not cases:
        parser.error("no case is left of these options; --problem and --subset full would widen them")

    console = Console(width=None if sys.stdout.isatty() else 320)
    baseline, found = load_baseline(args.backend), []
    whose = ["ours", *([args.against] if args.against else [])]
    for case in track(cases, "compiling", console=Console(stderr=True), transient=True):
        for who in whose:
            found += read(case, who, figures=not args.facts)
    shown = [show(r, baseline) for r in found]
    made_by = f"{args.backend} {compiler(args.backend)}"
    table = Table(title=f"Machine code from {made_by}: facts, bounds and estimates; nothing was executed")
    names = header(shown)
    for name in names:
        table.add_column(name, justify="left" if name in ("problem", "kernel", "mix", "notes") else "right")
    for cells in shown:
        table.add_row(*(cells.get(n, "") for n in names), style="dim" if cells["whose"] != "ours" else None)
    console.print(table)
    if args.against and (lacking := {case.problem.id: None for case in cases if case.problem.liger is None}):
        console.print(f"{args.against} has no kernel beside ours for {', '.join(lacking)}")
    if not comparable(baseline):
        console.print(f"The baseline is of {args.backend} {baseline[args.backend]}, this is {made_by}: not compared.")
    if args.markdown:
        args.markdown.write_text(markdown(shown))
    if args.json:
        figures = [
            {"id": r.id, "whose": r.whose, "op": r.case.problem.op, "problem": r.case.problem.name, "arch": r.case.arch,
             "dtype": r.case.dtype, "kernel": r.kernel, "facts": r.facts and asdict(r.facts), "error": r.error,
             "regions": [asdict(g) for g in r.regions]} for r in found
        ]  # fmt: skip
        args.json.write_text(json.dumps({args.backend: compiler(args.backend), "kernels": figures}, indent=1) + "\n")
    mine = [r for r in found if r.whose == "ours"]
    faults = [f"{r.id} {fault}" for r in mine for fault in r.faults()]
    if args.write_baseline:
        whole = args.subset == "full" and len(cases) == len(make("full"))
        write_baseline(mine, kept={} if whole else baseline["kernels"], backend=args.backend)
    elif comparable(baseline):
        unknown = [r for r in mine if r.facts and r.id not in baseline["kernels"]]
        faults += [f"{r.id} {overrun}" for r in mine if r not in unknown for overrun in r.overruns(baseline)]
        faults += (
            [f"{len(unknown)} kernels are not in the baseline, {unknown[0].id} the first: --write-baseline"] if unknown else []
        )
    for fault in faults:
        print(fault, file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
