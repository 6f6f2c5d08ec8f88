"""torch.nn.functional's functions over our kernels, and where patch puts them: in every method that names one."""

import copy
import pickle
import types

import namesakes
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import gelu

import gpt_kernels
from gpt_kernels import functional, patch, unpatch

OPS = {"attention", "layer_norm", "gelu", "rms_norm", "softmax", "dropout", "cross_entropy"}


def ran(call):
    """The ops of ours that a call runs."""
    with torch.profiler.profile() as profile:
        result = call()
    names = {event.name for event in profile.events()}
    return result, {op for op in OPS if any(f"gpt_kernels::{op}_fwd" in name for name in names)}


def test_every_call_means_what_torchs_means():
    """Of the namesakes' sweep, which has forms, ranks, dtypes, autocast, layouts and errors: no difference at all."""
    calls = namesakes.calls()
    assert len(calls) > 500
    if torch.__version__ >= "2.14":  # whose own ends the process at this one
        calls = [call for call in calls if call.code != "f(t(3, 4, 8), t(3, 5, 8), t(3, 6, 8))"]
    ours = types.SimpleNamespace(**vars(functional) | {"softmax": functional.torch_softmax})  # which the sweep is of
    differ = {call: d for call in calls if (d := namesakes.difference(call, ours)) is not None}
    assert not differ, "\n".join(f"{call.function} {call.code}: torch {a}, ours {b}" for call, (a, b) in differ.items())


@pytest.mark.parametrize("learned", (False, True))
@pytest.mark.parametrize("hidden", (False, True))
def test_a_row_hidden_by_numbers_is_what_torch_makes_of_it(hidden, learned):
    """A mask of the lowest number instead of -inf: such a row is the mean of all values."""
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), lowest)
    if hidden:
        mask[2] = lowest
    tensors = [torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3)] + [mask.requires_grad_(learned)]
    wanted = [t for t in tensors if t.requires_grad]
    theirs, (ours, ops) = (
        torch.autograd.grad(F.scaled_dot_product_attention(*tensors).square().sum(), wanted),
        ran(lambda: torch.autograd.grad(functional.scaled_dot_product_attention(*tensors).square().sum(), wanted)),
    )
    assert ops == (set() if hidden and learned else {"attention"})
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtypes", ((torch.float32, torch.float32, torch.bfloat16), (torch.float32,) * 3, (torch.bfloat16,) * 3)
)
def test_attention_under_autocast_of_mixed_dtypes(dtypes):
    """Positions in float32 make queries and keys float32: autocast casts them back."""
    q, k, v = (torch.randn(2, 3, 9, 8).to(dtype).requires_grad_() for dtype in dtypes)

    def run(function):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(q, k, v, is_causal=True)
        return y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))

    expected, (found, ops) = run(F.scaled_dot_product_attention), ran(lambda: run(functional.scaled_dot_product_attention))
    assert ops == {"attention"}
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


# ---- in a user's class ----


class Everything(nn.Module):
    """Each of the functions, named in another way, in forward and beside it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.p = 0.25

    def attend(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    def forward(self, x, *, scale=1.0):
        x = F.layer_norm(x, (8,), self.weight, self.bias) * scale
        x = gelu(self.attend(x[:, None])[:, 0]) + nn.functional.rms_norm(x, [8], eps=1e-6)
        return F.dropout(torch.softmax(x, -1), self.p, self.training)

    def training_step(self, batch, index=0):
        x, target = batch
        loss = nn.CrossEntropyLoss(ignore_index=-1)
        return F.cross_entropy(self(x).flatten(0, 1), target) + loss(self(x).flatten(0, 1), target)


def everything():
    torch.manual_seed(0)
    return Everything().eval(), (torch.randn(2, 5, 8), torch.tensor([1, 2, -1, 3, 4, 5, 6, 7, 0, 1]))


def test_a_class_that_names_torchs_functions():
    module, batch = everything()
    x, target = batch
    batch = (x, target.clamp(min=0))
    expected, none = ran(lambda: module.training_step(batch))
    assert not none
    plan = patch(module)
    assert set(plan.rows[0].op.split("+")) == OPS and "torch's functions over ours" in plan.rows[0].why
    found, ops = ran(lambda: module.training_step(batch))
    torch.testing.assert_close(found, expected)
    assert ops == OPS - {"dropout"}
    module.train()
    assert "dropout" in ran(lambda: module(x))[1]
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for one in (module, *copies):
        one.eval()
        torch.testing.assert_close(one.training_step(batch), expected)
        assert unpatch(one) == 1 and type(one) is Everything and not ran(lambda one=one: one.training_step(batch))[1]


def test_gradients_and_a_compiler():
    module, (x, target) = everything()
    target = target.clamp(min=0)

    def gradients(call):
        x_ = x.clone().requires_grad_()
        return torch.autograd.grad(call((x_, target)), (x_, *module.parameters()))

    expected = gradients(module.training_step)
    with gpt_kernels.patched(module):
        for call in (module.training_step, torch.compile(module.training_step, backend="aot_eager", fullgraph=True)):
            for a, b in zip(gradients(call), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ("the function", "the module's name"))
def test_what_somebody_puts_in_their_place_later_is_theirs(where, monkeypatch):
    module, (x, _) = everything()
    patch(module)
    called = []

    def theirs(*args, **kwargs):
        called.append(1)
        return torch.layer_norm(*args, **kwargs)

    if where == "the function":
        monkeypatch.setattr(F, "layer_norm", theirs)
    else:
        monkeypatch.setitem(globals(), "F", types.SimpleNamespace(layer_norm=theirs, dropout=F.dropout))
    module(x)
    assert called


def test_ops_without_a_kernel_are_torchs(monkeypatch):
    monkeypatch.setitem(patch.__globals__, "_no_kernel", lambda op, key: "none" if op == "gelu_fwd" else None)
    module, _ = everything()
    assert set(patch(module).rows[0].op.split("+")) == OPS - {"gelu"}


class Criterion(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.weights, self.loss = nn.Softmax(-1), nn.CrossEntropyLoss(**options)

    def forward(self, x, target):
        return self.loss(self.weights(x), target)


@pytest.mark.parametrize(
    "options", ({}, {"ignore_index": 2, "reduction": "sum"}, {"weight": torch.rand(8)}, {"label_smoothing": 0.1})
)
def test_losses_and_softmax_as_modules(options):
    module, x, target = Criterion(**options), torch.randn(5, 8, requires_grad=True), torch.tensor([0, 1, 2, 2, 7])
    expected = module(x, target)
    gradient = torch.autograd.grad(expected, x)[0]
    plan = patch(module)
    assert [row.op for row in plan.rows] == [None, "softmax", "cross_entropy"]
    found, ops = ran(lambda: module(x, target))
    assert ops == {"softmax", "cross_entropy"} - ({"cross_entropy"} if "weight" in options else set())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], gradient)


# ---- torch's own attention and transformer layers ----

B, S, E = 2, 7, 32
MHA = (
    {}, {"bias": False}, {"batch_first": True}, {"kdim": 16, "vdim": 24}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"dropout": 0.1},
)  # fmt: skip
PADDING = torch.zeros(B, S, dtype=torch.bool).index_fill(1, torch.tensor([5, 6]), True)
CALLS = (
    {}, {"key_padding_mask": PADDING}, {"attn_mask": torch.ones(S, S).triu(1).bool()}, {"need_weights": True},
    {"attn_mask": torch.randn(4 * B, S, S)}, {"attn_mask": torch.ones(S, S).triu(1).bool(), "is_causal": True},
    {"key_padding_mask": PADDING.float() * -1e9, "attn_mask": torch.randn(S, S)},
)  # fmt: skip


@pytest.mark.parametrize("options", MHA, ids=str)
def test_multihead_attention(options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, 4, **options).eval()
    batch_first = options.get("batch_first", False)
    q, k, v = (
        torch.randn(*((B, S) if batch_first else (S, B)), n) for n in (E, options.get("kdim", E), options.get("vdim", E))
    )
    for call in CALLS:
        call = {"need_weights": False} | call

        def run(call=call):
            q_ = q.clone().requires_grad_()
            y, weights = module(q_, k, v, **call)
            wanted = [q_, *(p for p in module.parameters())]
            return y.detach(), *([] if weights is None else [weights]), *torch.autograd.grad(y.square().sum(), wanted)

        expected = run()
        with gpt_kernels.patched(module) as plan:
            assert plan.rows[0].op == "attention"
            found, ops = ran(run)
        assert ops == (set() if call["need_weights"] else {"attention"}), call
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_torchs_attention_calls_may_be_replaced(monkeypatch):
    module, x = nn.MultiheadAttention(E, 4).eval(), torch.randn(S, B, E)
    called = []
    with gpt_kernels.patched(module):
        for name in ("linear", "scaled_dot_product_attention", "multi_head_attention_forward"):
            own = getattr(F, name)
            monkeypatch.setattr(F, name, lambda *args, own=own, name=name, **more: called.append(name) or own(*args, **more))
            module(x, x, x, need_weights=False)
            assert name in called
            monkeypatch.undo()


@pytest.mark.parametrize("act", ("gelu", nn.GELU("tanh"), F.relu), ids=("gelu", "GELU", "relu"))
@pytest.mark.parametrize("cls", (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
def test_transformer_layers(cls, act):
    torch.manual_seed(0)
    layer, x = cls(E, 4, 48, 0.0, act), torch.randn(S, B, E, requires_grad=True)
    given = (x,) if cls is nn.TransformerEncoderLayer else (x, torch.randn(5, B, E))

    def run():
        y = layer(*given)
        return y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))

    expected = run()
    plan = patch(layer)
    found, ops = ran(run)
    assert ops == {"attention", "layer_norm"} | ({"gelu"} if act is not F.relu else set())
    assert plan.rows[0].op == (None if act is F.relu else "gelu")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    hooked = []
    layer.linear1.register_forward_hook(lambda *_: hooked.append(1))
    torch.testing.assert_close(layer(*given), expected[0])
    assert hooked


# ---- globals of a user's module ----

FACTOR, calls = 2.0, 0


class OfGlobals(nn.Module):
    """Reads a number that may change."""

    def forward(self, x):
        return F.gelu(x) * FACTOR


class Counting(nn.Module):
    def forward(self, x):
        global calls
        calls += 1
        return F.gelu(x)


class Later(nn.Module):
    def forward(self, x):
        return F.gelu(x) * NOT_YET  # noqa: F821


class Assigning(nn.Module):
    def forward(self, x):
        torch.gpt_kernels_test = x.shape[0]
        return torch.softmax(x, -1) + F.gelu(x)


@pytest.mark.parametrize("compiled", (False, True))
def test_a_number_that_changes_is_seen(compiled, monkeypatch):
    module, x = OfGlobals(), torch.randn(3, 8)
    expected = module(x)
    with gpt_kernels.patched(module) as plan:
        assert plan.rows[0].op == "gelu"
        call = torch.compile(module, backend="eager") if compiled else module
        torch.testing.assert_close(call(x), expected)
        monkeypatch.setitem(globals(), "FACTOR", 3.0)
        torch.testing.assert_close(call(x), expected * 1.5)


def test_who_writes_globals_or_reads_those_to_come_is_kept():
    x = torch.randn(3, 8)
    for module, why in ((Counting(), "writes"), (Later(), "no replacement")):
        (row,) = patch(module).rows
        assert row.op is None and why in row.why, row
    module = Counting()
    before = calls
    module(x)
    assert calls == before + 1


def test_an_attribute_of_torch_is_set_in_torch(monkeypatch):
    monkeypatch.setattr(torch, "gpt_kernels_test", 0, raising=False)
    module = Assigning()
    with gpt_kernels.patched(module) as plan:
        assert plan.rows[0].op == "gelu+softmax"
        module(torch.randn(3, 8))
    assert torch.gpt_kernels_test == 3
