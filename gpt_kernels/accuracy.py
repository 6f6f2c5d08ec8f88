"""The one rule of how far from right is right. A kernel may be at most a little worse than plain PyTorch in the same dtype,
both against float64. Tests, verify(), the benchmark and what else compares read it here.

    |actual - truth| <= factor * max|eager - truth| + floor        for every element
    floor = RELATIVE_FLOOR * max|truth|    (two roundings in 16 bits, 16 in float32, 1e-12 in float64, where there is no wider
                                            truth to measure eager's error with), and two of the type's smallest numbers

    in 16 bits at most 2 * max|(truth + 0.3) - 0.3 - truth| in that dtype, as two roundings beside 0.3 are
    in float32 and float64, of a tensor of up to FEW elements, at least RELATIVE_FLOOR: eager may be exact by luck

And the same for the root mean square, whose floor follows the truth's own: or small elements, most of a cross entropy's
gradient, could be anything beside a few large ones.
Every row's cosine with the truth is close to 1, so that one bad row cannot hide behind a global maximum,
and NaN and inf stand in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# of one op: its output, its parameters' gradients, which are sums over many rows, and its inputs'
FORWARD, WEIGHT_GRADIENT, INPUT_GRADIENT = 1.5, 2.0, 3.0
# attention's bias, whose gradient is a sum over a batch: torch allows its own 12 to 22 (test_transformers.py)
BIAS_GRADIENT = 4.0
# of a whole model: gradients pass through more roundings than outputs, and kernels order their sums differently
MODEL_OUTPUT, MODEL_GRADIENT = 1.5, 3.0
# so many times more where the truth is nothing beside eager's error, as of the bias of attention's keys: what is left of terms
# that cancel is as large as the order of each sum has it (LOG L178)
NOTHING = 4.0
# somebody else's kernel that errs by more than so many times what ours may is taken for another function
FAR = 30.0
# 1 - cosine of a row: a few roundings of that dtype, squared, with room for short rows
COSINE = {torch.float64: 1e-13, torch.float32: 1e-9, torch.float16: 1e-5, torch.bfloat16: 1e-3}
# two formulas are the same one where their results differ by no more, of the largest element or of 1: of tests that look for
# another formula, not for a rounding
SAME_FORMULA = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FEW = 4096  # elements over which eager may be exact by luck
RELATIVE_FLOOR = {torch.float64: 1e-12, torch.float32: 2.0**-19, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
# that a kernel keeps: float32's and bfloat16's subnormals may be flushed
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-126, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}


@dataclass(frozen=True)
class Judgement:
    """Of one tensor: its largest error against float64, eager's, what is allowed, and what is wrong, None where nothing is."""

    error: float
    eager_error: float
    allowed: float
    wrong: str | None


def floor_of(truth: Tensor, dtype: torch.dtype, size: float | None = None) -> float:
    """In elements of this size, the truth's largest unless told."""
    finite = truth[torch.isfinite(truth)]
    if not finite.numel():
        return 0.0
    if size is None:
        size = finite.abs().max().item()
    if dtype.itemsize >= 4 and truth.numel() <= FEW:
        size = max(1.0, size)
    floor = RELATIVE_FLOOR[dtype] * size
    if dtype.itemsize == 2:
        rounded = finite.to(dtype)
        floor = min(floor, 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item())
    return floor + 2 * SMALLEST[dtype]


def model_floor(truth: Tensor, dtype: torch.dtype) -> float:
    """Of a whole model's tensor, whose values may all be tiny: two roundings of the largest; 1e-12 of it for float64."""
    finite = truth[torch.isfinite(truth)]
    relative = RELATIVE_FLOOR[dtype] if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    return relative * finite.abs().max().item() if finite.numel() else 0.0


def layers_apart(largest: float, layers: int, dtype: torch.dtype) -> float:
    """How far two right sets of logits, up to `largest`, may lie apart: each of so many layers, of which one rounds twice."""
    return 2 * layers * floor_of(torch.tensor([largest], dtype=torch.float64), dtype)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The error's norm over the truth's: 0.07 is 7 % off. Elements of which either is no finite number are left out."""
    a, t = actual.detach().double(), truth.detach().double()
    ok = torch.isfinite(a) & torch.isfinite(t)
    error, size = (a - t)[ok].norm().item(), t[ok].norm().item()
    return error / size if size else error


def misplaced(a: Tensor, t: Tensor, e: Tensor) -> str | None:
    """Which of NaN, +inf and -inf the actual values lack where the truth has it, or have where neither it nor eager does:
    float16 may overflow where eager does and float64 does not."""
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        if ((test(t) & ~test(a)) | (test(a) & ~(test(t) | test(e)))).any():
            return kind
    return None


def judge(actual: Tensor, truth: Tensor, eager: Tensor, factor: float = FORWARD) -> Judgement:
    """actual: a kernel's result; eager: plain PyTorch's in the same dtype; truth: the same computed in float64."""
    if actual.shape != truth.shape:
        return Judgement(torch.inf, 0.0, 0.0, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if actual.is_cuda and actual.dtype == torch.float32:
        factor *= 3  # exponentials of a GPU's special function unit err by 2^-22
    a, t, e = actual.detach().double(), truth.detach(), eager.detach().double()
    if kind := misplaced(a, t, e):
        return Judgement(torch.inf, 0.0, 0.0, f"{kind} in other places than the truth has them")
    ok = torch.isfinite(a) & torch.isfinite(t) & torch.isfinite(e)
    if not ok.any():
        return Judgement(0.0, 0.0, 0.0, None)
    a, t, e = (torch.where(ok, x, 0.0) for x in (a, t, e))
    eager_error, floor = (e - t).abs().max().item(), floor_of(t, actual.dtype)
    error, allowed = (a - t).abs(), factor * eager_error + floor
    worst, wrong = error.max().item(), None
    if worst > allowed:
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        wrong = (
            f"error {worst:.3e} at {where} (got {a[where].item():.6g}, truth {t[where].item():.6g}), "
            f"allowed {allowed:.3e} = {factor} x eager's {eager_error:.3e} + floor {floor:.3e}"
        )
    elif (rms := _rms(a - t)) > (limit := factor * _rms(e - t) + floor_of(t, actual.dtype, _rms(t))):
        wrong = f"the error's root mean square {rms:.3e}, allowed {limit:.3e} = {factor} x eager's {_rms(e - t):.3e} + floor"
    elif t.dim() and t.shape[-1] > 1:
        wrong = _crooked_row(a, t, e, factor, allowed, COSINE[actual.dtype])
    return Judgement(worst, eager_error, allowed, wrong)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _crooked_row(a: Tensor, t: Tensor, e: Tensor, factor: float, allowed: float, least: float) -> str | None:
    # rows so small that the allowed error is a large part of them say nothing about their direction
    large = t.norm(dim=-1) > 30 * allowed * t.shape[-1] ** 0.5
    if not large.any():
        return None
    deviation, of_eager = _deviation(a[large], t[large]), _deviation(e[large], t[large]).max()
    # eager may be exact in a row by luck: any row may err as much as eager's usual one does
    squares = (e - t).square().sum(-1)
    usual = (squares[squares > 0].median() if squares.any() else squares.sum()) / (2 * t[large].square().sum(-1))
    limit = factor**2 * torch.maximum(usual, of_eager).clamp(min=least / factor**2)
    row = int((deviation / limit).argmax())
    if deviation[row] <= limit[row]:
        return None
    return f"a row's cosine with the truth is off by {deviation[row]:.3e}, allowed {limit[row]:.3e}"


def _deviation(a: Tensor, t: Tensor) -> Tensor:
    """Each row's 1 - cosine."""
    return 1 - (a * t).sum(-1) / (a.norm(dim=-1) * t.norm(dim=-1))


def assert_close_to_truth(actual: Tensor, truth: Tensor, eager: Tensor, factor: float = FORWARD, name: str = "output") -> None:
    """judge() for tests. Raises AssertionError."""
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}"
    wrong = judge(actual, truth, eager, factor).wrong
    assert wrong is None, f"{name}: {wrong}"
