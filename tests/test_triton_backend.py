"""What every Triton launcher must do beyond right numbers, with no GPU: nothing of a tensor's data is read by the host, results
have the reference's form, fake CUDA tensors pass through every op. tests/gpu has the part that needs a device."""

import pytest
import torch
from kernel_calls import form, tensors, with_kernel
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt_kernels import cases, dispatch, triton
from gpt_kernels.architectures import ARCHITECTURES
from gpt_kernels.cases import op
from gpt_kernels.triton import common, slots

pytestmark = [
    pytest.mark.skipif(triton.absence() is not None, reason=str(triton.absence())),
    pytest.mark.skipif(triton.INTERPRETED, reason="the interpreter changes nothing here"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.mark.parametrize(
    "arch, dtype",
    [*((arch, torch.bfloat16) for arch in ARCHITECTURES), ("sm_90", torch.float32), ("gfx942", torch.float16)],
)
def test_launchers_need_no_data(arch, dtype):
    """On "meta" every host read of data, and so every synchronisation and every size that depends on data, raises.

    So launchers can be captured in a CUDA graph. The results' form is the reference's, which is what torch.compile believes.
    """
    for what, name, args in with_kernel("triton", cases.calls(dtype, "meta")):
        with common.recording(arch) as launches:
            result = slots.launcher(name)(*args)
        assert form(result) == form(op(name)(*args)), f"{name} {what}"
        for t in tensors(result):
            assert t.device.type == "meta"
        if args[0].numel():
            assert launches, f"{name} {what}: nothing was launched"
        assert all(launch.parameters["enable_fp_fusion"] is True for launch in launches), f"{name} {what}"


def test_a_host_read_is_seen():
    """The test above rests on this."""
    for read in (lambda t: t.item(), lambda t: t.cpu(), lambda t: t.tolist(), lambda t: bool(t > 0), lambda t: t.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
            read(torch.ones((), device="meta"))


@every_dtype
def test_fake_cuda_tensors_have_the_results_form(dtype):
    """torch.compile's view of a GPU: every op on fake CUDA tensors gives what the reference gives on real ones."""
    with FakeTensorMode():
        faked = []
        for what, name, args in cases.calls(dtype, "cuda"):
            result = op(name)(*args)
            assert all(t.device.type == "cuda" for t in tensors(result)), name
            faked.append((what, name, form(result)))
    real = cases.calls(dtype, "cpu")
    for (what, name, fake), (same, _, args) in zip(faked, real, strict=True):
        assert what == same and fake == form(dispatch.reference(name)(*args)), f"{name} {what}"


def test_a_gpu_alone_is_measured_and_a_wrong_device_is_refused():
    """Launchers check devices before they launch: a pointer of another device would fault."""
    for name, args in cases.step(cases.Sizes(1, 3, 8, 1, vocab=9), torch.float32, "meta"):
        for i, a in enumerate(args):
            if i and isinstance(a, torch.Tensor) and dispatch.kernel_of(name, "triton"):
                given = [torch.zeros(b.shape, dtype=b.dtype) if j == i else b for j, b in enumerate(args)]
                said = f"{name.removesuffix('_out')}: .* expected device: "
                with common.recording("sm_90") as launches, pytest.raises(RuntimeError, match=said):
                    slots.launcher(name)(*given)
                assert not launches


def test_float64_is_refused_by_name():
    for name, args in cases.step(cases.Sizes(1, 8, 16, 1, vocab=9), torch.float64, "meta"):
        if dispatch.kernel_of(name, "triton"):
            with common.recording("sm_80"), pytest.raises(RuntimeError, match=f"{name.removesuffix('_out')}: .* got float64"):
                slots.launcher(name)(*args)
