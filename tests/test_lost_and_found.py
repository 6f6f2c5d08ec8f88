"""What was measured is not lost by how it is shown, and no file, stream or home ends a command in a traceback."""

import copy
import errno
import io
import json
import math
import os
import pathlib
import pwd
import sys
import warnings

import bench_tools
import pytest

import gpt_kernels
from gpt_kernels import cache, cli, process
from gpt_kernels.bench import diff, environment, plots, report, run
from gpt_kernels.bench.result import dumps, load, validate
from gpt_kernels.commands import demo
from gpt_kernels.errors import UserError
from gpt_kernels.streams import streams
from gpt_kernels.triton.tuned import Tuned
from gpt_kernels.workflows import text

CACHE = sys.modules["gpt_kernels.cache"]


def ended(capsys, *arguments):
    """(exit code, standard error) of the command; an exception that leaves it is a traceback for a user."""
    try:
        code = cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


# ---- streams ----


class Broken(io.StringIO):
    """Fails from the first byte on, in the way that is asked for."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text=""):
        raise self.error

    flush = write


FAILURES = {
    "the reader left": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    "disk full": (OSError(errno.ENOSPC, "No space left"), 1, "gpt_kernels: standard output: No space left\n"),
    "closed": (ValueError("I/O operation on closed file"), 1, "gpt_kernels: standard output: I/O operation on closed file\n"),
}
COMMANDS = {"info": ["info"], "info --json": ["info", "--json"], "support": ["support"], "bench": ["bench", "gelu"],
            "bench report": ["bench", "report", "r.json"], "bench diff": ["bench", "diff", "r.json", "r.json"],
            "demo": ["demo", "--no-compile"]}  # fmt: skip
FILES = {"bench": "bench-out/bench.json", "bench report": "bench-out/report.html", "demo": "demo-out/result.json"}


def one_row(command, job, folder):
    yield {"row": bench_tools.row("gelu")}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Commands whose workers answer at once, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.sys, "argv", ["gpt_kernels"])
    monkeypatch.setattr(process.signal, "signal", lambda *given: None)
    (tmp_path / "r.json").write_text(dumps(bench_tools.result()))
    monkeypatch.setattr(run, "events", one_row)
    monkeypatch.setattr(plots, "draw", lambda result: ({}, {}))
    facts = {"losses": [2.0], "ms": [3.0], "steps": 1, "ms_per_step": 3.0, "tokens_per_s": 1.0, "sample": "µ 漢"}

    def trained(settings, documents, folder, result):
        result |= {"prompt": "±", "runs": {"ours": facts}}
        print("µs", flush=True)

    monkeypatch.setattr(demo, "_run_all", trained)
    monkeypatch.setattr(demo, "plot", lambda *given: None)
    monkeypatch.setattr(text, "standard_library", lambda: ["text"])


@pytest.mark.parametrize("command", COMMANDS)
def test_no_stream_ends_a_command(command, quick, monkeypatch):
    """Standard output, then standard error, broken in every way; absent; and of every encoding."""
    for error, code, words in FAILURES.values():
        err = io.StringIO()
        monkeypatch.setattr(sys, "stdout", Broken(error))
        monkeypatch.setattr(sys, "stderr", err)
        assert cli.main(COMMANDS[command]) == code and err.getvalue().endswith(words) and "Traceback" not in err.getvalue()
        if command in FILES:
            os.unlink(FILES[command])
        monkeypatch.setattr(sys, "stdout", out := io.StringIO())
        monkeypatch.setattr(sys, "stderr", Broken(error))
        assert cli.main(COMMANDS[command]) == 0 and out.getvalue()
        if command in FILES:
            os.unlink(FILES[command])
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(COMMANDS[command]) == 0 and sys.stdout is None
    for coding in ("ascii", "latin-1", "utf-8", "utf-16"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=coding))
        assert cli.main(COMMANDS[command]) == 0
        assert raw.getvalue().decode(coding)
    if command in FILES:
        assert os.path.exists(FILES[command])


def test_what_a_terminal_cannot_say_is_spelled(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with streams():
        print("8.6 µs ±3 % 漢", flush=True)
    assert raw.getvalue() == b"8.6 us +-3 % \\u6f22\n"


def test_a_real_pipe_without_a_reader_is_quiet_at_exit(tmp_path):
    (tmp_path / "r.json").write_text(dumps(bench_tools.result()))
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gpt_kernels", "bench", "diff", *2 * [str(tmp_path / "r.json")]]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = process.subprocess.run(command, stdout=write, stderr=process.subprocess.PIPE, text=True, env=buffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


# ---- a run that ends otherwise ----


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("a bug"), MemoryError()])
def test_an_error_keeps_the_rows_there_are(quick, monkeypatch, error):
    def events(command, job, folder):
        yield {"row": bench_tools.row(job["run"])}
        if job["run"] == "softmax":
            raise error

    monkeypatch.setattr(run, "events", events)
    if isinstance(error, OSError):
        assert cli.main(["bench", "gelu", "softmax", "dropout"]) == 1
    else:
        with pytest.raises(type(error)):
            cli.main(["bench", "gelu", "softmax", "dropout"])
    written = load("bench-out/bench.json")
    assert [row["op"] for row in written["rows"]] == ["gelu", "softmax"] and written["interrupted"]


def test_a_machine_that_dies_takes_one_target_with_it(quick, monkeypatch):
    """As if the power went in the second target: nothing after it runs."""

    class Dead(BaseException):
        pass

    def events(command, job, folder):
        yield {"row": bench_tools.row(job["run"])}
        if job["run"] == "softmax":
            raise Dead

    monkeypatch.setattr(run, "events", events)
    with pytest.raises(Dead):
        cli.main(["bench", "gelu", "softmax"])
    assert [row["op"] for row in load("bench-out/bench.partial.json")["rows"]] == ["gelu"]
    monkeypatch.setattr(run, "events", one_row)
    assert cli.main(["bench", "gelu"]) == 0 and not os.path.exists("bench-out/bench.partial.json")


def test_a_full_disk_shows_what_it_cannot_keep(quick, monkeypatch, capsys):
    def full(path, data, mode=0o600):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CACHE, "write_atomically", full)
    for command, words in (("bench", "8192x768"), ("demo", "ms/step")):
        assert cli.main(COMMANDS[command]) == 1
        streams = capsys.readouterr()
        assert words in streams.out and "No space left on device" in streams.err and "written" not in streams.out


def test_half_a_line_of_a_killed_worker_is_no_traceback(tmp_path, monkeypatch):
    real = process.subprocess.Popen
    script = ["/bin/sh", "-c", "echo '{\"a\": 1}'; printf '{\"b\": '; kill -9 $$"]
    monkeypatch.setattr(process.subprocess, "Popen", lambda arguments, **more: real(script, **more))
    events = process.events("gpt_kernels.bench.run", {"run": "gelu"}, str(tmp_path))
    assert next(events) == {"a": 1}
    with pytest.raises(process.RunFailed, match="the gelu process ended with signal 9"):
        next(events)


# ---- files that are not what they should be ----


def deep():
    return ("[" * 100_000).encode()


BAD_FILES = {
    "missing": None,
    "a folder": None,
    "empty": b"",
    "blank": b" \n",
    "a line": b"x\n",
    "binary": b"\x80\x02}q\x00\xff" * 99,
    "not UTF-8": b"text \xff\xfe",
    "no JSON": b"{",
    "JSON cut": dumps(bench_tools.result()).encode()[:2000],
    "JSON of another kind": b"[1, 2]",
    "null": b"null",
    "a long number": b"9" * 10_000,
    "nested deeply": deep(),
    "nested deeply in a result": b'{"schema": 1, "environment": {}, "limits": {}, "rows": ' + deep(),
    "another schema": b'{"schema": [1], "environment": {}, "limits": {}, "rows": []}',
}
READERS = {
    "bench report": lambda file: ["bench", "report", file],
    "bench diff A": lambda file: ["bench", "diff", file, "good.json"],
    "bench diff B": lambda file: ["bench", "diff", "good.json", file],
    "demo --data": lambda file: ["demo", "--no-compile", "--data", file],
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_every_command_refuses_files_that_are_no_such(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(process, "events", lambda *given, **more: pytest.fail("it began"))
    monkeypatch.setattr(process.signal, "signal", lambda *given: None)
    (tmp_path / "good.json").write_text(dumps(bench_tools.result()))
    if name == "a folder":
        (tmp_path / "file").mkdir()
    elif name != "missing":
        (tmp_path / "file").write_bytes(BAD_FILES[name])
    for command, arguments in READERS.items():
        if command.startswith("demo") and name.startswith("nested"):
            continue  # is text
        code, error = ended(capsys, *arguments("file"))
        assert code == 2 and "Traceback" not in error and len(error.strip().splitlines()) == 1, (command, error)
        assert "file: " in error


WRONG = (None, -1, 0, True, 1.5, "x", "\ud800", [], [1], [None], {}, {"x": "y"}, {"x": 1}, math.inf, math.nan, 10**400)


def places(value, path=()):
    """Paths to everything in it, lists by their first element."""
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def test_every_field_of_a_result_of_every_wrong_type(tmp_path, monkeypatch):
    """Refused, with a sentence, or read by the report and the diff as any other."""
    good = bench_tools.result([bench_tools.row(tiny=True, length=512)])
    good["rows"][0]["variants"]["ours"] |= {"launch": 1e-6, "warm": 1e-3}
    file, read, refused = tmp_path / "r.json", {}, 0
    validate(copy.deepcopy(good))
    for path in list(places(good))[1:]:
        for wrong in (*WRONG, "gone"):
            changed = copy.deepcopy(good)
            *outer, last = path
            at = changed
            for name in outer:
                at = at[name]
            if wrong == "gone":
                del at[last]
            else:
                at[last] = wrong
            file.write_text(json.dumps(changed))
            try:
                read.setdefault(json.dumps(load(file)), path)
            except UserError as error:
                assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
                refused += 1
    assert refused > 300 and len(read) > 50
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    drawn: set = set()
    for said, path in read.items():
        result = json.loads(said)
        report.show(result)
        report.html(result, {})
        report.csv_text(result["rows"])
        diff.compare(good, result, 0.05, 0.01)
        if path[0] in ("rows", "limits") and path not in drawn:
            drawn.add(path)
            for plot in plots.PLOTS.values():
                plot(result)
    process.write(file, "\ud800 µ")
    assert file.read_text() == "? µ"


def test_committed_results_are_read():
    files = sorted((environment.ROOT / "benchmarks" / "results").glob("*bench*.json"))
    assert files and all(load(file)["rows"] for file in files)


# ---- no home ----

HOMES = {
    "none": None,
    "a device": "/dev/null",
    "one that does not exist": "/nonexistent/home",
    "a file": __file__,
}


@pytest.mark.parametrize("name", HOMES)
def test_a_home_that_is_none(name, capsys, monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    if HOMES[name] is not None:
        monkeypatch.setenv("HOME", HOMES[name])
    for arguments in (["info"], ["info", "--json"]):
        code, error = ended(capsys, *arguments)
        assert code == 0 and not error
    facts = gpt_kernels.info()["caches"]["tokenizers of the demo"]
    if name == "none":
        assert facts["path"] is None and facts["problem"] == "no home directory is known: set HOME or XDG_CACHE_HOME"
    assert run.scrub("a log")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in ("a device", "a file") else "error")
        tuned = Tuned({"gpu": "x", "arch": "sm_90"})
    assert tuned.find("kernel", {}, [{}]) is None and tuned.status()
    if name != "one that does not exist" or os.getuid():
        with pytest.raises(OSError):
            tuned.add("kernel", {}, {}, 1.0, 1.0)
        with pytest.raises(OSError):
            cache.write("file", b"")
    if name == "none":
        assert "no home directory" in text.train_tokenizer(["some text " * 100], 300)[1]


def test_a_home_that_may_not_be_looked_into(monkeypatch, tmp_path):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(CACHE.os, "lstat", refuse)
    assert cache.problem(pathlib.Path("x")) == "x: Permission denied"
    assert gpt_kernels.info()["caches"]["tokenizers of the demo"]["problem"].endswith("Permission denied")
