"""Every op, forward and backward, over the magnitudes of a dtype: each input in turn, from subnormals to the largest.

Where plain PyTorch in the same dtype has a number, ours is as close to float64's result as accuracy.py's multiple of its error
or a few last places of the largest result, with no floor beside that: results of 1e-30 are held to 1e-30. Where it has NaN or
inf, ours is right, or NaN or inf: never another number.
"""

import itertools

import pytest
import torch
from grids import BACKEND, DTYPES, INTERPRETED, ISAS
from op_checks import forward_backward

import gpt_kernels
from gpt_kernels import cases
from gpt_kernels.accuracy import INPUT_GRADIENT

ON_THE_BACKEND_UNDER_TEST = True
SERVERS = (*ISAS, "reference") if BACKEND == "cpu" else ISAS
CASES = {f"{op}, {f.what}".removesuffix(", "): f for op in cases.families() for f in cases.of(op).magnitudes()}
if BACKEND != "cpu":
    CASES.pop("attention, one query")


def magnitudes(dtype: torch.dtype) -> list[float]:
    if dtype == torch.float16:
        return [2e-7, 1e-5, 1e-4, 1e-3, 1.0, 1e3, 3e4]
    exponents = [-42, -38, -37, -30, -20, -10, 0, 5, 14, 19, 30, 38]
    if not INTERPRETED:
        exponents += [-44, -40, -25, -19, -5, 2, 10, 14, 18, 20, 35]
    return [10.0**e for e in exponents]


def check(actual, truth, eager, what: str, floor: float = 0.0, far: bool = False) -> None:
    """far: sums of a row may leave float's range in one order and not in another; what is finite must be right all the same."""
    kind = torch.finfo(actual.dtype)
    a, e, t = actual.double(), eager.double(), truth.to(actual.dtype).double()  # t: inf where the dtype ends
    usable = e.isfinite() & t.isfinite()
    error = (e - t).abs()[usable].max().item() if usable.any() else 0.0
    top = t[t.isfinite()].abs().max().item() if t.isfinite().any() else 0.0
    last = (16 if kind.bits == 32 else 2) * kind.eps * top
    # beside that some of the smallest numbers there are: an intermediate one may be among them, and rstd, of at most 316, its
    # factor; the hardware's bfloat16 has no subnormals
    lowest = 16 * kind.tiny if actual.dtype == torch.bfloat16 else (1000 if kind.bits == 32 else 4) * kind.tiny * kind.eps
    # where plain PyTorch has no number at all, nearly all digits are more than it has
    last = torch.where(e.isfinite(), last, 1e-4 * top)
    right = ((a - t).abs() <= INPUT_GRADIENT * error + last + lowest + floor) | (a == t)
    # plain PyTorch has no number, or one that is all error
    lost = ~e.isfinite() | (error > 0.5 * top) | torch.tensor(far or floor > kind.max)
    bad = ~(right | lost & ~a.isfinite())
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        got = f"got {a[at]:.9g}, truth {truth[at]:.9g}, eager {e[at]:.9g}"
        raise AssertionError(f"{what} at {at}: {got} (its error {error:.3g})")


def floor_of(name: str, i: int, given: list) -> float:
    """attention's dq, dk and dbias: dp and delta are sums in different orders, so that what is left of their difference where a
    row is saturated is a rounding of dp; every kernel of the kind has it, torch's too. A cap's slope is such a difference."""
    kind = torch.finfo(given[0].dtype)
    eps = (16 if kind.bits == 32 else 2) * kind.eps
    top = [t.double().abs().max().item() for t in given]
    if name.startswith("attention") and i in (1, 2, 4):
        return eps * 4 * top[-1] * top[2] * {1: 0.25 * top[1], 2: 0.25 * 5 * top[0], 4: 1.0}[i]
    return eps * top[-1] if "cap" in name and i == 1 else 0.0


def overflows(name: str, given: list) -> bool:
    """A product of a query and a key may be beyond the dtype's range: infinite, of a sign that depends on the sum's order."""
    top = [t.double().abs().max().item() for t in given]
    return name.startswith("attention") and top[0] * top[1] * 16 > 1e38


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)  # for float64 there is no wider truth
@pytest.mark.parametrize("name", CASES)
def test_magnitudes(name, dtype):
    _, ours, eager, shapes = CASES[name]
    shapes = [*shapes, forward_backward(eager, [torch.zeros(s) for s in shapes])[0].shape]  # the output gradient's
    near_one = [(torch.rand(s) * 1.5 + 0.5) * torch.randn(s).sign() for s in shapes]
    for which, magnitude in itertools.product([*range(len(shapes)), None], magnitudes(dtype)):
        given = [(t * (magnitude if which in (i, None) else 1.0)).to(dtype) for i, t in enumerate(near_one)]
        if overflows(name, given):
            continue
        *args, dy = given
        same, truth = (forward_backward(eager, args, dy, wide) for wide in (None, torch.float64))
        of = "everything" if which is None else "dy" if which == len(args) else f"argument {which}"
        for server in SERVERS:
            with gpt_kernels.use_backend(server) if server == "reference" else gpt_kernels.use_isa(server):
                actual = forward_backward(ours, args, dy)
            for i, (a, e, t) in enumerate(zip(actual, same, truth, strict=True)):
                what = f"{server}: {of} of {magnitude:g}: {f'gradient {i - 1}' if i else 'output'}"
                check(a, t, e, what, floor_of(name, i, given), magnitude > 1e37)
