"""The adapters of the one peer that can be executed here: Liger's kernels, under Triton's interpreter, against torch."""

import os
import pathlib
import subprocess
import sys

import pytest

LIGER = """
import sys
import liger_kernel.ops, numpy, torch, torch.nn.functional as F, triton.language as tl
from triton.runtime import interpreter
from gpt_kernels.bench import peers

# what compiled kernels have and the interpreter lacks: a scalar of the language for a float, libdevice
plain = interpreter._implicit_cvt
def convert(value):
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(numpy.array([value], numpy.float32), tl.float32), tl.float32)
    return plain(value)
interpreter._implicit_cvt = convert
for name in ("layer_norm", "rms_norm"):
    sys.modules[f"liger_kernel.ops.{name}"].rsqrt = lambda x: 1 / tl.sqrt(x)

peers.Peer.absence = lambda self: None
torch.manual_seed(0)
x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((5, 33), (33,), (33,)))
target = torch.randint(33, (5,))
for op, options, inputs, eager in (
    ("layer_norm", {}, (x, weight, bias), lambda x, w, b: F.layer_norm(x, (33,), w, b)),
    ("rms_norm", {}, (x, weight), lambda x, w: F.rms_norm(x, (33,), w, 1e-6)),
    ("softmax", {}, (x,), lambda x: torch.softmax(x, -1)),
    ("cross_entropy", {"inplace": True}, (x,), lambda x: F.cross_entropy(x, target)),
):
    function = peers.functions(("liger",), op, options)["liger"]()
    before = x.detach().clone()
    ours = function(x, target) if op == "cross_entropy" else function(*inputs)
    theirs = eager(*inputs)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(theirs)
    gradients = (torch.autograd.grad(y, inputs, dy) for y in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before), "the inputs are those of every other variant"
    print(op)
"""


def test_liger_adapters():
    pytest.importorskip("liger_kernel")
    root = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", LIGER], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["layer_norm", "rms_norm", "softmax", "cross_entropy"], done.stderr
