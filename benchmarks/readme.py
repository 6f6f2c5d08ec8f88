"""Writes the measured numbers and plots of README.md from results: of `python -m gpt_kernels bench`, of its ops with --reuse,
and of the demo.

python -m benchmarks.readme benchmarks/results/NAME.json benchmarks/results/REUSE.json benchmarks/results/DEMO.json
"""

import argparse
import json
import pathlib
from collections.abc import Callable

from gpt_kernels.bench import plots
from gpt_kernels.bench.report import duration, growth_text, markdown_cell
from gpt_kernels.bench.run import load
from gpt_kernels.commands.demo import table
from gpt_kernels.process import write

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
LARGE = 1 << 23  # bytes that must move: below it much is found in cache
PLOTS = ("speed", "memory", "length-throughput", "length-memory")
BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"


def rows_table(lines: list[list[str]]) -> str:
    header, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def by_dtype(rows: list[dict], cell: Callable[[dict | None], str]) -> str:
    """A line per case and direction, a column per dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    lines = [["", *dtypes]]
    for op, shape, direction in dict.fromkeys(map(case_of, rows)):
        found = {row["dtype"]: row for row in rows if case_of(row) == (op, shape, direction)}
        lines.append([f"{op} {shape}, {direction}", *(cell(found.get(dtype)) for dtype in dtypes)])
    return rows_table(lines)


def case_of(row: dict) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["direction"]


def shares(rows: list[dict], reused: list[dict]) -> str:
    """Of the copy rate: of ours as it is / with memory reused."""

    def share(row: dict | None) -> str:
        return "-" if row is None or row["mismatch"] or row["bound"] != "copy" else f"{row['of_limit'] * 100:.0f} %"

    plain = {(*case_of(row), row["dtype"]): row for row in rows}
    return by_dtype(
        [row for row in reused if not row["mismatch"] and row["bytes"] >= LARGE],
        lambda row: "" if row is None else f"{share(plain.get((*case_of(row), row['dtype'])))} / {share(row)}",
    )


def small(rows: list[dict]) -> str:
    """What tiny calls cost, in a sentence: they are slower than eager where Python is what costs."""
    tiny = [row for row in rows if not row["mismatch"] and row["tiny"]]
    if not tiny:
        return ""
    slow = [row for row in tiny if row["ratio"] is not None and row["ratio"] < 1]
    times = [row["variants"]["ours"]["seconds"] for row in tiny]
    return (
        f"On tiny inputs a call costs {duration(min(times))} to {duration(max(times))}; in {len(slow)} of {len(tiny)} such rows"
        " eager or the compiler is faster, the JSON says where."
    )


def numbers(result: dict, reuse: dict, demo: dict, names: tuple[str, str, str], drawn: list[str]) -> str:
    environment, limits, s = result["environment"], result["limits"], demo["settings"]
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['isa']}, {environment['threads']} threads"
    measured = ", ".join(f"{key} {value / 1e9:.0f} {'GB/s' if key == 'copy' else 'GFLOP/s'}" for key, value in limits.items())
    sizes = (
        f"{s['layers']} layers, width {s['width']}, {s['batch']} x {s['context']} tokens, dropout {s['dropout']}, {s['dtype']}"
    )
    header, rows = table(demo["runs"])
    pictures = [f"![{plots.TITLES[plot]}](benchmarks/results/plots/{plot}.svg)" for plot in drawn]
    files = ", ".join(f"`benchmarks/results/{name}`" for name in names)
    growth = "; ".join(growth_text(result["rows"]))
    told = f" ({result['note']})" if result.get("note") else ""
    return (
        f"""
On {where}, torch {environment["torch"]}, {environment["date"][:10]}; in the same run {measured}.
The machine is shared: read the ratios. All of it: {files}.

`make demo`, a GPT-2 of {sizes}:

{rows_table([header, *map(list, rows)])}

`{result["command"]}`{told}: how often faster than the better of eager and `torch.compile`, our time, and half the
distance between its quartiles where that is above 20 %. {small(result["rows"])}

{by_dtype([row for row in result["rows"] if row["main"]], markdown_cell)}

{" ".join(pictures)}
{f"{growth}." if growth else ""}

Share of the copy rate that was measured among a row's own rounds, for the bytes that must move. First as it is, where a result
above 32 MB is fresh pages from the system at every call (a smaller one comes from the heap, which the benchmark keeps from
being given back between calls); then with `reuse_memory()`, by
`{reuse["command"]}`.

{shares(result["rows"], reuse["rows"])}
""".rstrip()
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=pathlib.Path)
    parser.add_argument("reuse", type=pathlib.Path)
    parser.add_argument("demo", type=pathlib.Path)
    args = parser.parse_args()
    result, reuse, demo = load(args.result), load(args.reuse), json.loads(args.demo.read_text())
    svgs, _ = plots.draw(result)
    folder = ROOT / "benchmarks" / "results" / "plots"
    folder.mkdir(exist_ok=True)
    drawn = [plot for plot in PLOTS if plot in svgs]
    for plot in drawn:
        write(folder / f"{plot}.svg", svgs[plot])
    readme = README.read_text()
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    names = (args.result.name, args.reuse.name, args.demo.name)
    write(README, before + BEGIN + numbers(result, reuse, demo, names, drawn) + END + after)


if __name__ == "__main__":
    main()
