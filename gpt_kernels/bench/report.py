"""A result as people read it: a table on the terminal, Markdown, CSV, plots, and an HTML page that needs nothing else."""

from __future__ import annotations

import collections
import csv
import io
import math
import pathlib
import statistics
from collections.abc import Sequence

from .. import process
from ..errors import need
from ..table import duration as duration
from ..table import print_table
from .contention import STAYED
from .result import dumps, load
from .settings import PRODUCTS

VARIANTS = ("eager", "compile", "ours")  # columns of their own; others share one


# ---- one row in words ----


def mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def figure(row: dict, variant: str, name: str = "seconds") -> float | None:
    return row.get("variants", {}).get(variant, {}).get(name)


def timing(row: dict, variant: str) -> str:
    if (seconds := figure(row, variant)) is None:
        return "-"
    spread = figure(row, variant, "spread")
    host = figure(row, variant, "host")
    return (
        duration(seconds)
        + (f" ±{spread / seconds:.0%}" if spread is not None else "")
        + (f", host {duration(host)}" if host else "")
        + (" disturbed" if stayed_disturbed(row) else "")
    )


def stayed_disturbed(row: dict) -> bool:
    return row.get("disturbed", 0.0) > STAYED


def disturbance(result: dict) -> str:
    """The first line of a report on a machine that had other work; "" on a quiet one."""
    rows = [row for row in result["rows"] if not row["mismatch"]]
    stayed = sum(map(stayed_disturbed, rows))
    repeated = sum(row.get("repeated", 0) for row in rows)
    if not stayed:
        return f"{repeated} samples were taken again: other work on the machine disturbed them" if repeated else ""
    return (
        f"DISTURBED: in {stayed} of {len(rows)} rows other work on the machine kept more than {STAYED:.0%} of the samples"
        f" waiting, also when they were taken again ({repeated} were): their times are too long. Measure on a quiet machine."
    )


def other_state(row: dict, variant: str) -> str:
    """The time in the state of the caches that the row's seconds are not from."""
    seconds = figure(row, variant, "cold" if row.get("timed") == "warm" else "warm")
    return "-" if seconds is None else duration(seconds)


def rate(row: dict, variant: str = "ours") -> str:
    seconds = figure(row, variant)
    if seconds is None:
        return "-"
    moved, done = row["bytes"] / seconds / 1e9, row["flops"] / seconds / 1e9
    return f"{moved:.3g} GB/s" if row["bound"] == "copy" else f"{done:.3g} GFLOP/s"


def ratio(row: dict) -> str:
    return "-" if row.get("ratio") is None else f"{row['ratio']:.2f}x"


def off_by(row: dict, variant: str) -> str:
    """The largest relative error of a variant's output and gradients, against the op in float64."""
    errors = row.get("variants", {}).get(variant, {}).get("errors")
    return f"{max(errors):.1e}" if errors else "-"


def others(row: dict) -> list[str]:
    """Variants beyond the three that have a column."""
    return [name for name in row.get("variants", {}) if name not in (*VARIANTS, PRODUCTS)]


def products(row: dict) -> str:
    """Of a whole model: the time of its matrix products alone, and how near ours and eager come to it."""
    if (alone := figure(row, PRODUCTS)) is None:
        return ""
    shares = [f"{name} {alone / seconds:.0%}" for name in VARIANTS if (seconds := figure(row, name))]
    return f"{duration(alone)}: {', '.join(shares)}"


HEADS = (
    "op", "shape", "dtype", "direction", "eager", "compile", "ours", "ours cold", "vs better", "ours, of limit",
    "products alone, of the step", "peak MiB eager / compile / ours", "off by eager / compile / ours", "others", "served by",
)  # fmt: skip


def cells(row: dict) -> list[str]:
    head = [row["op"], row["shape"], row["dtype"], row["direction"]]
    if row["mismatch"]:
        return [*head, "no numbers:", row["mismatch"], *[""] * (len(HEADS) - 7), row["served"]]
    peaks = " / ".join(mib(figure(row, v, "memory")) for v in VARIANTS)  # type: ignore[arg-type]
    errors = " / ".join(off_by(row, v) for v in VARIANTS)
    more = "\n".join(f"{name} {timing(row, name)}" for name in others(row))
    times = [*(timing(row, v) for v in VARIANTS), other_state(row, "ours"), ratio(row)]
    return [*head, *times, f"{rate(row)} {row['of_limit']:.0%}", products(row), peaks, errors, more, row["served"]]


def heads(result: dict) -> tuple[str, ...]:
    warm = any(row.get("timed") == "cold" for row in result["rows"])
    return tuple("ours warm" if warm and head == "ours cold" else head for head in HEADS)


def left_out(rows: Sequence[dict]) -> list[str]:
    """Every variant without numbers, with its reason: nothing is dropped in silence."""
    counts = collections.Counter((name, reason, row["op"]) for row in rows for name, reason in row.get("absent", {}).items())
    merged: dict[tuple[str, str], list[str]] = {}
    for (name, reason, op), n in counts.items():
        merged.setdefault((name, reason), []).append(f"{op} ({n})" if n > 1 else op)
    return [f"{name}: {reason} [{', '.join(ops)}]" for (name, reason), ops in merged.items()]


def limits_text(result: dict) -> str:
    parts = [f"{name} {value / 1e9:.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}" for name, value in result["limits"].items()]
    return "limits, medians of the run: " + (", ".join(parts) or "none")


def growth(rows: Sequence[dict], variant: str, direction: str) -> tuple[float, int] | None:
    """(exponent, longest length): peak memory grows like length ** exponent over the longer half of the lengths measured."""
    points = sorted(
        (row["length"], figure(row, variant, "memory"))
        for row in rows
        if row.get("length") and row["direction"] == direction and figure(row, variant, "memory")
    )
    if len(points) < 3:
        return None
    points = points[-max(3, len(points) // 2) :]
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))  # type: ignore[arg-type]
    return statistics.linear_regression(x, y).slope, points[-1][0]


def growth_text(rows: Sequence[dict]) -> list[str]:
    lines = []
    for direction in ("fwd", "bwd"):
        found = {name: growth(rows, name, direction) for name in ("ours", "reference")}
        parts = [f"{name} T^{g[0]:.2f} (to T = {g[1]})" for name, g in found.items() if g]
        lines += [f"attention {direction}, growth of peak extra memory with the sequence: {', '.join(parts)}"] if parts else []
    return lines


def show(result: dict) -> None:
    """On the terminal."""
    facts = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    columns = heads(result)
    right = [i for i, head in enumerate(columns) if head in (*VARIANTS, "ours cold", "ours warm", "vs better")]
    if line := disturbance(result):
        print(line)
    if result["rows"]:
        caption = f"{facts}\n{limits_text(result)}"
        # wide enough for every column also where there is no terminal
        print_table(columns, [cells(row) for row in result["rows"]], right=right, caption=caption, width=240)
    for line in [*growth_text(result["rows"]), *(f"no numbers for {line}" for line in left_out(result["rows"]))]:
        print(line)
    for target, reason in result["failed"].items():
        print(f"failed: {target}: {reason.splitlines()[0]}")


# ---- Markdown: the GPU kit's report and the README ----


def markdown_cell(row: dict | None) -> str:
    if row is None:
        return ""
    if row["mismatch"]:
        return row["mismatch"]
    seconds, spread = figure(row, "ours"), figure(row, "ours", "spread")
    noisy = f" ±{spread / seconds:.0%}" if seconds and spread and spread / seconds > 0.2 else ""
    host = f", host {duration(at)}" if (at := figure(row, "ours", "host")) else ""
    return f"{ratio(row)} ({duration(seconds or 0.0)}{noisy}{host}{' disturbed' * stayed_disturbed(row)})"


def markdown(rows: Sequence[dict]) -> str:
    """A line per case, a column per dtype: how often faster than the better of eager and torch.compile, and our time."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    lines = [
        f"| op | direction | {' | '.join(dtypes)} | peak MiB, {dtypes[0]}: eager / compile / ours |",
        "|---|---|" + "---|" * (len(dtypes) + 1),
    ]
    for op, shape, direction in dict.fromkeys((r["op"], r["shape"], r["direction"]) for r in rows):
        by_dtype = {r["dtype"]: r for r in rows if (r["op"], r["shape"], r["direction"]) == (op, shape, direction)}
        first = by_dtype.get(dtypes[0], {})
        peaks = " / ".join(mib(figure(first, v, "memory")) for v in VARIANTS)  # type: ignore[arg-type]
        columns = (f"{op} {shape}", direction, *(markdown_cell(by_dtype.get(d)) for d in dtypes), peaks)
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


# ---- CSV ----

COLUMNS = (
    "op", "shape", "dtype", "direction", "length", "variant", "seconds", "spread", "timed", "warm", "cold", "first", "launch",
    "memory", "bytes", "flops", "GB/s", "GFLOP/s", "bound", "of_limit", "ours_faster", "off_by", "served", "host",
    "disturbed", "note",
)  # fmt: skip


def csv_text(rows: Sequence[dict]) -> str:
    """A line per row and variant; a variant without numbers has its reason as note."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for name, v in row.get("variants", {}).items():
            facts = {"variant": name, "GB/s": row["bytes"] / v["seconds"] / 1e9, "GFLOP/s": row["flops"] / v["seconds"] / 1e9}
            facts["of_limit"] = row["of_limit"] * row["variants"]["ours"]["seconds"] / v["seconds"]
            facts["off_by"] = max(v["errors"]) if v.get("errors") else None
            facts["ours_faster"] = v["seconds"] / row["variants"]["ours"]["seconds"]
            writer.writerow({row["timed"]: v["seconds"]} | row | v | facts)
        for name, reason in {**({"ours": row["mismatch"]} if row["mismatch"] else {}), **row.get("absent", {})}.items():
            writer.writerow(row | {"variant": name, "note": reason})
    return file.getvalue()


# ---- HTML ----


def summary(rows: Sequence[dict]) -> list[tuple[str, str, str]]:
    """(op, how often faster than the better of eager and compile: geometric mean and range, of how many rows)"""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        ratios = [row["ratio"] for row in rows if row["op"] == op and row.get("ratio") and not row["tiny"]]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            lines.append((op, f"{mean:.2f}x", f"{min(ratios):.2f}x to {max(ratios):.2f}x, {len(ratios)} rows"))
    return lines


def html(result: dict, figures: dict[str, str]) -> str:
    """figures: SVG by name, as plots.draw makes them."""
    import jinja2

    from . import plots

    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("report.html")
    rows = result["rows"]
    by_target = {target: [r for r in rows if r["target"] == target] for target in dict.fromkeys(r["target"] for r in rows)}
    return template.render(
        result=result, disturbance=disturbance(result), heads=heads(result),
        by_target=by_target, cells=cells, summary=summary(rows), limits=limits_text(result),
        left_out=left_out(rows), growth=growth_text(rows), wrong=[row for row in rows if row["mismatch"]],
        figures=[(plots.TITLES[name], plots.themed(svg, name)) for name, svg in figures.items()],
    )  # fmt: skip


# ---- files ----


def write(result: dict, folder: pathlib.Path) -> str:
    """Everything but the table; each file is whole or as it was. Returns what was written, in words."""
    process.write(folder / "bench.json", dumps(result))
    return render(result, folder, ["bench.json"])


def render(result: dict, folder: pathlib.Path, written: list[str]) -> str:
    from . import plots

    process.write(folder / "bench.csv", csv_text(result["rows"]))
    svgs, pngs = plots.draw(result)
    (folder / "plots").mkdir(exist_ok=True)
    for name in plots.TITLES:
        for kind, drawn in (("svg", svgs), ("png", pngs)):
            path = folder / "plots" / f"{name}.{kind}"
            if name in drawn:
                process.write(path, drawn[name])
            else:
                path.unlink(missing_ok=True)  # of an earlier run: it would pass for this one's
    process.write(folder / "report.html", html(result, svgs))
    return f"written: {', '.join([*written, 'bench.csv', 'report.html', f'{len(svgs)} plots'])} in {folder}"


def rewrite(result: str, out: str) -> None:
    """`bench report`: from a result's JSON."""
    need("bench", "rich", "matplotlib", "numpy", "jinja2")
    loaded = load(result)
    written = render(loaded, process.out_folder(out), [])
    show(loaded)
    print(written)
