"""python -m gpt_kernels bench: flags, targets in turn, what is written, what ends it, and that nothing is left half-written."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import bench_tools
import pytest
import torch

from gpt_kernels import cache, cli, errors, process
from gpt_kernels.bench import environment, measure, plots, report, run
from gpt_kernels.bench.result import dumps, load
from gpt_kernels.bench.settings import PRODUCTS, Settings
from gpt_kernels.errors import UserError
from gpt_kernels.names import families

FILES = ["bench.csv", "bench.json", "plots", "report.html"]


def ended(capsys, *arguments):
    """(exit code, standard error) of the command line; a traceback is never a message for a user."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, error


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Workers that answer at once; returns what they were asked. `answers`: target -> events, or an exception at their end."""
    monkeypatch.chdir(tmp_path)
    previous = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    asked, answers = [], {}

    def events(command, job, folder):
        asked.append((command, job))
        for event in answers.get(job["run"], [{"row": bench_tools.row(job["run"].replace("sweep", "attention"))}]):
            if isinstance(event, BaseException):
                raise event
            yield event if "row" in event else {"environment": {"cpu": "Test CPU"}, **event}

    monkeypatch.setattr(run, "events", events)
    yield asked, answers
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), previous, strict=True):
        signal.signal(s, handler)


# ---- flags ----


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("relu",), "target: unknown 'relu', expected all, ops, attention,"),
        (("--against", "liger,tinygrad"), "--against: unknown 'tinygrad', expected liger, flash_attn, xformers, apex"),
        (("--backends", "vulkan"), "--backends: unknown 'vulkan', expected reference, cpu"),
        (("--dtypes", "float64"), "--dtypes: unknown 'float64', expected float32, bfloat16, float16"),
        (("--dtypes", ","), "--dtypes: none is left"),
        (("--threads", "0"), "--threads: must be at least 1, got 0"),
        (("--cases", "no"), "--cases: expected a whole number, got 'no'"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--fast",), "unrecognized arguments: --fast"),
        (("diff", "a.json"), "the following arguments are required: B.json"),
        (("diff", "a.json", "b.json"), "a.json: No such file"),
        (("diff", "a.json", "b.json", "--threshold", "2"), "--threshold: must be at least 0 and less than 1"),
        (("report", "a.json"), "a.json: No such file"),
        (("report",), "the following arguments are required: FILE.json"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_line(capsys, workers, arguments, words):
    code, error = ended(capsys, "bench", *arguments)
    assert code == 2 and words in error and not workers[0]


def test_what_cannot_be_is_said(capsys, workers, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, error = ended(capsys, "bench", "--device", "cuda")
    assert code == 2 and "--device cuda: torch" in error and "sees no GPU" in error
    (tmp_path / "file").touch()
    code, error = ended(capsys, "bench", "--out", str(tmp_path / "file" / "sub"))
    assert code == 2 and "Not a directory" in error
    find_spec = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda m: None if m in ("matplotlib", "scipy") else find_spec(m))
    for arguments in ((), ("report", "a.json"), ("diff", "a.json", "b.json")):
        code, error = ended(capsys, "bench", *arguments)
        assert code == 2 and re.search("(matplotlib|scipy) not installed: pip install 'gpt-kernels\\[bench\\]'", error)


def test_every_flag_reaches_the_workers(capsys, workers, tmp_path):
    flags = "rms_norm sweep --quick --huge --reuse --device cpu --threads 3 --dtypes float16 --against liger,apex"
    flags += " --backends reference --accelerate"
    assert cli.main(["bench", *flags.split(), "--no-compile", "--cases", "2", "--out", "here"]) == 0
    assert [(command, job["run"]) for command, job in workers[0]] == [(run.__name__, "rms_norm"), (run.__name__, "sweep")]
    given = Settings(**workers[0][0][1]["settings"])
    assert dataclasses.asdict(given) == {
        "targets": ["rms_norm", "sweep"],
        "quick": True,
        "huge": True,
        "reuse": True,
        "device": "cpu",
        "threads": 3,
        "dtypes": ["float16"],
        "against": ["liger", "apex"],
        "backends": ["reference"],
        "accelerate": True,
        "compile": False,
        "cases": 2,
        "out": "here",
    }
    written = json.loads((tmp_path / "here" / "bench.json").read_text())
    assert written["command"] == f"python -m gpt_kernels bench {flags} --no-compile --cases 2", "all but --out, as it was typed"
    assert sorted(os.listdir(tmp_path / "here")) == FILES


def test_targets(workers):
    assert cli.main(["bench"]) == 0
    assert [job["run"] for _, job in workers[0]] == [*families(), "sweep", "gpt", "decode", "llama", "bert"]
    workers[0].clear()
    assert cli.main(["bench", "gpt", "ops", "gelu"]) == 0
    assert [job["run"] for _, job in workers[0]] == ["gpt", *families()], "each once"
    assert json.loads(open("bench-out/bench.json").read())["command"].endswith("bench gpt ops gelu")


# ---- how a run ends ----


def test_a_mismatch_or_a_failed_worker_ends_with_1(workers, capsys):
    workers[1]["gelu"] = [{"row": bench_tools.row("gelu") | {"mismatch": "output 0 is off", "variants": {}}}]
    assert cli.main(["bench", "gelu"]) == 1 and "output 0 is off" in capsys.readouterr().out
    workers[1]["gelu"] = [
        {"row": bench_tools.row("gelu")},
        run.RunFailed(f"the gelu process ended:\n  {os.path.expanduser('~')}/x"),
    ]
    assert cli.main(["bench", "gelu", "softmax"]) == 1
    streams = capsys.readouterr()
    assert "failed: gelu: the gelu process ended" in streams.out and "~/x" not in streams.out
    written = json.loads(open("bench-out/bench.json").read())
    assert [row["op"] for row in written["rows"]] == ["gelu", "softmax"], "the others go on, and what was finished is kept"
    assert written["failed"]["gelu"].endswith("~/x") and "gelu failed" in open("bench-out/report.html").read()


def test_an_interrupted_run_writes_the_rows_it_has(workers, capsys):
    workers[1]["gelu"] = [{"row": bench_tools.row("gelu")}, KeyboardInterrupt()]
    assert cli.main(["bench", "gelu", "softmax"]) == 130
    assert "stopped; the rows there are" in capsys.readouterr().err
    written = json.loads(open("bench-out/bench.json").read())
    assert written["interrupted"] and len(written["rows"]) == 1 and "Interrupted" in open("bench-out/report.html").read()
    workers[1]["gelu"] = [KeyboardInterrupt()]
    assert cli.main(["bench", "gelu"]) == 130, "without a single row"
    written = json.loads(open("bench-out/bench.json").read())
    assert written["rows"] == [] and written["limits"] == {} and sorted(os.listdir("bench-out")) == FILES
    assert os.listdir("bench-out/plots") == [], "plots of the run before would pass for this one's"


def test_files_are_whole_or_as_they_were(workers, monkeypatch):
    assert cli.main(["bench", "gelu"]) == 0
    before = {name: open(f"bench-out/{name}").read() for name in ("bench.json", "bench.csv", "report.html")}
    real = os.replace

    def full(source, target):
        if str(target).endswith("bench.json"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(cache.os, "replace", full)
    assert cli.main(["bench", "softmax"]) == 1
    assert before == {name: open(f"bench-out/{name}").read() for name in before}
    assert not [name for name in os.listdir("bench-out") if name.startswith(".")]


def started(out, *flags):
    command = [sys.executable, "-m", "gpt_kernels", "bench", *flags, "--quick", "--device", "cpu", "--no-compile", "--out", out]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_whole_of_it(tmp_path):
    """One case, measured for real, in its own process."""
    done = started(tmp_path / "out", "dropout", "--cases", "1", "--threads", "1", "--against", "liger")
    out, error = done.communicate(timeout=300)
    assert done.returncode == 0, error
    assert "dropout 1x64 float32 fwd+bwd" in error and "no numbers for liger: " in out and "written: bench.json" in out
    result = load(tmp_path / "out" / "bench.json")
    assert [row["direction"] for row in result["rows"]] == ["fwd", "fwd+bwd"] and result["environment"]["threads"] == 1
    for row in result["rows"]:
        assert row["mismatch"] is None and row["limits"]["copy"] > 1e8 and row["variants"]["ours"]["seconds"] > 0


def test_a_real_interrupt_leaves_no_process_and_whole_files(tmp_path):
    bench = started(tmp_path / "out", "sweep")
    assert any("attention" in bench.stderr.readline() for _ in range(2)), "after a word about a busy machine, perhaps"
    children = subprocess.run(["ps", "--ppid", str(bench.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
    assert children
    bench.send_signal(signal.SIGTERM)
    bench.communicate(timeout=120)
    assert bench.returncode == 130 and sorted(os.listdir(tmp_path / "out")) == FILES
    assert load(tmp_path / "out" / "bench.json")["interrupted"]
    time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in children)


def test_worker(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(measure, "configure", lambda settings, models: None)
    monkeypatch.setattr(measure, "Limits", lambda dtype: {"copy": 1.0, "gemm": 1.0})
    monkeypatch.setattr(measure, "measure", lambda case, direction, limits, settings: {"shape": case.shape, "limits": limits})
    run.worker({"run": "rms_norm", "settings": {"cases": 1}}, lambda **f: sent.append(f))
    assert [next(iter(f)) for f in sent] == ["environment", "doing", "row", "doing", "row"]
    assert sent[2] == {"row": {"target": "rms_norm", "shape": "1x64", "limits": {"copy": 1.0, "gemm": 1.0}}}
    sent.clear()
    run.worker({"run": "gpt", "settings": {}}, lambda **f: sent.append(f))
    assert [f["apart"] for f in sent if "row" in f] == [0, 1, 2], "whose memory is asked for by these numbers"


# ---- memory of whole models, each variant in a process of its own ----


def apart(number=3, **more):
    row = bench_tools.row("gpt", direction="step", **more)
    row["variants"][PRODUCTS] = bench_tools.variant(5e-4)  # whose memory nobody asks for
    for figures in row["variants"].values():
        figures["memory"] = None
    return {"row": row, "apart": number}


@pytest.fixture
def alone(workers, monkeypatch):
    """Answers of the processes for one variant, by its name: bytes, or an exception."""
    targets, answers = run.events, {}

    def events(command, job, folder):
        if "variant" not in job:
            yield from targets(command, job, folder)
            return
        workers[0].append((command, job))
        if isinstance(answers[job["variant"]], BaseException):
            raise answers[job["variant"]]
        yield {"memory": answers[job["variant"]]}

    monkeypatch.setattr(run, "events", events)
    workers[1]["gpt"] = [apart(), {"row": bench_tools.row("gpt") | {"mismatch": "FAIL", "variants": {}}, "apart": 4}]
    return answers


def written():
    return json.loads(open("bench-out/bench.json").read())


def test_memory_of_a_model_is_of_a_process_per_variant(workers, alone):
    alone |= {"eager": 2 << 20, "ours": 1 << 20}
    workers[1]["gpt"].pop()
    assert cli.main(["bench", "gpt", "gelu"]) == 0
    settings = workers[0][0][1]["settings"]
    assert [job for _, job in workers[0][1:3]] == [
        {"run": "gpt", "settings": settings, "case": 3, "variant": name} for name in ("eager", "ours")
    ]
    assert [job["run"] for _, job in workers[0]] == ["gpt"] * 3 + ["gelu"] and "variant" not in workers[0][3][1]
    gpt, gelu = written()["rows"]
    assert {name: v["memory"] for name, v in gpt["variants"].items()} == alone | {PRODUCTS: None} and not gpt["absent"]
    assert gelu["variants"]["ours"]["memory"], "an op's is of its own run"


def test_memory_that_could_not_be_measured_is_none_and_the_row_says_why(workers, alone, capsys):
    home = os.path.expanduser("~")
    alone["eager"] = run.RunFailed("the gpt process ended with signal 9:\n  ")
    alone["ours"] = run.RunFailed(f"the gpt process ended with exit code 1:\n  Traceback\n  OSError: {home}/x")
    assert cli.main(["bench", "gpt"]) == 1, "for the mismatch"
    rows = written()["rows"]
    assert rows[0]["absent"] == {
        "memory of eager": "the gpt process ended with signal 9",
        "memory of ours": "the gpt process ended with exit code 1: OSError: ~/x",
    }
    assert all(v["memory"] is None for v in rows[0]["variants"].values()) and rows[1]["absent"] == {}
    assert "no numbers for memory of ours: the gpt process ended with exit code 1: OSError: ~/x" in capsys.readouterr().out
    assert cli.main(["bench", "diff", "bench-out/bench.json", "bench-out/bench.json"]) == 0, "compared as any other"


def test_interrupted_between_a_models_time_and_its_memory(workers, alone):
    alone |= {"eager": 2 << 20, "ours": KeyboardInterrupt()}
    workers[1]["gpt"].pop()
    assert cli.main(["bench", "gpt", "gelu"]) == 130
    (row,) = written()["rows"]
    memory = {name: v["memory"] for name, v in row["variants"].items()}
    assert written()["interrupted"] and memory == {"eager": 2 << 20, "ours": None, "products": None}


def test_an_interrupt_ends_the_process_that_measures_memory(workers, monkeypatch):
    targets, started = run.events, []

    class Process(subprocess.Popen):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            started.append(self)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def events(command, job, folder):
        return (process.events if "variant" in job else targets)(command, job, folder)

    monkeypatch.setattr(run, "events", events)
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv("PYTHONPATH", str(environment.ROOT))
    workers[1]["gpt"] = [apart(0)]
    assert cli.main(["bench", "gpt", "gelu"]) == 130
    assert [p.returncode for p in started] == [-signal.SIGKILL] and len(written()["rows"]) == 1


@pytest.mark.slow
def test_memory_of_a_model_for_real(tmp_path):
    pytest.importorskip("transformers")
    done = started(tmp_path / "out", "gpt", "--threads", "1")
    _, error = done.communicate(timeout=600)
    assert done.returncode == 0, error
    (row,) = load(tmp_path / "out" / "bench.json")["rows"]
    memory = {name: v["memory"] for name, v in row["variants"].items()}
    assert not row["absent"] and memory.keys() == {"eager", "ours", "GPT", "products"}
    assert measure.peak_memory(lambda: None) is None or 20 << 20 < memory["ours"] < memory["eager"]


@pytest.mark.parametrize("target, models", [("rms_norm", False), ("gpt", True)])
def test_worker_of_one_variant(monkeypatch, target, models):
    sent, configured = [], []
    job = {"run": target, "settings": {"quick": True}, "case": 0, "variant": "ours"}
    monkeypatch.setattr(measure, "configure", lambda settings, models: configured.append((settings.quick, models)))
    monkeypatch.setattr(measure, "memory_apart", lambda case, name: f"{case.op} {name}")
    run.worker(job, lambda **facts: sent.append(facts))
    assert sent == [{"memory": f"{target} ours"}] and configured == [(True, models)]


# ---- what the figures are valid for ----


def test_environment_names_no_host_and_no_folder(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere/private")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    facts = environment.environment()
    assert {"cpu", "cores", "threads", "isa", "torch", "python", "gpt_kernels", "commit", "load", "date"} <= facts.keys()
    assert "OMP_NUM_THREADS=7" in facts["variables"]
    text = json.dumps(facts)
    assert os.uname().nodename not in text and "/somewhere" not in text and "SECRET" not in text and os.getcwd() not in text


def test_commands_that_are_absent_or_fail(monkeypatch, tmp_path):
    assert environment.output("no-such-command") is None and environment.output("false") is None
    assert environment.output("echo", "a b") == "a b"
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() is None, "an installed package has no commit"


def test_scrub(monkeypatch):
    assert run.scrub(f"{environment.ROOT}/a {os.path.expanduser('~')}/b /usr/c") == "./a ~/b /usr/c"
    monkeypatch.setenv("HOME", "/")
    assert run.scrub("/usr/c") == "/usr/c"


def test_limits_are_medians_by_dtype():
    rows = [
        bench_tools.row(dtype=d) | {"limits": {"copy": c, "gemm": 10 * c}}
        for d, c in (("float32", 1.0), ("float32", 3.0), ("bfloat16", 2.0))
    ]
    rows.append({"mismatch": "wrong", "dtype": "float16"})
    assert run.medians(rows) == {"copy": 2.0, "gemm float32": 20.0, "gemm bfloat16": 20.0}


# ---- results on disk ----


def test_a_result_is_read_back_and_has_a_row_a_line(tmp_path):
    result = bench_tools.result()
    text = dumps(result)
    (tmp_path / "r.json").write_text(text)
    assert load(tmp_path / "r.json") == result and json.loads(dumps({"rows": [], "a": 1})) == {"rows": [], "a": 1}
    assert sum(line.startswith('  {"') for line in text.splitlines()) == len(result["rows"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "no JSON"),
        ("[]", "not a result of python -m gpt_kernels bench"),
        ('{"rows": []}', "not a result"),
        ('{"rows": [], "schema": 0, "environment": {}, "limits": {}}', "its schema is 0, expected 1"),
    ],
)
def test_other_files_are_refused(tmp_path, text, words):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "f.json")
    with pytest.raises(UserError, match="Is a directory"):
        load(tmp_path)


# ---- table, CSV, Markdown ----


def test_words():
    assert [report.duration(s) for s in (2.5, 0.0123, 8.6e-6, 1e-8)] == ["2.5 s", "12.3 ms", "8.6 µs", "0.01 µs"]
    row = bench_tools.row()
    shown = report.cells(row)
    assert len(shown) == len(report.HEADS) and "2.00x" in shown and "1 / - / 1" in shown and shown[5] == "-"
    assert shown[7] == "1.5 ms" and "GB/s 50%" in shown[9]
    wrong = report.cells(row | {"mismatch": "output 0 is off", "variants": {}})
    assert len(wrong) == len(report.HEADS) and "no numbers:" in wrong and "output 0 is off" in wrong
    rows = [
        row | {"absent": {"liger": "why"}},
        bench_tools.row("gelu", absent={"liger": "why"}),
        row | {"absent": {"liger": "why"}},
    ]
    step = bench_tools.row("gpt", direction="step")
    assert report.products(step) == ""
    step["variants"][PRODUCTS] = bench_tools.variant(5e-4, noise=0)
    step["variants"]["ours"]["seconds"], step["variants"]["eager"]["seconds"] = 1e-3, 2e-3
    assert report.products(step) == "500 µs: eager 25%, ours 50%" and report.products(step) in report.cells(step)
    assert report.others(step) == []
    assert report.left_out(rows) == ["liger: why [layer_norm (2), gelu]"]


def test_show(capsys):
    report.show(bench_tools.result())
    out = capsys.readouterr().out
    for words in ("8192x768", "Test <CPU>", "copy 20 GB/s", "no numbers for liger: its kernels need a GPU", "ours cold",
                  "no numbers for reference: needs about 17.2 GB, 15.0 are free [attention (2)]"):  # fmt: skip
        assert words in out, words
    gpu = bench_tools.result([bench_tools.row(timed="cold")])
    assert "ours warm" in report.heads(gpu) and "ours cold" not in report.heads(gpu)


def test_memory_grows_with_the_length_for_ours_and_its_square_for_the_reference():
    rows = bench_tools.result()["rows"]
    for direction in ("fwd", "bwd"):
        ours, theirs = (report.growth(rows, name, direction) for name in ("ours", "reference"))
        assert ours == (pytest.approx(1.0), 16384) and theirs == (pytest.approx(2.0), 8192)
    assert report.growth(rows[:3], "ours", "fwd") is None
    assert "ours T^1.00 (to T = 16384), reference T^2.00 (to T = 8192)" in report.growth_text(rows)[0]


def test_csv():
    lines = list(csv.DictReader(report.csv_text(bench_tools.result()["rows"]).splitlines()))
    ours = next(line for line in lines if line["variant"] == "ours" and line["dtype"] == "bfloat16")
    assert float(ours["ours_faster"]) == 1.0 and float(ours["of_limit"]) == 0.5 and ours["warm"] == ours["seconds"]
    absent = [line for line in lines if line["note"]]
    assert {line["variant"] for line in absent} == {"liger", "reference"} and not any(line["seconds"] for line in absent)
    wrong = list(csv.DictReader(report.csv_text([bench_tools.row() | {"mismatch": "off", "variants": {}}]).splitlines()))
    assert [(line["variant"], line["note"]) for line in wrong] == [("ours", "off")]


def test_markdown():
    rows = [bench_tools.row(), bench_tools.row(dtype="bfloat16", ours=4e-3), bench_tools.row("gelu", dtype="bfloat16")]
    lines = report.markdown(rows).splitlines()
    assert lines[0].startswith("| op | direction | float32 | bfloat16 |") and len({line.count("|") for line in lines}) == 1
    assert "2.00x" in lines[2] and "0.50x" in lines[2] and lines[3].startswith("| gelu 8192x768 | fwd |  | 2.00x")
    assert report.markdown_cell(bench_tools.row() | {"mismatch": "off"}) == "off"


# ---- plots and the page ----


class Page(HTMLParser):
    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags, self.links, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_page():
    result = bench_tools.result()
    result["rows"][0]["shape"] = "<script>alert(1)</script>"
    svgs, pngs = plots.draw(result)
    assert svgs.keys() == pngs.keys() == plots.TITLES.keys() and all(png.startswith(b"\x89PNG") for png in pngs.values())
    for svg in svgs.values():
        ElementTree.fromstring(svg)
        assert len(svg) < 60_000 and "Date" not in svg
    text = report.html(result, svgs)
    page = Page(text)
    assert not page.open and page.tags.count("svg") == len(svgs) and "script" not in page.tags
    assert len(page.ids) == len(set(page.ids)), "ids of two plots must not meet"
    # nothing from outside: every link is to something inside, and no CSS loads anything
    assert (
        page.links and all(link.startswith("#") for link in page.links) and {link[1:] for link in page.links} <= set(page.ids)
    )
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "<link" not in text
    words = " ".join(page.text)
    for expected in ("Test <CPU>", "layer_norm", "Roofline", "liger: its kernels need a GPU", "T^2.00", "commit abc"):
        assert expected in words, expected
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    # every colour of the plots follows the theme
    assert not re.search("#[0-9a-f]{6}", "".join(plots.themed(svg, name) for name, svg in svgs.items()))


def test_the_page_defines_every_colour_it_uses():
    text = report.html(bench_tools.result(), plots.draw(bench_tools.result())[0])
    light, dark = re.findall(r":root \{(.*?)\}", text, re.S)
    for name in {*plots.COLORS, "ink", "faint"}:
        assert f"--{name}:" in light and f"--{name}:" in dark, name
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(re.findall(r"--([\w-]+):", light))


def test_pages_of_little_or_nothing():
    for rows in ([], [bench_tools.row() | {"mismatch": "off", "variants": {}}], [bench_tools.row("decode", main=True)]):
        result = bench_tools.result(rows) | {"limits": run.medians(rows)}
        Page(report.html(result, plots.draw(result)[0]))
        report.show(result)


def test_plots_are_the_same_every_time():
    assert plots.draw(bench_tools.result())[0] == plots.draw(bench_tools.result())[0]


def test_report_again_from_the_json(tmp_path, capsys):
    (tmp_path / "r.json").write_text(dumps(bench_tools.result()))
    assert cli.main(["bench", "report", str(tmp_path / "r.json"), "--out", str(tmp_path / "new")]) == 0
    assert sorted(os.listdir(tmp_path / "new")) == ["bench.csv", "plots", "report.html"]
    assert len(os.listdir(tmp_path / "new" / "plots")) == 2 * len(plots.TITLES) and "8192x768" in capsys.readouterr().out
    code, error = ended(capsys, "bench", "report", str(tmp_path / "r.json"), "--out", str(tmp_path / "r.json"))
    assert code == 2 and "File exists" in error
