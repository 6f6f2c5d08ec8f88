"""The whole job on real text: train a GPT-2 with eager PyTorch, with torch.compile and with our kernels, and compare.

The three runs have the same initial weights and the same batches, and each has its own process, so that its peak memory is its
own. Eager and ours draw different dropout masks (another random generator), so with dropout their losses agree statistically;
with --dropout 0 they agree closely. A worker process reports in JSON lines on its standard output.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from typing import Any

from . import cache
from .cli import UserError
from .info import info, print_table
from .worker import RunFailed, events, start

END = "<|endoftext|>"
MOST_TEXT = 8_000_000  # bytes; minutes of training read a small part of it, the tokenizer profits from the rest
WARM_UP = 3  # steps that the timings leave out: first allocations, and all of torch.compile's work
HELD_OUT = 16  # sequences
PROMPT, NEW_TOKENS = 32, 96
LABELS = {"eager": "eager", "compile": "torch.compile", "ours": "gpt_kernels"}
COLORS = {"eager": "#8c8c8c", "compile": "#e08214", "ours": "#1b6ca8"}


@dataclasses.dataclass
class Settings:
    steps: int = 40
    data: str | None = None
    layers: int = 4
    heads: int = 6
    width: int = 384
    context: int = 512
    batch: int = 4
    vocab: int = 8192
    dropout: float = 0.1
    lr: float = 1e-3
    seed: int = 0
    out: str = "demo-out"
    device: str = "auto"
    dtype: str = "float32"
    compile: bool = True


# ---- text and tokens ----


def standard_library() -> list[str]:
    """The running Python's own sources and documentation, without tests: the same files in the same order every time."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [
        pathlib.Path(folder, name)
        for folder, folders, names in os.walk(root)
        # os.walk looks at what is left of `folders` to go on
        if folders.sort() is None and not skip & set(pathlib.Path(folder).relative_to(root).parts)
        for name in names
        if name.endswith((".py", ".txt", ".rst"))
    ]
    # by a hash of the name, so that the held-out end is a fair sample of all packages
    files.sort(key=lambda f: hashlib.sha256(f.relative_to(root).as_posix().encode()).digest())
    documents, size = [], 0
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # a few old sources are in latin-1: left out
            documents.append(file.read_text(encoding="utf-8"))
            size += len(documents[-1])
        if size >= MOST_TEXT:
            break
    if size < 5_000_000:
        raise UserError(
            f"this Python's standard library in {root} has only {size / 1e6:.1f} MB of text: name a file with --data"
        )
    return documents


def user_text(name: str) -> list[str]:
    """The first MOST_TEXT bytes of the user's file."""
    try:
        with open(name, "rb") as file:
            data = file.read(MOST_TEXT)
            more = file.read(1) != b""
    except OSError as error:
        raise UserError(f"--data {name}: {error.strerror}") from None
    if b"\0" in data:
        raise UserError(f"--data {name}: a binary file (a zero byte at {data.index(0)}); UTF-8 text is needed")
    try:
        return [data.decode()]
    except UnicodeDecodeError as error:
        if more and error.start >= len(data) - 4:  # a character that the cut at MOST_TEXT went through
            return [data[: error.start].decode()]
        raise UserError(f"--data {name}: not UTF-8 text (byte {error.start}: {error.reason})") from None


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out): the last 20th of the text is never trained on, by the tokenizer neither."""
    training, left = [], sum(map(len, documents)) * 19 // 20
    held_out = []
    for document in documents:
        training.append(document[:left])
        held_out.append(document[left:])
        left = max(0, left - len(document))
    return [t for t in training if t], [t for t in held_out if t]


def train_tokenizer(texts: list[str], vocab: int) -> tuple[Any, str]:
    """(byte-level BPE tokenizer, where it is from), cached by content, vocabulary size and version."""
    import tokenizers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    digest = hashlib.sha256(f"{tokenizers.__version__} {vocab} {len(texts)}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    name = f"tokenizer-{digest.hexdigest()[:32]}.json"
    try:
        if (data := cache.read(name)) is not None:
            return Tokenizer.from_str(data.decode()), "from the cache"
        origin = "trained"
    except Exception as error:  # noqa: BLE001  (a cache that is refused or damaged costs seconds, not the demo)
        origin = f"trained ({error})"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    try:
        cache.write(name, tokenizer.to_str().encode())
    except OSError as error:
        origin = f"trained, not cached ({error})"
    return tokenizer, origin


def encode(tokenizer: Any, texts: list[str]):
    """All tokens of the texts in one numpy row, END between them."""
    import numpy

    end = tokenizer.token_to_id(END)
    rows = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
    return numpy.concatenate([numpy.asarray(row, dtype=numpy.int32) for row in rows])


# ---- the worker: one run in its own process ----


def worker(job_path: str) -> int:
    """Entry point of `demo-worker`: runs one job, one JSON object per line to the parent."""
    job, send = start(job_path)
    settings = Settings(**job["settings"])
    (_verify if job["run"] == "verify" else _train)(job, settings, send)
    return 0


def build_model(settings: Settings, end: int):
    """A Hugging Face GPT-2 with fresh weights from the seed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(settings.seed)
    p = settings.dropout
    config = GPT2Config(
        vocab_size=settings.vocab, n_positions=settings.context, n_embd=settings.width, n_layer=settings.layers,
        n_head=settings.heads, attn_pdrop=p, resid_pdrop=p, embd_pdrop=p, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    return model.to(settings.device)


def _verify(job: dict, settings: Settings, send: Callable) -> None:
    import numpy
    import torch

    import gpt_kernels

    model = build_model(settings, job["end"]).to(getattr(torch, settings.dtype))
    length = min(settings.context, 128)
    ids = torch.from_numpy(numpy.load(job["held_out"])[: 2 * length]).long().view(2, length).to(settings.device)
    report = gpt_kernels.verify(model, {"input_ids": ids, "labels": ids}, show=False)
    send(verdict=bool(report.ok), text=str(report))


def _resident(kind: str) -> int:
    """Memory of this process in bytes: VmRSS now, VmHWM at its highest."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _train(job: dict, settings: Settings, send: Callable) -> None:
    import numpy
    import torch

    import gpt_kernels

    run, on_gpu = job["run"], settings.device == "cuda"
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401  (imports are nobody's training memory)

    if run == "compile":
        import torch._inductor.compile_fx  # noqa: F401
    train, held_out = (torch.from_numpy(numpy.load(job[name])) for name in ("train", "held_out"))
    baseline = _resident("VmRSS")
    model = build_model(settings, job["end"]).train()
    started = time.perf_counter()
    stepped = model
    if run == "ours":
        gpt_kernels.patch(model)
    elif run == "compile":
        stepped = torch.compile(model)
    preparation = time.perf_counter() - started
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.1, fused=True)
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(1, s / settings.steps)))
    )
    autocast = torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bfloat16")
    batches = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed + 1)  # dropout
    times = []
    for _ in range(settings.steps):
        starts = torch.randint(len(train) - settings.context, (settings.batch,), generator=batches)
        ids = torch.stack([train[s : s + settings.context] for s in starts]).long().to(settings.device)
        started = time.perf_counter()
        with autocast:
            loss = stepped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        value = loss.item()  # waits for the GPU as well
        times.append(time.perf_counter() - started)
        send(loss=value, ms=times[-1] * 1e3)
    peak = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM") - baseline
    steady = statistics.median(times[WARM_UP:] or times)
    startup = preparation + sum(t - steady for t in times[:WARM_UP])
    send(peak_bytes=peak, startup_s=max(0.0, startup), doing="held-out loss")

    # a held-out loss belongs to the weights: the compiled run evaluates its plain model, without a second compilation
    model.eval()
    count = min(HELD_OUT, len(held_out) // settings.context)
    windows = held_out[: count * settings.context].long().view(count, settings.context).to(settings.device)
    with torch.no_grad(), autocast:
        losses = [model(input_ids=w, labels=w, use_cache=False).loss.item() * len(w) for w in windows.split(settings.batch)]
    send(held_out_loss=sum(losses) / count)
    if run != "compile":
        send(doing="generation")
        _generate(model.to(getattr(torch, settings.dtype)), job, settings, send)


def _generate(model: Any, job: dict, settings: Settings, send: Callable) -> None:
    import torch

    import gpt_kernels

    prompt = torch.tensor([job["prompt"]], device=settings.device)
    fixed = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
        "pad_token_id": job["end"],
    }

    def tokens(count: int) -> list[int]:
        torch.manual_seed(settings.seed)
        return model.generate(prompt, min_new_tokens=count, max_new_tokens=count, **fixed)[0].tolist()

    def rate() -> float:
        started = time.perf_counter()
        tokens(new)
        return new / (time.perf_counter() - started)

    new = min(NEW_TOKENS, settings.context - len(job["prompt"]))
    send(sample_ids=tokens(new)[len(prompt[0]) :])
    if job["run"] == "eager":
        send(generation_tokens_per_s=statistics.median(rate() for _ in range(3)))
        return
    # in turn with eager on the same weights: a fifth more or less is what two processes differ by on a shared machine
    rates: dict[str, list[float]] = {"eager_generation_tokens_per_s": [], "generation_tokens_per_s": []}
    gpt_kernels.unpatch(model)
    for _ in range(5):
        rates["eager_generation_tokens_per_s"].append(rate())
        with gpt_kernels.patched(model):
            rates["generation_tokens_per_s"].append(rate())
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
    missing = [
        m for m in ("torch", "numpy", "transformers", "tokenizers", "tqdm", "matplotlib") if not importlib.util.find_spec(m)
    ]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'gpt-kernels[demo]'")
    import torch

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
    if settings.device == "auto":
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no GPU here")
    try:
        pathlib.Path(settings.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.out).close()
    except OSError as error:
        raise UserError(f"--out {settings.out}: {error.strerror}") from None


def demo(settings: Settings) -> int:
    """Everything, from the text to the table; returns the exit code. Ctrl-C ends it with what there is."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends it as cleanly as Ctrl-C
    _check(settings)
    documents = standard_library() if settings.data is None else user_text(settings.data)
    began, status, failure = time.monotonic(), 0, None
    result: dict[str, Any] = {"settings": dataclasses.asdict(settings), "runs": {}, "left_out": {}, "failed": {}}
    result["environment"] = info()  # before there is anything that an error could lose
    try:
        with tempfile.TemporaryDirectory(prefix="gpt_kernels-demo-", ignore_cleanup_errors=True) as folder:
            _run_all(settings, documents, folder, result)
    except KeyboardInterrupt:
        status = 130
        print("\nstopped; what there is:", flush=True)
    except Exception as error:
        if not result["runs"]:
            raise
        status, failure = 130, error
    # a second Ctrl-C must not cut the files in half
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result |= {"interrupted": status == 130, "seconds": round(time.monotonic() - began, 1)}
        _report(settings, result)
    finally:
        signal.signal(signal.SIGINT, previous)
    if failure is not None:
        raise failure
    return status or int(bool(result["failed"]) or result.get("verified") is False)


def _run_all(settings: Settings, documents: list[str], folder: str, result: dict[str, Any]) -> None:
    import numpy

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
        for event in events("demo-worker", {**job, "run": "verify"}, folder):
            result["verified"] = event["verdict"]
            print(event["text"], flush=True)
    except RunFailed as error:
        result["failed"]["verify"] = str(error)
        print(error, flush=True)

    for run in LABELS:
        if run == "compile" and (reason := no_compile(settings)):
            result["left_out"][run] = reason
            continue
        facts: dict[str, Any] = collections.defaultdict(list)
        try:
            _run(settings, {**job, "run": run}, folder, facts)
        except RunFailed as error:
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
    from tqdm import tqdm

    tokens = settings.batch * settings.context
    # torch.compile pays its own way: nothing is taken from an earlier run's cache
    own_cache = {"TORCHINDUCTOR_CACHE_DIR": str(pathlib.Path(folder, "inductor"))}
    bar = tqdm(total=settings.steps, desc=f"{LABELS[job['run']]:>13}", unit="step", disable=None, dynamic_ncols=True)
    with bar, contextlib.closing(events("demo-worker", job, folder, **own_cache)) as stream:
        for event in stream:
            if "loss" not in event:
                if "doing" in event:
                    bar.set_postfix_str(event.pop("doing"))
                facts.update(event)
                continue
            facts["losses"].append(event["loss"])
            facts["ms"].append(event["ms"])
            line = f"loss {event['loss']:.3f}, {tokens / event['ms'] * 1e3:,.0f} tokens/s"
            bar.set_postfix_str(line)
            bar.update()
            done = len(facts["losses"])
            if bar.disable and (done == 1 or done * 5 % settings.steps < 5):  # no terminal: a line at each fifth
                print(f"{LABELS[job['run']]:>13} step {done}/{settings.steps}: {line}", flush=True)


def _summarise(facts: dict[str, Any], settings: Settings) -> None:
    facts["steps"] = len(facts["losses"])
    facts["ms_per_step"] = statistics.median(facts["ms"][WARM_UP:] or facts["ms"])
    facts["tokens_per_s"] = settings.batch * settings.context / facts["ms_per_step"] * 1e3
    facts["final_loss"] = statistics.fmean(facts["losses"][-max(1, facts["steps"] // 10) :])
    if "held_out_loss" in facts:
        facts["perplexity"] = math.exp(min(facts["held_out_loss"], 700))


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
    cache.write_atomically(path, buffer.getvalue(), mode=0o644)


def _report(settings: Settings, result: dict[str, Any]) -> None:
    """Files first: what was trained is there whatever becomes of the words about it."""
    runs, out = result["runs"], pathlib.Path(settings.out)
    try:
        cache.write_atomically(out / "result.json", (json.dumps(result, indent=1) + "\n").encode(), mode=0o644)
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
        print_table(header, rows, title=f"{settings.steps} steps of {settings.batch} x {settings.context} tokens", right=True)
        for run, facts in runs.items():
            if facts["steps"] < settings.steps:
                print(f"{LABELS[run]} ended at step {facts['steps']} of {settings.steps}")
    for run, reason in result["left_out"].items():
        print(f"no {LABELS[run]} run: {reason}")
    if result["failed"]:
        print(f"failed: {', '.join(result['failed'])}")
