"""Train a GPT-2 on real text: eager, torch.compile, ours.

The three runs have the same initial weights and the same batches, and each has its own process, so that its peak memory is its
own. Eager and ours draw different dropout masks (another random generator), so with dropout their losses agree statistically;
with --dropout 0 they agree closely.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from typing import Any

from .. import arguments, process
from ..arguments import fraction, option, positive
from ..errors import UserError, need
from ..table import print_table

WARM_UP = 3  # steps that the timings leave out: first allocations, and all of torch.compile's work
PROMPT, NEW_TOKENS = 32, 96
LABELS = {"eager": "eager", "compile": "torch.compile", "ours": "gpt_kernels"}
COLORS = {"eager": "#8c8c8c", "compile": "#e08214", "ours": "#1b6ca8"}


@dataclasses.dataclass
class Settings:
    steps: int = option(40, "optimizer steps per run", type=positive)
    data: str | None = option(None, "UTF-8 text to train on (otherwise Python's own sources and documentation)", metavar="FILE")
    layers: int = option(4, "transformer blocks", type=positive)
    heads: int = option(6, "attention heads of a block", type=positive)
    width: int = option(384, "of a token's vector", type=positive)
    context: int = option(512, "tokens per sequence", type=positive)
    batch: int = option(4, "sequences per step", type=positive)
    vocab: int = option(8192, "size of the BPE vocabulary", type=positive)
    dropout: float = option(0.1, "for attention, residuals and embeddings", type=fraction)
    lr: float = option(1e-3, "highest learning rate")
    seed: int = option(0, "of weights, batches, dropout and samples")
    out: str = option("demo-out", "where result.json and demo.png go", metavar="DIR")
    device: str = arguments.device()
    dtype: str = option("float32", "bfloat16 trains under autocast", choices=("float32", "bfloat16"))
    compile: bool = option(True, "leave the torch.compile run out")


# ---- the worker: one run in its own process ----


def worker(job: dict[str, Any], send: Callable[..., None]) -> None:
    """job["run"]: "verify" or one of LABELS."""
    settings = Settings(**job["settings"])
    (_verify if job["run"] == "verify" else _train)(job, settings, send)


def _model(job: dict, settings: Settings) -> Any:
    from ..workflows.models import gpt2

    s = settings
    return gpt2(
        vocab=s.vocab,
        context=s.context,
        width=s.width,
        layers=s.layers,
        heads=s.heads,
        dropout=s.dropout,
        end=job["end"],
        seed=s.seed,
    ).to(s.device)


def _verify(job: dict, settings: Settings, send: Callable) -> None:
    import numpy
    import torch

    import gpt_kernels

    model = _model(job, settings).to(getattr(torch, settings.dtype))
    length = min(settings.context, 128)
    ids = torch.from_numpy(numpy.load(job["held_out"])[: 2 * length]).long().view(2, length).to(settings.device)
    report = gpt_kernels.verify(model, {"input_ids": ids, "labels": ids}, show=False)
    send(verdict=bool(report.ok), text=str(report))


def _train(job: dict, settings: Settings, send: Callable) -> None:
    import numpy
    import torch
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401  (imports are nobody's training memory)

    import gpt_kernels

    from ..workflows.evaluate import held_out_loss
    from ..workflows.train import batches, train

    run, on_gpu, dtype = job["run"], settings.device == "cuda", getattr(torch, settings.dtype)
    if run == "compile":
        import torch._inductor.compile_fx  # noqa: F401
    training, held_out = (torch.from_numpy(numpy.load(job[name])) for name in ("train", "held_out"))
    baseline = process.memory()
    model = _model(job, settings).train()
    started = time.perf_counter()
    stepped = model
    if run == "ours":
        gpt_kernels.patch(model)
    elif run == "compile":
        stepped = torch.compile(model)
    preparation = time.perf_counter() - started
    torch.manual_seed(settings.seed + 1)  # dropout
    times = []
    data = batches(training, settings.batch, settings.context, settings.seed)
    for loss, seconds in train(stepped, data, settings.steps, settings.lr, dtype):
        times.append(seconds)
        send(loss=loss, ms=seconds * 1e3)
    peak = torch.cuda.max_memory_allocated() if on_gpu else process.memory(highest=True) - baseline
    steady = statistics.median(times[WARM_UP:] or times)
    startup = preparation + sum(t - steady for t in times[:WARM_UP])
    send(peak_bytes=peak, startup_s=max(0.0, startup), doing="held-out loss")
    # a held-out loss belongs to the weights: the compiled run evaluates its plain model, without a second compilation
    send(held_out_loss=held_out_loss(model, held_out, settings.batch, settings.context, dtype=dtype))
    if run != "compile":
        send(doing="generation")
        _generate(model.to(dtype), job, settings, send)


def _generate(model: Any, job: dict, settings: Settings, send: Callable) -> None:
    import gpt_kernels

    from ..workflows.generate import sample, tokens_per_second

    prompt, how = job["prompt"], {"end": job["end"], "seed": settings.seed}
    new = min(NEW_TOKENS, settings.context - len(prompt))
    send(sample_ids=sample(model, prompt, new, **how))
    if job["run"] == "eager":
        send(generation_tokens_per_s=statistics.median(tokens_per_second(model, prompt, new, **how) for _ in range(3)))
        return
    # in turn with eager on the same weights: a fifth more or less is what two processes differ by on a shared machine
    rates: dict[str, list[float]] = {"eager_generation_tokens_per_s": [], "generation_tokens_per_s": []}
    gpt_kernels.unpatch(model)
    for _ in range(5):
        rates["eager_generation_tokens_per_s"].append(tokens_per_second(model, prompt, new, **how))
        with gpt_kernels.patched(model):
            rates["generation_tokens_per_s"].append(tokens_per_second(model, prompt, new, **how))
    send(**{name: statistics.median(values) for name, values in rates.items()})


# ---- the parent ----


def no_compile(settings: Settings) -> str | None:
    """Why there is no torch.compile run, or None."""
    if not settings.compile:
        return "--no-compile"
    if settings.device == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if not any(shutil.which(c) for c in (os.environ.get("CXX") or "g++", "c++", "clang++")):
        return "no C++ compiler found"
    headers = pathlib.Path(sysconfig.get_path("include"))
    return None if (headers / "Python.h").exists() else f"no Python headers in {headers}"


def _check(settings: Settings) -> None:
    need("demo", "torch", "numpy", "transformers", "tokenizers", "tqdm", "matplotlib")
    if settings.width % settings.heads:
        raise UserError(f"--width {settings.width} is not a multiple of --heads {settings.heads}")
    if settings.vocab < 257:
        raise UserError(f"--vocab {settings.vocab}: at least 257 (every byte and the end of text)")
    if settings.context < 2 * PROMPT:
        raise UserError(f"--context {settings.context}: at least {2 * PROMPT} (half of it is the prompt)")
    if not (math.isfinite(settings.lr) and settings.lr > 0):
        raise UserError(f"--lr {settings.lr}: must be greater than 0")
    if not -(2**63) <= settings.seed < 2**63 - 1:
        raise UserError(f"--seed {settings.seed}: must fit in 64 bits")
    settings.device = arguments.chosen_device(settings.device)
    process.out_folder(settings.out)


def run(settings: Settings) -> int:
    """Everything, from the text to the table. Ctrl-C ends it with what there is."""
    from ..info import info
    from ..workflows.text import standard_library, user_text

    process.kill_is_ctrl_c()
    _check(settings)
    documents = standard_library() if settings.data is None else user_text(settings.data)
    began = time.monotonic()
    result: dict[str, Any] = {"settings": dataclasses.asdict(settings), "runs": {}, "left_out": {}, "failed": {}}
    result["environment"] = info()  # before there is anything that an error could lose

    def work() -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="gpt_kernels-demo-", ignore_cleanup_errors=True) as folder:
                _run_all(settings, documents, folder, result)
        except KeyboardInterrupt:
            print("\nstopped; what there is:", flush=True)
            raise

    def report(interrupted: bool) -> None:
        result.update(interrupted=interrupted, seconds=round(time.monotonic() - began, 1))
        _report(settings, result)

    if process.reported(work, report, worth=lambda: bool(result["runs"])):
        return 130
    return int(bool(result["failed"]) or result.get("verified") is False)


def _run_all(settings: Settings, documents: list[str], folder: str, result: dict[str, Any]) -> None:
    import numpy

    from ..workflows.text import END, encode, split, train_tokenizer

    training, held_out = split(documents)
    if not training or not held_out:
        raise UserError(f"--data {settings.data}: too small, {sum(map(len, documents))} characters")
    tokenizer, origin = train_tokenizer(training, settings.vocab)
    job: dict[str, Any] = {"settings": dataclasses.asdict(settings), "end": tokenizer.token_to_id(END)}
    for name, texts in (("train", training), ("held_out", held_out)):
        tokens = encode(tokenizer, texts)
        job[name] = str(pathlib.Path(folder, f"{name}.npy"))
        numpy.save(job[name], tokens)
        result[f"{name}_tokens"] = len(tokens)
    if min(result["train_tokens"], result["held_out_tokens"]) < max(settings.context + 1, 256):
        size = sum(map(len, documents))
        raise UserError(
            f"--data {settings.data}: too small, {size} characters hold out {result['held_out_tokens']} tokens"
            f" and --context {settings.context} needs {max(settings.context + 1, 256)}"
        )
    job["prompt"] = tokens[:PROMPT].tolist()
    result["prompt"] = tokenizer.decode(job["prompt"], skip_special_tokens=False)
    source = settings.data or "Python's standard library"
    print(
        f"text: {sum(map(len, documents)) / 1e6:.1f} M characters of {source}, {result['train_tokens']:,} tokens to train on,"
        f" {result['held_out_tokens']:,} held out; BPE tokenizer with {settings.vocab} tokens {origin}\n"
        f"model: GPT-2 with {settings.layers} layers, {settings.heads} heads, width {settings.width},"
        f" context {settings.context}, dropout {settings.dropout};"
        f" batch {settings.batch}, {settings.dtype} on {settings.device}",
        flush=True,
    )

    print("verify: eager and ours against float64 ...", flush=True)
    try:
        for event in process.events(__name__, {**job, "run": "verify"}, folder):
            result["verified"] = event["verdict"]
            print(event["text"], flush=True)
    except process.RunFailed as error:
        result["failed"]["verify"] = str(error)
        print(error, flush=True)

    for run in LABELS:
        if run == "compile" and (reason := no_compile(settings)):
            result["left_out"][run] = reason
            continue
        facts: dict[str, Any] = collections.defaultdict(list)
        try:
            _run(settings, {**job, "run": run}, folder, facts)
        except process.RunFailed as error:
            result["failed"][run] = str(error)
            print(error, flush=True)
        finally:
            if "sample_ids" in facts:
                facts["sample"] = tokenizer.decode(facts.pop("sample_ids"), skip_special_tokens=False)
            if facts["losses"]:
                _summarise(facts, settings)
                in_turn = facts.pop("eager_generation_tokens_per_s", None)
                if in_turn and "eager" in result["runs"]:
                    result["runs"]["eager"]["generation_tokens_per_s"] = in_turn
                result["runs"][run] = dict(facts)


def _run(settings: Settings, job: dict, folder: str, facts: dict[str, Any]) -> None:
    from ..workflows.train import Progress

    # torch.compile pays its own way: nothing is taken from an earlier run's cache
    own_cache = {"TORCHINDUCTOR_CACHE_DIR": str(pathlib.Path(folder, "inductor"))}
    progress = Progress(LABELS[job["run"]], settings.steps, settings.batch * settings.context)
    with progress, contextlib.closing(process.events(__name__, job, folder, **own_cache)) as stream:
        for event in stream:
            if "loss" in event:
                facts["losses"].append(event["loss"])
                facts["ms"].append(event["ms"])
                progress.step(event["loss"], event["ms"] * 1e-3)
                continue
            if "doing" in event:
                progress.doing(event.pop("doing"))
            facts.update(event)


def _summarise(facts: dict[str, Any], settings: Settings) -> None:
    from ..workflows.evaluate import perplexity

    facts["steps"] = len(facts["losses"])
    facts["ms_per_step"] = statistics.median(facts["ms"][WARM_UP:] or facts["ms"])
    facts["tokens_per_s"] = settings.batch * settings.context / facts["ms_per_step"] * 1e3
    facts["final_loss"] = statistics.fmean(facts["losses"][-max(1, facts["steps"] // 10) :])
    if "held_out_loss" in facts:
        facts["perplexity"] = perplexity(facts["held_out_loss"])


# ---- the table, the picture, the files ----

ROWS: list[
    tuple[str, str, Callable[[float], str], int]
] = [  # title, key, format, 1 = higher is better, -1 = lower, 0 = no ratio
    ("ms/step (median)", "ms_per_step", "{:,.0f}".format, -1),
    ("tokens/s", "tokens_per_s", "{:,.0f}".format, 1),
    ("peak memory, MB", "peak_bytes", lambda v: f"{v / 1e6:,.0f}", -1),
    ("final loss (last tenth)", "final_loss", "{:.3f}".format, 0),
    ("held-out loss", "held_out_loss", "{:.3f}".format, 0),
    ("held-out perplexity", "perplexity", "{:,.0f}".format, 0),
    ("generation, tokens/s", "generation_tokens_per_s", "{:,.0f}".format, 1),
    ("start-up and compilation, s", "startup_s", "{:.1f}".format, 0),
]


def table(runs: dict[str, dict[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """(header, rows) of the final table; a dash where a run has no such number."""
    others = [run for run in runs if run != "ours" and "ours" in runs]
    header = ["", *(LABELS[run] for run in runs), *(f"ours vs {LABELS[run]}" for run in others)]
    rows = []
    for title, key, text, better in ROWS:
        cells = [text(facts[key]) if key in facts else "-" for facts in runs.values()]
        for run in others:
            known = better and key in runs[run] and key in runs["ours"] and runs[run][key] > 0 and runs["ours"][key] > 0
            cells.append(f"{(runs['ours'][key] / runs[run][key]) ** better:.2f}x" if known else "")
        rows.append((title, *cells))
    return header, rows


def plot(runs: dict[str, dict[str, Any]], settings: Settings, path: pathlib.Path) -> None:
    """Loss curves on the left, one group of bars per measure on the right."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    bars = [(title, key) for title, key, _, better in ROWS if better and key != "tokens_per_s"]
    figure, axes = pyplot.subplots(1, 1 + len(bars), figsize=(13, 4.2), width_ratios=[2.6, 1, 1, 1], layout="constrained")
    for run, facts in runs.items():
        steps = range(1, len(facts["losses"]) + 1)
        axes[0].plot(steps, facts["losses"], color=COLORS[run], label=LABELS[run], linewidth=1.6, alpha=0.85)
        if "held_out_loss" in facts:
            axes[0].plot(
                steps[-1], facts["held_out_loss"], "o", color=COLORS[run], markersize=5, markeredgecolor="white", zorder=5
            )
    axes[0].set(xlabel="step", ylabel="training loss, nats per token (dots: held out)")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False)
    for axis, (title, key) in zip(axes[1:], bars, strict=True):
        known = {run: facts[key] for run, facts in runs.items() if key in facts}
        text = next(f for _, k, f, _ in ROWS if k == key)
        drawn = axis.bar([LABELS[r] for r in known], list(known.values()), color=[COLORS[r] for r in known], width=0.7)
        axis.bar_label(drawn, [text(v) for v in known.values()], padding=2)
        if "ours" in known and "eager" in known:
            ratio = (known["ours"] / known["eager"]) ** next(better for _, k, _, better in ROWS if k == key)
            axis.text(
                list(known).index("ours"), 0, f"{ratio:.2f}x\n", ha="center", va="bottom", color="white", fontweight="bold"
            )
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.12)
        axis.tick_params(axis="x", labelrotation=25, length=0)
        axis.yaxis.set_visible(False)
        axis.spines["left"].set_visible(False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"GPT-2, {settings.layers} layers, width {settings.width}, context {settings.context}, batch {settings.batch},"
        f" {settings.dtype}, {settings.device}: the same weights and batches, three ways",
        fontsize=11,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    process.write(path, buffer.getvalue())


def _report(settings: Settings, result: dict[str, Any]) -> None:
    """Files first: what was trained is there whatever becomes of the words about it."""
    runs, out = result["runs"], pathlib.Path(settings.out)
    try:
        process.write(out / "result.json", json.dumps(result, indent=1) + "\n")
    finally:  # where the disk is full, the table is all there is
        _show(settings, result)
    written = [out / "result.json"]
    if runs:
        plot(runs, settings, out / "demo.png")
        written.insert(0, out / "demo.png")
    print(f"{result['seconds']:.0f} s; written: {', '.join(map(str, written))}", flush=True)


def _show(settings: Settings, result: dict[str, Any]) -> None:
    runs = result["runs"]
    for run, facts in runs.items():
        if "sample" in facts:
            print(f"\n--- {LABELS[run]} goes on from {result['prompt'][-60:]!r} ---\n{facts['sample'].strip()}")
    print()
    if runs:
        header, rows = table(runs)
        title = f"{settings.steps} steps of {settings.batch} x {settings.context} tokens"
        print_table(header, rows, title, right=range(1, len(header)))
        for run, facts in runs.items():
            if facts["steps"] < settings.steps:
                print(f"{LABELS[run]} ended at step {facts['steps']} of {settings.steps}")
    for run, reason in result["left_out"].items():
        print(f"no {LABELS[run]} run: {reason}")
    if result["failed"]:
        print(f"failed: {', '.join(result['failed'])}")
