"""Every derivative that torch can ask for, of every op, against the same function written with torch's own ops in float64."""

import functools

import pytest
import torch
import torch.autograd.functional as functional
from grids import DTYPES
from torch.autograd import forward_ad

import gpt_kernels
from gpt_kernels import cases

pytestmark = pytest.mark.skipif(torch.float64 not in DTYPES, reason="this backend has no float64")

CASES = [
    pytest.param(op, f.ours, f.plain, f.shapes, id=f"{op} {f.what}".strip())
    for op in cases.families()
    for f in cases.of(op).derivatives()
]


# ---- the derivatives: each takes a function of tensors, and tensors, and gives tensors ----


def scalar(f):
    """Of which every derivative depends on x, through f and past it."""
    return lambda *x: sum(
        (y.square() * torch.arange(1, y.numel() + 1).view(y.shape)).sum() for y in (f(*x), *(t + 1 for t in x))
    )


def like(x, i=0):
    return tuple(torch.cos(torch.arange(t.numel(), dtype=t.dtype) * 3 + i).view(t.shape) for t in x)


def asked(x):
    return tuple(t.clone().requires_grad_() for t in x)


def dot(a, b):
    return sum((s * t).sum() for s, t in zip(a, b, strict=True))


def of_each(x):
    return tuple(range(len(x)))


def first(f, x):
    x = asked(x)
    return torch.autograd.grad(scalar(f)(*x), x)


def second(f, x):
    x = asked(x)
    g = torch.autograd.grad(scalar(f)(*x), x, create_graph=True)
    return *g, *torch.autograd.grad(dot(g, like(x)), x)


def second_backward(f, x):
    x = asked(x)
    scalar(f)(*x).backward(create_graph=True)
    g = tuple(t.grad.clone() for t in x)
    dot(g, like(x)).backward()
    return tuple(t.grad.detach() for t in x)


def second_of_each_alone(f, x):
    """The others are constants: no gradient is asked of them."""
    results = []
    for i, t in enumerate(asked(x)):
        given = (*x[:i], t, *x[i + 1 :])
        (g,) = torch.autograd.grad(scalar(f)(*given), t, create_graph=True)
        results += torch.autograd.grad(g.square().sum(), t)
    return results


def third(f, x):
    x = asked(x)
    g = torch.autograd.grad(scalar(f)(*x), x, create_graph=True)
    h = torch.autograd.grad(dot(g, like(x)), x, create_graph=True)
    return torch.autograd.grad(dot(h, like(x, 1)), x)


def first_after_second(f, x):
    """The graph is used again after create_graph."""
    x = asked(x)
    y = scalar(f)(*x)
    g = torch.autograd.grad(y, x, create_graph=True)
    h = torch.autograd.grad(dot(g, like(x)), x, retain_graph=True)
    return *h, *torch.autograd.grad(y, x)


def of_the_output_gradient(f, x):
    x = asked(x)
    y = f(*x)
    (dy,) = asked(like([y]))
    g = torch.autograd.grad(y, x, dy, create_graph=True)
    return torch.autograd.grad(dot(g, like(x)), (dy, *x), materialize_grads=True)


def batched_gradients(f, x):
    x = asked(x)
    y = f(*x)
    return torch.autograd.grad(y, x, torch.stack([*like([y]), *like([y], 1)]), is_grads_batched=True)


def batched_gradients_twice(f, x):
    x = asked(x)
    y = f(*x).square()
    dy = torch.stack([*like([y]), *like([y], 1)]).detach()
    g = torch.autograd.grad(y, x, dy, is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in g), x, materialize_grads=True)


def checkpointed(f, x):
    x = asked(x)
    y = torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=False)
    g = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(dot(g, like(x)), x)


def saved_elsewhere(f, x):
    x = asked(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        g = torch.autograd.grad(f(*x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dot(g, like(x)), x)


def tangents(f, x):
    with forward_ad.dual_level():
        y = f(*map(forward_ad.make_dual, x, like(x)))
        return tuple(forward_ad.unpack_dual(y))


def tangents_without_grad(f, x):
    with torch.no_grad():
        return tangents(f, x)


def tangent_of_each_alone(f, x):
    """Beside tensors that want a gradient."""
    results = []
    for i, t in enumerate(x):
        given = list(asked(x))
        with forward_ad.dual_level():
            given[i] = forward_ad.make_dual(t, *like([t]))
            results.append(forward_ad.unpack_dual(f(*given)).tangent)
    return results


def forward_over_reverse(f, x):
    x = asked(x)
    with forward_ad.dual_level():
        given = tuple(map(forward_ad.make_dual, x, like(x)))
        g = torch.autograd.grad(scalar(f)(*given), given, create_graph=True)
        return tuple(forward_ad.unpack_dual(t).tangent for t in g)


def reverse_over_forward(f, x):
    x = asked(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, x, like(x))).square()).tangent
        return torch.autograd.grad(tangent.square().sum(), x, materialize_grads=True)


def tangent_of_the_output_gradient(f, x):
    """The graph was made before there was a tangent."""
    x = asked(x)
    y = f(*x)
    with forward_ad.dual_level():
        g = torch.autograd.grad(y, x, forward_ad.make_dual(*like([y]), *like([y], 1)))
        return tuple(t for each in g for t in forward_ad.unpack_dual(each))


def func_grad(f, x):
    return torch.func.grad(scalar(f), of_each(x))(*x)


def func_vjp(f, x):
    y, pull = torch.func.vjp(f, *x)
    return y, *pull(*like([y])), *torch.func.vmap(pull)(torch.stack([*like([y]), *like([y], 1)]))


def func_vjp_of_vjp(f, x):
    y = f(*x)
    g, pull = torch.func.vjp(lambda *x: torch.func.vjp(f, *x)[1](*like([y])), *x)
    return *g, *pull(like(x))


def func_jvp(f, x):
    return torch.func.jvp(f, x, like(x))


def func_linearize(f, x):
    y, push = torch.func.linearize(f, *x)
    return y, push(*like(x))


def func_grad_of_jvp(f, x):
    return torch.func.grad(lambda *x: torch.func.jvp(scalar(f), x, like(x))[1], of_each(x))(*x)


def func_jvp_of_grad(f, x):
    return sum(torch.func.jvp(torch.func.grad(scalar(f), of_each(x)), x, like(x)), ())


def func_jvp_of_jvp(f, x):
    return torch.func.jvp(lambda *x: torch.func.jvp(f, x, like(x))[1], x, like(x, 1))


def func_jacobian(transform, f, x):
    return transform(f, of_each(x))(*x)


def func_hessian(f, x):
    return sum(torch.func.hessian(scalar(f), of_each(x))(*x), ())


def batch(x, n=2):
    return tuple(torch.stack([t, *like([t]), *like([t], 1)][:n]) for t in x)


def vmap(f, x):
    return (torch.func.vmap(f)(*batch(x)),)


def vmap_of_each_alone(f, x):
    dims = [tuple(-1 if i == j else None for j in of_each(x)) for i in of_each(x)]
    return [
        torch.func.vmap(f, in_dims=d)(
            *(b.movedim(0, -1) if e is not None else t for t, b, e in zip(x, batch(x), d, strict=True))
        )
        for d in dims
    ]


def vmap_of_vmap(f, x):
    nested = tuple(torch.stack((b, b.flip(0))) for b in batch(x))
    return (torch.func.vmap(torch.func.vmap(f), chunk_size=1)(*nested),)


def vmap_inside_autograd(f, x):
    given = asked(batch(x))
    g = torch.autograd.grad(scalar(torch.func.vmap(f))(*given), given, create_graph=True)
    return *g, *torch.autograd.grad(dot(g, like(given)), given)


def vmap_of_grad(f, x):
    return torch.func.vmap(torch.func.grad(scalar(f), of_each(x)))(*batch(x))


def grad_of_vmap(f, x):
    return torch.func.grad(scalar(torch.func.vmap(f)), of_each(x))(*batch(x))


def vmap_of_jvp(f, x):
    return torch.func.vmap(lambda *x: torch.func.jvp(f, x, like(x)))(*batch(x))


def jvp_of_vmap(f, x):
    x = batch(x)
    return torch.func.jvp(torch.func.vmap(f), x, like(x))


def vmap_of_hvp(f, x):
    return torch.func.vmap(lambda *x: torch.func.vjp(torch.func.grad(scalar(f), of_each(x)), *x)[1](like(x)))(*batch(x))


def functionalized(f, x):
    return torch.func.functionalize(torch.func.grad(scalar(f), of_each(x)))(*x)


def classic(name, *more, **options):
    """torch.autograd.functional.`name`, of a scalar or, with `more`, of tensors."""

    def call(f, x):
        vectors = tuple(v(f, x) for v in more)
        of = scalar(f) if name in ("hvp", "vhp", "hessian") else f
        return flat(getattr(functional, name)(of, x, *vectors, **options))

    return call


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for each in result for t in flat(each)]


DERIVATIVES = [
    first, second, second_backward, second_of_each_alone, third, first_after_second, of_the_output_gradient, batched_gradients,
    batched_gradients_twice, checkpointed, saved_elsewhere, tangents, tangents_without_grad, tangent_of_each_alone,
    forward_over_reverse, reverse_over_forward, tangent_of_the_output_gradient, func_grad, func_vjp, func_vjp_of_vjp, func_jvp,
    func_grad_of_jvp, func_jvp_of_grad, func_jvp_of_jvp, func_hessian, vmap, vmap_of_each_alone, vmap_of_vmap,
    vmap_inside_autograd, vmap_of_grad, grad_of_vmap, vmap_of_jvp, jvp_of_vmap, vmap_of_hvp, functionalized,
]  # fmt: skip
DERIVATIVES = {f.__name__: f for f in DERIVATIVES} | {
    "jacrev": functools.partial(func_jacobian, torch.func.jacrev),
    "jacfwd": functools.partial(func_jacobian, torch.func.jacfwd),
    "functional.hvp": classic("hvp", lambda f, x: like(x)),
    "functional.vhp": classic("vhp", lambda f, x: like(x), strict=True),
    "functional.vjp": classic("vjp", lambda f, x: like([f(*x)])[0], create_graph=True),
    "functional.jvp": classic("jvp", lambda f, x: like(x)),
    "functional.jacobian": classic("jacobian"),
    "functional.jacobian vectorized": classic("jacobian", vectorize=True),
    "functional.jacobian forward": classic("jacobian", vectorize=True, strategy="forward-mode"),
    "functional.hessian": classic("hessian", create_graph=True),
    "functional.hessian vectorized": classic("hessian", vectorize=True),
    "functional.hessian forward": classic("hessian", vectorize=True, outer_jacobian_strategy="forward-mode"),
}


def slow(c):
    return pytest.param(*c.values, id=c.id, marks=pytest.mark.slow)


def assert_equal(actual, expected, what=""):
    for i, (a, e) in enumerate(zip(flat(actual), flat(expected), strict=True)):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9, msg=lambda text, i=i: f"{what} result {i}: {text}")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("op, ours, theirs, shapes", CASES)
def test_against_torch(op, ours, theirs, shapes):
    x = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    wrong = []
    for name, derivative in DERIVATIVES.items():
        expected = derivative(theirs, x)
        try:
            assert_equal(derivative(ours, x), expected)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("op, ours, theirs, shapes", [c if c.id == "cross_entropy" else slow(c) for c in CASES])
def test_linearize(op, ours, theirs, shapes):
    """torch.func.linearize traces what it is given."""
    x = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    assert_equal(func_linearize(ours, x), func_linearize(theirs, x))


# ---- what a call draws, hides or gives beside its result ----


def drawn_attention(x):
    return gpt_kernels.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], dropout_p=0.5)


@pytest.mark.parametrize("call", [lambda x: gpt_kernels.dropout(x, 0.5), drawn_attention], ids=["dropout", "attention"])
def test_masks_drawn_under_vmap(call):
    """As torch's dropout: refused, the same mask for all, or one for each; the derivative has the mask of its forward."""
    x = torch.ones(3, 8, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call)(x)
    same, different = (torch.vmap(call, randomness=how)(x) for how in ("same", "different"))
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert not torch.equal(different[0], different[1]) and not torch.equal(different[1], different[2])
    # linear along ones: the scores of equal rows are equal, whatever their size
    y, tangent = torch.vmap(lambda x: torch.func.jvp(call, (x,), (x,)), randomness="different")(x)
    assert_equal(tangent, y)
    y, slope = torch.vmap(functools.partial(grad_along, call), randomness="different")(x)
    assert_equal(slope, y)


def grad_along(call, x):
    y, pull = torch.func.vjp(lambda size: call(x * size).sum(), x.new_ones(()))
    return y, pull(torch.ones_like(y))[0]


def test_states_under_vmap():
    """rng_state may be batched: each sample's mask is that of its state."""
    x, states = torch.randn(2, 3, 4).double(), torch.tensor([[5, 7], [1, 2]])
    batched = torch.vmap(lambda x, rng: gpt_kernels.dropout(x, 0.4, rng_state=rng))(x, states)
    assert_equal(batched, torch.stack([gpt_kernels.dropout(t, 0.4, rng_state=rng) for t, rng in zip(x, states, strict=True)]))


def test_a_bad_target_is_named_under_vmap():
    x, target = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [3, 4, 0]])
    with pytest.raises(IndexError, match="cross_entropy_fwd: target 4 of row 4 is out of range"):
        torch.vmap(torch.func.grad(gpt_kernels.cross_entropy), in_dims=(0, 0))(x, target)
    with pytest.raises(IndexError, match="cross_entropy_fwd: target 7 of row 1 is out of range"):
        torch.func.grad(gpt_kernels.cross_entropy)(x[0], torch.tensor([0, 7, 1]))


SOME = ("first", "second", "forward_over_reverse", "reverse_over_forward", "func_grad", "func_jvp_of_grad", "func_hessian")


@pytest.mark.parametrize("name", SOME)
def test_rows_that_do_not_count(name):
    """Whatever is in an ignored row; a row of -inf is a hidden one. No NaN comes of either."""
    derivative, rows = DERIVATIVES[name], (torch.randn(2, 4, dtype=torch.float64),)
    ignored = torch.tensor([torch.inf, -torch.inf, torch.nan, 0], dtype=torch.float64)
    target = torch.tensor([3, -100, 0])
    results = [
        derivative(lambda x, r=row: gpt_kernels.cross_entropy(torch.stack((x[0], r, x[1])), target, logit_softcap=3.0), rows)
        for row in (ignored, torch.zeros(4, dtype=torch.float64))
    ]
    assert_equal(*results, "cross_entropy")
    keep = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    bias = torch.zeros(3, 4, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    q, k = torch.randn(1, 1, 3, 2, dtype=torch.float64), torch.randn(1, 1, 4, 2, dtype=torch.float64)
    for of in (
        lambda mask: derivative(lambda x: gpt_kernels.softmax(x, mask), (torch.ones_like(bias),)),
        lambda mask: derivative(lambda q, k: gpt_kernels.scaled_dot_product_attention(q, k, k, mask), (q, k)),
    ):
        assert_equal(of(bias), of(keep), "hidden row")


def test_what_carries_no_gradient_says_so():
    q = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    o, *beside = gpt_kernels.flash_attn_func(q, q, q, return_attn_probs=True)
    loss, z_loss = gpt_kernels.cross_entropy(q[0, :, 0], torch.tensor([3, -100, 0]), lse_square_scale=0.1, return_z_loss=True)
    assert o.requires_grad and loss.requires_grad and not any(t.requires_grad for t in (*beside, z_loss))
    # a transform has no such sign: there lse and probabilities are differentiated
    for i, plain in ((1, lambda s: s.logsumexp(-1)), (2, lambda s: s.softmax(-1))):
        ours = torch.func.grad(lambda q, i=i: gpt_kernels.flash_attn_func(q, q, q, return_attn_probs=True)[i].square().sum())
        theirs = torch.func.grad(lambda q, plain=plain: plain(q.transpose(1, 2) @ q.transpose(1, 2).mT * 0.5).square().sum())
        assert_equal(ours(q.detach()), theirs(q.detach()))


@pytest.mark.parametrize("op, ours, theirs, shapes", [c for c in CASES if c.id in ("cross_entropy", "attention")])
def test_compiled(op, ours, theirs, shapes):
    """Transforms inside a compiled function are right, a second derivative of one is refused by torch."""
    x = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(func_jvp_of_grad, ours), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x), func_jvp_of_grad(theirs, x))
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    assert_equal(tangents(compiled, x), tangents(theirs, x))
    with pytest.raises(RuntimeError, match="double backward"):
        second(compiled, x)


# ---- a patched model ----


def model_loss(model, ids):
    given = {"input_ids": ids, "labels": ids, "use_cache": False}
    return lambda params: torch.func.functional_call(model, params, kwargs=given).loss


def model_derivatives(model, ids):
    params = dict(model.named_parameters())
    given = {name: p.detach() for name, p in params.items()}
    v = {name: torch.cos(torch.arange(p.numel()).view(p.shape)).to(p.dtype) for name, p in given.items()}
    loss = model_loss(model, ids)
    g = torch.autograd.grad(loss(params), [*params.values()], create_graph=True)
    yield "grad of grad", torch.autograd.grad(dot(g, v.values()), [*params.values()])
    yield "func.grad", torch.func.grad(loss)(given).values()
    yield "func.jvp of grad", torch.func.jvp(torch.func.grad(loss), (given,), (v,))[1].values()
    of_one = lambda params, one: model_loss(model, one[None])(params)  # noqa: E731
    yield "gradients of each sample", torch.vmap(torch.func.grad(of_one), (None, 0))(given, ids).values()
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p, v[name]) for name, p in given.items()}
        yield "tangent", [forward_ad.unpack_dual(loss(dual)).tangent]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_patched_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager", loss_type="ForCausalLMLoss",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    ids = torch.randint(50, (2, 12))
    expected = {name: [*result] for name, result in model_derivatives(model, ids)}
    gpt_kernels.patch(model)
    for name, result in model_derivatives(model, ids):
        for a, e in zip(result, expected[name], strict=True):
            # transformers' loss is of logits in float32
            assert (a - e).norm() <= 2e-6 * e.norm() + 1e-7, f"{name}: off by {(a - e).norm() / e.norm():.1e}"
