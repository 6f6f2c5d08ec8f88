"""Which backend serves the GPU: the CUDA C++ library where driver and GPUs can run it, else Triton, else the reference; and the
table of architectures that this, setup.py and the tools go by."""

import ctypes
import pathlib
import subprocess
import sys

import pytest
import torch

from gpt_kernels import architectures, dispatch, gpu, library
from gpt_kernels.architectures import NVIDIA

ROOT = pathlib.Path(__file__).parents[1]
ALL = " ".join([*NVIDIA, "compute_80"])  # what setup.py builds


def test_setup_reads_the_table_without_torch_or_the_package():
    """As in pip's isolated environment, which has neither."""
    code = "import runpy, sys; runpy.run_path('setup.py'); print({'torch', 'gpt_kernels', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, "--name"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-2:] == ["gpt-kernels", "set()"], done.stderr
    alone = f"import runpy; print(*runpy.run_path({str(ROOT / 'gpt_kernels' / 'architectures.py')!r})['CUDA_ARCHS'])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", alone], capture_output=True, text=True)
    assert done.stdout.split() == [*architectures.CUDA_ARCHS], done.stderr


def test_passes_of_nvcc():
    codes = ["sm_90a", "sm_80", "sm_86", "compute_80"]
    assert architectures.passes("gelu.cu", codes) == {"80": ["sm_90", "sm_80", "sm_86", "compute_80"]}
    assert architectures.passes("attention_bwd.cu", codes) == {"90a": ["sm_90a"], "80": ["sm_80", "sm_86", "compute_80"]}
    for wrong in ("native", "sm_", "90x", ""):
        with pytest.raises(ValueError, match="expected one like sm_90"):
            architectures.number_of(wrong)


@pytest.mark.parametrize(
    "archs, capability, driver, served",
    [
        *[(ALL, c, 13000, True) for c in ((8, 0), (8, 6), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))],
        (ALL, (7, 5), 13000, False),
        (ALL, (11, 0), 12080, False),  # PTX of 13.0 alone would serve it, which a driver of 12.8 cannot read
        (ALL, (8, 7), 12080, True),  # machine code of sm_86
        (ALL, (11, 0), None, True),
        ("sm_90 compute_90", (8, 0), 13000, False),
        ("sm_90 compute_90", (10, 0), 13000, True),
        ("sm_90a compute_80", (9, 0), 12080, True),
        ("sm_100a", (10, 3), 13000, False),  # an `a` runs on its number alone
        ("sm_86", (8, 0), 13000, False),
    ],
)
def test_code_for_a_gpu(archs, capability, driver, served):
    reason = gpu.no_code(archs, capability, driver, 13000)
    assert (reason is None) == served
    assert served or f"sm_{capability[0]}{capability[1]}" in reason


def test_driver_and_library():
    assert gpu.too_old(12080, 13000) == "the driver serves CUDA 12.8, the CUDA kernels were built with 13.0"
    assert gpu.too_old(12020, 12080) is None and gpu.too_old(13000, 12080) is None and gpu.too_old(None, 13000) is None


def test_the_driver_is_asked_without_initialising_it(monkeypatch):
    asked = []

    class Driver:
        def cuDriverGetVersion(self, version):
            asked.append("version")
            ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = 12080
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert gpu.driver_version() == 12080 and asked == ["version"]


@pytest.fixture
def with_library(monkeypatch):
    """As if every op had a kernel in _cuda.so, and Triton one for GPUs."""

    class Library:
        def gpt_kernels_cuda_archs(self):
            return b"sm_90 compute_90"

        class gpt_kernels_cuda_version:  # noqa: N801
            restype = None

            def __new__(cls):
                return 13000

    monkeypatch.setattr(library, "cuda", Library())
    monkeypatch.setattr(dispatch, "BACKENDS", [*dict.fromkeys([*dispatch.BACKENDS, "cuda"])])
    filled = {}
    monkeypatch.setattr(dispatch, "_fill", lambda library, name, *filling: filled.update({name: filling}))
    for name, op in dispatch._ops.items():
        kernels = {"cuda": ("CUDA", None), "triton": ("CUDA", lambda first, name=name: f"triton's {name}")}
        monkeypatch.setattr(op, "kernels", kernels)
        monkeypatch.setattr(op, "absent", {})
        monkeypatch.setattr(op, "cuda", "cuda")
    return filled


def test_a_driver_that_is_too_old_leaves_the_slots_to_triton(with_library, monkeypatch):
    monkeypatch.setattr(gpu, "driver_version", lambda: 12080)
    gpu.settle()
    for name, (function, key) in with_library.items():
        assert key == "CUDA" and function(torch.zeros(1)) == f"triton's {name}"
    assert [*with_library] == dispatch.ops()
    for op in dispatch.ops():
        said = dispatch.where(op)["CUDA"]
        assert said.backend == "triton" and "not cuda: the driver serves CUDA 12.8" in said.reason
    with pytest.raises(RuntimeError, match="has no kernel for .*: the driver serves CUDA 12.8"):
        with dispatch.use_backend("cuda", dispatch.ops()[0]):
            pass


@pytest.mark.parametrize("capability, serves", [((9, 0), "cuda"), ((8, 0), "triton")])
def test_a_gpu_without_code_is_found_when_torch_initialises_cuda(with_library, monkeypatch, capability, serves):
    queued = []
    monkeypatch.setattr(gpu, "driver_version", lambda: 13000)
    monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    gpu.settle()
    assert not with_library  # nothing is known before
    (check,) = queued
    check()
    for op in dispatch.ops():
        said = dispatch.where(op)["CUDA"]
        assert said.backend == serves and (serves == "cuda" or "A GPU: the CUDA kernels are built for sm_90" in said.reason)


def test_what_is_settled_inside_of_use_backend_stays_below_it():
    """torch initialises CUDA at its first use, which may be in the block: the backend that was asked for serves to its end."""
    if library.cuda is not None:
        pytest.skip("the slots are the library's")
    op, calls = dispatch._ops["gelu_fwd"], []

    def called():
        calls.clear()
        # the CUDA slot is asked directly: here are no GPUs
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        torch.ops.gpt_kernels.gelu_fwd.default.redispatch(keys, torch.zeros(2), None, True)
        return calls[0]

    def kernel(name):
        return lambda x, *rest: calls.append(name) or x

    own = torch.library.Library("gpt_kernels", "IMPL")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "_library", own)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(op, "kernels", {"triton": ("CUDA", kernel("triton"))})
            with dispatch.use_backend("triton", "gelu_fwd"):
                assert called() == "triton"
                dispatch._settle("gelu_fwd", kernel("settled"))
                assert called() == "triton"
            assert called() == "settled"
    finally:
        own._destroy()


def test_large_calls_go_where_they_were_measured_to_be_faster(with_library, monkeypatch):
    queued, capability = [], [(9, 0)]
    monkeypatch.setattr(gpu, "driver_version", lambda: 13000)
    monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability[0])
    for op in dispatch._ops.values():
        op.kernels["cuda"] = ("CUDA", lambda *args: "cuda")
        op.kernels["triton"] = ("CUDA", lambda *args: "triton")
        monkeypatch.setattr(op, "declines", {"triton": lambda: None})
        monkeypatch.setattr(op, "shared", False)
    gpu.settle()
    capability[0] = (10, 0)
    queued[0]()
    assert not with_library  # nothing was measured there
    capability[0] = (9, 0)
    queued[0]()
    assert {*with_library} == {"attention_fwd", "attention_bwd"}

    def served(dtype, T):
        q = torch.empty(4, 16, T, 64, dtype=dtype, device="meta")
        return with_library["attention_fwd"][0](q, q, q), with_library["attention_bwd"][0](q, q, q, q, q, q)

    assert served(torch.bfloat16, 64) == ("cuda", "cuda") and served(torch.bfloat16, 16384) == ("triton", "triton")
    assert served(torch.float32, 16384) == ("cuda", "cuda")
    assert "triton for large calls in 16 bits" in dispatch.where("attention_fwd")["CUDA"].reason


def test_without_triton_the_reference_serves(with_library):
    for op in dispatch._ops.values():
        op.kernels.pop("triton")
        op.absent["triton"] = "Triton is not installed"
    dispatch.without_cuda("no code")
    assert all(function is dispatch._ops[name].reference for name, (function, _) in with_library.items())
    assert str(dispatch.where("gelu_fwd")["CUDA"]) == "reference (Triton is not installed; no code)"


def test_amd(monkeypatch):
    """Under a ROCm torch the CUDA slots are an AMD GPU's: the library is not even loaded."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert library._load_cuda() == (None, f"the CUDA kernels are for NVIDIA GPUs, torch {torch.__version__} is for AMD's")
