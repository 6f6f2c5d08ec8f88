"""The runner of seeded faults: what is killed, what survives, what is no fault at all."""

import pathlib
import shlex
import subprocess

import pytest
from mutants import INVALID, KILLED, ROOT, SURVIVED, load, run

SOURCE = "def double(x):\n    return x + x\n\n\ndef unused():\n    return 1\n"
TESTS = """
import os

from m import double, unused

def test_double():
    assert double(3) == 6

def test_environment():
    assert os.environ.get("TRITON_INTERPRET", "0") == "{interpret}"

def test_red():
    assert unused() == 2
"""
CASES = {  # (old, new, tests, verdict, in the reason given)
    "killed": ("x + x", "x * x", "-k double", KILLED, "test_double"),
    "hangs": ("return x + x", "while True: pass", "-k double", KILLED, "nothing within"),
    "crashes": ("return x + x", "__import__('os').abort()", "-k double", KILLED, "signal 6"),
    "survives": ("return 1", "return 3", "-k double", SURVIVED, "pass"),
    "missing": ("x - x", "x * x", "-k double", INVALID, "occurs 0 times"),
    "ambiguous": ("return", "yield", "-k double", INVALID, "occurs 2 times"),
    "no change": ("x + x", "x + x", "-k double", INVALID, "same"),
    "no such test": ("x + x", "x * x", "-k nowhere", INVALID, "deselected"),
    "cannot be imported": ("def double(x):", "def double(x:", "-k double", INVALID, "test_m.py"),
    "red before": ("x + x", "x * x", "-k red", INVALID, "without the fault: test_m.py::test_red"),
}


@pytest.fixture
def tree(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "m.py").write_text(SOURCE)
    return tmp_path


def write(tree, group, *entries):
    """entries: (name, old, new, tests, survives)"""
    keys = ("name", "old", "new", "tests", "survives")
    lines = ["[[mutant]]\nfile = 'm.py'\n" + "\n".join(f'{k} = "{v}"' for k, v in zip(keys, e, strict=True)) for e in entries]
    (tree / f"{group}.toml").write_text("\n".join(lines))


def test_verdicts(tree, monkeypatch):
    monkeypatch.setattr("mutants.LIMIT", (3, 2))
    (tree / "test_m.py").write_text(TESTS.format(interpret=0))
    write(tree, "cuda_m", *((name, old, new, "test_m.py " + k, "") for name, (old, new, k, *_) in CASES.items()))
    reported = []
    results = run(tree, load(tree, []), 1, reported.append)
    assert reported == results and [r.mutant.name for r in results] == list(CASES)
    for r in results:
        *_, verdict, why = CASES[r.mutant.name]
        assert (r.verdict, r.ok) == (verdict, verdict == KILLED) and why in r.why, r
    assert (tree / "m.py").read_text() == SOURCE


def test_reasons_and_environment(tree):
    (tree / "test_m.py").write_text(TESTS.format(interpret=1))
    tests = "test_m.py -k 'double or environment'"
    write(
        tree,
        "triton_m",
        ("seen", "x + x", "x * x", tests, ""),
        ("unseen", "return 1", "return 3", tests, "nothing calls it"),
        ("said to be unseen", "x + x", "x - x", tests, "wrongly"),
    )
    results = run(tree, load(tree, []), 2, lambda r: None)
    assert [(r.verdict, r.ok) for r in results] == [(KILLED, True), (SURVIVED, True), (KILLED, False)]
    assert [m.name for m in load(tree, ["triton_m: s"])] == ["seen", "said to be unseen"]


def test_every_fault_has_its_place():
    """The text that it changes stands there once, and its tests' file exists: code that moves takes its faults along."""
    for mutant in load(pathlib.Path(__file__).parent / "mutants", []):
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant
        assert (ROOT / shlex.split(mutant.tests)[0]).exists(), mutant
