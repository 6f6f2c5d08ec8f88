"""dev/LOG.md: ids without gaps, newest first, each in the index; and what cites an id in the code leads somewhere."""

import pathlib
import re
import subprocess

import pytest

from tools import log

ROOT = pathlib.Path(__file__).parents[1]


def test_newest_first_and_every_id_once():
    text = log.LOG.read_text()
    entries = log.entries(text)
    assert [entry.id for entry in entries] == [f"L{n:03d}" for n in range(len(entries), 0, -1)]
    dates = re.findall(r"^## (.*)$", text, re.M)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d: .+", date) for date in dates), dates
    days = [date[:10] for date in dates]
    assert days == sorted(days, reverse=True)


def test_index():
    text = log.LOG.read_text()
    written = text.partition(log.BEGIN)[2].partition(log.END)[0]
    assert written == log.index(text), "python -m tools.log"
    assert set(re.findall(r"L\d{3}", written)) == {entry.id for entry in log.entries(text)}


def test_a_heading_of_another_form_is_named():
    with pytest.raises(ValueError, match="not `### L042 .*: ### L7 softmax: twice as fast"):
        log.entries("### L007 softmax, cpu: a buffer [kept]\n### L7 softmax: twice as fast [kept]\n")
    with pytest.raises(ValueError, match="L008 softmax: twice as fast .great."):
        log.entries("### L008 softmax: twice as fast [great]\n")


def test_what_the_code_cites_is_in_the_log():
    """`LOG L042`, several as `LOG L042, L043`; the log's name without an id leads nowhere."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    roots = ("csrc/", "gpt_kernels/", "tests/", "tools/", "benchmarks/", "setup.py")
    files = [ROOT / name for name in names if name.startswith(roots) and name.endswith((".py", ".cpp", ".h", ".cu", ".cuh"))]
    known = {entry.id for entry in log.entries(log.LOG.read_text())}
    cited = 0
    for file in files:
        if file.name in ("test_log.py", "log.py") or not file.exists():
            continue
        for ids in re.findall(r"\bLOG((?:,? L\d{3})+)", file.read_text()):
            assert set(re.findall(r"L\d{3}", ids)) <= known, (file, ids)
            cited += 1
        assert "dev/LOG.md" not in file.read_text(), f"{file}: cite the entry by its id, as `LOG L042`"
    assert cited > 0
