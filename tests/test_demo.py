"""The demo: three runs in their own processes, a table, files that are whole, and a clean Ctrl-C."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from gpt_kernels import process
from gpt_kernels.commands import demo

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

SMALL = "--steps 4 --layers 1 --heads 2 --width 32 --context 64 --batch 2 --vocab 400 --no-compile --device cpu".split()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} says that {i * i} is the square of {i}\n" for i in range(4000)))
    return path


# ---- table and picture ----

RUN = {"losses": [5.0, 4.0], "steps": 2, "ms_per_step": 200.0, "tokens_per_s": 10.0, "peak_bytes": 4e8, "final_loss": 4.0}
OURS = {**RUN, "ms_per_step": 100.0, "tokens_per_s": 20.0, "peak_bytes": 1e8, "held_out_loss": 3.5, "perplexity": 33.1}


def test_table_ratios_say_how_much_better_ours_is():
    header, rows = demo.table({"eager": RUN, "compile": RUN, "ours": OURS})
    assert header == ["", "eager", "torch.compile", "gpt_kernels", "ours vs eager", "ours vs torch.compile"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["ms/step (median)"] == ("200", "200", "100", "2.00x", "2.00x")
    assert cells["tokens/s"][3] == "2.00x" and cells["peak memory, MB"] == ("400", "400", "100", "4.00x", "4.00x")
    assert cells["held-out loss"] == ("-", "-", "3.500", "", "")  # a run that was stopped early
    assert cells["generation, tokens/s"] == ("-", "-", "-", "", "")


def test_table_of_one_run():
    assert demo.table({"eager": RUN})[0] == ["", "eager"]
    assert demo.table({"ours": OURS})[0] == ["", "gpt_kernels"]


@pytest.mark.parametrize("runs", [{"eager": RUN}, {"eager": RUN, "ours": OURS}])
def test_plot_writes_a_whole_picture(tmp_path, runs):
    (tmp_path / "out").mkdir()
    demo.plot(runs, demo.Settings(), tmp_path / "out" / "p.png")
    data = (tmp_path / "out" / "p.png").read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82") and os.listdir(tmp_path / "out") == ["p.png"]


# ---- workers ----


def test_a_worker_that_dies_is_reported_with_its_last_words(tmp_path):
    job = {"run": "eager", "settings": {"no_such_setting": 1}}
    with pytest.raises(process.RunFailed, match=r"(?s)the eager process ended with exit code 1.*no_such_setting"):
        list(process.events(demo.__name__, job, str(tmp_path)))


def test_no_compile_reasons(monkeypatch):
    assert demo.no_compile(demo.Settings(compile=False)) == "--no-compile"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert demo.no_compile(demo.Settings(device="cpu")) == "no C++ compiler found"


# ---- the whole ----


def command(text_file, out, *more):
    return [sys.executable, "-m", "gpt_kernels", "demo", *SMALL, "--data", str(text_file), "--out", str(out), *more]


def test_demo_end_to_end(text_file, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(command(text_file, out, "--dropout", "0"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert sorted(os.listdir(tmp_path / "out")) == ["demo.png", "result.json"]
    assert result["verified"] is True and not result["failed"] and not result["interrupted"]
    assert result["left_out"] == {"compile": "--no-compile"} and "no torch.compile run: --no-compile" in done.stdout
    eager, ours = result["runs"]["eager"], result["runs"]["ours"]
    for run in (eager, ours):
        assert len(run["losses"]) == run["steps"] == 4
        assert run["losses"][0] == pytest.approx(math.log(400), rel=0.05)  # untrained: uniform over the vocabulary
        assert run["peak_bytes"] > 0 and run["ms_per_step"] > 0 and run["generation_tokens_per_s"] > 0 and run["sample"]
        assert run["perplexity"] == pytest.approx(math.exp(run["held_out_loss"]))
    # without dropout nothing but rounding tells the two apart
    assert ours["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    assert ours["held_out_loss"] == pytest.approx(eager["held_out_loss"], rel=1e-4)
    assert result["environment"]["ops"]
    for words in ("held-out perplexity", "ours vs eager", "goes on from", "tokens/s", "demo.png"):
        assert words in done.stdout


def test_too_small_a_file_is_refused(text_file, tmp_path):
    text_file.write_text("too little text\n" * 20)
    done = subprocess.run(command(text_file, tmp_path / "out"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "too small" in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_with_what_there_is(text_file, tmp_path, sent):
    """Ctrl-C or kill in the middle of the first run: its steps so far in table and files, no worker left, code 130."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(text_file, out, "--steps", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    try:
        for line in process.stdout:
            if "step 1/" in line:
                break
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        assert children
        process.send_signal(sent)
        output, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "stopped" in output and "ended at step" in output
    result = json.loads((out / "result.json").read_text())
    assert result["interrupted"] and 0 < result["runs"]["eager"]["steps"] < 100000 and "ours" not in result["runs"]
    assert sorted(os.listdir(out)) == ["demo.png", "result.json"]
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
