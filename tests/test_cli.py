"""The command line: exit codes, one-line errors, and an import that costs next to nothing."""

import dataclasses
import json
import subprocess
import sys

import pytest

from gpt_kernels import arguments, cli, errors, names
from gpt_kernels.bench.settings import TARGETS

HEAVY = {"transformers", "tokenizers", "safetensors", "matplotlib", "rich", "tqdm", "pandas", "scipy", "triton", "numpy"}


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
        ((), "required: {bench,demo,estimate,explain,info,run,support,tune}"),
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
    find_spec = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda m: None if m in ("tokenizers", "tqdm") else find_spec(m))
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


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_names_the_commands(capsys):
    text = help_of(capsys)
    assert "info" in text and "demo" in text and "bench" in text and "worker" not in text and "diff" not in text


COMMANDS = cli.found()


def test_there_are_commands():
    assert {"bench", "bench_diff", "bench_report", "demo", "info", "support", "tune"} <= COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_default_is_written_once(command, capsys):
    """What the command line gives for no arguments, and what it says of it, is what Settings has; and back into words."""
    settings = COMMANDS[command].Settings
    fields = dataclasses.fields(settings)
    needed = [f.name for f in fields if f.default is dataclasses.MISSING]
    words = command.split("_")
    module, given = cli.parsed([*words, *needed])
    assert module is COMMANDS[command] and given == settings(*needed)
    text = help_of(capsys, *words)
    assert text.startswith(f"usage: gpt_kernels {' '.join(words)} [-h]")
    for f in fields:
        if isinstance(f.default, (int, float, str)) and not isinstance(f.default, bool):
            assert f"(default: {f.default})" in text, f.name
        assert f.metadata["help"] in text, f.name
    assert arguments.typed(given) == [*needed, *(w for f in fields if f.metadata["words"] for w in f.default)]


OTHER = {int: 7, float: 0.25, str: "x"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_sets_its_field_alone(command):
    """Another value for each field: in words, parsed, and the same again."""
    settings = COMMANDS[command].Settings
    fields = dataclasses.fields(settings)
    needed = {f.name: f.name for f in fields if f.default is dataclasses.MISSING}
    for f in fields:
        how, default = f.metadata["more"], f.default
        if isinstance(default, bool):
            value = not default
        elif f.metadata["of"] is not None:
            value = ["a", "b"]
        elif "choices" in how:
            value = next(c for c in arguments._now(how["choices"]) if c != default)
        else:
            value = 7 if how.get("type") is arguments.positive else OTHER.get(type(default), "x")
        changed = settings(**needed | {f.name: value})
        module, given = cli.parsed([*command.split("_"), *arguments.typed(changed)])
        assert json.dumps(dataclasses.asdict(given)) == json.dumps(dataclasses.asdict(changed)), f.name


def test_the_ops_are_offered(capsys):
    bench, tune = help_of(capsys, "bench"), help_of(capsys, "tune")
    assert all(f" {target}" in bench for target in TARGETS)
    assert f"--op {{{','.join(names.families())}}}" in tune


HELP = """
import sys, time
import gpt_kernels
before, start = set(sys.modules), time.perf_counter()
from gpt_kernels import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
new = {name: module for name, module in sys.modules.items() if name not in before}
print(time.perf_counter() - start, sorted({name.split(".")[0] for name in new} - set(sys.stdlib_module_names)),
      [name for name in new if "torch" in vars(new[name])], sep="\\n", file=sys.stderr)
"""


def test_help_reads_the_commands_and_nothing_heavy():
    run = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "Train a GPT-2" in run.stdout, run.stderr
    seconds, packages, with_torch = run.stderr.splitlines()
    assert float(seconds) < 1 and packages == "['gpt_kernels']" and with_torch == "[]"


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
    assert not HEAVY & set(eval(runs[0].stdout.splitlines()[1]))
