"""What is special about swiglu and geglu: the halves of one tensor, rows by stride, what is kept, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import assert_rounded, check_raises, every_isa, forward_backward

import gpt_kernels
from gpt_kernels import geglu, swiglu
from gpt_kernels.cases.glu import FORMS, packed
from gpt_kernels.ops.glu import in_rows

FWD = torch.ops.gpt_kernels.glu_fwd.default
BWD = torch.ops.gpt_kernels.glu_bwd.default


@every_isa
@pytest.mark.parametrize("name", FORMS)
def test_one_rounding(name, isa):
    """of a 16-bit result, where act(gate) rounded first has two"""
    ours = FORMS[name][0]
    with gpt_kernels.use_isa(isa), torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            gate, up = torch.randn(2, 17, 129).to(dtype)
            gate = gate.abs() + 0.5  # what the short polynomials are measured by is the product, not its smallest factor
            assert_rounded(ours(gate, up), ours(gate.float(), up.float()))


@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_one_tensor_is_its_halves(name, up_first):
    """bit for bit, and the gradient is one tensor with both"""
    ours = packed(name, up_first)[0]
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = torch.randn(5, 3, 74).to(dtype), torch.randn(5, 3, 37).to(dtype)
        halves = x.chunk(2, -1)
        y, dx = forward_backward(ours, (x,), dy)
        two = forward_backward(FORMS[name][0], halves[::-1] if up_first else halves, dy)
        grads = two[:0:-1] if up_first else two[1:]
        assert torch.equal(y, two[0]) and torch.equal(dx, torch.cat(grads, -1)) and dx.is_contiguous()


@pytest.mark.parametrize("name", FORMS)
def test_rows_by_stride(name):
    """of N elements that go 16 bytes at a time, at strides that do and do not, gate's another than up's; bit for bit"""
    for dtype in (torch.float32, torch.bfloat16):
        for gate_width, up_width, N in ((48, 33, 32), (33, 48, 32), (33, 33, 16), (40, 64, 24), (64, 37, 37)):
            x, z = torch.randn(5, gate_width).to(dtype), torch.randn(5, up_width).to(dtype)
            dy = torch.randn(5, N).to(dtype)
            given = x[:, gate_width - N :], z[:, :N]
            copied = forward_backward(FORMS[name][0], [t.clone(memory_format=torch.contiguous_format) for t in given], dy)
            for a, e in zip(forward_backward(FORMS[name][0], given, dy), copied, strict=True):
                assert torch.equal(a, e), (gate_width, up_width, N)


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_rows_by_stride_are_not_copied():
    x, dy = torch.randn(4, 6, 40), torch.randn(4, 6, 10)
    slices = [x[..., 1:11], x[..., 12:22]]
    for gate, up in (
        slices,
        (slices[0], slices[1].contiguous()),
        (x[0, :, 3:13], x[1, :, 3:13]),
        (slices[0][:, :1], slices[1][:, :1]),
    ):
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        with Copies() as copies:
            copies.seen = []
            swiglu(*leaves).backward(dy[: gate.shape[0]].reshape(-1, 10)[: gate[..., 0].numel()].reshape(gate.shape))
        assert not any("copy" in name or "clone" in name or "contiguous" in name for name in copies.seen), copies.seen


def test_which_rows_lie_at_one_stride():
    x = torch.randn(4, 6, 40)
    assert all(in_rows(t) for t in (x, x[..., :7], x[::2, :1], x[1], x[:, ::2][:1], x[..., :1], x[:1].expand(4, 6, 40)[:, :1]))
    assert not any(in_rows(t) for t in (x[:, :5, :7], x.transpose(0, 1), x[..., ::2], x[:, 1:]))


def test_nothing_but_the_inputs_is_kept():
    gate, up = torch.randn(2, 7, 9).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]


def test_one_input_wants_a_gradient():
    gate, up = torch.randn(2, 3, 8)
    for leaf in (gate, up):
        leaf.requires_grad_()
        (ours,) = torch.autograd.grad(geglu(gate, up).sum(), leaf)
        (theirs,) = torch.autograd.grad((F.gelu(gate) * up).sum(), leaf)
        torch.testing.assert_close(ours, theirs)
        leaf.requires_grad_(False)


X, T = torch.zeros(4, 8), torch.zeros(4, 8).t()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: swiglu(X, X[:3]), RuntimeError, r"glu_fwd: up must have the shape of gate \(4, 8\), got \(3, 8\)"),
        (lambda: swiglu(X, X.double()), RuntimeError, "up must be float32, got float64"),
        (lambda: swiglu(X, X.to("meta")), RuntimeError, "on one device"),
        (lambda: swiglu(X, 1.0), TypeError, "swiglu: up must be a Tensor or None, got float"),
        (lambda: swiglu(None), TypeError, "swiglu: gate must be a Tensor, got NoneType"),
        (lambda: swiglu(X[:, :7]), RuntimeError, r"swiglu: gate without an up must have an even last dimension.*\(4, 7\)"),
        (lambda: swiglu(torch.tensor(1.0)), RuntimeError, r"must have an even last dimension, got shape \(\)"),
        (lambda: geglu(X, X, up_first=True), RuntimeError, "geglu: up_first is of a gate that holds both"),
        (lambda: geglu(X, X, "erf"), RuntimeError, "geglu: approximate must be 'tanh' or 'none', got 'erf'"),
        (lambda: geglu(X, X, None), TypeError, "approximate must be 'tanh' or 'none', got None"),
        (lambda: swiglu(X.int(), X.int()), RuntimeError, "gate must be float32, (float64, )?bfloat16 or float16, got int32"),
        (lambda: FWD(T, T, 0, False), RuntimeError, "gate must have contiguous rows at one stride"),
        (lambda: FWD(X, None, 3, False), RuntimeError, "act must be 0 .* got 3"),
        (lambda: FWD(X[:, :7], None, 0, False), RuntimeError, "glu_fwd: gate without an up must have an even last"),
        (lambda: FWD(X, X, 0, True), RuntimeError, "glu_fwd: up_first is of a gate that holds both"),
        (lambda: BWD(X, X, None, 0, False), RuntimeError, r"glu_bwd: dy must have .* half the columns, got \(4, 8\)"),
        (lambda: BWD(X[:, :4], X, None, 0, False), RuntimeError, "glu_bwd: dy must be contiguous"),
        (lambda: BWD(X[:3], X, X, 0, False), RuntimeError, r"glu_bwd: dy must have the shape of gate \(4, 8\), got \(3, 8\)"),
        (lambda: BWD(X.half(), X, X, 0, False), RuntimeError, "dy must be float32, got float16"),
    ],
)
def test_bad_input(call, error, message):
    check_raises(call, error, message)
