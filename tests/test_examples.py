"""examples/ run as they stand."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def run(*words, **variables):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent), **variables}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text):
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


def torchrun(processes, *words):
    return run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, FOLDER / "train_distributed.py", *words
    )


SMALL = ("--batch", 2, "--seq", 32, "--width", 64, "--layers", 2)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
def test_train_distributed_and_its_checkpoint_on_other_processes(parallel, tmp_path):
    whole = losses(torchrun(2, *SMALL, "--parallel", parallel, "--steps", 12, "--out", tmp_path / "whole"))
    assert len(whole) == 3 and whole[-1] < whole[0]
    torchrun(2, *SMALL, "--parallel", parallel, "--steps", 10, "--out", tmp_path / "out")
    assert losses(torchrun(2, *SMALL, "--parallel", parallel, "--steps", 12, "--out", tmp_path / "out"))[-1] == pytest.approx(
        whole[-1], abs=2e-3
    )
    if parallel == "fsdp":
        assert losses(torchrun(1, *SMALL, "--steps", 14, "--out", tmp_path / "out"))


def test_lightning():
    pytest.importorskip("lightning")
    found = losses(run(FOLDER / "lightning_gpt.py"))
    assert 0 < found[-1] < 4.5


def test_accelerate():
    pytest.importorskip("accelerate")
    text = run(FOLDER / "accelerate_gpt.py")
    assert "RMS norm" in text and 0 < losses(text)[-1] < 4.5
