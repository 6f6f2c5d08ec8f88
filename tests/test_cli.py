"""The command line: exit codes, one-line errors, and an import that costs next to nothing."""

import subprocess
import sys

import pytest

from gpt_kernels import cli, demo


def fails(capsys, *arguments):
    """(exit code, standard error); a traceback is never a message for a user."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, output.err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "required: {info,demo,support,tune,bench}"),
        (("dance",), "invalid choice: 'dance'"),
        (("info", "--xml"), "unrecognized arguments: --xml"),
        (("demo", "--steps", "0"), "--steps: must be at least 1, got 0"),
        (("demo", "--steps", "-3"), "--steps: must be at least 1, got -3"),
        (("demo", "--steps", "many"), "--steps: expected a whole number, got 'many'"),
        (("demo", "--width", "1.5"), "--width: expected a whole number"),
        (("demo", "--dropout", "1"), "--dropout: must be at least 0 and less than 1, got 1"),
        (("demo", "--dropout", "nan"), "--dropout: must be at least 0"),
        (("demo", "--dropout", "x"), "--dropout: expected a number"),
        (("demo", "--device", "tpu"), "invalid choice: 'tpu'"),
        (("demo", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("demo", "--width", "100", "--heads", "3"), "--width 100 is not a multiple of --heads 3"),
        (("demo", "--vocab", "256"), "--vocab 256: at least 257"),
        (("demo", "--context", "32"), "--context 32: at least 64"),
        (("demo", "--lr", "0"), "--lr 0.0: must be greater than 0"),
        (("demo", "--lr", "nan"), "--lr nan: must be greater than 0"),
        (("demo", "--seed", str(2**64)), "--seed 18446744073709551616: must fit in 64 bits"),
        (("demo", "--data", "absent.txt"), "--data absent.txt: No such file"),
        (("demo", "--data", "."), "--data .: Is a directory"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_line(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, message = fails(capsys, *arguments)
    assert code == 2 and words in message


def test_no_gpu_is_said(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, message = fails(capsys, "demo", "--device", "cuda")
    assert code == 2 and "sees no GPU" in message


def test_missing_packages_are_named(capsys, monkeypatch):
    find_spec = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda m: None if m in ("tokenizers", "tqdm") else find_spec(m))
    code, message = fails(capsys, "demo")
    assert code == 2 and "tokenizers, tqdm not installed: pip install 'gpt-kernels[demo]'" in message


def test_unusable_output_folder_is_said(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, message = fails(capsys, "demo", "--out", str(tmp_path / "file" / "sub"))
    assert code == 2 and "Not a directory" in message


def test_interrupt_and_system_errors_have_no_traceback(capsys, monkeypatch):
    info = sys.modules["gpt_kernels.info"]  # the name gpt_kernels.info is the function
    monkeypatch.setattr(info, "info", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert fails(capsys, "info") == (130, "gpt_kernels info: stopped\n")
    monkeypatch.setattr(info, "info", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert fails(capsys, "info") == (1, "gpt_kernels info: [Errno 28] No space left on device\n")


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m gpt_kernels info | true", shell=True, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "info" in text and "demo" in text and "bench" in text and "worker" not in text


IMPORT = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import gpt_kernels
print(time.perf_counter() - start)
print(sorted({m.split(".")[0] for m in set(sys.modules) - before}))
"""


def test_import_adds_under_0_3_seconds_and_nothing_heavy():
    runs = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120) for _ in range(2)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    # the better of two: other work on the machine is not the import's
    assert min(float(run.stdout.splitlines()[0]) for run in runs) < 0.3
    heavy = {"transformers", "tokenizers", "safetensors", "matplotlib", "rich", "tqdm", "pandas", "scipy", "triton"}
    assert not heavy & set(eval(runs[0].stdout.splitlines()[1]))
