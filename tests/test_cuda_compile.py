"""The CUDA kernels as nvcc and ptxas see them, without a GPU: no warning, no spill, nothing beyond the budget, registers within
what each launch counts on, the instructions that a kernel is built around; and no PTX outside ptx.cuh."""

import re

import pytest

from gpt_kernels.architectures import NVIDIA, number_of, passes
from tools import static_cuda
from tools.gates import Budget

needs_nvcc = pytest.mark.skipif(static_cuda.NVCC is None, reason="no nvcc")
BUDGET = Budget.load("cuda", static_cuda.version()) if static_cuda.NVCC else None
CASES = [
    pytest.param(case, id=case.id, marks=[] if case.arch in static_cuda.PR_ARCHS else pytest.mark.slow)
    for case in static_cuda.matrix("full")
]


@needs_nvcc
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_within_their_budget(case):
    found = static_cuda.rows(case)
    faults = [f"{row.id} {fault}" for row in found for fault in row.faults()]
    if BUDGET.comparable(static_cuda.version()):
        faults += [f"{row.id} {overrun}" for row in found for overrun in row.overruns(BUDGET.kernels)]
    assert not faults, "\n".join(faults)
    norm_bwd_has_the_blocks_it_counts_on(found)


def norm_bwd_has_the_blocks_it_counts_on(found):
    """norm_bwd_warps' warps fit a processor's 65536 registers; of 16 bits they have 33 KB in flight: two rows each and, where
    each warp has its own rows, the sectors of these rows' statistics. A block's warps share one row: 32.8 KB."""
    for row in found:
        if kernel := re.fullmatch(r"norm_bwd<(\w+), \w+, (\w+), (\w+), (\d+)>", row.kernel):
            V, centred, block, kept = 4 if kernel[1] == "float" else 8, kernel[2] == "true", kernel[3] == "true", int(kernel[4])
            warps = 16 if block or kept * 32 * V <= 512 else 8 if kept * V >= 32 else 12
            granted = -(-row.facts.registers // 8) * 8 * 32 * warps  # registers are handed out by 8 per thread
            assert granted <= 65536, f"{row.id}: {row.facts}"
            statistics = 0 if block else warps * 32 * (1 + centred)
            assert warps * kept * 2 * 512 + statistics >= (32 << 10 if block else 33_000), row.id


SPILLING = """
__global__ void __launch_bounds__(1024, 2) spills(float* p) {
  float v[64];
  for (int i = 0; i < 64; i++) v[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < 64; j++) v[i] += v[j] * v[i ^ 1];
  for (int i = 0; i < 64; i++) p[i * 1024 + threadIdx.x] = v[i];
}
namespace gk { template <class T, bool aligned> __global__ void gelu_fwd(T* p) { p[threadIdx.x] *= 2; } }
template __global__ void gk::gelu_fwd<float, true>(float*);
"""


@needs_nvcc
def test_faults_are_seen(tmp_path, monkeypatch):
    (tmp_path / "bad.cu").write_text(SPILLING)
    monkeypatch.setattr(static_cuda, "FOLDER", tmp_path)
    bad, spills = static_cuda.rows(static_cuda.Source("bad", "sm_80"))
    assert spills.kernel == "spills" and any("spills: " in fault for fault in spills.faults())
    assert bad.kernel == "gelu_fwd<float, true>" and bad.overruns({}) == ["is not in the baseline: --write-baseline"]
    assert bad.faults() == ["has no MUFU", "moves 0% of its bytes 16 at a time, expected 99%"]
    (tmp_path / "bad.cu").write_text("__global__ void warns() { int unused; }")
    (row,) = static_cuda.rows(static_cuda.Source("bad", "sm_80"))
    assert "does not compile" in row.faults()[0] and "unused" in row.faults()[0]


def test_the_model_states_what_dq_streams():
    """8 T D bytes per block of keys; on an H100 one block of threads a processor keeps its sums in L2 to T = 1551, D = 64."""
    said = static_cuda.dq_stream(NVIDIA["sm_90"], "attention_bwd<bf16, 64, true>", 1)
    assert said == "dq's sums: 512 T bytes per block of keys, in L2 up to T = 1551"


def test_no_ptx_outside_its_header():
    for path in sorted(static_cuda.FOLDER.iterdir()):
        text = path.read_text()
        if path.name != "ptx.cuh":
            assert not re.search(r"\basm\b|__asm|_sync\(0x|__shfl_|__ballot|<<<", text), path.name


def included(path):
    """The file and all of ours that it includes."""
    found = {path}
    for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
        found |= included((path.parent / name).resolve())
    return found


def test_what_depends_on_the_architecture_is_built_for_each_generation():
    """The others go down to PTX once, for all architectures: in these there must be no __CUDA_ARCH__."""
    generations = {number_of(arch) // 10 for arch in NVIDIA}
    for path in sorted(static_cuda.FOLDER.glob("*.cu")):
        depends = any("__CUDA_ARCH__" in file.read_text() for file in included(path))
        assert len(passes(path.name, NVIDIA)) == (len(generations) if depends else 1), path.name


def test_one_way_to_launch():
    for path in sorted(static_cuda.FOLDER.iterdir()):
        if path.name != "launch.cu":
            assert not re.search(r"cudaLaunch|cudaMalloc|cudaDeviceSynchronize|cudaStreamSynchronize", path.read_text()), (
                path.name
            )
