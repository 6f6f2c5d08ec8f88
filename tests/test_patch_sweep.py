"""A patched module does what its own class does, for every attribute that the class reads and every kind of argument.

Attributes are found in the classes' sources: one that a new version reads makes the sweep fail until it has values here. Each
value is set before patch and after it. Compared with the unpatched: values, gradients, shapes, strides, dtypes, and the type of
the error where there is one.
"""

import ast
import contextlib
import copy
import importlib
import inspect
import itertools
import re
import textwrap

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

from gpt_kernels import patch
from gpt_kernels.accuracy import SAME_FORMULA
from gpt_kernels.patch import is_patched

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AttentionInterface,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
    activations,
    cache_utils,
)
from transformers.integrations import sdpa_attention  # noqa: E402
from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402
from transformers.models.gpt2 import modeling_gpt2  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from gpt_kernels import Served  # noqa: E402
from gpt_kernels.integrations import transformers_gpt2, transformers_models  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
patch_module = importlib.import_module("gpt_kernels.patch")  # the function has the module's name
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FLOATS = (F32, BF16, F16, F64)
N = 16


# ---- comparison ----


def outcome(call):
    """(None, tensors and other results, flat) or (type of the error, []). Memory errors and the like pass through."""
    torch.manual_seed(5)
    try:
        return None, list(flat(call()))
    except Exception as error:
        return type(error), []


def flat(value):
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from flat(v)
    else:
        yield value


def form(t):
    # strides of dimensions of one element mean nothing
    strides = (
        [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] if t.layout == torch.strided and t.numel() else None
    )
    return type(t), t.shape, t.dtype, t.device, t.layout, strides, t.requires_grad


def difference(expected, actual, computed=F64):
    """What is not the same, or None. computed: the coarsest dtype on the way."""
    (error, want), (other_error, got) = expected, actual
    if error is not other_error:
        return f"{error and error.__name__} became {other_error and other_error.__name__}"
    if len(want) != len(got):
        return f"{len(want)} results became {len(got)}"
    for a, b in zip(want, got, strict=True):
        if not isinstance(a, torch.Tensor) or a.is_nested:
            if type(a) is not type(b) or not isinstance(a, torch.Tensor) and a != b:
                return f"{a} became {b}"
            if isinstance(a, torch.Tensor) and (problem := difference((None, list(a.unbind())), (None, list(b.unbind())))):
                return problem
        elif form(a) != form(b):
            return f"{form(a)} became {form(b)}"
        elif not a.is_meta:
            a, b = (t.detach().to_dense() if t.layout != torch.strided else t.detach() for t in (a, b))
            a, b = (t.dequantize() if t.is_quantized else t for t in (a, b))
            tolerance = max(SAME_FORMULA[a.dtype], SAME_FORMULA[computed]) if a.dtype in FLOATS else 0.0
            if a.dtype not in FLOATS:
                a, b = (t.to(F64) if not t.is_complex() else t for t in (a, b))
            if not torch.allclose(
                b,
                a,
                rtol=tolerance,
                atol=tolerance * (1 + a.abs().nan_to_num(0, 0, 0).amax().item() if a.numel() else 1),
                equal_nan=True,
            ):
                return f"values off by {(a.double() - b.double()).abs().nan_to_num(1e30).max()}"
    return None


def compare(make, call, change=None, when="before", computed=F64):
    """call(module) on make()'s module as it is and on one that was patched; change(module) comes before or after patch."""
    torch.manual_seed(1)
    ours = make()
    theirs = copy.deepcopy(ours)
    if change and when == "before":
        change(ours), change(theirs)
    patch(ours)
    if change and when == "after":
        assert is_patched(ours)
        change(ours), change(theirs)
    return difference(outcome(lambda: call(theirs)), outcome(lambda: call(ours)), computed)


def gradients(module, out, x):
    """out, and gradients of a fixed sum of it where there are any."""
    outs = [t for t in flat(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    params = [p for p in (x, *module.parameters()) if isinstance(p, torch.Tensor) and p.requires_grad]
    if not outs or outs[0].is_nested or outs[0].is_sparse or not outs[0].is_floating_point():
        return out
    y = outs[0]
    if "Dropout" in type(module).__name__:
        dy = torch.ones_like(y)
    else:
        dy = torch.cos(torch.arange(y.numel(), dtype=F64)).view(y.shape).to(y)
    return out, [t for t in torch.autograd.grad(y, params, dy, allow_unused=True)]


# ---- what the sources read ----


def attributes(function, name):
    """Attributes of the variable `name` that the function reads, by dot, getattr or hasattr."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name:
            found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            if getattr(node.args[0], "id", "") == name:
                found.add(node.args[1].value)
    return found


def read_by(cls, methods=("__init__", "forward"), also=()):
    """What methods of cls read of self, and the functions of `also` of their `module`; methods are not attributes."""
    found = set().union(*(attributes(getattr(cls, m), "self") for m in methods if m in cls.__dict__))
    found |= set().union(*(attributes(f, "module") for f in also), set())
    return {a for a in found if not callable(getattr(cls, a, None))}


# ---- torch's own modules ----


def setter(name, *values):
    return [(f"{name}={v!r}"[:60].replace("\n", " "), lambda m, v=v: setattr(m, name, copy.deepcopy(v))) for v in values]


def parameter(name, *makes):
    def change(make):
        def change(m):
            torch.manual_seed(2)
            value = make()
            setattr(m, name, value if value is None else nn.Parameter(value))

        return change

    return [(f"{name} {i}", change(make)) for i, make in enumerate(makes)]


def in_place(name, *edits):
    return [(f"{name} edit {i}", edit) for i, edit in enumerate(edits)]


VECTORS = (
    lambda: None,
    lambda: torch.randn(N),
    lambda: torch.randn(2 * N)[::2],
    lambda: torch.randn(1).expand(N),
    lambda: torch.randn(N, 2).t()[0],
    lambda: torch.randn(N + 1),
    lambda: torch.randn(1),
    lambda: torch.randn(1, N),
    lambda: torch.randn(N, device="meta"),
    *(lambda d=d: torch.randn(N).to(d) for d in (BF16, F16, F64, torch.complex64)),
)
SHAPES = setter("normalized_shape", (N,), [N], torch.Size((N,)), (N + 1,), (4, N), (), N, None)
FLAGS = [
    *setter("training", False, True),
    ("frozen", lambda m: m.requires_grad_(False)),
    ("half", lambda m: m.to(BF16)),
    ("double", lambda m: m.double()),
]
NORM = {
    "normalized_shape": SHAPES,
    "elementwise_affine": setter("elementwise_affine", False, True),
    "weight": [
        *parameter("weight", *VECTORS),
        ("data", lambda m: m.weight.data.mul_(2)),
        ("weight frozen", lambda m: m.weight.requires_grad_(False)),
    ],
    "bias": parameter("bias", *VECTORS),
    "eps": setter("eps", 1e-3, 0.0, -1.0, 1, None, float("nan"), "a", True),
}
P = (0.0, 0, 1e-7, 1e-4, 0.3, 0.9, 1 - 1e-7, 1.0, 1, -0.1, 1.5, float("nan"), None, "a", True)
VALUES = {
    nn.LayerNorm: NORM,
    nn.RMSNorm: {k: v for k, v in NORM.items() if k != "bias"},
    nn.GELU: {"approximate": setter("approximate", "none", "tanh", "fast", None, 3)},
    nn.Dropout: {"p": setter("p", *P), "inplace": setter("inplace", True, False), "training": setter("training", False, True)},
}
MAKE = {
    nn.LayerNorm: lambda dtype=F32: scrambled(nn.LayerNorm(N, dtype=dtype)),
    nn.RMSNorm: lambda dtype=F32: scrambled(nn.RMSNorm(N, dtype=dtype)),
    nn.GELU: lambda dtype=F32: nn.GELU(),
    nn.Dropout: lambda dtype=F32: nn.Dropout(0.3),
}


def scrambled(module):
    for p in module.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    return module


def call_on(make_x, **how):
    """Run a module on make_x()'s input, with gradients; a dropout's mask is another, so its kind is what is compared."""

    def call(module):
        x = make_x()
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.is_leaf and not x.is_meta and how.get("grad", True):
            x = x.requires_grad_()
        y = (
            x * 1
            if isinstance(x, torch.Tensor)
            and how.get("grad", True)
            and x.requires_grad
            and type(x) is torch.Tensor
            and x.is_contiguous()
            else x
        )
        out = module(y)
        if isinstance(module, nn.Dropout) and isinstance(out, torch.Tensor):
            results = gradients(module, out, x)
            if out.is_nested or out.is_sparse or not out.is_floating_point() or out.is_meta or out.numel() < 2000:
                # too few to tell a share: form alone
                return [out is y, *(str(form(t)) if not t.is_nested else str(type(t)) for t in flat(results))]
            return [out is y, *(k for t in flat(results) for k in (str(form(t)), *shares(t)))]
        return gradients(module, out, x)

    return call


def shares(t):
    """For a tensor of ones that was dropped: its values and, roughly, how many are zero."""
    t = t.detach().double()
    # float16, as our p is a multiple of 1 / 65536
    return t.unique().half(), round((t == 0).double().mean().item(), 1)


def ones(dtype=F32):
    return lambda: torch.ones(64, 256).to(dtype)


@pytest.mark.parametrize("cls", VALUES)
def test_every_attribute_that_the_source_reads_has_values(cls):
    assert read_by(cls, ("__init__", "forward")) - set(VALUES[cls]) == set()


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("cls, name", [(cls, name) for cls in VALUES for name in VALUES[cls]])
def test_attributes_of_torchs_modules(cls, name, when):
    bad = []
    for (what, change), dtype in itertools.product([*VALUES[cls][name], *FLAGS], FLOATS):
        x = ones(dtype) if cls is nn.Dropout else lambda dtype=dtype: (torch.randn(3, N) * 0.05).to(dtype)
        if problem := compare(MAKE[cls], call_on(x), change, when):
            bad.append(f"{what}, input {dtype}: {problem}")
    assert not bad, "\n".join(bad)


class Own(torch.Tensor):
    pass


def jagged():
    return torch.nested.nested_tensor([torch.randn(2, N), torch.randn(5, N)], layout=torch.jagged)


INPUTS = {
    **{str(d): lambda d=d: torch.randn(3, N).to(d) for d in (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
                                                            torch.int64, torch.uint8, torch.bool)},
    "transposed": lambda: torch.randn(N, 3).t(),
    "permuted": lambda: torch.randn(2, 5, N).transpose(0, 1),
    "permuted, last dimension": lambda: torch.randn(2, N, N).transpose(1, 2),
    "channels last": lambda: torch.randn(2, 3, 5, N).to(memory_format=torch.channels_last),
    "every second": lambda: torch.randn(3, 2 * N)[:, ::2],
    "every second row": lambda: torch.randn(6, N)[::2],
    "slice of rows": lambda: torch.randn(6, N + 3)[:, :N],
    "expanded": lambda: torch.randn(1, N).expand(3, N),
    "expanded columns": lambda: torch.randn(3, 1).expand(3, N),
    "overlapping": lambda: torch.randn(N + 2).unfold(0, N, 1),
    "one row of odd stride": lambda: torch.randn(3, N)[:1],
    "conjugate's imaginary part": lambda: torch.randn(3, N, dtype=torch.complex64).conj().imag,
    "negative view": lambda: torch._neg_view(torch.randn(3, N)),
    **{f"rank {len(s)}": lambda s=s: torch.randn(s) for s in ((), (N,), (3, N), (2, 3, N), (2, 1, 3, N), (2, 1, 3, 2, N))},
    **{f"zero size {s}": lambda s=s: torch.randn(s) for s in ((0, N), (3, 0), (0,), (2, 0, N), (0, 0))},
    "wrong width": lambda: torch.randn(3, N - 1),
    "one column": lambda: torch.randn(N, 1),
    "sparse": lambda: torch.randn(3, N).to_sparse(),
    "sparse rows": lambda: torch.randn(3, N).to_sparse_csr(),
    "mkldnn": lambda: torch.randn(3, N).to_mkldnn(),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(3, N), 0.1, 0, torch.quint8),
    "jagged": jagged,
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, N), torch.randn(5, N)]),
    "meta": lambda: torch.randn(3, N, device="meta"),
    "meta, float64": lambda: torch.randn(3, N, device="meta", dtype=F64),
    "parameter": lambda: nn.Parameter(torch.randn(3, N)),
    "subclass": lambda: torch.randn(3, N).as_subclass(Own),
    "no tensor": lambda: [1.0] * N,
    "None": lambda: None,
    "number": lambda: 2.0,
    "NaN": lambda: torch.tensor([float("nan"), *[1.0] * (N - 1)]),
    "large": lambda: torch.randn(3, N) * 1e4,
}  # fmt: skip
CONTEXTS = {
    "plain": contextlib.nullcontext,
    "autocast bfloat16": lambda: torch.autocast("cpu", BF16),
    "autocast float16": lambda: torch.autocast("cpu", F16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
COMPUTED = {"plain": F32, "autocast bfloat16": BF16}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cls", MAKE)
def test_inputs_of_torchs_modules(cls, context):
    bad = []

    def inside(call):
        def run(module):
            with CONTEXTS[context]():
                return call(module)

        return run

    for (name, x), dtype in itertools.product(INPUTS.items(), FLOATS):
        if dtype != F32 and (cls in (nn.GELU, nn.Dropout) or context not in ("plain", "autocast bfloat16")):
            continue
        if problem := compare(lambda dtype=dtype: MAKE[cls](dtype), inside(call_on(x, grad=context != "inference"))):
            bad.append(f"{name}, parameters {dtype}: {problem}")
    for xd in FLOATS if cls is nn.Dropout else ():
        if problem := compare(MAKE[cls], inside(call_on(ones(xd), grad=context != "inference"))):
            bad.append(f"ones {xd}: {problem}")
    assert not bad, "\n".join(bad)


def dual(module, x):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))))


def dual_weight(module, x):
    with forward_ad.dual_level():
        params = {n: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for n, p in module.named_parameters()}
        return tuple(forward_ad.unpack_dual(torch.func.functional_call(module, params, (x,))))


def total(module):
    return lambda x: module(x).square().sum()


def traced(module, x):
    graph = torch.jit.trace(module, x, check_trace=False)
    return graph(x), sorted(node.kind() for node in graph.inlined_graph.nodes() if node.kind() == "prim::PythonOp")


WAYS = {
    "by keyword": lambda m, x: m(**{next(iter(inspect.signature(type(m).forward).parameters.keys() - {"self"})): x}),
    "too many": lambda m, x: m(x, x),
    "none": lambda m, x: m(),
    "unknown keyword": lambda m, x: m(x, y=x),
    "signature": lambda m, x: str(inspect.signature(m.forward)),
    "functional_call": lambda m, x: torch.func.functional_call(m, {n: p * 2 for n, p in m.named_parameters()}, (x,)),
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "vmap of parameters": lambda m, x: torch.func.vmap(lambda p: torch.func.functional_call(m, p, (x,)))(
        {n: torch.stack((p, 2 * p)) for n, p in m.named_parameters()}
    ),
    "func.grad": lambda m, x: torch.func.grad(total(m))(x),
    "vjp": lambda m, x: torch.func.vjp(m, x)[1](torch.ones_like(x)),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),)),
    "hessian": lambda m, x: torch.func.hessian(total(m))(x[0]),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x[0]),
    "per sample": lambda m, x: torch.func.vmap(torch.func.grad(total(m)))(x),
    "dual": dual,
    "dual parameters": dual_weight,
    "trace": traced,
    "deepcopy": lambda m, x: copy.deepcopy(m)(x),
    "share_memory": lambda m, x: m.share_memory()(x),
    "meta": lambda m, x: m.to("meta")(x.to("meta")),
    "half": lambda m, x: m.half()(x.half()),
}  # fmt: skip


@pytest.mark.parametrize("cls", MAKE)
def test_ways_to_call(cls):
    bad = []
    for (name, way), training in itertools.product(WAYS.items(), (True, False)):
        if cls is nn.Dropout and training and name != "signature":
            # another mask
            continue
        torch.manual_seed(3)
        x = torch.randn(3, N)
        if problem := compare(lambda training=training: MAKE[cls]().train(training), lambda m, way=way, x=x: way(m, x)):
            bad.append(f"{name}: {problem}")
    assert not bad, "\n".join(bad)


def test_autocast_does_nothing_to_what_is_served_under_it():
    # patch.py serves these two in 16 bits under autocast: on no device may autocast change their inputs
    for op, key in itertools.product(("gelu", "dropout"), ("CPU", "CUDA")):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", f"Autocast{key}")


def test_classes_that_wrap_a_module_after_patch():
    class Shift(nn.Module):
        def forward(self, w):
            return (w + 1).to(BF16)

    def parametrised(m):
        nn.utils.parametrize.register_parametrization(m, "weight", Shift(), unsafe=True)

    def weight_normed(m):
        nn.utils.parametrizations.weight_norm(m, dim=None)

    def hooked(m):
        m.register_forward_pre_hook(lambda m, a: (a[0].double(),))
        m.register_forward_hook(lambda m, a, y: y + 1)

    for change, cls, when in itertools.product(
        (parametrised, weight_normed, hooked), (nn.LayerNorm, nn.RMSNorm), ("before", "after")
    ):
        assert compare(MAKE[cls], call_on(lambda: torch.randn(3, N)), change, when) is None


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("cls", MAKE)
def test_a_forward_put_into_the_class_is_run(cls, when, monkeypatch):
    module = MAKE[cls]().eval()
    if when == "after":
        patch(module)
    monkeypatch.setattr(cls, "forward", lambda self, input: "theirs")
    if when == "before":
        assert "class's forward was replaced" in patch(module).rows[0].why
    assert module(torch.randn(3, N)) == "theirs"


@pytest.mark.parametrize("device", ("cuda", "cpu"))
def test_float64_on_a_gpu_is_kept(device, monkeypatch):
    monkeypatch.setattr(patch_module, "where", lambda op: {"CPU": Served("cpu", "..."), "CUDA": Served("triton", "...")})
    with FakeTensorMode():
        rows = patch(nn.Sequential(nn.LayerNorm(N, device=device, dtype=F64), nn.GELU())).rows[1:]
        if device == "cpu":
            assert all(r.op for r in rows)
        else:
            assert all(not r.op and "float64" in r.why and "cuda" in r.why for r in rows)
        assert all(r.op for r in patch(nn.Sequential(nn.LayerNorm(N, device=device), nn.GELU())).rows[1:])


def test_float64_on_a_gpu_after_patch_is_not_served():
    serving = importlib.import_module("gpt_kernels.serving")
    dense = serving.dense
    with FakeTensorMode(), pytest.MonkeyPatch.context() as m:
        m.setattr(serving, "Tensor", FakeTensor)
        assert dense(torch.zeros(2, device="cuda")) and dense(torch.zeros(2, dtype=F64))
        assert not dense(torch.zeros(2, device="cuda", dtype=F64)) and not dense(torch.zeros(2, device="meta"))


# ---- GPT-2's attention ----

B, H, T, D, LAYER = 2, 4, 7, 8, 1
C = H * D


def config(**overrides):
    sizes = dict(vocab_size=61, n_positions=40, n_embd=C, n_layer=2, n_head=H, initializer_range=0.2)
    dropouts = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    return GPT2Config(**{**sizes, **dropouts, "bos_token_id": 0, "eos_token_id": 0, **overrides})


def attention_of(implementation, dtype=F32):
    def make():
        module = modeling_gpt2.GPT2Attention(config(attn_implementation=implementation), layer_idx=LAYER)
        for p in module.parameters():
            nn.init.normal_(p, 0.0, 0.3)
        return module.to(dtype)

    return make


def causal_mask(dtype=None, Tk=T, hidden="min"):
    """(1, 1, T, Tk): boolean, or 0 and the lowest value of dtype or -inf."""
    visible = torch.ones(T, Tk, dtype=torch.bool).tril(Tk - T)[None, None]
    if dtype is None:
        return visible
    low = torch.finfo(dtype).min if hidden == "min" else -float("inf")
    return torch.zeros(1, 1, T, Tk, dtype=dtype).masked_fill(~visible, low)


def attend(mask=None, cache=None, dtype=F32, x=None, weights=False, **kwargs):
    """Output, and gradients; the weights only where they were asked for."""

    def call(module):
        h = (torch.randn(B, T, C).to(dtype) if x is None else x()).requires_grad_()
        m = mask() if callable(mask) else mask
        past = cache(module) if cache else None
        out = module(h, past, m, **{k: v() if callable(v) else v for k, v in kwargs.items()})
        # "eager" returns the weights unasked, and None stands in their place
        return gradients(module, out[0], h), past.get_seq_length() if past is not None else None, *(out[1:] if weights else ())

    return call


class Doubled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


class AddedAdapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Linear(C, base.nf, bias=False)

    def forward(self, x):
        return self.base(x) + self.a(x)


class InFloat64(Conv1D):
    def forward(self, x):
        return super().forward(x).double()


def replaced(name, make):
    def change(m):
        torch.manual_seed(4)
        setattr(m, name, make(getattr(m, name)))

    return change


def child(name):
    def change_class(cls):
        return lambda m: setattr(getattr(m, name), "__class__", cls)

    return [
        (f"{name} doubled", change_class(Doubled)),
        (f"{name} in float64", change_class(InFloat64)),
        (f"{name} adapted", replaced(name, AddedAdapter)),
        (f"{name} hooked", lambda m: getattr(m, name).register_forward_hook(lambda m, a, y: y * 3)),
        (f"{name} hooked before", lambda m: getattr(m, name).register_forward_pre_hook(lambda m, a: (a[0] * 3,))),
        (f"{name} hooked backward", lambda m: getattr(m, name).register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))),
        (f"{name} with a forward", lambda m: setattr(getattr(m, name), "forward", lambda x: x.repeat(1, 1, 3))),
        (f"{name} without bias", lambda m: setattr(getattr(m, name), "bias", None)),
        (f"{name} in bfloat16", lambda m: getattr(m, name).to(BF16)),
        (f"{name} nf", lambda m: setattr(getattr(m, name), "nf", 3 * N)),
        (f"{name} weight by columns", replaced_weight(name, lambda w: w.detach().t().contiguous().t())),
        (f"{name} weight expanded", replaced_weight(name, lambda w: w.detach()[:1].expand(w.shape))),
        (f"{name} bias by step", replaced_weight(name, lambda b: torch.randn(2 * b.numel())[::2], "bias")),
        (f"{name} bias of one", replaced_weight(name, lambda b: torch.randn(1), "bias")),
        (f"{name} bias a row", replaced_weight(name, lambda b: b.detach()[None], "bias")),
        (f"{name} bias in bfloat16", replaced_weight(name, lambda b: b.detach().to(BF16), "bias")),
        (f"{name} frozen", lambda m: getattr(m, name).requires_grad_(False)),
    ]  # fmt: skip


def replaced_weight(name, edit, what="weight"):
    def change(m):
        torch.manual_seed(4)
        setattr(getattr(m, name), what, nn.Parameter(edit(getattr(getattr(m, name), what))))

    return change


PROBABILITIES = (0, 0.0, 1.0, 1, 1e-9, -0.1, 2.0, None, "a")


def dropouts(name):
    # a probability of 1 has one mask, others many
    return [
        *((f"{name} p={p!r}", lambda m, p=p: setattr(getattr(m, name), "p", p)) for p in PROBABILITIES),
        (f"{name} in eval", lambda m: (setattr(getattr(m, name), "p", 1.0), getattr(m, name).eval())),
        (f"{name} replaced", lambda m: setattr(m, name, nn.Identity())),
        (f"{name} alpha", lambda m: setattr(m, name, nn.AlphaDropout(0.0))),
        (f"{name} in place", lambda m: setattr(getattr(m, name), "inplace", True)),
    ]  # fmt: skip


def sets(name, *values):
    return [(f"{name}={v!r}", lambda m, v=v: setattr(m, name, v)) for v in values]


def another(module, q, k, v, mask, **options):
    o, w = sdpa_attention.sdpa_attention_forward(module, q, k, v, mask, **options)
    return o * 2, w


ATTENTION = {
    "config": [
        *((f"implementation {i}", lambda m, i=i: setattr(m.config, "_attn_implementation_internal", i))
          for i in ("sdpa", "eager", "nothing", None, "swept")),
    ],
    "embed_dim": sets("embed_dim", 5),
    "num_heads": sets("num_heads", 2, 3, 8),
    "head_dim": sets("head_dim", 4, 16, 5, 32),
    "split_size": sets("split_size", 16, 5, 48),
    "scale_attn_weights": sets("scale_attn_weights", False),
    "scale_attn_by_inverse_layer_idx": sets("scale_attn_by_inverse_layer_idx", True),
    "reorder_and_upcast_attn": sets("reorder_and_upcast_attn", True, False),
    "is_cross_attention": sets("is_cross_attention", True),
    "layer_idx": sets("layer_idx", 0, 3),
    "scaling": sets("scaling", 0.5, 0.0, -1.0, 2, None, torch.tensor(0.3), float("nan")),
    "c_attn": child("c_attn"),
    "c_proj": child("c_proj"),
    "attn_dropout": dropouts("attn_dropout"),
    "resid_dropout": dropouts("resid_dropout"),
    "is_causal": sets("is_causal", True, False, None, 1, 0, "a"),
    "num_key_value_groups": sets("num_key_value_groups", 1, 2),
    "training": sets("training", True, False),
    "q_attn": [("q_attn", lambda m: setattr(m, "q_attn", Conv1D(C, C)))],
}  # fmt: skip
INTERFACES = (sdpa_attention.sdpa_attention_forward, modeling_gpt2.eager_attention_forward)


def test_every_attribute_that_attention_reads_has_values():
    methods = ("__init__", "forward", "_upcast_and_reordered_attn")
    assert read_by(modeling_gpt2.GPT2Attention, methods, INTERFACES) - set(ATTENTION) == set()
    # and in forward, one of its config
    source = inspect.getsource(modeling_gpt2.GPT2Attention.forward)
    assert set(re.findall(r"self\.config\.(\w+)", source)) == {"_attn_implementation"}


def test_every_argument_that_the_interfaces_read_is_known():
    for function in INTERFACES:
        names = set(inspect.signature(function).parameters) - {"attention_mask", "kwargs"}
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("kwargs.get", "kwargs.pop"):
                names.add(node.args[0].value)
            assert not (isinstance(node, ast.Subscript) and ast.unparse(node.value) == "kwargs")
        assert names <= transformers_gpt2._READ


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("when", ("before", "after"))
def test_attributes_of_attention(implementation, when, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "swept", another)
    bad = []
    for (name, change), full in itertools.product([*itertools.chain(*ATTENTION.values()), *FLAGS], (False, True)):
        mask = causal_mask(F32 if implementation == "eager" else None, T + 3) if full else None
        call = attend(mask, filled() if full else None)
        if problem := compare(attention_of(implementation), call, change, when, F32):
            bad.append(f"{name}, {'mask and cache' if full else 'bare'}: {problem}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_registered_functions_are_called(implementation, monkeypatch):
    patched = attention_of(implementation)()
    patch(patched)
    for mapping in (AttentionInterface._global_mapping, modeling_gpt2.ALL_ATTENTION_FUNCTIONS._local_mapping):
        with monkeypatch.context() as m:
            m.setitem(mapping, implementation, lambda module, q, *a, **k: (torch.full((B, T, H, D), 7.0), "w"))
            out, weights = patched(torch.randn(B, T, C))
            torch.testing.assert_close(out, patched.c_proj(torch.full((B, T, C), 7.0)))
            assert weights == "w"
    assert patched(torch.randn(B, T, C))[1] is None


MASKS = {
    "none": None,
    "boolean": causal_mask(),
    "boolean, per batch": causal_mask().expand(B, 1, T, T),
    "boolean, per head": (torch.rand(B, H, T, T) > 0.3) | torch.eye(T, dtype=torch.bool),
    "boolean, one column": torch.ones(1, 1, T, 1, dtype=torch.bool),
    "boolean, keys only": torch.ones(B, 1, 1, T, dtype=torch.bool).index_fill(3, torch.tensor([2]), False),
    "boolean, transposed": causal_mask().mT.contiguous().mT,
    "boolean, rank 1": torch.ones(T, dtype=torch.bool),
    **{f"boolean, rank {r}": causal_mask().reshape((1,) * (r - 2) + (T, T)) for r in (2, 3, 5)},
    **{f"rank {r}": torch.randn((1,) * (r - 2) + (T, T)) for r in (2, 3, 5)},
    **{str(d): torch.randn(B, 1, T, T).to(d) for d in (*FLOATS, torch.complex64)},
    **{str(d): torch.ones(B, 1, T, T).to(d) for d in (torch.int64, torch.uint8)},
    **{f"causal {d}": causal_mask(d) for d in FLOATS},
    "causal, -inf": causal_mask(F32, hidden="inf"),
    "a row that sees nothing": causal_mask(F32).index_fill(2, torch.tensor([3]), torch.finfo(F32).min),
    "a row that sees nothing, -inf": causal_mask(F32).index_fill(2, torch.tensor([3]), -float("inf")),
    "zero width": torch.zeros(1, 1, T, 0),
    "zero width, boolean": torch.zeros(1, 1, T, 0, dtype=torch.bool),
    "wider": torch.zeros(1, 1, T, T + 1),
    "wider, boolean": torch.ones(1, 1, T, T + 1, dtype=torch.bool),
    "narrower": torch.zeros(1, 1, T, T - 1),
    "more rows": torch.zeros(1, 1, T + 1, T),
    "more batches": torch.zeros(B + 1, 1, T, T),
    "subclass": torch.zeros(1, 1, T, T).as_subclass(Own),
    "parameter": nn.Parameter(torch.randn(1, 1, T, T)),
    "sparse": causal_mask().to_sparse(),
    "expanded": torch.randn(1, 1, 1, T).expand(B, H, T, T),
    "a number": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("context", ("plain", "autocast bfloat16"))
def test_masks(implementation, context):
    bad = []
    for (name, mask), dtype in itertools.product(MASKS.items(), (F32, BF16) if context == "plain" else (F32,)):

        def call(module, mask=mask, dtype=dtype):
            with CONTEXTS[context]():
                return attend(mask, dtype=dtype)(module)

        if problem := compare(attention_of(implementation, dtype), call, computed=COMPUTED[context]):
            bad.append(f"{name}, {dtype}: {problem}")
    assert not bad, "\n".join(bad)


def filled(cls=DynamicCache, dtype=F32, batch=B, heads=H, tokens=3, **options):
    def make(module):
        cache = cls(config=module.config, **options)
        torch.manual_seed(9)
        cache.update(*(torch.randn(batch, heads, tokens, D).to(dtype) for _ in range(2)), LAYER)
        return cache

    return make


class OwnCache(DynamicCache):
    def update(self, k, v, layer, *args, **kwargs):
        return super().update(k * 2, v * 2, layer, *args, **kwargs)


CACHES = {
    "DynamicCache": lambda m: DynamicCache(config=m.config),
    "DynamicCache without config": lambda m: DynamicCache(),
    "filled": filled(),
    **{f"filled in {d}": filled(dtype=d) for d in (BF16, F16, F64)},
    "batch of one": filled(batch=1),
    "one head": filled(heads=1),
    "cropped": lambda m: (c := filled()(m), c.crop(0))[0],
    "StaticCache": lambda m: StaticCache(config=m.config, max_cache_len=12),
    "StaticCache, filled": filled(StaticCache, max_cache_len=12),
    "EncoderDecoderCache": lambda m: EncoderDecoderCache(DynamicCache(config=m.config), DynamicCache(config=m.config)),
    "subclass": lambda m: OwnCache(config=m.config),
    "sliding": lambda m: cache_utils.Cache(layers=[cache_utils.DynamicSlidingWindowLayer(sliding_window=5) for _ in range(2)]),
    "static sliding": lambda m: cache_utils.Cache(
        layers=[cache_utils.StaticSlidingWindowLayer(max_cache_len=12, sliding_window=5) for _ in range(2)]
    ),
    "lazy": lambda m: cache_utils.Cache(layer_class_to_replicate=cache_utils.DynamicLayer),
}  # fmt: skip
# what needs other packages or another device, or is a base of those above
LEFT_OUT = {"Cache", "QuantizedCache", "OffloadedCache", "OffloadedStaticCache", "OwnCache"}


def test_every_class_of_caches_is_tried():
    named = {n for n, c in vars(cache_utils).items() if isinstance(c, type) and issubclass(c, cache_utils.Cache)}
    tried = {"DynamicCache", "StaticCache", "EncoderDecoderCache"}
    aliases = {
        n for n in named if getattr(cache_utils, n).__name__ in tried or getattr(cache_utils, n).__mro__[1].__name__ in tried
    }
    assert named - tried - LEFT_OUT - aliases == set()


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("context", ("plain", "autocast bfloat16"))
def test_caches(implementation, context):
    bad = []
    for (name, cache), x in itertools.product(CACHES.items(), (None, lambda: torch.randn(B, 1, C))):

        def call(module, cache=cache, x=x):
            with CONTEXTS[context]():
                first = attend(None, cache, x=x)(module)
                past = cache(module)
                return first, [module(torch.randn(B, n, C), past)[0] for n in (3, 1, 2)]

        if problem := compare(attention_of(implementation), call, computed=COMPUTED[context]):
            bad.append(f"{name}, {'one token' if x else T}: {problem}")
    assert not bad, "\n".join(bad)


ARGUMENTS = {
    "is_causal": (True, False, None),
    "position_bias": (None, lambda: torch.randn(1, H, T, T)),
    "cache": (None, 3),
    "softcap": (None, 1.0),
    "output_attentions": (True, False, None),
    "dropout": (0.0,),
    "scaling": (2.0,),
    "use_cache": (True, False),
    "position_ids": (lambda: torch.arange(T)[None],),
    "num_items_in_batch": (3,),
    "module": (3,),
    "query": (3,),
    "unknown": (3,),
    "encoder_hidden_states": (lambda: torch.randn(B, 3, C),),
    "encoder_attention_mask": (lambda: torch.ones(B, 1, 1, 3),),
}


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_arguments_of_attention(implementation):
    bad = []
    for name, values in ARGUMENTS.items():
        for value in values:
            if problem := compare(attention_of(implementation), attend(**{name: value})):
                bad.append(f"{name}={value}: {problem}")
    shapes = ((B, 1, C), (0, T, C), (B, 0, C), (1, 1, C), (T, C), (C,), (B, 2, T, C), (B, T, C + 1))
    hiddens = {
        **{str(s): lambda s=s: torch.randn(s) for s in shapes},
        **{str(d): lambda d=d: torch.randn(B, T, C).to(d) for d in FLOATS},
        "transposed": lambda: torch.randn(T, B, C).transpose(0, 1),
        "by columns": lambda: torch.randn(B, C, T).mT,
        "expanded": lambda: torch.randn(1, T, C).expand(B, T, C).detach(),
        "subclass": lambda: torch.randn(B, T, C).as_subclass(Own),
        "meta": lambda: torch.randn(B, T, C, device="meta"),
    }  # fmt: skip
    for name, x in hiddens.items():
        if problem := compare(attention_of(implementation), attend(x=x)):
            bad.append(f"hidden_states {name}: {problem}")
    for name in ("vmap", "func.grad", "jvp", "dual"):
        x = torch.randn(B, T, C)
        way = {**WAYS, "vmap": lambda m, x: torch.func.vmap(m)(x[:, None])}[name]

        class First(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x)[0]

        if problem := compare(lambda: First(attention_of(implementation)()), lambda m, way=way, x=x: way(m, x)):
            bad.append(f"{name}: {problem}")
    assert not bad, "\n".join(bad)


def test_weights_of_eager_reach_a_hook():
    for when in ("before", "after"):
        seen = []

        def change(m, seen=seen):
            m.register_forward_hook(lambda m, a, out: seen.append(out[1]))

        assert compare(attention_of("eager"), lambda m: m(torch.ones(B, T, C))[1], change, when) is None
        assert len(seen) == 2 and all(isinstance(w, torch.Tensor) for w in seen)


# ---- GPT-2's MLP ----


def mlp_of(activation="gelu_new", dtype=F32):
    def make():
        module = modeling_gpt2.GPT2MLP(3 * N, config(activation_function=activation))
        for p in module.parameters():
            nn.init.normal_(p, 0.0, 0.3)
        return module.to(dtype)

    return make


def function_of(act, f):
    return lambda m: (setattr(m, "act", act()), setattr(m.act, "act", f))


ACTS = {
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    **{name: getattr(activations, name) for name in ("NewGELUActivation", "GELUActivation", "GELUTanh", "FastGELUActivation")},
    "in Python": lambda: activations.GELUActivation(True),
    "tanh in Python": lambda: activations.GELUTanh(True),
    "subclass": type("Mine", (activations.NewGELUActivation,), {"forward": lambda self, x: x * 2}),
}  # fmt: skip
MLP = {
    "c_fc": child("c_fc"),
    "c_proj": child("c_proj"),
    "dropout": dropouts("dropout"),
    "act": [
        *((f"act {name}", lambda m, make=make: setattr(m, "act", make())) for name, make in ACTS.items()),
        ("function", lambda m: (delattr(m, "act"), setattr(m, "act", torch.relu))),
        ("relu inside erf", function_of(activations.GELUActivation, torch.relu)),
        ("relu inside tanh", function_of(activations.GELUTanh, torch.relu)),
        *((what, change) for what, change in child("act") if "hooked" in what or "a forward" in what),
    ],
}


def test_every_attribute_that_the_mlp_reads_has_values():
    assert read_by(modeling_gpt2.GPT2MLP) - set(MLP) == set()
    # what is fused into it: of these, `child` gives values to each
    assert read_by(Conv1D, ("forward",)) == {"nf", "weight", "bias"}
    for cls, reads in (
        (activations.NewGELUActivation, set()),
        (activations.GELUTanh, {"act"}),
        (activations.GELUActivation, {"act"}),
    ):
        assert read_by(cls) == reads


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("activation", ("gelu_new", "gelu", "gelu_pytorch_tanh"))
def test_attributes_of_the_mlp(activation, when):
    def call(module):
        x = torch.randn(B, T, C).requires_grad_()
        return gradients(module, module(x), x)

    bad = []
    for name, change in [*itertools.chain(*MLP.values()), *FLAGS]:
        if problem := compare(mlp_of(activation), call, change, when, F32):
            bad.append(f"{name}: {problem}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("context", ("plain", "autocast bfloat16"))
def test_inputs_of_the_mlp(context):
    bad = []
    for (name, x), dtype in itertools.product(INPUTS.items(), FLOATS):
        # a dtype beside another of the parameters': for the plain layout
        if dtype != F32 and not name.startswith("torch."):
            continue

        def call(module, x=x):
            with CONTEXTS[context]():
                return call_on(x)(module)

        if problem := compare(lambda dtype=dtype: narrow(mlp_of(dtype=dtype)()), call, computed=COMPUTED[context]):
            bad.append(f"{name}, parameters {dtype}: {problem}")
    assert not bad, "\n".join(bad)


def narrow(mlp):
    """N wide, as INPUTS are."""
    mlp.c_fc.weight = nn.Parameter(mlp.c_fc.weight.detach()[:N].contiguous())
    mlp.c_proj.weight, mlp.c_proj.bias = (
        nn.Parameter(p.detach()[..., :N].contiguous()) for p in (mlp.c_proj.weight, mlp.c_proj.bias)
    )
    mlp.c_proj.nf = N
    return mlp


# ---- the loss ----


def lm():
    return GPT2LMHeadModel(config())


def mean_of_logits(logits, labels, **_):
    return logits.mean()


LOSS = {
    "loss_function": [
        ("own", lambda m: setattr(m, "loss_function", mean_of_logits)),
        ("theirs", lambda m: setattr(m, "loss_function", ForCausalLMLoss)),
        ("none", lambda m: setattr(m, "loss_function", None)),
        ("set and unset", lambda m: (setattr(m, "loss_function", mean_of_logits), delattr(m, "_loss_function"))),
        *sets("loss_type", "ForMaskedLM", "ForCausalLM", "ForSequenceClassification", "nonsense", None),
    ],
    "config": [(f"vocab_size {n}", lambda m, n=n: setattr(m.config, "vocab_size", n)) for n in (60, 122)],
    "transformer": [("hooked", lambda m: m.transformer.register_forward_hook(lambda m, a, o: None))],
    "lm_head": [
        ("double", lambda m: m.lm_head.register_forward_hook(lambda m, a, y: y.double())),
        ("untied", lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.ones_like(m.lm_head.weight)))),
        ("biased", lambda m: replaced("lm_head", lambda _: nn.Linear(C, 61))(m)),
    ],
}  # fmt: skip


def test_every_attribute_that_the_model_reads_for_its_loss_has_values():
    assert read_by(GPT2LMHeadModel, ("forward",)) - set(LOSS) == set()


@pytest.mark.parametrize("when", ("before", "after"))
def test_attributes_of_the_language_model(when):
    def call(model):
        torch.manual_seed(6)
        out = model(x, labels=x)
        return gradients(model, out.loss, None), out.logits

    x = torch.randint(0, 60, (B, T))
    bad = []
    for name, change in [*itertools.chain(*LOSS.values()), *FLAGS]:
        torch.manual_seed(4)
        if problem := compare(lm, call, change, when, BF16 if name == "half" else F32):
            bad.append(f"{name}: {problem}")
    assert not bad, "\n".join(bad)


V = 13
LABELS = {
    **{str(d): lambda d=d: torch.randint(0, V, (B, T)).to(d) for d in (torch.int64, torch.int32, torch.uint8, torch.bool, F32)},
    "some ignored": lambda: torch.randint(0, V, (B, T)).index_fill(1, torch.arange(3), -100),
    "all ignored": lambda: torch.full((B, T), -100),
    "one token short": lambda: torch.randint(0, V, (B, T - 1)),
    "one row": lambda: torch.randint(0, V, (T,)),
    "transposed": lambda: torch.randint(0, V, (T, B)).t(),
    "parameter": lambda: nn.Parameter(torch.randint(0, V, (B, T)), requires_grad=False),
    "subclass": lambda: torch.randint(0, V, (B, T)).as_subclass(Own),
    "none": lambda: None,
}  # fmt: skip
LOSS_OPTIONS = [
    {},
    *({"num_items_in_batch": n} for n in (7, 7.5, torch.tensor(7))),
    *({"ignore_index": i} for i in (5, -1, None, 2.0)),
    {"shift_labels": torch.arange(B * T).view(B, T) % V},
    {"shift_labels": (torch.arange(B * T) % V).view(T, B).t()},
    {"shift_labels": (torch.arange(B * T) % V).float().view(B, T)},
    {"weight": torch.ones(V)},
    {"label_smoothing": 0.1},
    {"reduction": "none"},
    *({"vocab_size": n} for n in (V + 1, -1, T * V)),
]


@pytest.mark.parametrize("context", ("plain", "autocast bfloat16"))
@pytest.mark.parametrize("dtype", (*FLOATS, torch.int64, torch.complex64), ids=str)
def test_losses(dtype, context):
    shapes = {
        "": lambda: torch.randn(B, T, V).to(dtype),
        "transposed": lambda: torch.randn(T, B, V).to(dtype).transpose(0, 1),
        "by columns": lambda: torch.randn(B, V, T).to(dtype).mT,
        "one token": lambda: torch.randn(B, 1, V).to(dtype),
        "no token": lambda: torch.randn(B, 0, V).to(dtype),
        "two dimensions": lambda: torch.randn(B * T, V).to(dtype),
        "subclass": lambda: torch.randn(B, T, V).to(dtype).as_subclass(Own),
    }
    bad = []
    for (shape, make), (label, labels), options in itertools.product(shapes.items(), LABELS.items(), LOSS_OPTIONS):
        # one at a time
        if sum(map(bool, (options, label != "torch.int64", shape))) > 1:
            continue

        def run(f, make=make, labels=labels, options=options):
            def call():
                x = make()
                x = x.requires_grad_() if x.is_floating_point() else x
                with CONTEXTS[context]():
                    loss = f(x, labels(), **{"vocab_size": V, **options})
                return gradients(nn.Identity(), loss, x)

            return outcome(call)

        problem = difference(run(ForCausalLMLoss), run(transformers_models.causal_lm_loss), F32)
        # a label out of range: the op's own error, which names its row
        if problem and problem != "IndexError became RuntimeError":
            bad.append(f"logits {shape or 'plain'}, labels {label}, {options}: {problem}")
    assert not bad, "\n".join(bad)


# ---- hooks ----

HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(lambda m, *_: f(m)),
    "forward_pre": lambda m, f: m.register_forward_pre_hook(lambda m, *_: f(m)),
    "full_backward": lambda m, f: m.register_full_backward_hook(lambda m, *_: f(m)),
    "full_backward_pre": lambda m, f: m.register_full_backward_pre_hook(lambda m, *_: f(m)),
}
GLOBAL_HOOKS = {
    "forward": lambda f: nn.modules.module.register_module_forward_hook(lambda m, *_: f(m)),
    "forward_pre": lambda f: nn.modules.module.register_module_forward_pre_hook(lambda m, *_: f(m)),
    "full_backward": lambda f: nn.modules.module.register_module_full_backward_hook(lambda m, *_: f(m)),
    "full_backward_pre": lambda f: nn.modules.module.register_module_full_backward_pre_hook(lambda m, *_: f(m)),
}


def fired(model, register, when):
    """Paths of the modules whose hooks fired in a step, in order."""
    names, seen, x = {m: path for path, m in model.named_modules()}, [], torch.arange(5)[None]
    if when == "after":
        patch(model)
    handle = register(lambda m: seen.append(names[m]))
    if when == "before":
        patch(model)
    model(x, labels=x).loss.backward()
    handle.remove()
    return seen


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_hooks_on_all_modules_see_every_module(kind, implementation, when):
    model = GPT2LMHeadModel(config(attn_implementation=implementation)).train()
    want = fired(copy.deepcopy(model), GLOBAL_HOOKS[kind], None)
    assert "transformer.h.0.mlp.act" in want
    assert fired(model, GLOBAL_HOOKS[kind], when) == want


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_each_module_fire(kind, when):
    model = GPT2LMHeadModel(config(n_layer=1)).train()
    for path, _ in model.named_modules():

        def register(module, path=path):
            return lambda f: HOOKS[kind](module.get_submodule(path), f)

        a, b = copy.deepcopy(model), copy.deepcopy(model)
        assert fired(a, register(a), None) == fired(b, register(b), when), path
