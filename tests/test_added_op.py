"""An op is its own files and nothing else: a made-up one, `cube`, is laid over a copy of the tree and is found everywhere."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from gpt_kernels import triton

ROOT = pathlib.Path(__file__).parents[1]
MADE_UP = ROOT / "tests" / "made_up"
OUTSIDE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*-out", "results", "out")


def copied(folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(ROOT, folder, ignore=OUTSIDE)
    shutil.copytree(MADE_UP, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copied(tmp_path_factory.mktemp("added") / "tree")


def run(tree, *command, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "GPT_KERNELS", "TRITON"))}
    env |= {"PYTHONPATH": str(tree), "TRITON_CACHE_DIR": str(tree / "cache"), **environment}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def pytest_of(tree, words, *files, **environment):
    """How many tests of the op passed; none may fail."""
    options = ("-m", "not slow", "-o", "addopts=", "-p", "no:cacheprovider", "-n", "0")
    out = run(tree, "-m", "pytest", *files, "-k", words, *options, **environment)
    return int(out.rsplit(" passed", 1)[0].rsplit(None, 1)[-1])


COMMANDS = """
import contextlib
import gpt_kernels
from gpt_kernels import cli
for command in ("info --json", "support", "bench --help", "tune --help"):
    print("$", command)
    with contextlib.suppress(SystemExit):
        cli.main(command.split())
print("$ export", gpt_kernels.cube.__name__)
"""


def test_it_is_all_there(tree):
    _, info, support, bench, tune, export = run(tree, "-c", COMMANDS).split("$ ")
    assert '"cube_fwd"' in info and '"cube_bwd"' in info
    (line,) = [line for line in support.splitlines() if line.startswith("| cube ")]
    assert "`cube`" in line and "any shape" in line
    assert all("cube" in said for said in (bench, tune, export))


GENERIC = [f"tests/test_{name}.py" for name in ("ops", "cases", "magnitudes", "derivatives", "cube")]


def test_generic_tests_find_it(tree):
    assert pytest_of(tree, "cube", *GENERIC) > 40


@pytest.mark.skipif(triton.absence() is not None, reason=str(triton.absence()))
def test_generic_tests_find_it_in_triton(tree):
    environment = {"TRITON_INTERPRET": "1"}
    assert pytest_of(tree, "triton and cube", *GENERIC, "tests/test_triton_memory.py", **environment) > 15


MATRIX = """
from tools.problems import matrix
for case in matrix("pr"):
    if case.problem.op == "cube":
        print(case.id, [launch.kernel.__name__ for launch in case.launches()])
"""


@pytest.mark.skipif(triton.absence() is not None, reason=str(triton.absence()))
def test_the_compile_matrix_has_it(tree):
    for line in (found := run(tree, "-c", MATRIX).splitlines()):
        assert line.endswith("['cube_fwd_kernel', 'cube_bwd_kernel']")
    assert len(found) == 4 and found[0].startswith("cube-8192x768-bf16-")
    run(tree, "-m", "tools.static", "--op", "cube", "--arch", "sm_80", "--facts", "--write-baseline")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_its_kernels_in_cpp_and_cuda(tmp_path):
    """Both are compiled by being there, and pass the generic tests."""
    tree = copied(tmp_path / "tree")
    for kind in ("cpu", "sim"):
        run(tree, "setup.py", "-q", "build_ext", "--inplace", GPT_KERNELS_BUILD=kind)
    said = run(tree, "-c", "import gpt_kernels; print(gpt_kernels.where('cube_fwd')['CPU'].backend)")
    assert said.strip() == "cpu"
    assert pytest_of(tree, "cube", *GENERIC) > 40
    assert pytest_of(tree, "cuda_sim and cube", *GENERIC, GPT_KERNELS_TEST_BACKEND="cuda_sim") > 15


def test_it_is_seen_where_it_is_not(tree, tmp_path):
    """Without its calls the whole is red, not green."""
    alone = tmp_path / "tree"
    shutil.copytree(tree, alone)
    (alone / "gpt_kernels" / "cases" / "cube.py").unlink()
    (alone / "gpt_kernels" / "__init__.py").open("a").write("\nfrom .ops.cube import cube\n")
    with pytest.raises(AssertionError, match="test_every_defined_op_has_cases"):
        pytest_of(alone, "test_every_defined_op_has_cases", "tests/test_cases.py")
