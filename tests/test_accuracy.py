"""The rule itself: just inside passes, just outside fails, one bad row fails, and nobody else has numbers of his own."""

import pathlib
import re

import pytest
import torch

from gpt_kernels import accuracy
from gpt_kernels.accuracy import FORWARD, assert_close_to_truth, floor_of, judge, layers_apart, model_floor, relative_error


def pair(dtype=torch.float32, *shape):
    truth = torch.randn(shape or (6, 50), dtype=torch.float64)
    return truth, truth.to(dtype)


def test_just_inside_and_just_outside():
    truth, eager = pair()
    allowed = judge(eager, truth, eager).allowed
    assert allowed == pytest.approx(FORWARD * (eager - truth).abs().max().item() + floor_of(truth, torch.float32))
    for factor, right in ((0.9, True), (1.1, False)):
        actual = truth.clone()
        actual[3, 7] += factor * allowed
        assert (judge(actual.float(), truth, eager).wrong is None) == right
    with pytest.raises(AssertionError, match=r"dx: error .* at \(3, 7\) .* allowed"):
        assert_close_to_truth(actual.float(), truth, eager, name="dx")


def test_a_bad_row_cannot_hide_behind_a_large_one():
    truth, _ = pair(torch.float32, 6, 400)
    truth[0] *= 1e3
    eager = truth.float()
    actual = eager.clone()
    actual[2] += 3e-4 * torch.randn(400).sign()  # less than the first row's roundings
    found = judge(actual, truth, eager)
    assert found.error <= found.allowed and found.wrong.startswith("a row's cosine")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "fault", (lambda g: g * (g.abs() >= 1e-4), lambda g: g * 0, lambda g: g * 0.5), ids=("small", "all", "half")
)
def test_small_gradients_count(dtype, fault):
    """Cross entropy's, a mean over 512 rows: 2e-3 for the target, 2e-6 for all others."""
    logits, target = torch.randn(512, 1024).to(dtype), torch.randint(1024, (512,))

    def gradient(x):
        x = x.detach().requires_grad_()
        torch.nn.functional.cross_entropy(x, target).backward()
        return x.grad

    truth, eager = gradient(logits.double()), gradient(logits)
    assert judge(eager, truth, eager).wrong is None
    assert judge(fault(eager), truth, eager).wrong is not None
    if dtype != torch.float16:  # which has no numbers so small
        truth, eager = truth * 1e-4, eager * 1e-4
        assert judge(eager, truth, eager).wrong is None and judge(fault(eager), truth, eager).wrong is not None


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_smallest_number_for_none_is_right(dtype):
    truth = torch.zeros(65, 64, dtype=torch.float64)  # more than a few
    least = torch.full((65, 64), accuracy.SMALLEST[dtype], dtype=dtype)
    assert judge(8 * least, truth, truth.to(dtype)).wrong is not None
    assert judge(least, truth, truth.to(dtype)).wrong is None


def test_specials_and_shapes():
    truth, eager = pair()
    actual = eager.clone()
    actual[1, 1] = torch.nan
    assert "NaN in other places" in judge(actual, truth, eager).wrong
    truth[1, 1] = torch.nan
    assert judge(actual, truth, eager).wrong is None and "NaN" in judge(eager, truth, eager).wrong
    over = eager.clone()
    over[2, 2] = torch.inf  # float16 overflows where eager does, or is right
    assert judge(over, truth.nan_to_num(), over).wrong is None and judge(eager, truth.nan_to_num(), over).wrong is None
    assert "shape (2,), expected (6, 50)" in judge(torch.zeros(2), truth, eager).wrong


def test_floors_and_relative_error():
    truth = torch.tensor([1.0, -4.0, float("inf")], dtype=torch.float64)
    assert model_floor(truth, torch.float32) == 2 * 2**-23 * 4 and floor_of(truth, torch.float64) == 4e-12
    assert relative_error(torch.tensor([1.1, -4.4, 0.0]), truth) == pytest.approx(0.1)
    assert 0 < layers_apart(10.0, 2, torch.float32) < layers_apart(10.0, 12, torch.float32) < 1e-3


def test_nobody_else_has_a_tolerance():
    """In the package, fixed tolerances stand in accuracy.py."""
    package = pathlib.Path(accuracy.__file__).parent
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if path.name != "accuracy.py"
        for line in path.read_text().splitlines()
        if re.search(r"\b(TOLERANCE|[ra]tol ?= ?[1-9.]|FACTORS? ?=.*\b[0-9]|assert_close\()", line)
    ]
    assert found == []
