"""Every kernel for every GPU compiled on this machine, and what its machine code says: `python -m tools.static`.

--backend triton compiles the Triton kernels (tools/static_triton.py), cuda csrc/cuda (tools/static_cuda.py). Facts, bounds and
the model are those of tools/model.py: nothing here was executed, nothing here is performance. A kernel that does not pass
tools/gates.py fails the run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import track
from rich.table import Table

from gpt_kernels.architectures import ARCHITECTURES, NVIDIA
from gpt_kernels.triton import INTERPRETED, absence

from . import amdgcn
from .gates import Budget, Facts, Row
from .problems import ARCHS, PROBLEMS


def _figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _occupancy(f: Facts, arch: str) -> str:
    """Resident warps of those that a processor can hold; of AMD's, waves."""
    most = NVIDIA[arch].warps if arch in NVIDIA else amdgcn.WAVES
    return f"{f.ctas * f.threads / ARCHITECTURES[arch].wave / most:.0%}"


def show(row: Row, budget: Budget) -> dict[str, str]:
    """A row's cells by column; of its regions the hottest."""
    cells = {"whose": row.whose, "problem": row.case.problem.id, "dtype": row.case.dtype, "arch": row.case.arch,
             "kernel": row.kernel}  # fmt: skip
    if row.facts is None:
        return {**cells, "notes": row.error if row.whose != "ours" else ""}
    f, hot = row.facts, next(iter(row.regions), None)
    cells |= {
        "regs": str(f.registers),
        "spills": str(f.spills),
        "smem KB": f"{f.shared / 1024:.3g}",
        "CTAs x threads": f"{f.ctas}x{f.threads}",
        "occupancy": _occupancy(f, row.case.arch),
        "limit": f.limit,
        "code KB": f"{f.code / 1024:.1f}",
        "16 B": f"{f.wide:.0%}",
        "matrix": " ".join(f"{n} {op}" for op, n in f.matrix.items()),
    }
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
    changes = row.changes(budget.kernels) if budget.comparable(row.compiler) else ""
    cells["notes"] = "; ".join(filter(None, (changes, row.states)))
    return cells


def header(shown: list[dict[str, str]]) -> list[str]:
    """The columns that have anything in them, in order."""
    longest = max(shown, key=len)
    return [name for name in longest if any(cells.get(name) for cells in shown)]


def markdown(shown: list[dict[str, str]]) -> str:
    names = header(shown)
    lines = [names, ["---"] * len(names), *([cells.get(n, "") for n in names] for cells in shown)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(found: list[Row]) -> list[dict]:
    """Every figure, for --json."""
    return [
        {
            "id": r.id,
            "whose": r.whose,
            "op": r.case.problem.op,
            "problem": r.case.problem.of.name,
            "arch": r.case.arch,
            "dtype": r.case.dtype,
            "kernel": r.kernel,
            "facts": r.facts and asdict(r.facts),
            "error": r.error,
            "regions": [asdict(g) for g in r.regions],
        }
        for r in found
    ]


def overruns(rows: list[Row], budget: Budget) -> list[str]:
    """Of those that are not in the budget one line for all."""
    unknown = [r for r in rows if r.facts and r.id not in budget.kernels]
    found = [f"{r.id} {overrun}" for r in rows if r not in unknown for overrun in r.overruns(budget.kernels)]
    if unknown:
        found.append(f"{len(unknown)} kernels are not in the baseline, {unknown[0].id} the first: --write-baseline")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.static", description=__doc__.partition("\n")[0])
    ops = sorted({p.op for p in PROBLEMS})
    parser.add_argument("--backend", choices=["triton", "cuda"], default="triton")
    parser.add_argument("--subset", choices=["pr", "full"], default="pr", help="pr: main problems in bf16, or sm_80 and sm_90")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this architecture (may be repeated)")
    parser.add_argument("--op", action="append", choices=ops, help="only this op (may be repeated)")
    parser.add_argument("--problem", metavar="TEXT", default="", help="only problems whose name has TEXT")
    parser.add_argument("--against", choices=["liger"], help="the same problems' kernels of an installed peer beside ours")
    parser.add_argument("--facts", action="store_true", help="no bounds and model: faster")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="also write every figure to FILE")
    parser.add_argument("--markdown", metavar="FILE", type=pathlib.Path, help="also write the table to FILE")
    parser.add_argument("--write-baseline", action="store_true", help="renew the budget with what was compiled")
    args = parser.parse_args(argv)
    if args.backend == "triton":
        if (reason := absence()) is not None:
            parser.error(reason)
        if INTERPRETED:
            parser.error("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    elif args.against:
        parser.error(f"--against {args.against}: it has no kernels in CUDA C++")
    if args.against:
        try:
            import liger_kernel.ops  # noqa: F401
        except ImportError as e:
            parser.error(f"--against {args.against}: {e} (pip install liger-kernel)")
    backend = importlib.import_module(f".static_{args.backend}", __package__)
    if args.backend == "cuda" and backend.NVCC is None:
        parser.error("no nvcc on the PATH")
    cases = [
        case
        for case in backend.matrix(args.subset, args.arch or ())
        if (not args.op or case.problem.op in args.op) and args.problem in case.problem.id
    ]
    if not cases:
        parser.error("no case is left of these options; --problem and --subset full would widen them")

    console = Console(width=None if sys.stdout.isatty() else 320)
    compiler, found = backend.version(), []
    budget = Budget.load(args.backend, compiler)
    whose = ["ours", *([args.against] if args.against else [])]
    for case in track(cases, "compiling", console=Console(stderr=True), transient=True):
        for who in whose:
            found += backend.rows(case, who, figures=not args.facts)
    shown = [show(r, budget) for r in found]
    made_by = f"{args.backend} {compiler}"
    table = Table(title=f"Machine code from {made_by}: facts, bounds and estimates; nothing was executed")
    names = header(shown)
    for name in names:
        table.add_column(name, justify="left" if name in ("problem", "kernel", "mix", "notes") else "right")
    for cells in shown:
        table.add_row(*(cells.get(n, "") for n in names), style="dim" if cells["whose"] != "ours" else None)
    console.print(table)
    if args.against and (lacking := {case.problem.id: None for case in cases if not case.problem.has_liger}):
        console.print(f"{args.against} has no kernel beside ours for {', '.join(lacking)}")
    if not budget.comparable(compiler):
        console.print(f"The baseline is of {args.backend} {budget.compiler}, this is {made_by}: not compared.")
    if args.markdown:
        args.markdown.write_text(markdown(shown))
    if args.json:
        args.json.write_text(json.dumps({args.backend: compiler, "kernels": report(found)}, indent=1) + "\n")
    mine = [r for r in found if r.whose == "ours"]
    faults = [f"{r.id} {fault}" for r in mine for fault in r.faults()]
    if args.write_baseline:
        whole = args.subset == "full" and len(cases) == len(backend.matrix("full"))
        new = {r.id: r.budget() for r in mine if r.facts}
        Budget(args.backend, compiler, new if whole else {**budget.kernels, **new}).save()
    elif budget.comparable(compiler):
        faults += overruns(mine, budget)
    for fault in faults:
        print(fault, file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
