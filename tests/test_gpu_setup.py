"""make gpu's choice of torch (tools/gpu_setup.py), in environments with a made-up torch, pip and nvidia-smi."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TORCH = """
__version__ = "{version}"
class cuda:
    is_available = staticmethod(lambda: {gpu})
    get_device_name = staticmethod(lambda: "Test 9000")
"""
PIP = """
import json, os, pathlib, sys
lines = pathlib.Path(sys.argv[-1]).read_text().split()
with open("pip-was-asked", "a") as file: print(*sys.argv[1:-1], *lines, file=file)
if os.environ.get("OFFLINE"): sys.exit("WARNING: Retrying\\nERROR: No matching distribution found for " + lines[0])
(site,) = pathlib.Path(sys.argv[sys.argv.index("--python") + 1]).parents[1].glob("lib/python3*/site-packages")
for line in lines:
    name = line.split("=")[0]
    (site / f"{name}.dist-info").mkdir()
    (site / f"{name}.dist-info/METADATA").write_text(f"Name: {name}\\nVersion: 1\\n")
if os.environ.get("REPLACES"): (site / "triton.py").write_text("__version__ = '9'")
"""
MAKE = """echo $@ >> ran; mkdir -p .venv/bin; ln -s "${2#PYTHON=}" .venv/bin/python"""
ENDS = "import sys\nprint('ran', sys.argv[1:], sys.executable, file=open('ran', 'a'))"


@pytest.fixture
def machine(tmp_path):
    """A Python with torch 2.11, Triton and pip, and a repository whose set-up and kit only say that they were called."""
    repository, python = tmp_path / "repository", tmp_path / "python"
    (repository / "tools").mkdir(parents=True)
    (repository / "tools" / "__init__.py").touch()
    shutil.copy(ROOT / "tools" / "gpu_setup.py", repository / "tools")
    shutil.copy(ROOT / "Makefile", repository)
    (repository / "requirements-dev.txt").write_text("# a comment\ntorch==2\ntriton==3\npytest==9\nrich==1\nliger-kernel==1\n")
    (repository / "setup.py").write_text(ENDS)
    (repository / "tools" / "gpu.py").write_text(ENDS)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True)
    (site,) = python.glob("lib/python3*/site-packages")
    (site / "triton.py").write_text("__version__ = '3.6.0'")
    (site / "pip").mkdir()
    (site / "pip" / "__main__.py").write_text(PIP)

    def run(version="2.11.0+cu130", gpu=True, have=(), smi=None, ok=0, **environment):
        (site / "torch.py").write_text(TORCH.format(version=version, gpu=gpu))
        for name in have:
            (site / f"{name}.dist-info").mkdir()
            (site / f"{name}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
        (tmp_path / "bin").mkdir()
        for name, script in {"nvidia-smi": smi, "make-of-it": MAKE}.items():
            if script is not None:
                (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
                (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:/usr/bin:/bin"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "MAKE"))}
        done = subprocess.run(
            [python / "bin" / "python", "-m", "tools.gpu_setup", "--quick"],
            cwd=repository,
            text=True,
            capture_output=True,
            env={**clean, "PATH": path, "MAKE": "make-of-it", **environment},
        )
        assert done.returncode == ok, done.stderr

        def said(name):
            return (repository / name).read_text().splitlines() if (repository / name).exists() else []

        return done.stderr, said("ran"), said("pip-was-asked")

    return run


def test_takes_the_torch_that_sees_a_gpu(machine):
    said, ran, asked = machine(have=["pytest"])
    assert "takes torch 2.11.0+cu130 with Triton 3.6.0 of" in said and "sees Test 9000" in said
    builds, kit = ran
    assert builds.startswith("ran ['-q', 'build_ext', '--inplace']") and kit.startswith("ran ['--quick']")
    assert ".venv-gpu" in builds and ".venv-gpu" in kit
    others, liger = asked
    assert others.endswith(" rich==1") and "--no-deps" not in others, "only what is missing, never torch or Triton"
    assert liger.endswith("--no-deps -r liger-kernel==1"), "it would ask for NVIDIA's Triton"


def test_without_an_index_what_is_there_must_do(machine):
    said, ran, _ = machine(have=["pytest"], OFFLINE="1")
    assert "not installed: ERROR: No matching distribution found for rich==1" in said
    assert "goes on without rich, liger-kernel" in said and len(ran) == 2


def test_asks_no_index_where_nothing_is_missing(machine):
    _, ran, asked = machine(have=["pytest", "rich", "liger_kernel"], OFFLINE="1")
    assert len(ran) == 2 and not asked


def test_stops_without_what_nothing_can_run_without(machine):
    said, ran, _ = machine(ok=1, OFFLINE="1")
    assert "cannot run without pytest" in said and not ran


def test_a_replaced_triton_is_an_error(machine):
    said, ran, _ = machine(ok=1, REPLACES="1")
    assert "another torch or Triton now" in said and not ran


def test_the_pinned_torch_where_its_driver_is(machine):
    said, ran, _ = machine(gpu=False, smi="echo 580.65")
    assert "takes the pinned torch of requirements-dev.txt: torch 2.11.0+cu130" in said and "sees no GPU" in said
    setup, builds, kit = ran
    assert setup.startswith("setup PYTHON=") and builds.endswith(".venv/bin/python") and kit.startswith("ran ['--quick']")


def test_an_older_driver_needs_a_torch_of_its_own(machine):
    said, ran, asked = machine(gpu=False, smi="echo 550.54.15", ok=2)
    assert "needs a driver from 580 on, this is 550" in said and "make gpu PYTHON=" in said and not ran and not asked


def test_without_a_gpu_nothing_is_installed(machine):
    said, ran, asked = machine(gpu=False, ok=2)
    assert "no GPU is here" in said and not ran and not asked


def test_an_old_torch_is_not_taken(machine):
    said, *_ = machine(version="2.9.1", ok=2)
    assert "is older than 2.10" in said
