"""What is special about rotary: flash-attn's and transformers' meaning, tables of both kinds, memory, what is refused."""

import pytest
import torch
from op_checks import check_raises, forward_backward

from gpt_kernels import apply_rotary_emb, apply_rotary_pos_emb
from gpt_kernels.accuracy import SAME_FORMULA
from gpt_kernels.cases.rotary import for_both, plain, tables

FWD = torch.ops.gpt_kernels.rotary_fwd.default
OUT = torch.ops.gpt_kernels.rotary_fwd_out.default


def close(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= SAME_FORMULA[actual.dtype] * max(1.0, expected.abs().max().item())


def model_function(name):
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}").apply_rotary_pos_emb


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name, R, interleaved", [("llama", 16, False), ("phi3", 12, False), ("cohere", 16, True)])
def test_as_transformers(name, R, interleaved, batch):
    """q and k as models have them, views of (B, S, H, D); forward and gradients; the tables' halves are not alike"""
    theirs = model_function(name)
    cos, sin = tables((batch, 5), R, torch.float32)
    q, k = (torch.randn(2, 5, heads, 16).transpose(1, 2) for heads in (3, 1))

    def joined(f, **options):
        return lambda q, k: torch.cat(f(q, k, cos, sin, **options), 1)

    dy = torch.randn(2, 4, 5, 16)
    ours = forward_backward(joined(apply_rotary_pos_emb, interleaved=interleaved), (q, k), dy)
    for a, e in zip(ours, forward_backward(joined(theirs), (q, k), dy), strict=True):
        close(a, e)
    swapped = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2, interleaved=interleaved)
    assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(swapped, ours[0].split((3, 1), 1), strict=True))


def test_as_gptj():
    theirs = model_function("gptj")
    cos, sin = tables((2, 5), 4, torch.float32)
    x = torch.randn(2, 5, 3, 8)
    close(apply_rotary_emb(x, cos, sin, interleaved=True), theirs(x, sin, cos))


def test_a_wide_table_widens_q_as_products_do():
    cos, sin = tables((1, 5), 8, torch.float32)
    q, k = torch.randn(2, 2, 3, 5, 8).bfloat16()
    for a, x in zip(apply_rotary_pos_emb(q, k, cos, sin), (q, k), strict=True):
        close(a, (plain(x.float(), cos[:, None], sin[:, None], False)))
    x = q.transpose(1, 2)
    assert apply_rotary_emb(x, cos[..., :4], sin[..., :4]).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="cannot be written in place, cos and sin make float32 of them"):
        apply_rotary_pos_emb(q, k, cos, sin, inplace=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions(interleaved):
    """of each sequence from its offset, and of sequences one after another"""
    cos, sin = tables((20,), 4, torch.float32)
    x, offsets = torch.randn(3, 5, 2, 10), torch.tensor([0, 7, 15])

    def at(x, first):
        rows = slice(first, first + x.shape[0])
        return plain(x, *(for_both(t[rows], interleaved)[:, None] for t in (cos, sin)), interleaved)

    for given in (0, 3, 15):
        close(
            apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=given),
            torch.stack([at(sequence, given) for sequence in x]),
        )
    expected = torch.stack([at(*pair) for pair in zip(x, offsets.tolist(), strict=True)])
    close(apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets), expected)
    lengths = (1, 4, 6, 2)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = torch.randn(13, 2, 10)
    for offsets in (0, 2, torch.tensor([5, 0, 9, 1])):
        firsts = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * 4
        expected = torch.cat([at(*pair) for pair in zip(packed.split(lengths), firsts, strict=True)])
        more = dict(seqlen_offsets=offsets, cu_seqlens=starts, max_seqlen=6)
        close(apply_rotary_emb(packed, cos, sin, interleaved, **more), expected)
        given = packed.clone()
        assert apply_rotary_emb(given, cos, sin, interleaved, True, **more) is given
        close(given, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place(interleaved):
    """into views of packed q, k and v too, whose other parts stay; with the same bits, and the same gradient"""
    cos, sin = tables((5,), 4, torch.float32)
    base = torch.randn(2, 5, 3, 3, 12)
    expected = [apply_rotary_emb(base[:, :, i], cos, sin, interleaved) for i in (0, 1)]
    packed = base.clone()
    for i in (0, 1):
        x = packed[:, :, i]
        assert apply_rotary_emb(x, cos, sin, interleaved, inplace=True) is x
    assert torch.equal(packed, torch.stack([*expected, base[:, :, 2]], 2))
    for x in (
        base[:, :, 0].transpose(1, 3).contiguous().transpose(1, 3),
        base[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert torch.equal(apply_rotary_emb(x, cos, sin, interleaved, inplace=True), expected[0])
    leaf, dy = base.clone().requires_grad_(), torch.randn_like(base)

    def through(inplace):
        q, k, v = (leaf * 1).unbind(2) if not inplace else [(leaf * 1)[:, :, i] for i in range(3)]
        turned = [apply_rotary_emb(x, cos, sin, interleaved, inplace) for x in (q, k)]
        return torch.autograd.grad(torch.stack([*turned, v], 2), leaf, dy)[0]

    assert torch.equal(through(True), through(False))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        apply_rotary_emb(torch.randn(2, 5, 3, 12, requires_grad=True), cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="some of its elements share memory"):
        apply_rotary_emb(torch.randn(1, 5, 3, 12).expand(2, 5, 3, 12), cos, sin, inplace=True)


def test_in_place_tells_autograd():
    """whoever needs what was written over gets its error"""
    cos, sin = tables((5,), 4, torch.float32)
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    y = x.exp()
    apply_rotary_emb(y, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        y = x.detach().clone()
        version = y._version
        apply_rotary_emb(y, cos, sin, inplace=True)
    assert y._version > version


def test_compiled_in_place():
    cos, sin = tables((5,), 4, torch.float32)
    torch._dynamo.reset()
    call = lambda x: apply_rotary_emb(x * 2, cos, sin, inplace=True) + 1  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    args, dy = (torch.randn(2, 5, 3, 8),), torch.randn(2, 5, 3, 8)
    for a, e in zip(forward_backward(compiled, args, dy), forward_backward(call, args, dy), strict=True):
        assert torch.equal(a, e)


def test_order_of_memory():
    """The result has heads where x has them, and nothing else is copied."""
    cos, sin = tables((1, 5), 16, torch.float32)
    for q in (
        torch.randn(2, 5, 3, 16).transpose(1, 2),
        torch.randn(2, 3, 5, 16),
        torch.randn(2, 5, 3, 3, 16)[:, :, 1].transpose(1, 2),
    ):
        a, b = apply_rotary_pos_emb(q, q[:, :2], cos, sin)
        assert (a.stride(1) > a.stride(2)) == (q.stride(1) > q.stride(2)) == (b.stride(1) > b.stride(2))
        assert a.stride(-1) == 1 and a.stride(0) == 3 * 5 * 16


def test_one_of_two_gradients():
    cos, sin = tables((1, 5), 16, torch.float32)
    q, k = torch.randn(2, 1, 3, 5, 16, requires_grad=True)
    turned = apply_rotary_pos_emb(q, k, cos, sin)
    (dq,) = torch.autograd.grad(turned[0].sum(), q)
    close(dq, torch.autograd.grad(plain(q, cos[:, None], sin[:, None], False).sum(), q)[0])
    q, k = q.detach().requires_grad_(), k.detach()
    assert torch.autograd.grad(apply_rotary_pos_emb(q, k, cos, sin)[0].sum(), q)[0].equal(dq)


def test_gradients_of_tables():
    """are plain PyTorch's"""
    x = torch.randn(2, 5, 3, 8)
    cos, sin = (t.requires_grad_() for t in tables((5,), 4, torch.float32))
    ours = torch.autograd.grad(apply_rotary_emb(x, cos, sin).square().sum(), (cos, sin))
    theirs = torch.autograd.grad(
        plain(x, *(for_both(t, False)[None, :, None] for t in (cos, sin)), False).square().sum(), (cos, sin)
    )
    for a, e in zip(ours, theirs, strict=True):
        close(a, e)


X, C = torch.zeros(2, 5, 3, 8), torch.zeros(5, 4)
C3 = torch.zeros(1, 5, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: apply_rotary_emb(X[0], C, C), RuntimeError, r"_emb: x must have 4 dimensions, got shape \(5, 3, 8\)"),
        (lambda: apply_rotary_emb(X, C, None), TypeError, "sin must be a Tensor, got NoneType"),
        (lambda: apply_rotary_emb(X, C, C[:, :3]), RuntimeError, r"sin must have the shape of cos \(5, 4\), got \(5, 3\)"),
        (lambda: apply_rotary_emb(X, C[:4], C[:4]), RuntimeError, "cos has 4 rows, x of 5 positions from seqlen_offsets 0"),
        (lambda: apply_rotary_emb(X, C, C, seqlen_offsets=1), RuntimeError, "cos has 5 rows, x of 5 positions from .* 1"),
        (lambda: apply_rotary_emb(X, C, C, seqlen_offsets=-1), RuntimeError, "from seqlen_offsets -1"),
        (lambda: apply_rotary_emb(X, C3, C3, seqlen_offsets=1), RuntimeError, "go with cos of 2 dimensions"),
        (lambda: apply_rotary_emb(X, C3[:, :4], C3[:, :4]), RuntimeError, r"cos must have shape \(2 or 1, 5, ...\)"),
        (lambda: apply_rotary_emb(X[..., :6], C, C), RuntimeError, "rotary dimension must be even and at most 6, .* got 8"),
        (lambda: apply_rotary_emb(X, C.half(), C.half()), RuntimeError, "cos must be float32 like x or float32, got float16"),
        (lambda: apply_rotary_emb(X, C, C.double()), RuntimeError, "sin must be float32 like x or float32, got float64"),
        (lambda: apply_rotary_emb(X.int(), C, C), RuntimeError, "x must be float32, float64, bfloat16 or float16, got int32"),
        (lambda: apply_rotary_emb(X, C.to("meta"), C), RuntimeError, "on one device"),
        (lambda: apply_rotary_pos_emb(X, X, C3, C3, 3), ValueError, "unsqueeze_dim must be 1 or 2, got 3"),
        (lambda: apply_rotary_pos_emb(X, X, C3[..., :3], C3[..., :3], 2), RuntimeError, "must be even and at most 8, .* got 3"),
        (lambda: apply_rotary_pos_emb(X, X[:, :4], C3, C3, 2), RuntimeError, r"cos must have shape \(2 or 1, 4, ...\), got"),
        (lambda: FWD(X, C3, C3, 9, False, False), RuntimeError, "rotary_fwd: rotary_dim must be even and at most 8.* got 9"),
        (lambda: FWD(X, C3, C3, 6, False, False), RuntimeError, r"cos must have shape \(2 or 1, 5, 6 or 3\), got \(1, 5, 4\)"),
        (lambda: FWD(X.transpose(1, 3), C3, C3, 2, False, False), RuntimeError, "x must be contiguous in its last dimension"),
        (lambda: FWD(X, C3, C3[..., :2], 4, False, False), RuntimeError, "sin must have as many columns as cos, 4, got 2"),
        (lambda: FWD(X.half(), C3.half(), C3, 8, False, False), RuntimeError, "sin must be float16, got float32"),
        (lambda: OUT(X, C3, C3, 8, False, False, X[:1]), RuntimeError, r"rotary_fwd: y must have the shape of x"),
        (lambda: OUT(X, C3, C3, 8, False, False, X.half()), RuntimeError, "y must be float32, got float16"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    check_raises(call, error, message)
