"""The parity slice of the families and the hooks at both ends of what is promised: the oldest and the newest transformers, and
the oldest and the newest torch. Environments of their own, several GB each for a torch; what the index does not give is
skipped, by name."""

import pathlib
import re
import shutil
import sys

import pytest
import torch
from test_packaging import PINNED, ROOT, STRANGER, make_venv, pip, run

from gpt_kernels.triton import PAIRS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SLICE = (
    "tests/test_families.py", "tests/test_functional.py", "tests/test_structure_attention.py",
    "tests/test_hooks_transformers.py", "tests/test_hooks_torch_flash.py", "tests/test_distributed.py",
    "tests/test_engines.py",
)  # fmt: skip
SITE = pathlib.Path(torch.__file__).parents[1]
OLDEST = re.search(r'hf = \["transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text())[1]


def get(python, *what):
    try:
        return pip(python, "-q", *what, **STRANGER)
    except AssertionError as refusal:
        reason = re.search(r"ERROR: .*", str(refusal))
        pytest.skip(f"the registry did not give {' '.join(what)}: {reason.group() if reason else 'no reason'}")


def parity(python, name):
    """The slice that make test takes, by that Python; what it says of the versions."""
    code = "import torch, transformers, gpt_kernels; print(torch.__version__, transformers.__version__, gpt_kernels.__file__)"
    said = run(python, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).split()[-3:]
    assert pathlib.Path(said[2]).is_relative_to(ROOT), said
    slice_of = [python, "-m", "pytest", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", *SLICE]
    output = run(*slice_of, cwd=ROOT, PYTHONPATH=str(ROOT))
    assert re.search(r"\d{3} passed", output) and "failed" not in output, output[-3000:]
    return dict(zip(("torch", "transformers"), said, strict=False))[name]


@pytest.mark.parametrize("asked", (f"transformers=={OLDEST}.*", "transformers"))
def test_parity_under_transformers(tmp_path, asked):
    """With what it asks for, and of the running environment what it does not: torch and pytest."""
    python = make_venv(tmp_path / "venv", borrow=False)
    get(python, asked)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(f"{SITE}\n")
    version = parity(python, "transformers")
    assert version.startswith(OLDEST) if "==" in asked else version >= OLDEST


MINORS = sorted(PAIRS, key=lambda minor: int(minor.split(".")[1]))


@pytest.mark.parametrize("minor", (MINORS[0], MINORS[-1]))
def test_parity_under_torch(tmp_path, minor):
    """The library of this tree: one binary for all of them."""
    if minor == PINNED.rpartition(".")[0]:
        pytest.skip("is the one that everything else runs under")
    python = make_venv(tmp_path / "venv", borrow=False)
    get(python, f"torch=={minor}.*")
    lines = (ROOT / "requirements-dev.txt").read_text()
    wanted = ("transformers", "tokenizers", "safetensors", "numpy", "pytest", "pytest-xdist", "pytest-timeout")
    marker = ">=" if sys.version_info >= (3, 11) else "<"
    found = [re.search(rf"^{name}==[\w.]+(?=$|; python_version {marker})", lines, re.M)[0] for name in wanted]
    get(python, *found)
    version = parity(python, "torch")
    shutil.rmtree(tmp_path)
    assert version.startswith(minor)
