"""Plots of a result, as SVG and PNG. The SVG's colours are a small fixed set, which the HTML report swaps for its themes'."""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..names import families
from .settings import MODELS

TITLES = {
    "speed": "Time of the others over ours",
    "speed-16": "Time of the others over ours, in 16 bits",
    "memory": "Peak extra memory of one call",
    "length-throughput": "Attention: throughput against sequence length",
    "length-memory": "Attention: peak extra memory against sequence length",
    "roofline": "Roofline: what was reached under this machine's limits",
    "launch": "What a call costs on tiny inputs",
}
WIDTH = 4.0  # inches: a phone shows the letters nearly at their own size
INK, FAINT, PAPER = "#2b2b2c", "#bcbcbd", "#fefefe"
# distinct also for the colour-blind, and in grey
COLORS = {
    "ours": "#1b6ca8", "eager": "#8a8a8b", "compile": "#e08214", "reference": "#c23b58", "hf": "#6a9f3c", "GPT": "#7b5ea7",
    "liger": "#b8860b", "flash_attn": "#0e9c8d", "xformers": "#d95fa4", "apex": "#5c4033", "triton": "#417fd9",
    "cuda": "#76b900", "cpu": "#3f8f8f", "products": "#4a4e9e",
}  # fmt: skip
LABELS = {
    "compile": "torch.compile",
    "hf": "HF",
    "reference": "naive",
    "GPT": "our GPT module",
    "products": "matrix products alone",
}
MARKERS = dict(zip((*families(), *MODELS), itertools.cycle("osDv^<>P*XphdH8")))
STYLE: Any = {
    "font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "gpt_kernels", "text.color": INK,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": FAINT, "grid.linewidth": 0.4, "axes.grid": True, "axes.axisbelow": True,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "legend.frameon": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
}  # fmt: skip


def color(variant: str) -> str:
    """Ink for a variant of another version."""
    return COLORS.get(variant, INK)


def seconds(row: dict, variant: str) -> float | None:
    return row["variants"].get(variant, {}).get("seconds")


def label(variant: str) -> str:
    return LABELS.get(variant, variant)


def log_axis(axis: Any, text: Callable[[float], str] = "{:g}".format) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, columns: int = 3) -> None:
    """Under the plot, each name once."""
    handles = {str(h.get_label()): h for ax in figure.axes for h in ax.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, columnspacing=1.2, handletextpad=0.4)


def dots(rows: Sequence[dict], values: Callable[[dict], dict[str, float]], xlabel: str, one: bool = False) -> Figure | None:
    """A line per row, a dot per variant, on a logarithmic axis."""
    shown = [(row, values(row)) for row in rows]
    shown = [(row, v) for row, v in shown if v]
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 0.85 + 0.2 * len(shown)), layout="constrained")
    ax = figure.subplots()
    for y, (_, v) in enumerate(shown):
        for name, x in v.items():
            ax.plot(x, y, "o", color=color(name), label=label(name), markersize=8 if name == "ours" else 5)
        ax.plot([min(v.values()), max(v.values())], [y, y], color=FAINT, linewidth=1, zorder=0)
    names = [f"{row['op']} {row['direction']}" for row, _ in shown]
    last = [row["shape"].split()[-1] for row, _ in shown]
    labels = [f"{name}, {word}" if names.count(name) > 1 else name for name, word in zip(names, last, strict=True)]
    ax.set_yticks(range(len(shown)), labels)
    ax.set(xscale="log", xlabel=xlabel)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    if one:
        ax.axvline(1.0, color=COLORS["ours"], linewidth=1.2)
    log_axis(ax.xaxis)
    ax.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else ""))
    ax.tick_params(axis="x", which="minor", labelsize=8)
    legend(figure)
    return figure


def main_rows(result: dict, nth: int = 0) -> list[dict]:
    """The main cases in the nth of the dtypes that were measured."""
    rows = [row for row in result["rows"] if row["main"] and not row["mismatch"]]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    return [row for row in rows if row["dtype"] in dtypes[nth : nth + 1]]


def speed(result: dict, nth: int = 0) -> Figure | None:
    def over_ours(row: dict) -> dict[str, float]:
        return {name: v["seconds"] / seconds(row, "ours") for name, v in row["variants"].items() if name != "ours"}

    rows = main_rows(result, nth)
    return dots(rows, over_ours, f"times as long as ours, {rows[0]['dtype']}" if rows else "", one=True)


def memory(result: dict) -> Figure | None:
    def peaks(row: dict) -> dict[str, float]:
        return {n: v["memory"] / 2**20 for n, v in row["variants"].items() if v["memory"] and v["memory"] >= 2**18}

    rows = main_rows(result)
    return dots(rows, peaks, f"MiB, {rows[0]['dtype']}" if rows else "")


def launch(result: dict) -> Figure | None:
    tiny = [row for row in result["rows"] if not row["mismatch"] and row["tiny"]]
    return dots(tiny, lambda row: {n: v["launch"] * 1e6 for n, v in row["variants"].items() if v.get("launch")}, "µs per call")


def by_length(result: dict) -> Iterator[tuple[str, str, list[dict]]]:
    """(variant, direction, rows by length)"""
    rows = sorted((row for row in result["rows"] if row["length"] and not row["mismatch"]), key=lambda row: row["length"])
    for variant in dict.fromkeys(name for row in rows for name in row["variants"]):
        for direction in dict.fromkeys(row["direction"] for row in rows):
            chosen = [row for row in rows if row["direction"] == direction and variant in row["variants"]]
            if chosen:
                yield variant, direction, chosen


def curves(result: dict, value: Callable[[dict, str], float | None], ylabel: str) -> tuple[Figure, Axes] | None:
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    ax = figure.subplots()
    for variant, direction, rows in by_length(result):
        points = [(row["length"], y) for row in rows if (y := value(row, variant))]
        line: dict[str, Any] = {"linestyle": "-" if direction == "fwd" else "--", "marker": "o" if direction == "fwd" else "s"}
        name = f"{label(variant)} {direction}"
        ax.plot(*zip(*points, strict=True), color=color(variant), label=name, markersize=3.5, **line) if points else None
    if not ax.lines:
        return None
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set(xlabel="sequence length", ylabel=ylabel)
    log_axis(ax.xaxis, lambda v: f"{v / 1024:g}k" if v >= 1024 else f"{v:g}")
    log_axis(ax.yaxis)
    return figure, ax


def length_throughput(result: dict) -> Figure | None:
    def gflops(row: dict, variant: str) -> float:
        return row["flops"] / row["variants"][variant]["seconds"] / 1e9

    drawn = curves(result, gflops, "GFLOP/s")
    if drawn is None:
        return None
    figure, ax = drawn
    dtype = next(row["dtype"] for row in result["rows"] if row["length"])
    ax.axhline(result["limits"][f"gemm {dtype}"] / 1e9, color=INK, linewidth=0.8, label="matrix product here")
    legend(figure)
    return figure


def length_memory(result: dict) -> Figure | None:
    drawn = curves(result, lambda row, variant: (row["variants"][variant]["memory"] or 0) / 2**20, "MiB")
    if drawn is None:
        return None
    legend(drawn[0])
    return drawn[0]


def roofline(result: dict) -> Figure | None:
    """float32's or, without it, the first dtype's: each has its own roof."""
    rows = [row for row in result["rows"] if not row["mismatch"] and not row["tiny"] and row["flops"]]
    dtypes = {row["dtype"] for row in rows}
    if not dtypes:
        return None
    dtype = "float32" if "float32" in dtypes else sorted(dtypes)[0]
    rows = [row for row in rows if row["dtype"] == dtype]
    copy, gemm = result["limits"]["copy"] / 1e9, result["limits"][f"gemm {dtype}"] / 1e9
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    ax = figure.subplots()
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min([*intensity, gemm / copy]) / 2, max([*intensity, gemm / copy]) * 2
    ax.plot([low, gemm / copy, high], [low * copy, gemm, gemm], color=INK, linewidth=1, label="limits")
    for row, x in zip(rows, intensity, strict=True):
        for variant in ("eager", "ours"):
            if t := seconds(row, variant):
                ax.plot(
                    x,
                    row["flops"] / t / 1e9,
                    MARKERS[row["op"]],
                    markersize=5,
                    linestyle="none",
                    markerfacecolor=color(variant) if variant == "ours" else "none",
                    markeredgecolor=color(variant),
                )
    for op in dict.fromkeys(row["op"] for row in rows):
        ax.plot([], [], MARKERS[op], color=INK, markersize=5, linestyle="none", label=op)
    for variant in ("ours", "eager"):
        ax.plot([], [], "o", color=color(variant), markersize=6, linestyle="none", label=variant)
    ax.set(xscale="log", yscale="log", xlabel=f"flops per byte that must move ({dtype})", ylabel="GFLOP/s")
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    legend(figure)
    return figure


PLOTS: dict[str, Callable[[dict], Figure | None]] = {
    "speed": speed, "speed-16": functools.partial(speed, nth=1), "memory": memory,
    "length-throughput": length_throughput, "length-memory": length_memory,
    "roofline": roofline, "launch": launch,
}  # fmt: skip


def draw(result: dict) -> tuple[dict[str, str], dict[str, bytes]]:
    """(SVG, PNG) by name; a plot that has nothing to show is left out."""
    svgs, pngs = {}, {}
    with matplotlib.rc_context(STYLE):
        for name, plot in PLOTS.items():
            if figure := plot(result):
                vector, raster = io.StringIO(), io.BytesIO()
                figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
                figure.savefig(raster, format="png", dpi=160)
                svgs[name], pngs[name] = vector.getvalue(), raster.getvalue()
    return svgs, pngs


def themed(svg: str, name: str) -> str:
    """For the HTML page: colours by CSS variables, the page's font, ids of its own, a width that follows the page's."""
    svg = svg[svg.index("<svg") :]
    variables = {INK: "ink", FAINT: "faint", PAPER: "paper"} | {color: variant for variant, color in COLORS.items()}
    for color, variable in variables.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", svg)
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups()  # type: ignore[union-attr]
    return svg.replace(f'width="{width}pt" height="{height}pt"', f'role="img" aria-label="{TITLES[name]}"', 1)
