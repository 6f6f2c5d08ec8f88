"""Writes what README.md and docs/ say of measured results, and their plots, from those results.

python -m tools.docs                  # from the results that the documents name now
python -m tools.docs --bench benchmarks/results/NAME.json --reuse .. --demo .. --gpu ..    # from these in their place
python -m tools.docs --families FILE  # what the tests of the families wrote into FILE, see tests/test_families.py
python -m tools.docs --determinism    # also runs the ops for the table of docs/determinism.md (a minute)

A generated block stands between `<!-- name -->` and `<!-- /name -->`. tests/test_docs.py holds every one to its source.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import json
import math
import pathlib
import re
from collections.abc import Callable

import matplotlib
import torch
from matplotlib.figure import Figure

import gpt_kernels
from gpt_kernels import gpu, library
from gpt_kernels.bench import plots, run
from gpt_kernels.bench.report import duration, figure, growth_text, markdown_cell, mib
from gpt_kernels.bench.result import load
from gpt_kernels.bench.settings import PRODUCTS, Settings
from gpt_kernels.commands.demo import COLORS, LABELS, table
from gpt_kernels.info import support
from gpt_kernels.process import write

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = "benchmarks/results"
README, SPEED, MEMORY, DETERMINISM = (
    ROOT / name for name in ("README.md", "docs/speed.md", "docs/memory.md", "docs/determinism.md")
)
GPU, SUPPORT = ROOT / "docs/gpu.md", ROOT / "docs/support.md"
FAMILIES, FAMILIES_FOUND = ROOT / "docs/families.md", ROOT / "docs/families.json"
LARGE = 1 << 23  # bytes that must move: below it much is found in cache
HOST_BOUND = 200  # us: a call of PyTorch's on the H200 that took less by events waited for the host, not for the GPU
PLOTS = ("speed", "memory", "length-throughput", "length-memory")
SOURCES = ("bench", "reuse", "demo", "gpu", "models")


# ---- blocks ----


def block(document: str, name: str) -> str:
    """What stands between the markers of that name, without the line ends at both sides."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"expected one {begin.strip()} and one {end.strip()}")
    return document.partition(begin)[2].partition(end)[0]


def replace(file: pathlib.Path, name: str, text: str) -> None:
    document = file.read_text()
    old = block(document, name)
    write(file, document.replace(f"<!-- {name} -->\n{old}\n<!--", f"<!-- {name} -->\n{text}\n<!--"))


def sources() -> dict[str, str]:
    """Which committed results the documents are made of: the names that stand in them."""
    where = ((SPEED, "numbers"), (GPU, "gpu"), (SPEED, "models"))
    texts = (block(file.read_text(), name) for file, name in where)
    found = [name for text in texts for name in re.findall(r"`benchmarks/results/([\w.-]+\.json)`", text)]
    return dict(zip(SOURCES, found, strict=True))


def blocks(names: dict[str, str]) -> dict[tuple[pathlib.Path, str], str]:
    """(file, name of the block) -> its text, of those that are made of results."""
    bench, reuse, whole = (load(ROOT / RESULTS / names[source]) for source in ("bench", "reuse", "models"))
    demo, device = (json.loads((ROOT / RESULTS / names[source]).read_text()) for source in ("demo", "gpu"))
    drawn = [plot for plot in PLOTS if plots.PLOTS[plot](bench) is not None]
    return {
        (README, "headline"): headline(bench, demo, device, names),
        (SPEED, "numbers"): numbers(bench, reuse, demo, names, drawn),
        (SPEED, "models"): models(whole, names),
        (MEMORY, "memory"): memory(bench, demo, drawn),
        (GPU, "gpu"): on_gpu(device, names),
    }


# ---- tables ----


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


def machine(result: dict) -> str:
    e = result["environment"]
    return e.get("gpu") or f"{e['cpu']}, {e['isa']}, {e['threads']} threads"


def of_demo(demo: dict) -> str:
    s = demo["settings"]
    return (
        f"{s['layers']} layers, width {s['width']}, {s['batch']} x {s['context']} tokens, dropout {s['dropout']}, {s['dtype']}"
    )


def picture(plot: str) -> str:
    return f"![{plots.TITLES[plot]}](../{RESULTS}/plots/{plot}.svg)"


# ---- README: five numbers and a picture ----


def headline(bench: dict, demo: dict, device: dict, names: dict[str, str]) -> str:
    runs, others = demo["runs"], [run for run in demo["runs"] if run != "ours"]
    of_gpu = [ratio for *_, forward, backward in on_gpu_ratios(device) for ratio in (forward, backward) if ratio]

    def speed(run: str) -> str:
        return f"**{runs[run]['ms_per_step'] / runs['ours']['ms_per_step']:.2f}x** as fast as {LABELS[run]}"

    def peak(run: str) -> str:
        return f"{runs[run]['peak_bytes'] / 1e6:,.0f} MB"

    def rows(op: str, shape: str, dtype: str) -> str:
        found = [row for row in bench["rows"] if (row["op"], row["shape"], row["dtype"]) == (op, shape, dtype)]
        return ", ".join(f"{row['direction']} **{row['ratio']:.2f}x** as fast" for row in found)

    lines = [
        ["what", "ours", "made by"],
        ["a GPT-2's training step", ", ".join(map(speed, others)), "`make demo`"],
        ["its peak memory", ", ".join([f"**{peak('ours')}**", *(f"{LABELS[r]} {peak(r)}" for r in others)]), "`make demo`"],
        ["attention, 1024 tokens, bfloat16", rows("attention", "B4 H12 T1024 D64 causal", "bfloat16"), "`bench`"],
        ["cross entropy, 50257 words, float32", rows("cross_entropy", "1024x50257", "float32"), "`bench`"],
        [f"on a GPU, {device['environment']['gpu']}, bfloat16, {device['date']}",
         f"**{min(of_gpu):.2f}x** to **{max(of_gpu):.1f}x** as fast as PyTorch, by op", "[docs/gpu.md](docs/gpu.md)"],
    ]  # fmt: skip
    return f"""{rows_table(lines)}

The first four on {machine(bench)}, torch {bench["environment"]["torch"]}. `bench` is
`{bench["command"]}`; its rows are beside the better of eager and `torch.compile`.
The machine is shared: read the ratios. Every row, the slow ones too: [docs/speed.md](docs/speed.md)."""


def drawing(demo: dict) -> str:
    """README's picture as SVG: time and memory of a training step, a bar per variant. Its ground is its own: it reads on white
    pages and on black ones."""
    runs = {run: facts for run, facts in demo["runs"].items() if run in LABELS}
    panels = (("ms_per_step", "time of a step, ms", 1.0), ("peak_bytes", "peak memory, MB", 1e-6))
    with matplotlib.rc_context(plots.STYLE):
        canvas = Figure(figsize=(plots.WIDTH, 2.1), layout="constrained")
        canvas.suptitle(f"Training a GPT-2 on a CPU\n{of_demo(demo)}", fontsize=8)
        for place, (ax, (key, title, unit)) in enumerate(zip(canvas.subplots(1, 2), panels, strict=True)):
            values = [facts[key] * unit for facts in runs.values()]
            bars = ax.barh([LABELS[run] for run in runs], values, color=[COLORS[run] for run in runs], height=0.7)
            ax.bar_label(bars, [f"{value:,.0f}" for value in values], padding=2, fontsize=8)
            ax.set(xlim=(0, 1.28 * max(values)), xticks=[], xlabel=title)
            ax.tick_params(labelleft=place == 0)
            ax.grid(False)
            ax.invert_yaxis()
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


# ---- docs/speed.md, docs/memory.md ----


def numbers(bench: dict, reuse: dict, demo: dict, names: dict[str, str], drawn: list[str]) -> str:
    limits = bench["limits"].items()
    measured = ", ".join(f"{key} {value / 1e9:.0f} {'GB/s' if key == 'copy' else 'GFLOP/s'}" for key, value in limits)
    header, rows = table(demo["runs"])
    files = ", ".join(f"`{RESULTS}/{names[source]}`" for source in SOURCES[:3])
    told = f" ({bench['note']})" if bench.get("note") else ""
    pictures = "\n".join(picture(plot) for plot in drawn if "memory" not in plot)
    e = bench["environment"]
    return f"""On {machine(bench)}, torch {e["torch"]}, {e["date"][:10]}; in the same run {measured}.
The machine is shared: read the ratios. All of it: {files}.

### Training a GPT-2

`make demo`, a GPT-2 of {of_demo(demo)}:

{rows_table([header, *map(list, rows)])}

### Op by op

`{bench["command"]}`{told}: how often faster than the better of eager and `torch.compile`, our time, and half the
distance between its quartiles where that is above 20 %. {small(bench["rows"])}

{by_dtype([row for row in bench["rows"] if row["main"]], markdown_cell)}

{pictures}

### How near to the machine's limit

Share of the copy rate that was measured among a row's own rounds, for the bytes that must move. First as it is, where a result
above 32 MB is fresh pages from the system at every call (a smaller one comes from the heap, which the benchmark keeps from
being given back between calls); then with `reuse_memory()`, by
`{reuse["command"]}`.

{shares(bench["rows"], reuse["rows"])}"""


def models(result: dict, names: dict[str, str]) -> str:
    """Whole models beside their matrix products."""
    runs = ("eager", "compile", "ours")

    def of_products(row: dict, run: str) -> str:
        alone, seconds = figure(row, PRODUCTS), figure(row, run)
        return f"{alone / seconds:.0%}" if alone and seconds else "-"

    def times(row: dict, run: str) -> str:
        ours, other = figure(row, "ours"), figure(row, run)
        return f"{other / ours:.2f}x" if ours and other else "-"

    lines = [["", "dtype", "ours", "over eager", "over torch.compile", "products alone", "their share: eager / compiled / ours",
              "peak MiB: eager / compiled / ours"]]  # fmt: skip
    for row in result["rows"]:
        if row["mismatch"]:
            continue
        seconds, alone = figure(row, "ours"), figure(row, PRODUCTS)
        lines.append(
            [
                f"{row['op']} {row['shape']}, {row['direction']}",
                row["dtype"],
                duration(seconds) if seconds else "-",
                *(times(row, run) for run in runs[:2]),
                duration(alone) if alone else "-",
                " / ".join(of_products(row, run) for run in runs),
                " / ".join(mib(figure(row, run, "memory")) for run in runs),  # type: ignore[arg-type]
            ]
        )
    e = result["environment"]
    return f"""`{result["command"]}`, torch {e["torch"]}, {e["date"][:10]} (`{RESULTS}/{names["models"]}`): Hugging Face's
models, patched, beside eager, `torch.compile` and the matrix products of the step alone, which no kernel between them can beat.

{rows_table(lines)}"""


def memory(bench: dict, demo: dict, drawn: list[str]) -> str:
    def peaks(row: dict | None) -> str:
        return (
            "" if row is None else " / ".join(mib(figure(row, variant, "memory")) for variant in ("eager", "compile", "ours"))
        )  # type: ignore[arg-type]

    of_runs = ", ".join(f"{LABELS[run]} {facts['peak_bytes'] / 1e6:,.0f} MB" for run, facts in demo["runs"].items())
    growth = "; ".join(growth_text(bench["rows"]))
    pictures = "\n".join(picture(plot) for plot in drawn if "memory" in plot)
    return f"""Peak of `make demo`'s training, a process for each variant: {of_runs}.

Peak extra memory of one call in MiB, eager / torch.compile / ours; a dash where it was not measured. By
`{bench["command"]}`.

{by_dtype([row for row in bench["rows"] if row["main"] and not row["mismatch"]], peaks)}

{pictures}

{f"{growth}." if growth else ""}""".rstrip()


# ---- docs/gpu.md ----


def on_gpu_ratios(device: dict) -> list[tuple[str, str, float | None, float | None]]:
    """(op and shape, whose kernel serves it there, PyTorch's time over its, forward, the same backward). A row that was timed
    forward and backward together has its ratio first; none where PyTorch's time is the host's."""
    times: dict[tuple[str, str], dict[str, dict]] = {}
    for row in device["minute"]:
        times.setdefault((row["op"], row["shape"]), {})[row["whose"]] = row

    def ratio(torch_row: dict, our_row: dict, key: str) -> float | None:
        by_events = "events" in torch_row["clock"].partition("bwd")[2] and key == "bwd_us"
        if key not in torch_row or (by_events and torch_row[key] < HOST_BOUND):
            return None
        return torch_row[key] / our_row[key]

    found = []
    for (op, shape), rows in times.items():
        whose = served_there(op, shape)
        forward, backward, both = (ratio(rows["torch"], rows[whose], key) for key in ("fwd_us", "bwd_us", "fwd_bwd_us"))
        found.append((f"{op} {shape}{', in all' * bool(both)}", whose, both or forward, backward))
    return found


def served_there(op: str, shape: str) -> str:
    """Which backend has such a call in 16 bits on sm_90: the CUDA C++ kernels but for attention that is large enough."""
    least = gpu.TRITON_FROM.get(f"{op}_fwd", {}).get(9)
    sizes = {letter: int(size) for letter, size in re.findall(r"\b([BHTD])(\d+)", shape)}
    return "triton" if least and math.prod(sizes.values()) * sizes["T"] >= least else "cuda"


def on_gpu(device: dict, names: dict[str, str]) -> str:
    e = device["environment"]
    stages = [[s["name"], s["status"], s["summary"]] for s in device["stages"]]
    words = {"cuda": "CUDA C++", "triton": "Triton"}
    lines = [
        [case, words[whose], *(f"{r:.2f}x" if r else "-" * ("in all" not in case) for r in pair)]
        for case, whose, *pair in on_gpu_ratios(device)
    ]
    return f"""{e["gpu"]}, torch {e["torch"]}, Triton {e["triton"]}, {device["date"]}; CUDA kernels: {e["cuda kernels"]}.
Every figure: `{RESULTS}/{names["gpu"]}`, and as a page the `.md` beside it.

{rows_table([["what ran", "", ""], *stages])}

bfloat16, PyTorch's time over ours, by the kernel that serves such a call there. A dash where PyTorch's time was the host's,
not the GPU's; "in all": forward and backward together.

{rows_table([["", "served by", "forward", "backward"], *lines])}"""


# ---- docs/determinism.md ----


def results(case) -> list[torch.Tensor]:
    """Output and gradients of a benchmark's case, the same inputs and the same random numbers each time."""
    torch.manual_seed(0)
    inputs = case.inputs()
    out = case.ours(*inputs)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, torch.randn_like(out))]


def same_bits(found: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def determinism() -> str:
    """A line per op, run here in the sizes that the benchmark measures: what leaves every bit as it was."""
    isas = library.ISA_LEVELS[: library.ISA_LEVELS.index(str(library.best_isa())) + 1]
    lines = [["op", "called again, on 1, 2 and 4 threads", f"under {', '.join(isas)}"]]
    threads_before = torch.get_num_threads()
    for op in run.GROUPS["ops"]:
        same = [True, True]
        for case in run.cases(op, Settings(compile=False)):
            if not case.main:
                continue
            by_threads, by_isa = [], []
            try:
                for threads in (1, 2, 4):
                    torch.set_num_threads(threads)
                    by_threads.append(results(case))
            finally:
                torch.set_num_threads(threads_before)
            for isa in isas:
                with gpt_kernels.use_isa(isa):
                    by_isa.append(results(case))
            same = [same[0] and same_bits(by_threads), same[1] and same_bits(by_isa)]
        lines.append([op, *("the same bits" if s else "other roundings" for s in same)])
    return rows_table(lines)


# ---- docs/families.md ----


def families_found(lines: list[str]) -> dict:
    """What the tests wrote, a line each, as docs/families.json has it: {family: {column: value}} beside the versions."""
    found: dict[str, dict] = {}
    for name, column, value in map(json.loads, lines):
        shown = found.setdefault(name, {})
        # ops that several tests saw
        shown[column] = sorted({*shown.get(column, ()), *value}) if isinstance(value, list) else value
    here = {name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name)}
    versions = {name: importlib.metadata.version(name) for name in sorted(here, reverse=True)}
    return {
        "versions": versions,
        "families": {name: dict(sorted(found[name].items())) for name in sorted(found, key=str.lower)},
    }


# letter of the table, what it says, columns of what the tests wrote, each of which has to show the op
SHOWN = (
    ("f", "forward", ("forward",)),
    ("b", "backward", ("backward",)),
    ("g", "generation", ("generate greedy",)),
    ("c", "torch.compile, forward and backward", ("compile",)),
    ("l", "LoRA, forward and backward", ("LoRA, then patch", "patch, then LoRA")),
)


def families(found: dict) -> str:
    """A line per family of the ops that ran, and one of what else a test has shown of it; a dash where none has."""

    def several(shown: dict, *columns: str, start: str = "") -> str:
        return ", ".join(column.removeprefix(start) for column in columns if shown.get(column)) or "-"

    def letters(shown: dict, op: str) -> str:
        return "".join(letter for letter, _, columns in SHOWN if all(op in shown.get(c, ()) for c in columns)) or "-"

    columns = [column for _, _, of in SHOWN for column in of]
    ops = sorted({op for shown in found["families"].values() for column in columns for op in shown.get(column, ())})
    by_op = [["family", *ops]]
    lines = [["family", "forward, backward in", "generates", "also", "attn_implementation"]]
    for name, shown in found["families"].items():
        by_op.append([name, *(letters(shown, op) for op in ops)])
        dtypes = ["float32"] * bool(shown.get("forward") and shown.get("backward"))
        dtypes += [dtype for dtype in ("bfloat16", "float16") if shown.get(dtype)]
        how = sorted(column for column in shown if column.startswith("generate "))
        also = several(shown, "hidden states, attentions", "checkpointing", "Trainer")
        hook = "yes" if shown.get("attn_implementation") else "-"
        lines.append([name, ", ".join(dtypes) or "-", several(shown, *how, start="generate "), also, hook])
    of = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    legend = ", ".join(f"{letter} {what}" for letter, what, _ in SHOWN)
    return f"Ops of ours that ran in {legend}, with {of}.\n\n{rows_table(by_op)}\n\n{rows_table(lines)}"


def families_in_short(found: dict) -> str:
    """For README: of how many families each thing was shown with at least one op of ours in it."""
    every = found["families"].values()
    cells = [f"{what} {sum(all(shown.get(c) for c in columns) for shown in every)}" for _, what, columns in SHOWN]
    return f"Of {len(every)} families tested patched beside unpatched, our ops run in: {', '.join(cells)}."


# ---- all of it ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for source in SOURCES:
        parser.add_argument(f"--{source}", type=pathlib.Path, metavar="FILE", help=f"a result in {RESULTS}")
    parser.add_argument("--families", type=pathlib.Path, metavar="FILE", help="what the tests of the families wrote")
    parser.add_argument(
        "--determinism", action="store_true", help="also run the ops and write what leaves their bits as they were"
    )
    args = vars(parser.parse_args())
    if args["families"]:
        found = families_found(args["families"].read_text().splitlines())
        write(FAMILIES_FOUND, json.dumps(found, indent=1) + "\n")
    names = sources() | {source: args[source].name for source in SOURCES if args[source]}
    folder = ROOT / RESULTS / "plots"
    folder.mkdir(exist_ok=True)
    svgs, _ = plots.draw(load(ROOT / RESULTS / names["bench"]))
    svgs = {plot: svgs[plot] for plot in PLOTS if plot in svgs}
    svgs["headline"] = drawing(json.loads((ROOT / RESULTS / names["demo"]).read_text()))
    for plot, svg in svgs.items():
        write(folder / f"{plot}.svg", svg)
    for (file, name), text in blocks(names).items():
        replace(file, name, text)
    replace(SUPPORT, "support", support())
    found = json.loads(FAMILIES_FOUND.read_text())
    replace(FAMILIES, "families", families(found))
    replace(README, "families", families_in_short(found))
    if args["determinism"]:
        replace(DETERMINISM, "determinism", determinism())


if __name__ == "__main__":
    main()
