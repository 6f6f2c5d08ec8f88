"""Writes the measured numbers of README.md from a JSON file of `python -m benchmarks --json` and one of the demo.

python -m benchmarks.readme benchmarks/results/NAME.json benchmarks/results/DEMO.json
"""

import argparse
import json
import pathlib

README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    if row["mismatch"]:
        return row["mismatch"]
    spread = row["spread"]["ours"] / row["seconds"]["ours"]
    noisy = f" ±{spread:.0%}" if spread > 0.2 else ""
    return f"{row['ratio']:.2f}x ({row['seconds']['ours'] * 1e3:.3g} ms{noisy})"


def op_table(parts: list[dict]) -> str:
    rows = [row for part in parts for row in part["rows"]]
    lines = ["| op | direction | float32 | bfloat16 | peak MiB, float32: eager / compile / ours |", "|---|---|---|---|---|"]
    for op, shape, direction in dict.fromkeys((r["op"], r["shape"], r["direction"]) for r in rows):
        by_dtype = {r["dtype"]: r for r in rows if (r["op"], r["shape"], r["direction"]) == (op, shape, direction)}
        memory = by_dtype["float32"].get("memory", {})
        peaks = " / ".join(
            f"{memory[v] / 2**20:.0f}" if memory.get(v) is not None else "-" for v in ("eager", "compile", "ours")
        )
        cells = (f"{op} {shape}", direction, cell(by_dtype["float32"]), cell(by_dtype.get("bfloat16")), peaks)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def demo_table(demo: dict) -> str:
    from gpt_kernels.demo import table

    header, rows = table(demo["runs"])
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def numbers(parts: list[dict], demo: dict) -> str:
    environment, limits, s = parts[0]["environment"], parts[0]["limits"], demo["settings"]
    machine = f"{environment['cpu']}, {environment['isa']}, {environment['threads']} threads, torch {environment['torch']}"
    measured = f"copy {limits['copy'] / 1e9:.0f} GB/s, sgemm {limits['gemm'] / 1e9:.0f} GFLOP/s in the same run"
    sizes = (
        f"{s['layers']} layers, width {s['width']}, {s['batch']} x {s['context']} tokens, dropout {s['dropout']}, {s['dtype']}"
    )
    return f"""
On {machine}, {environment["date"][:10]}; {measured}. The machine is shared: read the ratios.

`make demo`, a GPT-2 of {sizes}:

{demo_table(demo)}

`python -m benchmarks --quick --threads {environment["threads"]}`: how often faster than the better of
eager and `torch.compile`, our time, and half the distance between its quartiles where that is above 20 %
(fresh pages of large outputs). Tiny calls are often slower than eager's: a Python
autograd function costs more than torch's own.

{op_table(parts)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", type=pathlib.Path)
    parser.add_argument("demo", type=pathlib.Path)
    args = parser.parse_args()
    text = numbers(json.loads(args.benchmarks.read_text()), json.loads(args.demo.read_text()))
    readme = README.read_text()
    before, rest = readme.split(BEGIN)
    README.write_text(before + BEGIN + text + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
