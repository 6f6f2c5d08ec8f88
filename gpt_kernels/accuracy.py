"""The one tolerance rule. A kernel may be at most a little worse than plain PyTorch in the same dtype, both against fp64.

    |actual - truth| <= factor * max|eager - truth| + floor        for every element
    floor = 2 * max|(truth + 0.3) - 0.3 - truth| in actual's dtype    (two roundings; exact cases have no eager error)

    at least 16 eps max(1, max|truth|) in float32 (over few elements eager may be exact by luck)
    and 1e-12 max(1, max|truth|) in float64, where there is no wider truth to measure eager's error with

And every row's cosine with the truth is close to 1, so that one bad row cannot hide behind a global maximum,
and NaN and inf stand in the same places.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, WEIGHT_GRADIENT, INPUT_GRADIENT = 1.5, 2.0, 3.0
# 1 - cosine of a row: a few roundings of that dtype, squared, with room for short rows
COSINE = {torch.float64: 1e-13, torch.float32: 1e-9, torch.float16: 1e-5, torch.bfloat16: 1e-3}


RELATIVE_FLOOR = {torch.float64: 1e-12, torch.float32: 16 * 2.0**-23}


def floor_of(truth: Tensor, dtype: torch.dtype) -> float:
    finite = truth[torch.isfinite(truth)]
    if not finite.numel():
        return 0.0
    rounded = finite.to(dtype)
    two_roundings = 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().double().item()
    return max(two_roundings, RELATIVE_FLOOR.get(dtype, 0.0) * max(1.0, finite.abs().max().item()))


def assert_close_to_truth(actual: Tensor, truth: Tensor, eager: Tensor, factor: float = FORWARD, name: str = "output") -> None:
    """actual: a kernel's result; eager: plain PyTorch's in the same dtype; truth: the same computed in float64."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}"
    if actual.is_cuda and actual.dtype == torch.float32:
        factor *= 3  # exponentials of a GPU's special function unit err by 2^-22
    a, t, e = actual.detach().double(), truth.detach(), eager.detach().double()
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        # where the truth has it; also where eager has: float16 may overflow where float64 does not
        wrong = (test(t) & ~test(a)) | (test(a) & ~(test(t) | test(e)))
        assert not wrong.any(), f"{name}: {kind} in other places than the truth has them"
    ok = torch.isfinite(a) & torch.isfinite(t) & torch.isfinite(e)
    if not ok.any():
        return
    a, t, e = (torch.where(ok, x, 0.0) for x in (a, t, e))
    eager_error, floor = (e - t).abs().max().item(), floor_of(t, actual.dtype)
    error, allowed = (a - t).abs(), factor * eager_error + floor
    worst = error.max().item()
    if worst > allowed:
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: error {worst:.3e} at {where} (got {a[where].item():.6g}, truth {t[where].item():.6g}), "
            f"allowed {allowed:.3e} = {factor} x eager's {eager_error:.3e} + floor {floor:.3e}"
        )
    if t.dim() == 0 or t.shape[-1] < 2:
        return
    # rows so small that the allowed error is a large part of them say nothing about their direction
    large = t.norm(dim=-1) > 30 * allowed * t.shape[-1] ** 0.5
    if not large.any():
        return
    deviation, of_eager = _deviation(a[large], t[large]), _deviation(e[large], t[large]).max()
    # eager may be exact in a row by luck: any row may err as much as eager's elements do on the average
    usual = (e - t).square().mean() * t.shape[-1] / (2 * t[large].square().sum(-1))
    limit = factor**2 * torch.maximum(usual, of_eager).clamp(min=COSINE[actual.dtype] / factor**2)
    row = int((deviation / limit).argmax())
    assert deviation[row] <= limit[row], (
        f"{name}: a row's cosine with the truth is off by {deviation[row]:.3e}, allowed {limit[row]:.3e}"
    )


def _deviation(a: Tensor, t: Tensor) -> Tensor:
    """Each row's 1 - cosine."""
    return 1 - (a * t).sum(-1) / (a.norm(dim=-1) * t.norm(dim=-1))
