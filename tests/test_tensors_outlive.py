"""No tensor outlives the call that allocated it, but for its results and what they are kept in.

A tensor kept across calls is memory of the pool of whatever graph the call was recorded into: torch.compile's CUDA graphs
(mode="reduce-overhead") then give it to others. Their check is a storage's: is it gone when the results are?
"""

import gc
from unittest import mock

import pytest
import torch
from kernel_calls import tensors, with_kernel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_kernels import cases, triton
from gpt_kernels.cases import op
from gpt_kernels.triton import common, slots


class Pool(TorchDispatchMode):
    """The storages that calls inside it make."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[str, StorageWeakRef]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors(args)}  # views of what is there make none
        storages = [t.untyped_storage() for t in tensors(result)]
        self.made += [(str(function), StorageWeakRef(s)) for s in storages if s._cdata not in given]
        return result

    def kept(self) -> list[str]:
        if not all(storage.expired() for _, storage in self.made):
            gc.collect()
        return [made_by for made_by, storage in self.made if not storage.expired()]


def outliving(function, *args) -> list[str]:
    """What made the tensors that a call of the function has left behind, its results being gone."""
    with Pool() as pool:
        function(*args)
    return pool.kept()


def test_a_tensor_that_is_kept_is_seen():
    kept = []
    assert outliving(lambda: kept.append(torch.empty(3).exp()[1:])) == ["aten.exp.default"]
    assert not outliving(lambda: torch.empty(3).exp()[1:])


def test_cpu_and_reference():
    for what, name, args in cases.calls(torch.bfloat16, "cpu"):
        for _ in range(2):
            assert not outliving(op(name), *args), f"{name} {what}"


@pytest.mark.skipif(triton.absence() is not None, reason=str(triton.absence()))
def test_triton():
    """On fake CUDA tensors, with a stream that is not being captured, as in the warm-up before a graph's capture."""
    with (
        FakeTensorMode(),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
        mock.patch("torch.cuda.current_stream", lambda device=None: mock.Mock(cuda_stream=0)),
    ):
        kept = {
            (name, what, made_by)
            for what, name, args in with_kernel("triton", cases.calls(torch.bfloat16, "cuda"))
            for _ in range(2)
            for made_by in outliving(launched, name, args)
        }
    assert not kept


def launched(name, args):
    with common.recording("sm_90"):
        return slots.launcher(name)(*args)
