"""The CUDA kernels as nvcc and ptxas see them, without a GPU: no warning, no spill, registers within what each launch counts
on, the instructions that a kernel is built around; and no PTX outside ptx.cuh.

By default sm_80 is compiled; GPT_KERNELS_TEST_ARCHS="80 90a 100a 120a" compiles for these.
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "csrc" / "cuda"
SOURCES = sorted(p.name for p in FOLDER.glob("*.cu"))
ARCHS = (os.environ.get("GPT_KERNELS_TEST_ARCHS") or "80").split()
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc")

# instructions of the machine code that must be there, per file
EXPECTED = {
    "gelu.cu": ("LDG.E.128", "STG.E.128", "MUFU.EX2"),
    "layer_norm.cu": ("LDG.E.128", "STG.E.128", "SHFL.BFLY"),
    "rms_norm.cu": ("LDG.E.128", "STG.E.128", "SHFL.BFLY"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source, architecture) -> (cubin, ptxas's words on each kernel), each compiled once"""
    done = {}

    def build(source, arch):
        if (source, arch) not in done:
            cubin = tmp_path_factory.mktemp("cubin") / f"{source}.{arch}.cubin"
            command = [
                NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings",
                "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", '-DGK_CUDA_ARCHS=""',
                "-isystem", str(pathlib.Path(torch.__file__).parent / "include"), str(FOLDER / source), "-o", str(cubin),
            ]  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-4000:]
            done[source, arch] = cubin, ptxas_lines(result.stderr)
        return done[source, arch]

    return build


def ptxas_lines(text):
    """kernel (mangled) -> {"registers", "spills", "stack", "threads": from its launch bounds}"""
    kernels = {}
    for block in text.split("Compiling entry function '")[1:]:
        numbers = {
            "stack": re.search(r"(\d+) bytes stack frame", block)[1],
            "spills": re.search(r"(\d+) bytes spill stores", block)[1],
            "registers": re.search(r"Used (\d+) registers", block)[1],
        }
        kernels[block.partition("'")[0]] = {key: int(value) for key, value in numbers.items()}
    return kernels


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(built, source, arch):
    for kernel, facts in built(source, arch)[1].items():
        assert facts["spills"] == 0 and facts["stack"] == 0, f"{kernel}: {facts}"


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", ["layer_norm.cu", "rms_norm.cu"])
def test_norm_backward_has_the_blocks_it_counts_on(built, source, arch):
    """norm_bwd_warps' warps fit a processor's 65536 registers, and their two rows in flight are at least 32 KB of 16 bits."""
    seen = 0
    for kernel, facts in built(source, arch)[1].items():
        found = re.search(r"norm_bwdI(N|f).*?Lb([01])ELb([01])ELi(\d+)EEEv", kernel)
        if not found:
            continue
        V, block, kept = 4 if found[1] == "f" else 8, found[3] == "1", int(found[4])
        warps = 16 if block or kept * 32 * V <= 512 else 8 if V == 4 and kept * V >= 32 else 12
        granted = -(-facts["registers"] // 8) * 8 * 32 * warps  # registers are handed out by 8 per thread
        assert granted <= 65536, f"{kernel}: {facts}"
        assert warps * kept * 2 * 512 >= 32 << 10, kernel
        seen += 1
    assert seen >= 15


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", EXPECTED)
def test_machine_code_holds(built, source, arch):
    tools = pytest.importorskip("triton").__path__[0] + "/backends/nvidia/bin"
    dump = shutil.which("cuobjdump") or f"{tools}/cuobjdump"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}  # it calls nvdisasm
    command = [dump, "-sass", str(built(source, arch)[0])]
    code = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for instruction in EXPECTED[source]:
        assert instruction in code, f"{source}: no {instruction} for sm_{arch}"


def test_no_ptx_outside_its_header():
    for path in sorted(FOLDER.iterdir()):
        text = path.read_text()
        if path.name != "ptx.cuh":
            assert not re.search(r"\basm\b|__asm|_sync\(0x|__shfl_|__ballot|<<<", text), path.name


def test_one_way_to_launch():
    for path in sorted(FOLDER.iterdir()):
        if path.name != "runtime.cu":
            assert not re.search(r"cudaLaunch|cudaMalloc|cudaDeviceSynchronize|cudaStreamSynchronize", path.read_text()), (
                path.name
            )
