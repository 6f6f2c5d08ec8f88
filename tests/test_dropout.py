"""dropout: its mask, its residual."""

import pytest
import torch
from grids import BACKEND, ISAS
from op_checks import (
    check_raises,
    every_isa,
)

from gpt_kernels import dropout, use_backend, use_isa
from gpt_kernels.cases.dropout import RNG, eager, ours
from gpt_kernels.ops import dropout as module
from gpt_kernels.ops.philox import dropout_threshold, philox, philox_uint16


@every_isa
def test_float16_to_the_bit(isa):
    """Every float16 read, and sums of two rounded: base has no instruction for either."""
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16)
    with use_isa(isa):
        for residual in (torch.full_like(every, -0.0), every[torch.randperm(2**16)], every.flip(0)):
            y = torch.ops.gpt_kernels.dropout_fwd(every.view(64, -1), residual.view(64, -1), RNG, 0.0).view(-1)
            want = (every.float() + residual.float()).half()
            same = (y.view(torch.int16) == want.view(torch.int16)) | (y.isnan() & want.isnan())
            assert same.all(), f"{every[~same][0]} + {residual[~same][0]} became {y[~same][0]}"


# Random123's kat_vectors of philox4x32, 7 rounds: counter and key, words
KNOWN = {
    "zeros": ("00000000 00000000 00000000 00000000 00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
}


def words_of(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name):
    given, expected = map(words_of, KNOWN[name])
    assert [int(word) for word in philox(*map(torch.tensor, given))] == expected


@every_isa
def test_known_answer_of_the_kernel(isa):
    x, words = torch.ones(1, 8), words_of(KNOWN["zeros"][1])
    with use_isa(isa):
        for column, value in enumerate(half for word in words for half in (word & 0xFFFF, word >> 16)):
            # a value is kept at a threshold of its own and dropped at the next
            at, above = (dropout(x, v / 65536, rng_state=torch.tensor([0, 0]))[0, column] for v in (value, value + 1))
            assert at != 0 and above == 0


def test_neighbours_are_uncorrelated():
    values = philox_uint16(RNG, 1, 4, 256, 512)
    pairs = {f"{d} columns": (values[..., d:], values[..., :-d]) for d in (1, 2, 4, 8)}
    pairs |= {"rows": (values[:, :, 1:], values[:, :, :-1]), "planes": (values[:, 1:], values[:, :-1])}
    pairs |= {
        name: (values, philox_uint16(RNG + torch.tensor(step), 1, 4, 256, 512))
        for name, step in {"seeds": (1, 0), "seeds' high words": (1 << 32, 0), "offsets": (0, 1)}.items()
    }
    for name, (a, b) in pairs.items():
        for p in (0.01, 0.1, 0.5, 0.9):
            dropped = torch.stack((a.flatten(), b.flatten())) < dropout_threshold(p)
            # 5 standard deviations of a correlation of independent draws
            assert abs(torch.corrcoef(dropped.double())[0, 1].item()) < 5 * a.numel() ** -0.5, f"{name}, p = {p}"


def test_mask_is_the_same_on_every_isa_and_backend():
    x = torch.ones(17, 1025)
    for isa in ISAS:
        with use_isa(isa):
            assert torch.equal(ours(x), eager(x))
    with use_backend("reference"):
        assert torch.equal(ours(x), eager(x))


def test_rate_and_seed():
    n = 512 if BACKEND == "cpu" else 128
    x = torch.ones(n, n)
    for p in (0.01, 0.1, 0.5, 0.9):
        y = dropout(x, p)
        # 5 standard deviations of a mean of n^2 draws; the expectation of the output is 1
        assert abs((y == 0).double().mean().item() - p) < 5 * (p * (1 - p)) ** 0.5 / n
        assert abs(y.double().mean().item() - 1) < 5 * (p / (1 - p)) ** 0.5 / n
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)


def test_nothing_to_drop():
    x = torch.randn(3, 5)
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0) is x
    assert torch.equal(dropout(x, 0.0, residual=x), x + x)


def test_gradient_of_the_residual_alone():
    residual = torch.randn(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(dropout(torch.ones(2, 8), 0.5, residual=residual).sum(), residual)
    assert torch.equal(gradient, torch.ones(2, 8))


X = torch.ones(2, 4)
BAD = {
    "p of 1": (lambda: module.fwd(X, None, RNG, 1.0), r"dropout_fwd: dropout_p must be in \[0, 1\), got 1"),
    "negative p": (lambda: module.fwd(X, None, RNG, -0.5), r"dropout_fwd: dropout_p must be in \[0, 1\), got -0.5"),
    "NaN p": (lambda: module.fwd(X, None, RNG, float("nan")), r"dropout_fwd: dropout_p must be in \[0, 1\), got nan"),
    "integers": (lambda: dropout(X.long(), 0.5), "dropout_fwd: x must be float32, (float64, )?bfloat16 or float16, got int64"),
    "scalar": (lambda: module.fwd(torch.tensor(1.0), None, RNG, 0.5), "dropout_fwd: x must have at least 1 dimension"),
    "residual shape": (
        lambda: dropout(X, 0.5, residual=X[:1]),
        r"dropout_fwd: residual must have the shape of x \(2, 4\), got \(1, 4\)",
    ),
    "residual dtype": (lambda: dropout(X, 0.5, residual=X.double()), "dropout_fwd: residual must be float32, got float64"),
    "rng shape": (lambda: dropout(X, 0.5, rng_state=RNG[:1]), r"dropout_fwd: rng_state must have shape \(2,\), got \(1,\)"),
    "rng dtype": (lambda: dropout(X, 0.5, rng_state=torch.ones(2)), "dropout_fwd: rng_state must be int64, got float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    check_raises(call, RuntimeError, message)
