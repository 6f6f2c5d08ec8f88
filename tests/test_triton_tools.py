"""The mended interpreter and its watch: each check is seen red on a kernel that is wrong on purpose."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from grids import BACKEND

ROOT = pathlib.Path(__file__).parents[1]
if BACKEND != "triton":
    pytest.skip("the interpreter runs with TRITON_INTERPRET=1", allow_module_level=True)

import triton_tools  # noqa: E402

from gpt_kernels.triton.interpreter import mend_bfloat16  # noqa: E402


def interpreted(source: str) -> subprocess.CompletedProcess:
    """`source` in a process of its own, the interpreter as Triton ships it."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=300)


# ---- what is mended ----


@triton.jit
def copy_kernel(y, x, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i, i < n, 0.0).to(y.dtype.element_ty), i < n)


@triton.jit
def dot_kernel(c, a, b, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def bfloat16_is_right() -> tuple[bool, bool]:
    """(rounding to nearest, products)"""
    x = torch.linspace(-3, 3, 1024)
    y, c = torch.zeros(1024, dtype=torch.bfloat16), torch.zeros(16, 16)
    copy_kernel[(1,)](y, x, 1024, N=1024)
    a, b = (torch.randint(-2, 3, (16, 16)).bfloat16() for _ in range(2))
    dot_kernel[(1,)](c, a, b, N=16)
    return torch.equal(y, x.bfloat16()), torch.equal(c, a.float() @ b.float())


def test_bfloat16_is_mended():
    mend_bfloat16()
    assert bfloat16_is_right() == (True, True)


def test_a_user_s_process_has_it_mended():
    """What use_backend recommends, in a process without our tests."""
    r = interpreted(ATTENTION)
    assert float(r.stdout or "nan") < 0.05, r.stdout + r.stderr


ATTENTION = """
import torch, gpt_kernels as gk
q, k, v = (torch.randn(1, 2, 20, 16).bfloat16() for _ in range(3))
with gk.use_backend("triton"):
    y = gk.scaled_dot_product_attention(q, k, v)
print((y.double() - torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())).abs().max().item())
"""


def test_bfloat16_still_needs_mending():
    """Red with a Triton whose interpreter is right by itself: then drop what mend_bfloat16 no longer needs to do."""
    # kernels need a file, so this one is imported; nothing mends where our launcher launches nothing
    r = interpreted("import test_triton_tools as t; print(t.bfloat16_is_right())")
    assert r.stdout.strip() == "(False, False)", r.stdout + r.stderr


# ---- which backend the op tests run on ----


def test_op_tests_run_on_the_backend_in_their_name():
    tests = ["tests/test_dropout.py", "-k", "nothing_to_drop", "--setup-show", "-o", "addopts=", "-p", "no:cacheprovider"]
    r = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "SETUP    F backend['triton']" in r.stdout and "1 passed" in r.stdout, r.stdout


# ---- scan ----


@triton.jit
def row_sums(out, x, n, WRONG: tl.constexpr, N: tl.constexpr):
    """out[row] = sum of x[row]"""
    row, i = tl.program_id(0), tl.arange(0, N)
    if WRONG == "reads past its row's end":
        v = tl.load(x + row * n + i, i < n + 1, 0.0)
    elif WRONG == "reads before its row":
        v = tl.load(x + row * n + i - 1, i < n, 0.0)
    else:
        v = tl.load(x + row * n + i, i < n, 0.0)
    if WRONG == "writes where the next one does":
        tl.store(out + row + tl.arange(0, 2), tl.sum(v, 0), row + tl.arange(0, 2) < tl.num_programs(0))
    elif WRONG == "reads what another writes":
        tl.store(out + row, tl.sum(v, 0) + tl.load(out + (row + 1) % tl.num_programs(0)))
    elif WRONG == "adds atomically":
        tl.atomic_add(out, tl.sum(v, 0))
    elif WRONG == "stores twice at once":
        tl.store(out + row + tl.arange(0, 2) * 0, tl.sum(v, 0))
    elif WRONG == "reads back without a barrier":
        tl.store(out + row, tl.sum(v, 0))
        tl.store(out + row, tl.load(out + row) * 2)
    else:
        tl.store(out + row, tl.sum(v, 0))


WRONG_SUMS = {
    "reads past its row's end": r"row_sums: load outside the tensors by program 3 \(1 elements\) at x\[400\]",
    "reads before its row": r"load outside the tensors by program 0 \(1 elements\)",
    "writes where the next one does": r"race: store by program 1 unordered with write by program 0 at out\[1\] of shape \(4,\)",
    "reads what another writes": r"race: store by program 1 unordered with read by program 0 at out\[1\]",
    "adds atomically": "atomic on floats",
    "stores twice at once": "one store of program 0 to an element twice",
    "reads back without a barrier": "load of what program 0 stored with no barrier",
}


@pytest.mark.parametrize("wrong", WRONG_SUMS)
def test_scan_is_red(wrong):
    with pytest.raises(AssertionError, match=WRONG_SUMS[wrong]), triton_tools.scan():
        row_sums[(4,)](torch.zeros(4), torch.ones(4, 100), 100, WRONG=wrong, N=128)


def test_scan_is_green():
    out, x = torch.zeros(4), torch.randn(4, 100)
    with triton_tools.scan() as s, triton_tools.reordered(0):
        row_sums[(4,)](out, x, 100, WRONG="", N=128)
    assert s.accesses == 8 and torch.allclose(out, x.sum(1), atol=1e-5)


def test_scan_sees_gaps_between_rows():
    """reading on into the space between two rows of a tensor is not in the tensor"""
    x = torch.zeros(4, 128)[:, :100]
    with (
        pytest.raises(AssertionError, match=r"load outside the tensors by program 0 \(28 elements\) at x\[100\]"),
        triton_tools.scan(),
    ):
        copy_kernel[(1,)](torch.zeros(128), x, 128, N=128)


@triton.jit
def last_adds(out, partials, arrivals, WRONG: tl.constexpr, N: tl.constexpr):
    """The last of the programs to arrive adds what all have stored, and leaves the counter at 0."""
    pid, n = tl.program_id(0), tl.num_programs(0)
    tl.store(partials + pid, pid + 1.0)
    if WRONG != "no barrier":
        tl.debug_barrier()
    if WRONG == "stores after arriving":
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
        tl.store(partials + pid, pid + 2.0)
    elif WRONG == "relaxed":
        arrived = tl.atomic_add(arrivals, 1, sem="relaxed")
    elif WRONG == "acquire only":
        arrived = tl.atomic_add(arrivals, 1, sem="acquire")
    else:
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
    last = n - 2 if WRONG == "one too early" else n - 1
    if arrived == last:
        tl.store(arrivals, 0)
        i = tl.arange(0, N)
        tl.store(out, tl.sum(tl.load(partials + i, i < n, 0.0), 0))


@pytest.mark.parametrize("seed", range(3))
def test_scan_knows_the_last_arriver(seed):
    out, arrivals = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with triton_tools.scan(), triton_tools.reordered(seed):
        last_adds[(5,)](out, torch.zeros(5), arrivals, WRONG="", N=8)
    assert out.item() == 15 and arrivals.item() == 0


@pytest.mark.parametrize("wrong", ["no barrier", "stores after arriving", "relaxed", "acquire only", "one too early"])
def test_scan_is_red_on_a_broken_last_arriver(wrong):
    with pytest.raises(AssertionError, match="race"), triton_tools.scan():
        last_adds[(5,)](torch.zeros(1), torch.zeros(5), torch.zeros(1, dtype=torch.int32), WRONG=wrong, N=8)


# ---- memory ----


@triton.jit
def copy_around_kernel(y, x, before, after, N: tl.constexpr):
    i = tl.arange(0, N) - 1
    tl.store(y + i + 1, tl.load(x + i, (i >= -before) & (i < after), 0.0))


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("before, after, red_at", [(0, 100, ()), (0, 101, (False,)), (1, 100, (True,))])
def test_guard_pages(before, after, front, red_at):
    """one element too far is a crash at the end that is guarded; the other end has the rest of a page"""
    call = f"t.copy_around_kernel[(1,)](torch.zeros(128), g(torch.ones(100), {front}), {before}, {after}, N=128)"
    r = interpreted(f"import torch, test_triton_tools as t; from triton_tools import guarded as g; {call}")
    assert r.returncode == (-signal.SIGSEGV if front in red_at else 0), r.stderr


def test_padding_is_nan():
    x = torch.randn(3, 5)
    for gap in (0, 3):
        p = triton_tools.padded(x, gap)
        assert torch.equal(p, x) and p.stride() == (5 + gap, 1)
        around = p.as_strided((p.stride(0) * 3 + 2,), (1,), p.storage_offset() - 1)
        assert around[0].isnan() and around[-1].isnan() and around.isnan().sum() == 2 + 3 * gap


@triton.jit
def last_row(y, x, stride, WIDE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + row * stride + i))


@pytest.mark.parametrize("wide", [True, False])
def test_offsets_past_int32(wide):
    source = f"""
import torch, test_triton_tools as t, triton_tools
x, y = torch.empty(5, 2**29 + 16, dtype=torch.int8), torch.zeros(16, dtype=torch.int8)
x[4, :16] = 7
with triton_tools.only(1):
    t.last_row[(5,)](y, x, x.stride(0), WIDE={wide}, N=16)
assert (y == 7).all()
"""
    assert (interpreted(source).returncode == 0) == wide
