"""accelerate(): torch's own functions on our kernels, under ATen's contract; what ours do not serve, and the way back."""

import contextlib
import copy
import importlib
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from op_checks import forward_backward, is_float
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpt_kernels
from gpt_kernels import cases, library
from gpt_kernels.accelerate import SLOTS, accelerate, accelerated, calls, decelerate, record, recorded, state
from gpt_kernels.accuracy import FORWARD, INPUT_GRADIENT, SAME_FORMULA, WEIGHT_GRADIENT, assert_close_to_truth, misplaced

pytestmark = pytest.mark.skipif(library.cpu is None, reason="the C++ kernels were not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
named = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
EVERY = tuple(slot for slots in SLOTS.values() for slot in slots)


@pytest.fixture(autouse=True)
def as_before():
    yield
    assert not state(), "a test left the slots filled"


def served(slots=EVERY):
    return {slot: calls(slot) for slot in slots}


@contextlib.contextmanager
def ours_alone(*slots, torchs=()):
    """Each of `slots` serves at least one call inside, and hands none back but those in torchs."""
    before = served()
    yield
    told = {s: (a - before[s][0], t - before[s][1]) for s, (a, t) in served().items()}
    assert all(told[s][0] > 0 for s in slots), f"not ours: {told}"
    assert all(t == 0 for s, (_, t) in told.items() if s not in torchs), f"handed back: {told}"


# ---- right ----

# eager of these ops is one call of torch's, which a slot serves
CALLS = {"layer_norm": 2, "rms_norm": 2, "softmax": 2, "gelu": 2, "cross_entropy": 1}
PLAIN = {  # the examples whose eager is nothing but the op
    "softmax": lambda e: len(e.args) == 1,
    "gelu": lambda e: len(e.args) == 1,
    "cross_entropy": lambda e: not any(word in e.what for word in ("lse_square_scale", "logit_softcap", "z-loss", "cap")),
}


def examples(op, dtype):
    for example in [*cases.of(op).small(dtype), *cases.of(op).odd(dtype, False)]:
        if PLAIN.get(op, lambda e: True)(example):
            yield example


@named
@pytest.mark.parametrize("op", CALLS)
def test_every_case_is_right_against_float64(op, dtype):
    factors, count = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT), 0
    for example in examples(op, dtype):
        torch.manual_seed(0)
        with torch.no_grad():
            dy = torch.randn(example.eager(*example.args).shape).to(dtype)
        with accelerated(ops=(op,)):
            actual = forward_backward(example.eager, example.args, dy)
        own, truth = (forward_backward(example.eager, example.args, dy, to) for to in (None, torch.float64))
        for i, (a, e, t) in enumerate(zip(actual, own, truth, strict=True)):
            assert (a.dtype, a.shape) == (e.dtype, e.shape), example.what
            if e.dtype == dtype or e.dtype == torch.float32:
                assert_close_to_truth(a, t.double(), e, factors[min(i, 2)], f"{op} {example.what} {i}")
        count += 1
    assert count > 1


@named
def test_what_is_not_finite_stands_where_torch_has_it(dtype):
    x = torch.randn(6, 40)
    x[0, 3], x[1, 3], x[2, 3], x[3], x[4] = torch.nan, torch.inf, -torch.inf, -torch.inf, torch.inf
    # gelu of +inf: some machines' eager erf makes NaN of it and others' inf
    gelu = lambda x: F.gelu(x.clamp(max=6e4))  # noqa: E731
    for f in (lambda x: x.softmax(-1), lambda x: F.layer_norm(x, (40,)), lambda x: F.rms_norm(x, (40,)), gelu):
        with accelerated():
            ours = f(x.to(dtype))
        theirs = f(x.to(dtype)).double()
        truth = f(x.double())
        assert misplaced(ours.double(), torch.where(theirs.isnan(), theirs, truth), theirs) is None
    assert x.softmax(-1)[3].isnan().all()


def heads(layout, B=2, H=4, T=19, D=16, dtype=torch.float32):
    if layout == "heads first":
        return torch.randn(B, H, T, D).to(dtype)
    if layout == "tokens first":
        return torch.randn(B, T, H, D).to(dtype).transpose(1, 2)
    if layout == "packed":
        return torch.randn(B, T, 3, H, D).to(dtype)[:, :, 1].transpose(1, 2)
    return torch.randn(H, B, T, D).to(dtype).transpose(0, 1)


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "boolean mask": {"attn_mask": torch.rand(19, 19, generator=torch.Generator().manual_seed(1)) > 0.3},
    "additive mask": {"attn_mask": torch.randn(2, 1, 19, 19, generator=torch.Generator().manual_seed(1))},
    "hidden row": {"attn_mask": torch.arange(19)[:, None] > torch.arange(19)},
}


@named
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "packed", "heads outside"])
@pytest.mark.parametrize("how", ATTENTION)
def test_attention(how, layout, dtype):
    torch.manual_seed(0)
    q, k, v = (heads(layout, dtype=dtype) for _ in range(3))
    more = {n: m.to(dtype) if is_float(m) else m for n, m in ATTENTION[how].items()}

    def f(q, k, v):
        own = {n: m.to(q.dtype) if is_float(m) else m for n, m in more.items()}
        return F.scaled_dot_product_attention(q, k, v, **own)

    with accelerated():
        actual = forward_backward(f, (q, k, v))
    own, truth = (forward_backward(f, (q, k, v), dtype=to) for to in (None, torch.float64))
    for a, e, t in zip(actual, own, truth, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        assert_close_to_truth(a, t, e, INPUT_GRADIENT)


def test_grouped_heads_broadcasting_dropout_and_a_masks_gradient():
    q, k, v = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)

    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def g(q, bias):
        return F.scaled_dot_product_attention(q, q, q, bias)

    for call, args in ((f, (q, k, v)), (g, (torch.randn(3, 4, 6, 8), torch.randn(4, 6, 6))), (g, (q[0], torch.zeros(1, 5, 5)))):
        with accelerated(), ours_alone():
            actual = forward_backward(call, args)
        for a, e in zip(actual, forward_backward(call, args), strict=True):
            torch.testing.assert_close(a, e, atol=2e-6, rtol=1e-4)
    x = torch.randn(2, 4, 64, 16)
    with accelerated(), ours_alone("_scaled_dot_product_attention_math"):
        torch.manual_seed(3)
        a = F.scaled_dot_product_attention(x, x, torch.ones_like(x), dropout_p=0.5)
        torch.manual_seed(3)
        assert torch.equal(a, F.scaled_dot_product_attention(x, x, torch.ones_like(x), dropout_p=0.5))
    assert abs(a.mean().item() - 1) < 0.05 and a.std() > 0.01


# ---- ATen's contract: shapes, dtypes, strides, output masks, as the stand-ins of a compiler have them ----


def contract(dtype):
    x, w = torch.randn(3, 5, 16).to(dtype), torch.randn(16).to(dtype)
    w2 = torch.randn(5, 16).to(dtype)
    aten = torch.ops.aten
    across = torch.randn(5, 3, 16).to(dtype).transpose(0, 1)
    for t in (x, across):
        yield aten.native_layer_norm.default, (t, [16], w, w, 1e-5)
        yield aten.native_layer_norm.default, (t, [16], None, None, 1e-5)
        yield aten.native_layer_norm.default, (t, [5, 16], w2, None, 1e-5)
        yield aten._softmax.default, (t, -1, False)
        yield aten.gelu.default, (t,)
    if dtype in (torch.bfloat16, torch.float16):
        yield aten.native_layer_norm.default, (x, [16], w.float(), w.float(), 1e-5)
    y, mean, rstd = torch.native_layer_norm(x, [16], w, w, 1e-5)
    for mask in ([True, True, True], [True, False, False], [False, True, True]):
        yield aten.native_layer_norm_backward.default, (y, x, [16], mean, rstd, w, w, mask)
    yield aten._softmax_backward_data.default, (y, y, 2, dtype)
    yield aten.gelu_backward.default, (y, x)
    yield aten.native_dropout.default, (x, 0.5, True)
    for layout in ("heads first", "tokens first"):
        q = heads(layout, dtype=dtype)
        yield aten._scaled_dot_product_flash_attention_for_cpu.default, (q, q, q)
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True)
        yield aten._scaled_dot_product_flash_attention_for_cpu_backward.default, (o, q, q, q, o, lse, 0.0, True)


@named
def test_contract(dtype):
    def facts(results):
        results = results if isinstance(results, (tuple, list)) else (results,)
        return [None if t is None else (tuple(t.shape), t.dtype, [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1])
                for t in results]  # fmt: skip

    for op, args in contract(dtype):
        own = op(*args)
        with accelerated(), ours_alone(op._schema.name.removeprefix("aten::")):
            ours = op(*args)
        assert facts(ours) == facts(own), (op, [a.stride() for a in args if isinstance(a, torch.Tensor)])
        if "dropout" not in str(op):
            for a, e in zip(
                ours if isinstance(ours, tuple) else (ours,), own if isinstance(own, tuple) else (own,), strict=True
            ):
                if a is not None and a.dtype.is_floating_point:
                    apart = SAME_FORMULA[torch.bfloat16 if a.dtype == torch.bfloat16 else dtype]
                    torch.testing.assert_close(a, e, atol=4 * apart, rtol=4 * apart)


@named
def test_rms_norm_s_contract_is_the_compositions(dtype):
    x, w = torch.randn(4, 6, 16).to(dtype), torch.randn(16).to(dtype)
    for args in ((x, [16], w, None), (x, [16], None, 1e-3), (x, [6, 16], torch.randn(6, 16).to(dtype), 1e-6)):
        own = torch._fused_rms_norm(*args)
        with accelerated(), ours_alone("_fused_rms_norm"):
            ours = torch._fused_rms_norm(*args)
        for a, e in zip(ours, own, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())
            torch.testing.assert_close(a, e, atol=4 * SAME_FORMULA[dtype], rtol=4 * SAME_FORMULA[dtype])


# ---- what is not ours goes to the kernel that stood there ----

X = torch.randn(4, 6, 8)
BACK = {
    "softmax over another dimension": ("_softmax", lambda: X.softmax(0)),
    "layouts that differ": (
        "gelu_backward",
        lambda: torch.ops.aten.gelu_backward(X.permute(2, 0, 1), X.permute(2, 0, 1).contiguous()),
    ),
    "no elements": ("native_layer_norm", lambda: F.layer_norm(X[:0], (8,))),
    "parameters by stride": ("native_layer_norm", lambda: F.layer_norm(X, (8,), X[0, 0].repeat(2)[::2])),
    "rms norm across": ("_fused_rms_norm", lambda: F.rms_norm(X.transpose(0, 2), (4,))),
    "class weights": ("cross_entropy_loss", lambda: F.cross_entropy(X[0], torch.arange(6), weight=torch.ones(8))),
    "probabilities": ("cross_entropy_loss", lambda: F.cross_entropy(X[0], X[1].abs())),
    "classes in the second dimension": ("cross_entropy_loss", lambda: F.cross_entropy(X, torch.zeros(4, 8, dtype=torch.long))),
    "a rare dropout": ("dropout", lambda: F.dropout(torch.ones(200, 200), 1e-5).sum() * 0),
}  # fmt: skip


@pytest.mark.parametrize("what", BACK)
def test_handed_back(what):
    slot, call = BACK[what]
    own = call()
    before = calls(slot)[1]
    with accelerated():
        ours = call()
    assert calls(slot)[1] == before + 1
    assert torch.equal(ours, own) and ours.stride() == own.stride()


def test_gradients_of_what_is_handed_back():
    w = torch.randn(4)
    for f, args in (
        (lambda x: F.rms_norm(x, (4,)), (X.transpose(0, 2),)),
        (lambda x, w: F.rms_norm(x, (4,), w), (X.transpose(0, 2), w)),
        (lambda x: x.softmax(0), (X,)),
        (lambda x, w: F.layer_norm(x, (4,), w), (X.transpose(0, 2), w.repeat(2)[::2])),
    ):
        with accelerated():
            actual = forward_backward(f, args)
        for a, e in zip(actual, forward_backward(f, args), strict=True):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


def test_errors_are_torchs_words():
    wrong = {
        "gelu": lambda: F.gelu(torch.arange(4)),
        "layer_norm": lambda: F.layer_norm(X, (8,), torch.ones(7)),
        "softmax": lambda: X.softmax(7),
        "few targets": lambda: F.cross_entropy(X[0], torch.full((6,), 9)),
        "many targets": lambda: F.cross_entropy(torch.randn(30000, 9), torch.full((30000,), 9)),
        "attention": lambda: F.scaled_dot_product_attention(X, X, X[..., :3, :]),
        "dropout": lambda: torch.dropout(X, 1.5, True),
    }
    for what, call in wrong.items():
        with pytest.raises(Exception) as own:
            call()
        with accelerated(), pytest.raises((RuntimeError, IndexError)) as ours:
            call()
        assert str(own.value).splitlines()[0] in str(ours.value), what


# ---- in and out ----


def dump():
    return {slot: torch._C._dispatch_dump_table(f"aten::{slot}") for slot in EVERY}


def test_the_very_kernels_stand_again():
    x, before = torch.randn(7, 33), dump()
    own = [x.softmax(-1), F.gelu(x), F.layer_norm(x, (33,))]
    for ops in (None, ("gelu",), ("softmax", "attention")):
        accelerate(ops=ops)
        assert dump() != before
        decelerate()
        assert dump() == before
    assert all(torch.equal(a, b) for a, b in zip(own, [x.softmax(-1), F.gelu(x), F.layer_norm(x, (33,))], strict=True))


def test_ops_choose_and_blocks_nest():
    with accelerated(ops=("gelu",)):
        assert list(state()) == ["gelu"]
        with accelerated(ops="softmax"):
            assert list(state()) == ["softmax", "gelu"]
            decelerate(ops=("gelu",))
            assert list(state()) == ["softmax"]
        assert list(state()) == ["gelu"]
        with ours_alone("gelu"):
            F.gelu(X), X.softmax(-1)
    with pytest.raises(ValueError, match="accelerate: unknown op 'conv'"):
        accelerate(ops=("conv",))
    with pytest.raises(ValueError, match="decelerate: unknown op 'conv'"):
        decelerate(ops=("conv",))


def test_it_is_loud():
    assert gpt_kernels.info()["accelerate"] == {}
    with accelerated(ops=("layer_norm",)):
        assert "process-wide: native_layer_norm" in gpt_kernels.where("layer_norm_fwd")["CPU"].reason
        assert "ATen" not in gpt_kernels.where("gelu_fwd")["CPU"].reason
        assert list(gpt_kernels.info()["accelerate"]) == ["layer_norm"]
    assert "ATen" not in gpt_kernels.where("layer_norm_fwd")["CPU"].reason


QUIET = """
import torch, gpt_kernels
gpt_kernels.accelerate()
x = torch.randn(4, 8, requires_grad=True)
torch.nn.functional.layer_norm(x, (8,)).softmax(-1).sum().backward()
"""


def test_nothing_is_said_on_stderr():
    run = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stderr == "" and run.stdout == ""


def test_kinds_of_calls_are_recorded_on_request():
    saved = importlib.import_module("gpt_kernels.saved")
    x = torch.randn(3, 40, requires_grad=True)
    with accelerated():
        F.gelu(x)
        record(True)
        F.gelu(x).sum().backward()
        F.layer_norm(x, (40,), torch.ones(40))
        F.dropout(torch.ones(300, 300), 0.25)
        F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
        kinds = recorded()
        record(False)
        F.gelu(x)
    assert recorded() == {} and kinds == {
        "gelu float32 3x40 none": 1, "gelu_backward float32 3x40 none": 1, "native_layer_norm float32 3x40 1 float32 -": 1,
        "dropout float32 300x300 0.25 -": 1,
        "_scaled_dot_product_flash_attention_for_cpu float32 1x1x3x40 float32 1x1x3x40 -": 1,
    }  # fmt: skip
    saved.SECONDS, saved.ROUNDS = 0.0, (1, 1)
    rows = saved.saved(kinds)
    assert len(rows) == len(kinds) and all(row.ours and row.torchs for row in rows)


def test_every_slot_can_be_timed_again():
    assert set(importlib.import_module("gpt_kernels.saved")._OF) == set(EVERY)


# ---- with the rest of torch ----


def model(dropout=0.0):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout, activation="gelu", batch_first=True, norm_first=True)
    return nn.Sequential(layer, nn.RMSNorm(32), nn.Linear(32, 11))


def step(net, x, target):
    net.zero_grad()
    loss = F.cross_entropy(net(x).flatten(0, 1), target)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


BATCH = torch.randn(8, 24, 32, generator=torch.Generator().manual_seed(5)), torch.arange(192) % 11


def close(actual, expected, tol=2e-5):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=tol, rtol=1e-3)


def test_a_training_step():
    net = model()
    own = step(net, *BATCH)
    both = ("native_layer_norm", "_fused_rms_norm", "gelu", "_scaled_dot_product_flash_attention_for_cpu")
    with accelerated(), ours_alone(*both, *(f"{slot}_backward" for slot in both), torchs=("cross_entropy_loss",)):
        close(step(net, *BATCH), own)


def test_autocast():
    net = model()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = net(BATCH[0])
            return (
                y,
                F.cross_entropy(y.flatten(0, 1), BATCH[1]),
                F.cross_entropy(y.flatten(0, 1).repeat(20, 1), BATCH[1].repeat(20)),
            )

    own = run()
    with accelerated():
        ours = run()
    assert [t.dtype for t in ours] == [t.dtype for t in own]
    close([t.float() for t in ours], [t.float() for t in own], 5e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode):
    net = model(0.5).eval()
    with mode():
        own = net(BATCH[0])
        with accelerated():
            ours = net(BATCH[0])
            again = F.dropout(BATCH[0], 0.5, False)
            dropped = F.dropout(torch.ones(300, 300), 0.5)
            loss = F.cross_entropy(torch.randn(4000, 70), torch.arange(4000) % 70)
    close([ours], [own])
    assert again is BATCH[0] and set(dropped.unique().tolist()) == {0.0, 2.0} and loss.dim() == 0


@pytest.mark.parametrize("rows", [4, 400])  # with a stored mask, and without
def test_checkpointing_and_dropout_s_random_state(rows):
    x = torch.ones(rows, 512, requires_grad=True)
    with accelerated():
        y = checkpoint(lambda x: F.dropout(F.gelu(x), 0.5), x, use_reentrant=False)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad == 0, y == 0)


def test_an_exception_of_a_hook_passes():
    """Checkpointing ends a recomputation by one."""

    class Stop(Exception):
        pass

    def stop(t):
        raise Stop

    x = torch.ones(400, 400, requires_grad=True)
    mask = torch.ones(400, 400, dtype=torch.bool)
    with accelerated():
        for f in (
            lambda: F.dropout(x, 0.5),
            lambda: F.dropout(x[:4], 0.5),
            lambda: F.cross_entropy(x, torch.arange(400)),
            lambda: F.layer_norm(x, (400,)),
            lambda: F.scaled_dot_product_attention(x[:, :64], x[:, :64], x[:, :64], mask, dropout_p=0.1),
        ):
            with torch.autograd.graph.saved_tensors_hooks(stop, lambda t: t), pytest.raises(Stop):
                f()


def test_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        own = step(model(), *BATCH)
        with accelerated():
            close(step(nn.parallel.DistributedDataParallel(model()), *BATCH), own)
    finally:
        dist.destroy_process_group()


TRANSFORMED = {
    "layer_norm": lambda x: F.layer_norm(x, (6,), torch.arange(6.0), torch.ones(6)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), torch.arange(6.0)),
    "softmax": lambda x: x.softmax(-1),
    "gelu": F.gelu,
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0],
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(4, dtype=torch.bool)),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.arange(4)),
    "a large cross_entropy": lambda x: F.cross_entropy(x.repeat(6000, 1), torch.arange(24000) % 6),
}


@pytest.mark.parametrize("op", TRANSFORMED)
def test_torch_func_has_torchs_own_rules(op):
    f, x, v = TRANSFORMED[op], torch.randn(3, 4, 6), torch.randn(4, 6)

    def results():
        def loss(x):
            return (f(x) * torch.linspace(1, 2, f(x).numel()).view(f(x).shape)).sum()

        found = [torch.func.vmap(f)(x), torch.func.grad(loss)(x[0]), torch.func.vmap(torch.func.grad(loss))(x)]
        if "attention" not in op or op == "masked attention":  # torch's flash attention has no forward derivative
            found.append(torch.func.jvp(loss, (x[0],), (v,))[1])
        return found

    own = results()
    with accelerated():
        close(results(), own)


@pytest.mark.parametrize("op", [op for op in TRANSFORMED if op != "attention"])  # torch's flash attention has no second one
def test_second_derivatives(op):
    f, x = TRANSFORMED[op], torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    double = f

    if op in ("layer_norm", "rms_norm"):
        w = torch.randn(6, dtype=torch.float64, requires_grad=True)
        norm = {"layer_norm": lambda x, w: F.layer_norm(x, (6,), w), "rms_norm": lambda x, w: F.rms_norm(x, (6,), w)}[op]
        with accelerated():
            assert torch.autograd.gradgradcheck(norm, (x, w))
        return
    if op == "a large cross_entropy":

        def double(x):
            return F.cross_entropy(x.repeat(6000, 1), torch.arange(24000) % 6)

    with accelerated():
        assert torch.autograd.gradgradcheck(double, (x,))


def test_threads_and_switching_meanwhile():
    x, errors, stop = torch.randn(5, 64, requires_grad=True), [], threading.Event()
    own = forward_backward(lambda x: F.layer_norm(x, (64,)).softmax(-1), (x,))

    def work():
        while not stop.is_set():
            try:
                close(forward_backward(lambda x: F.layer_norm(x, (64,)).softmax(-1), (x,)), own)
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for _ in range(30):
        with accelerated():
            F.gelu(x)
    stop.set()
    for t in threads:
        t.join()
    assert not errors, errors[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process():
    with accelerated(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        F.gelu(X)
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            ok = torch.allclose(F.layer_norm(X, (8,)).mean(-1), torch.zeros(4, 6), atol=1e-5)
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_wrapper_subclass_keeps_its_own_way():
    from torch.testing._internal.two_tensor import TwoTensor

    class Watched(TwoTensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            assert func.namespace != "gpt_kernels", func
            return super().__torch_dispatch__(func, types, args, kwargs)

    x = Watched(torch.randn(3000, 70), torch.randn(3000, 70))
    mask, target = torch.ones(3000, 3000).bool(), torch.arange(3000) % 70
    with accelerated():
        for f in (lambda x: F.dropout(x, 0.5), lambda x: F.cross_entropy(x, target),
                  lambda x: F.scaled_dot_product_attention(x, x, x, mask, dropout_p=0.1)):  # fmt: skip
            assert isinstance(f(x), TwoTensor)


@pytest.mark.parametrize("dynamic", [False, True])
def test_under_torch_compile_attention_stays_ours(dynamic):
    net = model()

    def masked(x):
        return F.scaled_dot_product_attention(x, x, x, torch.ones(x.shape[-2], x.shape[-2]).bool().tril())

    own = step(net, *BATCH), masked(BATCH[0])
    with accelerated():
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", dynamic=dynamic, fullgraph=True)
        close(step(compiled, *BATCH), own[0])
        with ours_alone(torchs=("cross_entropy_loss",)):
            seen = calls("_scaled_dot_product_flash_attention_for_cpu")[0]
            compiled(BATCH[0])
            assert calls("_scaled_dot_product_flash_attention_for_cpu")[0] > seen
        close([torch.compile(masked, backend="aot_eager", dynamic=dynamic, fullgraph=True)(BATCH[0])], [own[1]])
    for _ in range(2):  # and not afterwards: torch remembers what serves a slot
        torch._dynamo.reset()
        close(step(torch.compile(copy.deepcopy(net), backend="aot_eager", dynamic=dynamic, fullgraph=True), *BATCH), own[0])
    torch._dynamo.reset()


# ---- python -m gpt_kernels run ----

SCRIPT = """
import sys, torch
from gpt_kernels.accelerate import calls
print(__name__, sys.argv[1:], sys.path[0])
x = torch.randn(400, 300, requires_grad=True)
torch.nn.functional.dropout(torch.nn.functional.gelu(x), 0.5).sum().backward()
print("ours", calls("gelu")[0])
if "--fail" in sys.argv:
    raise OSError("no such luck")
sys.exit(3)
"""


def run(*words, folder):
    return subprocess.run(
        [sys.executable, "-m", "gpt_kernels", "run", *map(str, words)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


def test_run_runs_a_program_as_it_is(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    done = run("--report", script, "--lr", "3", folder=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == [f"__main__ ['--lr', '3'] {tmp_path}", "ours 1"]
    assert "gelu_backward" in done.stderr and "calls were ours; saved about" in done.stderr
    done = run("--no-accelerate", script, folder=tmp_path)
    assert done.returncode == 3 and "ours 0" in done.stdout and done.stderr == ""


def test_run_tells_of_errors_as_python_does(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    done = run("--module", "program", "--fail", folder=tmp_path)
    assert done.returncode == 1 and "ours 1" in done.stdout
    lines = done.stderr.splitlines()
    assert (
        lines[0] == "Traceback (most recent call last):" and "program.py" in lines[1] and lines[-1] == "OSError: no such luck"
    )
    for words, said in (([tmp_path / "none.py"], "there is no file"), (["--module", "no_such"], "there is no module"),
                        (["--report", "--no-accelerate", script], "--report")):  # fmt: skip
        done = run(*words, folder=tmp_path)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
