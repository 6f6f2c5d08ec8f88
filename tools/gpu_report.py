"""The GPU kit's report: one JSON and one Markdown file of what its stages found."""

from __future__ import annotations

import json
import pathlib
import re

import torch

from gpt_kernels import cache, dispatch, library, triton
from gpt_kernels.bench.environment import environment
from gpt_kernels.bench.report import markdown as row_table

from .gpu_calls import DRY


def fingerprint(device: str) -> dict[str, object]:
    with torch.device(device):
        facts = environment()
    facts |= {
        "triton": triton.version(),
        "cuda kernels": library.cuda_archs() or library.cuda_error,
        "interpreted": triton.INTERPRETED,
    }
    return facts


def comparison(rows: list[dict]) -> str:
    """Each shape's milliseconds by backend and the better of eager and torch.compile: from it an op's default is chosen."""
    others = [name for name in dispatch.BACKENDS if any(name in row["variants"] for row in rows)]
    lines = [
        "| op | dtype | direction | default | " + " | ".join(others) + " | PyTorch | fastest |",
        "|---" * (6 + len(others)) + "|",
    ]
    for row in (row for row in rows if not row["mismatch"]):
        seconds = {name: variant["seconds"] for name, variant in row["variants"].items()}
        times = {"default": seconds["ours"]} | {name: seconds[name] for name in others if name in seconds}
        times["PyTorch"] = min(seconds[name] for name in ("eager", "compile") if name in seconds)
        cells = [f"{times[name] * 1e3:.3g}" if name in times else "-" for name in ("default", *others, "PyTorch")]
        what = f"| {row['op']} {row['shape']} | {row['dtype']} | {row['direction']} | "
        lines.append(what + " | ".join(cells) + f" | {min(times, key=times.__getitem__)} |")
    return "\n".join(lines)


def markdown(report: dict) -> str:
    facts, done = report["environment"], report["stages"]
    title = DRY if report["dry_run"] else facts.get("gpu", "GPU")
    lines = [f"# gpt_kernels on {title}", "", f"{report['verdict']}. `python -m tools.gpu {report['arguments']}`", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    lines += ["| stage | | | seconds |", "|---|---|---|---|"]
    lines += [f"| {s['name']} | {s['status']} | {s['summary']} | {s['seconds']:.0f} |" for s in done]
    for s in (s for s in done if s["failures"]):
        lines += ["", f"## {s['name']}", "", "```", *s["failures"], "```"]
    rows = [row for s in done for row in s["rows"]]
    if rows:
        lines += ["", "## Benchmarks", "", "How often faster than the better of eager and `torch.compile`, and our time.", ""]
        lines.append(row_table(rows))
    if any(backend in row["variants"] for row in rows for backend in dispatch.BACKENDS):
        lines += ["", "## Which backend", "", comparison(rows)]
    return "\n".join(lines) + "\n"


def write(report: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """<date>-<gpu>.json and .md"""
    gpu = "dry-run-cpu" if report["dry_run"] else str(report["environment"].get("gpu", "gpu"))
    name = f"{report['date']}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    cache.write_atomically(paths[0], (json.dumps(report, indent=1) + "\n").encode(), mode=0o644)
    cache.write_atomically(paths[1], markdown(report).encode(), mode=0o644)
    return paths
