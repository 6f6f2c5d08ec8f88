"""The machines of strangers: PyPI's own torch, with CUDA and without a GPU, and every torch that we promise.

pip is asked as on a machine without settings: no other index, no constraint. All of it is downloaded, several GB for a torch;
GPT_KERNELS_TEST_CUDA_ENV names an environment that has requirements-dev.txt with PyPI's torch, instead of a new one.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from test_packaging import CHECK, PINNED, ROOT, STRANGER, needs_compiler, run, source  # noqa: F401
from test_torch_versions import NEWER, PROSE

from gpt_kernels.triton import PAIRS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("public"), pytest.mark.timeout(3600)]
TARGET = re.search(r"-DTORCH_TARGET_VERSION=\w+", (ROOT / "setup.py").read_text())[0]
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")


def pip(*arguments):
    try:
        return run(sys.executable, "-m", "pip", *arguments, **STRANGER)
    except AssertionError as refusal:
        if not re.search(r"Temporary failure in name resolution|Connection|Network is unreachable", str(refusal)):
            raise
        pytest.skip("no package index is reached")


# ---- PyPI's torch of the pin: with CUDA, on a machine without a GPU ----


def requirements(place, python):
    """A file of those for that Python: pip reads markers as of its own. === is the very version, where an index has others."""
    lines = (line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if re.match(r"\w", line))
    asked = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"python_version": python})]
    exact = [f"{r.name}{'===' if r.name == 'torch' else '=='}{str(r.specifier)[2:]}" for r in asked]
    (place / "requirements.txt").write_text("\n".join(exact))
    return place / "requirements.txt"


@pytest.mark.parametrize("python", ["3.10", "3.13"])
def test_requirements_resolve(python, tmp_path):
    wanted = ["--python-version", python, "--only-binary=:all:", "--target", tmp_path / "none"]
    output = pip("install", "--dry-run", "--ignore-installed", "-r", requirements(tmp_path, python), *wanted)
    would = re.search(r"Would install (.*)", output)[1].split()
    assert f"torch-{PINNED}" in would and f"triton-{PAIRS[PINNED.rpartition('.')[0]]}" in would
    assert any(name.startswith("nvidia-") for name in would), "the build for CUDA"


@pytest.fixture(scope="module")
def cuda_python(tmp_path_factory):
    if ready := os.environ.get("GPT_KERNELS_TEST_CUDA_ENV"):
        yield pathlib.Path(ready, "bin", "python")
        return
    place = tmp_path_factory.mktemp("public")
    run(sys.executable, "-m", "venv", "--without-pip", place)
    python = place / "bin" / "python"
    pip("--python", python, "install", "-q", "-r", requirements(place, f"{sys.version_info[0]}.{sys.version_info[1]}"))
    yield python
    shutil.rmtree(place)  # 5 GB


@pytest.fixture(scope="module")
def installed(source, cuda_python, tmp_path_factory):  # noqa: F811
    """(that Python, the package built with it: C++ and CUDA for one architecture, importable by this PYTHONPATH)"""
    place = shutil.copytree(source, tmp_path_factory.mktemp("build") / "tree")
    build = {"GPT_KERNELS_BUILD": "cuda", "GPT_KERNELS_CUDA_ARCHS": "80", "GPT_KERNELS_WERROR": "1"}
    run(cuda_python, "setup.py", "-q", "build_ext", "--inplace", cwd=place, **build)
    return cuda_python, str(place)


@needs_compiler
@needs_nvcc
def test_works_with_a_cuda_torch_and_no_gpu(installed):
    """C++ serves the CPU, CUDA C++ the GPU that is not there, and info says so."""
    python, path = installed
    assert run(python, "-c", "import torch; print(torch.version.cuda)").split()[-1] != "None"
    facts = json.loads(run(python, "-c", f"import sys; sys.path.insert(0, {path!r})\n{CHECK}").splitlines()[-1])
    assert facts["file"].startswith(path) and facts["torch"].split("+")[0] == PINNED and facts["library"]["built"]
    assert facts["gpu"]["archs_built"] == ["sm_80", "compute_80"]
    for op, where in facts["ops"].items():
        assert where["CPU"]["backend"] == "cpu", op
        assert where["CUDA"]["backend"] == "cuda", op
    said = run(python, "-m", "gpt_kernels", "info", cwd=path)
    assert "none seen by torch" in said and "built for sm_80, compute_80; no device" in said


@needs_compiler
@needs_nvcc
def test_the_symbol_of_the_stream_is_bound(installed, tmp_path):
    """It is in libtorch_cuda, which Python loads for itself alone: the library must name one that brings it."""
    python, path = installed
    symbol, code = "aoti_torch_get_current_cuda_stream", f"import sys; sys.path.insert(0, {path!r}); import gpt_kernels"
    run(python, "-c", code, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=tmp_path / "bound")
    lines = [line for file in tmp_path.iterdir() for line in file.open(errors="replace") if f"`{symbol}'" in line]
    bound = [re.search(r"binding file (\S+) \[\d+\] to (\S+) ", line).groups() for line in lines]
    assert {pathlib.Path(to).name for of, to in bound if of.endswith("gpt_kernels/_cuda.so")} == {"libtorch_cuda.so"}


# ---- every torch that we promise ----


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """minor version -> the include folder of its latest release; kept in build, `make clean` removes it"""
    kept = ROOT / "build" / "torch-headers"

    def get(minor):
        if not (kept / minor).exists():
            place = tmp_path_factory.mktemp(f"torch-{minor}")
            pip("download", "-q", "--no-deps", "-d", place, f"torch=={minor}.*")
            with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
                wheel.extractall(place, [name for name in wheel.namelist() if name.startswith("torch/include/")])
            kept.mkdir(parents=True, exist_ok=True)
            (place / "torch").rename(kept / minor)
            shutil.rmtree(place)
        return kept / minor / "include"

    return get


@pytest.mark.parametrize("minor", PAIRS)
@needs_compiler
def test_headers_of_every_torch_compile_the_sources(headers, minor, tmp_path):
    """Looked at, not translated to machine code: a name, a type or an overload that is not there is seen so."""
    include = headers(minor)
    # other compilers, where they are, need be asked once; a processor of ARM's has `base` alone
    others = ("g++-11", "clang++", "aarch64-linux-gnu-g++") if minor == PINNED.rpartition(".")[0] else ()
    compilers = [shutil.which(c) for c in ("g++", *others)]
    jobs = [
        [c, "-std=c++17", "-fsyntax-only", TARGET, "-isystem", include, path]
        for c in filter(None, compilers)
        for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    ]
    if nvcc := shutil.which("nvcc"):
        options = ["-std=c++17", "-arch=sm_80", "-ptx", "-Werror", "all-warnings", "-DUSE_CUDA", '-DGK_CUDA_ARCHS=""', TARGET]
        for name in ("runtime", "layer_norm"):
            jobs.append(
                [nvcc, *options, "-isystem", include, ROOT / "csrc/cuda" / f"{name}.cu", "-o", tmp_path / f"{name}.ptx"]
            )
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda job: subprocess.run([*map(str, job)], capture_output=True, text=True), jobs))
    assert [(job[0], job[-1], d.stderr[-2000:]) for job, d in zip(jobs, done, strict=True) if d.returncode] == []


@needs_compiler
def test_the_newer_names_are_all_there(headers):
    """tests/torch_newer_names.txt against the headers themselves."""

    def names(minor):
        include = str(headers(minor))
        files = [f"torch/csrc/stable/{f}.h" for f in ("library", "ops", "tensor", "accelerator")]
        probe = "".join(f"#include <{f}>\n" for f in [*files, "torch/headeronly/core/ScalarType.h"])
        command = ["g++", "-std=c++17", "-DUSE_CUDA", TARGET, "-I", include, "-MM", "-x", "c++", "-"]
        said = subprocess.run(command, input=probe, capture_output=True, text=True, check=True).stdout
        texts = [pathlib.Path(p).read_text() for p in said.split() if p.startswith(include)]
        assert len(texts) > 40
        return {name for text in texts for name in re.findall(r"(?<!\w)[A-Za-z_]\w+", PROSE.sub('""', text))}

    of = {minor: names(minor) for minor in PAIRS}
    oldest = next(iter(PAIRS))
    newer = set().union(*of.values()) - of[oldest]
    assert newer == NEWER, f"tests/torch_newer_names.txt: add {sorted(newer - NEWER)}, remove {sorted(NEWER - newer)}"
