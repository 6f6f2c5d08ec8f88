"""Installing in clean environments: with and without a compiler, by wheel, by sdist, in isolation, under another torch.

Each environment is a fresh venv that borrows the heavy packages of the running one by symbolic links. The wheel is also tried
under every other torch that we promise (several GB each are downloaded, and removed); GPT_KERNELS_TEST_TORCH names those to try
instead: "2.10 2.15.0".
"""

import json
import os
import pathlib
import re
import resource
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
import torch

from gpt_kernels.architectures import CUDA_ARCHS, NVIDIA
from gpt_kernels.triton import PAIRS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging"), pytest.mark.timeout(1800)]
ROOT = pathlib.Path(__file__).parents[1]
PINNED = re.search(r"^torch==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.M)[1]
OTHERS = os.environ.get("GPT_KERNELS_TEST_TORCH", " ".join(m for m in PAIRS if m != PINNED.rpartition(".")[0])).split()
# pip as on a machine without settings: no index but the public one, no constraint, and no copy kept of gigabytes
STRANGER = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")

CHECK = """
import json, torch, gpt_kernels
x = torch.randn(4, 33, requires_grad=True)
y = gpt_kernels.layer_norm(x)
y.square().sum().backward()
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (33,)))
with gpt_kernels.use_backend("reference"), gpt_kernels.use_backend("reference"):  # torch before 2.13 refuses unless asked
    torch.testing.assert_close(gpt_kernels.layer_norm(x), y)
print(json.dumps({"file": gpt_kernels.__file__, **gpt_kernels.info()}))
"""


def run(*command, ok=True, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPT_KERNELS_", "PYTHON"))}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd or "/", env={**clean, **environment}, timeout=1500
    )
    assert (done.returncode == 0) is ok, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def make_venv(path, borrow=True):
    """A venv's Python; pip is the running one's, told which Python to serve."""
    run(sys.executable, "-m", "venv", "--without-pip", path)
    if borrow:
        target = next(pathlib.Path(path).glob("lib/python*/site-packages"))
        for entry in pathlib.Path(torch.__file__).parents[1].iterdir():
            if not re.match(r"(__editable__.*|gpt[_-]kernels.*|__pycache__|.*\.pth)$", entry.name):
                (target / entry.name).symlink_to(entry)
    return pathlib.Path(path, "bin", "python")


def pip(python, *arguments, **more):
    return run(sys.executable, "-m", "pip", "--python", python, "install", "-v", *arguments, **more)


def check(python):
    """The op works and gives the right answer, imported from the venv; what info says."""
    facts = json.loads(run(python, "-c", CHECK).splitlines()[-1])
    assert pathlib.Path(facts["file"]).is_relative_to(python.parents[1])
    return facts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source tree without anything built, at a path with a space in it."""
    path = tmp_path_factory.mktemp("packaging") / "source tree"
    leave = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", "*-out", "out"
    )
    return shutil.copytree(ROOT, path, ignore=leave)


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """(wheel, sdist) from python -m build: the wheel is built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@needs_compiler
def test_install_with_a_compiler(source, tmp_path):
    python = make_venv(tmp_path / "venv")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pip(python, "--no-build-isolation", "--no-deps", source)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # 90 s on 2 cores, as processor time: the clock would also measure what else the machine does
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180
    facts = check(python)
    assert facts["library"]["built"] and all(w["CPU"]["backend"] == "cpu" for w in facts["ops"].values())
    assert "instruction set" in run(python.parent / "gpt-kernels", "info")


def test_install_without_a_compiler(source, tmp_path):
    python = make_venv(tmp_path / "venv")
    (tmp_path / "bin").mkdir()
    bare = {"PATH": str(tmp_path / "bin"), "CXX": ""}
    output = pip(python, "--no-build-isolation", "--no-deps", source, **bare)
    assert "building nothing, no C++ compiler found" in output
    facts = check(python)
    assert facts["library"]["problem"].startswith("the C++ kernels were not built")
    assert all(w["CPU"]["reason"].startswith("the C++ kernels were not built") for w in facts["ops"].values())
    output = pip(python, "--no-build-isolation", "--no-deps", source, ok=False, GPT_KERNELS_BUILD="cpu", **bare)
    assert "GPT_KERNELS_BUILD=cpu, but there is no C++ compiler" in output


def test_install_without_kernels(source, tmp_path):
    python = make_venv(tmp_path / "venv")
    assert "GPT_KERNELS_BUILD=none" in pip(python, "--no-build-isolation", "--no-deps", source, GPT_KERNELS_BUILD="none")
    assert not check(python)["library"]["built"]
    assert not list(python.parents[1].rglob("gpt_kernels/*.so"))
    output = pip(python, "--no-build-isolation", "--no-deps", source, ok=False, GPT_KERNELS_BUILD="everything")
    assert "GPT_KERNELS_BUILD=everything: expected auto, cpu, cuda or none" in output


@needs_compiler
def test_a_compiler_that_fails_is_said(source, tmp_path):
    bad = tmp_path / "bad-g++"
    bad.write_text("#!/bin/sh\necho cannot compile >&2\nexit 1\n")
    bad.chmod(0o755)
    python = make_venv(tmp_path / "venv")
    output = pip(python, "--no-build-isolation", "--no-deps", source, ok=False, CXX=str(bad))
    assert "cannot compile" in output and "the C++ kernels did not compile" in output


def fake(folder, name, script):
    """A program of that name, first on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@needs_compiler
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_a_gpu_gets_cuda_kernels_of_its_own(source, tmp_path):
    """Only nvidia-smi's answer is made up: the library is built, loaded and asked."""
    path = fake(tmp_path / "bin", "nvidia-smi", "echo 8.0; echo 8.0")
    python = make_venv(tmp_path / "venv")
    output = pip(python, "--no-build-isolation", "--no-deps", source, PATH=path, GPT_KERNELS_WERROR="1")
    assert "CUDA kernels for sm_80 compute_80" in output
    facts = check(python)
    assert facts["gpu"]["archs_built"] == ["sm_80", "compute_80"]
    assert all(w["CUDA"]["backend"] == "cuda" for w in facts["ops"].values())


@needs_compiler
def test_where_nvcc_fails_the_other_kernels_are_installed(source, tmp_path):
    fake(tmp_path / "bin", "nvidia-smi", "echo 12.0")
    path = fake(tmp_path / "bin", "nvcc", "echo too old >&2; exit 1")
    python = make_venv(tmp_path / "venv")
    output = pip(python, "--no-build-isolation", "--no-deps", source, PATH=path)
    assert "CUDA kernels for sm_120 compute_120" in output and "too old" in output and "installed without them" in output
    facts = check(python)
    assert facts["library"]["built"] and all(w["CUDA"]["backend"] == "triton" for w in facts["ops"].values())


@needs_compiler
@pytest.mark.parametrize(
    "capabilities, said",
    [
        ("", ": none, no GPU from sm_80 on"),
        ("7.5", ": none, no GPU from sm_80 on"),
        ("7.5 8.7", " for sm_86 compute_86"),
        ("9.0 8.0", " for sm_80 sm_90 compute_80"),
        ("10.3 12.1", " for sm_100 sm_120 compute_100"),
        ("11.0", " for sm_80 compute_80"),  # its own generation has no code: by PTX
        ("nonsense", ": none, no GPU from sm_80 on"),
    ],
)
def test_gpus_that_are_there_choose_the_architectures(source, tmp_path, capabilities, said):
    fake(tmp_path / "bin", "nvidia-smi", "\n".join(f"echo {c}" for c in capabilities.split()))
    path = fake(tmp_path / "bin", "nvcc", "exit 1")
    assert f"CUDA kernels{said}" in run(sys.executable, "setup.py", "--name", cwd=source, PATH=path)


@needs_compiler
@pytest.mark.parametrize(
    "version, codes, wish, said",
    [
        (
            "12.4",
            "sm_80 sm_86 sm_89 sm_90",
            "cuda",
            f"for sm_80 sm_86 sm_89 sm_90 compute_80, with .*does not know {' '.join(a for a in CUDA_ARCHS if int(a) > 90)}",
        ),
        ("13.0", " ".join(NVIDIA), "cuda", f"for {' '.join(NVIDIA)} compute_80, with"),
        ("11.8", "sm_80", "auto", "none, nvcc is of CUDA 11.8, the oldest is 12.4"),
    ],
)
def test_nvcc_says_what_it_can_build(source, tmp_path, version, codes, wish, said):
    fake(tmp_path / "bin", "nvidia-smi", "echo 8.0")
    lists = f'[ "$1" = --list-gpu-code ] && echo {codes} || echo "Cuda compilation tools, release {version}, V{version}.1"'
    path = fake(tmp_path / "bin", "nvcc", lists)
    output = run(sys.executable, "setup.py", "--name", cwd=source, PATH=path, GPT_KERNELS_BUILD=wish)
    assert re.search(f"CUDA kernels:? {said}", output), output


@needs_compiler
def test_isolated_install_takes_no_second_torch(source, tmp_path):
    """Plain `pip install .`: setuptools and ninja come from the registry, torch's headers from where torch is."""
    python = make_venv(tmp_path / "venv")
    output = pip(python, source)
    assert not re.search(r"(Downloading|Collecting|Installing collected packages:).*\btorch\b", output)
    assert check(python)["library"]["built"]


@needs_compiler
def test_wheel_holds_what_it_should(built):
    wheel, sdist = built
    assert re.fullmatch(r"gpt_kernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    # no path of the machine that built it, in any file
    paths = [str(p) for p in (ROOT, pathlib.Path.home(), sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"))]
    paths += [*site.getsitepackages(), "/tmp/", str(pathlib.Path(torch.__file__).parent)]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in names:
            data = archive.read(name)
            assert [p for p in paths if len(p) > 1 and p.encode() in data] == [], name
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "gpt_kernels").rglob("*.py")}
    assert {n for n in names if ".dist-info/" not in n} == package | {
        "gpt_kernels/_cpu.so",
        "gpt_kernels/py.typed",
        "gpt_kernels/bench/report.html",
    }
    assert any(n.endswith("LICENSE") for n in names)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.*")} <= inside
    assert not [name for name in inside if name.endswith((".so", ".o"))]


@needs_compiler
def test_library_symbols(built, tmp_path):
    """Out: five C functions. In: torch's stable C interface, nothing of its C++ (c10, at, torch) and nothing of Python."""
    with zipfile.ZipFile(built[0]) as archive:
        library = archive.extract("gpt_kernels/_cpu.so", tmp_path)
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    names = ("isa", "best_isa", "set_isa", "compiler", "torch_target")
    assert {name for name in exported if "@" not in name} == {f"gpt_kernels_{name}" for name in names}
    needed = {line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()}
    assert [n for n in needed if re.match(r"_?Py|_ZN?K?(3c10|2at|5torch)", n)] == []
    foreign = [n for n in needed if "@" not in n and not n.startswith(("aoti_torch_", "torch_", "_ITM_", "__gmon_start__"))]
    assert foreign == []


@needs_compiler
def test_wheel_works_where_it_is_installed(built, tmp_path):
    python = make_venv(tmp_path / "venv")
    pip(python, "--no-deps", built[0], PATH="/nowhere")
    facts = check(python)
    assert facts["library"]["built"] and facts["torch"] == torch.__version__


@needs_compiler
@pytest.mark.parametrize("version", OTHERS)
def test_wheel_works_under_every_other_torch(built, tmp_path, version):
    python = make_venv(tmp_path / "venv", borrow=False)
    asked = f"torch=={version}" + ".*" * (version.count(".") == 1)
    try:
        pip(python, "-q", asked, "numpy", **STRANGER)
    except AssertionError as refusal:
        reason = re.search(r"ERROR: .*", str(refusal))
        pytest.skip(f"the registry did not give {asked}: {reason.group() if reason else 'no reason'}")
    pip(python, "--no-deps", built[0])
    facts = check(python)
    shutil.rmtree(tmp_path)
    assert facts["torch"].startswith(version) and facts["torch"].split("+")[0] != PINNED
    assert facts["library"]["built"] and all(w["CPU"]["backend"] == "cpu" for w in facts["ops"].values())
