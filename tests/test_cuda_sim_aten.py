"""The CUDA kernels in ATen's slots (csrc/cuda/aten.cu), on their CPU model, whose slots are those of CPU tensors."""

import ctypes
import importlib

import grids
import pytest
import torch
import torch.nn.functional as F
from op_checks import forward_backward

from gpt_kernels.accuracy import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, assert_close_to_truth

if grids.BACKEND != "cuda_sim":
    pytest.skip("needs GPT_KERNELS_TEST_BACKEND=cuda_sim", allow_module_level=True)

accelerate = importlib.import_module("gpt_kernels.accelerate")
OPS = ("layer_norm", "rms_norm", "softmax", "gelu")
SLOTS = tuple(slot for op in OPS for slot in accelerate.SLOTS[op])


@pytest.fixture
def model_s_slots(monkeypatch):
    """accelerate() fills CPU slots as it fills a GPU's, with the model's kernels."""
    from csrc import sim

    library = ctypes.CDLL(str(sim.PATH))
    monkeypatch.setattr(accelerate, "_loaded", lambda key: library if key == "CPU" else None)
    monkeypatch.setattr(accelerate, "_in_cpp", lambda slot, key: slot in SLOTS)
    monkeypatch.setattr(accelerate, "_namespace", lambda key: "gpt_kernels_aten_sim")
    monkeypatch.setattr(accelerate, "_libraries", LIBRARIES)
    library.gpt_kernels_aten_count.restype = ctypes.c_int64
    return library


LIBRARIES: dict = {}  # defined once in a process


CALLS = {
    "native_layer_norm": lambda x, w, b: F.layer_norm(x, (24,), w, b),
    "_fused_rms_norm": lambda x, w, b: F.rms_norm(x, (24,), w) + b,
    "_softmax": lambda x, w, b: x.softmax(-1) * w + b,
    "gelu": lambda x, w, b: F.gelu(x, approximate="tanh") * w + b,
}


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
@pytest.mark.parametrize("slot", CALLS)
def test_cuda_sim_slots_are_right(model_s_slots, slot, dtype):
    args = torch.randn(3, 5, 24).to(dtype), torch.randn(24).to(dtype), torch.randn(24).to(dtype)
    dy, before = torch.randn(3, 5, 24).to(dtype), model_s_slots.gpt_kernels_aten_count(slot.encode(), 1)
    with accelerate.accelerated(ops=OPS):
        actual = forward_backward(CALLS[slot], args, dy)
    assert model_s_slots.gpt_kernels_aten_count(slot.encode(), 1) == before + 1
    own, truth = (forward_backward(CALLS[slot], args, dy, to) for to in (None, torch.float64))
    for i, (a, e, t) in enumerate(zip(actual, own, truth, strict=True)):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert_close_to_truth(a, t, e, (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)[min(i, 2)])


def test_cuda_sim_hands_back(model_s_slots):
    x, wide = torch.randn(4, 6, 8), torch.randn(3, 8, dtype=torch.float64)
    calls = (lambda: x.softmax(0), lambda: F.gelu(wide), lambda: F.layer_norm(wide, (8,)))
    own = [call() for call in calls]
    with accelerate.accelerated(ops=OPS):
        assert all(torch.equal(call(), e) for call, e in zip(calls, own, strict=True))
        x[0, 0] = -torch.inf
        assert x.softmax(-1)[0, 0].isnan().all()
        mean = torch.native_layer_norm(x[1:].bfloat16(), [8], None, None, 1e-5)[1]
        assert mean.dtype is torch.float32 and mean.shape == (3, 6, 1)
