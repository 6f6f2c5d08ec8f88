"""The memory that Triton kernels touch: only their tensors, in an order that does not matter, at 64-bit offsets.

Each op is run on what bounds() and huge() of its cases say. Two of the three checks may end
in SIGSEGV, so they run as `python tests/test_triton_memory.py guard|large <op>`.
"""

from __future__ import annotations

import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt_kernels import cases, dispatch
from gpt_kernels.names import family
from gpt_kernels.triton import INTERPRETED
from gpt_kernels.triton.slots import OPS, launcher

ROOT = pathlib.Path(__file__).parents[1]
if not INTERPRETED:
    pytest.skip("the interpreter runs with TRITON_INTERPRET=1", allow_module_level=True)

import triton_tools  # noqa: E402

REGISTERED = [op for op in OPS if dispatch.kernel_of(op, "triton")]


def modules_with(name: str) -> list:
    return [m for key, m in sys.modules.items() if key.startswith("gpt_kernels.triton.") and hasattr(m, name)]


# ---- bounds and races ----


def results(op: str, args: tuple) -> list[Tensor]:
    """What the op returns or, where it returns nothing, the argument that it writes."""
    out = launcher(op)(*args)
    return [args[-1]] if out is None else [out] if isinstance(out, Tensor) else list(out)


def rearranged(op: str, args: tuple, change: Callable[[Tensor, bool], Tensor]) -> tuple:
    """args with every tensor passed through change(tensor, whether the op takes it by stride)."""
    by_stride = op.startswith("attention")
    return tuple(change(a, by_stride and a.dim() == 4) if isinstance(a, Tensor) else a for a in args)


def surrounded(t: Tensor, by_stride: bool) -> Tensor:
    if not by_stride:
        return triton_tools.padded(t)
    if t.stride(1) < t.stride(2):
        return triton_tools.padded(t.transpose(1, 2), 8).transpose(1, 2)
    return triton_tools.padded(t, 8)


@pytest.mark.parametrize("op", REGISTERED)
def test_bounds_and_races(op, monkeypatch):
    """every access inside a tensor and ordered; and with NaN around the tensors and programs in another order, the same bits"""
    launcher(op)
    for m in modules_with("processors"):  # enough that groups of programs have more than one, and too few for every row
        monkeypatch.setattr(m, "processors", lambda device: 9)
    for i, (what, args) in enumerate(cases.of(family(op)).bounds(op)):
        with triton_tools.reordered(i), triton_tools.scan() as s:
            actual = results(op, rearranged(op, args, surrounded))
        expected = results(op, rearranged(op, args, lambda t, _: t.clone()))
        assert s.accesses, what
        for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert torch.allclose(a, e, rtol=0, atol=0, equal_nan=True), f"{what}: result {n} differs"


def in_process(check: str, op: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    r = subprocess.run([sys.executable, __file__, check, op], env=env, capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, f"exit status {r.returncode}\n{r.stdout}{r.stderr}"


def mostly_slow(*usual: str) -> list:
    """each runs in a process of its own, some for a minute: all in the long tier, the ones named in the usual one too"""
    return [op if op in usual else pytest.param(op, marks=pytest.mark.slow) for op in REGISTERED]


@pytest.mark.parametrize("op", mostly_slow("dropout_fwd", "rms_norm_fwd", "softmax_fwd"))
def test_guard_pages(op):
    """one byte past either end of any tensor, the op's own included, is a crash"""
    in_process("guard", op)


def guard(op: str) -> None:
    for i, (what, args) in enumerate(cases.of(family(op)).bounds(op)):
        for front in (False, True) if i % 3 == 0 else (False,):
            print(what, "front" if front else "back", flush=True)
            with triton_tools.allocations(lambda t, front=front: triton_tools.guarded(t, front)):
                results(op, rearranged(op, args, lambda t, _, front=front: triton_tools.guarded(t, front)))


# ---- more than 2^31 elements, of which few pages are touched ----

RSS = 2**31  # bytes: torch and Triton take a third of it, one tensor of 2^31 elements twice as much


@pytest.mark.parametrize("op", mostly_slow("gelu_bwd", "rms_norm_fwd", "softmax_fwd", "cross_entropy_bwd", "attention_fwd"))
def test_more_than_two_to_the_31_elements(op):
    in_process("large", op)


def large(op: str) -> None:
    launcher(op)
    # loops over rows would take days: as many programs as rows, of which the last few are run; and a row is one program's
    for m in modules_with("processors"):
        count = 1 if m.__name__.endswith("aligned") else 2**20
        m.processors = lambda device, count=count: count
    for m in modules_with("MOST_PROGRAMS"):
        m.MOST_PROGRAMS = 2**20
    for made in cases.of(family(op)).huge(op):
        print(made.what, flush=True)
        expected = results(op, made.small)
        with triton_tools.only(made.programs):
            actual = results(op, made.large)
        for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
            # another number of rows may be cut otherwise
            torch.testing.assert_close(made.meet(a), made.meet(e), msg=lambda m, at=f"{made.what}: result {n}": f"{at}: {m}")
        del actual, made
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert used < RSS, f"{used} bytes of memory were touched"


if __name__ == "__main__":
    torch.manual_seed(0)
    {"guard": guard, "large": large}[sys.argv[1]](sys.argv[2])
