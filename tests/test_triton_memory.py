"""The memory that Triton kernels touch: only their tensors, in an order that does not matter, at 64-bit offsets.

Each registered op is run on what its entries in CASES and LARGE say; an op without any fails. Two of the three checks may end
in SIGSEGV, so they run as `python tests/test_triton_memory.py guard|large <op>`.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gpt_kernels import dispatch
from gpt_kernels.triton import INTERPRETED, OPS

ROOT = pathlib.Path(__file__).parents[1]
if not INTERPRETED:
    pytest.skip("the interpreter runs with TRITON_INTERPRET=1", allow_module_level=True)

import triton_tools  # noqa: E402

REGISTERED = [op for op in OPS if "triton" in dispatch._ops[op].kernels]
CPU = torch.ops.gpt_kernels  # the C++ kernels' slot, for what a backward needs of its forward
RNG = torch.tensor([5, 1])


def launcher(op: str) -> Callable:
    return getattr(importlib.import_module(f"gpt_kernels.triton.{OPS[op]}"), op)


def modules_with(name: str) -> list:
    return [m for key, m in sys.modules.items() if key.startswith("gpt_kernels.triton.") and hasattr(m, name)]


# ---- boundary cases: (what, arguments) ----

SHAPES = ((1, 1), (3, 7), (17, 33), (2, 129), (5, 768), (3, 1000), (3, 1025), (2, 4099))
DTYPES = (torch.float32, torch.bfloat16)
Cases = Iterator[tuple[str, tuple]]


def rows(shapes=SHAPES) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    for i, shape in enumerate(shapes):
        dtype = DTYPES[i % 2]
        yield f"{shape} {dtype}", torch.randn(shape).to(dtype), dtype
        if shape[1] > 512:
            dtype = DTYPES[1 - i % 2]
            yield f"{shape} {dtype}", torch.randn(shape).to(dtype), dtype


def like(x: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape or x.shape).to(x.dtype)


def dropout_fwd() -> Cases:
    for what, x, _ in rows():
        yield what, (x, None, RNG, 0.3)
        yield f"{what} residual", (x, like(x), RNG, 0.3)


def gelu_fwd() -> Cases:
    for what, x, _ in rows():
        yield what, (x, None, True)
        yield f"{what} bias", (x, like(x, x.shape[1]), False)
    yield "rows in turn", (torch.randn(200, 65), torch.randn(65), True)


def gelu_bwd() -> Cases:
    for what, (x, bias, tanh) in gelu_fwd():
        yield what, (like(x), x, bias, tanh)


def layer_norm_fwd() -> Cases:
    for what, x, dtype in rows((*SHAPES, (200, 65), (3, 20011))):
        N = x.shape[1]
        yield what, (x, None, None, 1e-5)
        yield f"{what} weight, bias", (x, like(x, N), torch.randn(N) if dtype == torch.float32 else like(x, N), 1e-5)


def layer_norm_bwd() -> Cases:
    for what, (x, weight, bias, eps) in layer_norm_fwd():
        _, mean, rstd = CPU.layer_norm_fwd(x, weight, bias, eps)
        yield what, (like(x), x, weight, mean, rstd, bias is not None)


def rms_norm_fwd() -> Cases:
    for what, (x, weight, _, eps) in layer_norm_fwd():
        yield what, (x, weight, eps)


def rms_norm_bwd() -> Cases:
    for what, (x, weight, eps) in rms_norm_fwd():
        yield what, (like(x), x, weight, CPU.rms_norm_fwd(x, weight, eps)[1])


def softmax_fwd() -> Cases:
    for what, x, _ in rows((*SHAPES, (2, 20011))):
        yield what, (x, None, 0.5, False)
        yield f"{what} mask", (x, torch.rand(x.shape) > 0.2, 1.0, False)
    x = torch.randn(2, 3, 5, 33).bfloat16()
    yield "causal", (x, None, 1.0, True)
    yield "mask of a row", (x, torch.randn(33), 1.0, True)
    yield "mask of heads", (x, torch.randn(2, 1, 1, 33).bfloat16(), 1.0, False)


def softmax_bwd() -> Cases:
    for what, (x, mask, scale, causal) in softmax_fwd():
        yield what, (like(x), CPU.softmax_fwd(x, mask, scale, causal), scale, causal)


OPTIONS = ((-100, 1, 0.0, 0.0, 0.0), (-100, 0, 0.1, 1e-4, 0.0), (2, 2, 0.1, 0.0, 30.0))


def cross_entropy_fwd() -> Cases:
    for i, (what, x, _) in enumerate(rows((*SHAPES, (2, 20011)))):
        target = torch.randint(0, x.shape[1], x.shape[:1])
        target[1:2] = OPTIONS[i % 3][0]
        yield what, (x, target, *OPTIONS[i % 3], OPTIONS[i % 3][1] != 0)
        yield what, (x, target, *OPTIONS[0], False)


def cross_entropy_bwd() -> Cases:
    for what, (x, target, *options, _) in cross_entropy_fwd():
        loss, _, lse, _ = CPU.cross_entropy_fwd(x, target, *options, False)
        yield what, (torch.randn(loss.shape), x, target, lse, *options)


def cross_entropy_bwd_out() -> Cases:
    for what, args in cross_entropy_bwd():
        yield what, (*args, False, args[1].clone())


def attention_fwd() -> Cases:
    """(B, H, T, D) and (B, T, H, D) in memory; heads, lengths, head dimensions and score steps in turn"""
    steps = {  # bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset, window_left, window_right
        "plain": (None, None, None, 0.125, 0.0, 0.0, 0, -1, -1),
        "causal": (None, None, None, 0.125, 0.0, 0.0, 0, -1, 0),
        "window": (None, None, None, 0.125, 0.0, 0.0, 3, 20, 5),
        "softcap": (None, None, None, 0.125, 5.0, 0.0, 0, -1, 0),
        "dropout": (None, None, RNG, 0.125, 0.0, 0.2, 0, -1, 0),
        "alibi": (None, torch.rand(4), None, 0.125, 0.0, 0.0, 0, -1, 0),
    }
    sizes = ((1, 4, 4, 1, 1, 64), (2, 4, 2, 65, 65, 64), (1, 4, 1, 33, 130, 80), (1, 4, 4, 130, 17, 128), (1, 4, 4, 31, 33, 40))
    for i, (B, H, Hk, Tq, Tk, D) in enumerate(sizes):
        for j, (what, options) in enumerate(steps.items()):
            if (i + j) % 3:
                continue
            dtype = (torch.float16, torch.bfloat16, torch.float32)[(i + j // 3) % 3]
            q, k, v = (torch.randn(B, t, h, D).to(dtype).transpose(1, 2) for t, h in ((Tq, H), (Tk, Hk), (Tk, Hk)))
            if j % 2:
                q, k, v = (t.contiguous() for t in (q, k, v))
            yield f"{tuple(q.shape)} {Tk} {dtype} {what}", (q, k, v, *options)
            if what == "plain" and i:
                for bias in (torch.randn(1, H, Tq, Tk).to(dtype), torch.rand(B, 1, 1, Tk) > 0.2):
                    yield f"{tuple(q.shape)} {Tk} {dtype} bias {tuple(bias.shape)}", (q, k, v, bias, *options[1:])


def attention_bwd() -> Cases:
    for what, (q, k, v, bias, *options) in attention_fwd():
        o, lse = CPU.attention_fwd(q, k, v, bias, *options)
        need_dbias = bias is not None and bias.dtype != torch.bool
        yield what, (like(q).copy_(torch.randn(q.shape)), q, k, v, o, lse, bias, *options, need_dbias)


CASES = {f.__name__: f for f in (
    dropout_fwd, gelu_fwd, gelu_bwd, layer_norm_fwd, layer_norm_bwd, rms_norm_fwd, rms_norm_bwd, softmax_fwd, softmax_bwd,
    cross_entropy_fwd, cross_entropy_bwd, cross_entropy_bwd_out, attention_fwd, attention_bwd,
)}  # fmt: skip


def test_every_op_has_cases():
    assert REGISTERED and set(REGISTERED) <= set(CASES) and set(REGISTERED) <= set(LARGE)


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
    for i, (what, args) in enumerate(CASES[op]()):
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
    for i, (what, args) in enumerate(CASES[op]()):
        for front in (False, True) if i % 3 == 0 else (False,):
            print(what, "front" if front else "back", flush=True)
            with triton_tools.allocations(lambda t, front=front: triton_tools.guarded(t, front)):
                results(op, rearranged(op, args, lambda t, _, front=front: triton_tools.guarded(t, front)))


# ---- more than 2^31 elements, of which few pages are touched ----

# what, large arguments, the same in small, the part of a result where they meet, how many of the last programs are run
Large = Iterator[tuple[str, tuple, tuple, Callable[[Tensor], Tensor], int]]


def tail(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])[-1] if t.dim() > 1 else t[-1:]


def row_of_matrix(t: Tensor) -> Tensor:
    """not the gradients of parameters, which are sums over all rows"""
    return tail(t) if t.dim() > 1 else t[:0]


def last_row_of(columns: int) -> Callable[[Tensor], Tensor]:
    """nothing of results that have other columns"""
    return lambda t: t[-1] if t.shape[-1:] == (columns,) else t.reshape(-1)[:0]


def large_rows(*shape: int, count: int = 1, dtype=torch.bfloat16) -> list[tuple[Tensor, Tensor]]:
    """count times (tensor, copy of its last rows): more than 2^31 elements, or a statistic of each row"""
    pairs = []
    for _ in range(count):
        t = torch.empty(shape, dtype=dtype)
        t[-16:] = torch.randn(16, *shape[1:])
        pairs.append((t, t[-16:].clone()))
    return pairs


def pair_up(what: str, args: list, meet=tail, programs: int = 8) -> Large:
    """args: pairs (large, small), or one value for both"""
    yield what, *(tuple(a[i] if isinstance(a, tuple) else a for a in args) for i in (0, 1)), meet, programs


# rows that a program keeps, and rows that it goes over by pieces; M divides by all numbers of programs that loop over rows
N, LONG = 4096, 2**17
M, FEW = 2**31 // N + 2**14, 2**31 // LONG + 2**9


def large_dropout_fwd() -> Large:
    x, residual = large_rows(M, N, count=2)
    yield from pair_up("rows", [x, residual, RNG, 0.0])


def large_gelu_fwd() -> Large:
    yield from pair_up("flat", [*large_rows(M, N), None, True])
    yield from pair_up("rows", [*large_rows(M, N), torch.randn(N), True])


def large_gelu_bwd() -> Large:
    yield from pair_up("flat", [*large_rows(M, N, count=2), None, True], row_of_matrix)
    yield from pair_up("rows", [*large_rows(M, N, count=2), torch.randn(N), True], row_of_matrix)


def large_norm_fwd(parameters: int) -> Callable[[], Large]:
    def large() -> Large:
        for m, n in ((M, N), (FEW, LONG)):
            yield from pair_up(f"rows of {n}", [*large_rows(m, n), *torch.randn(parameters, n), 1e-5])

    return large


def large_norm_bwd(statistics: int, *rest) -> Callable[[], Large]:
    def large() -> Large:
        for m, n in ((M, N), (FEW, LONG)):
            saved = large_rows(m, count=statistics, dtype=torch.float32)
            args = [*large_rows(m, n, count=2), torch.randn(n), *saved, *rest]
            yield from pair_up(f"rows of {n}", args, row_of_matrix, programs=1)

    return large


def large_softmax_fwd() -> Large:
    for m, n in ((M, N), (FEW, LONG)):
        yield from pair_up(f"rows of {n}", [*large_rows(m, n), None, 1.0, False])


def large_softmax_bwd() -> Large:
    for m, n in ((M, N), (FEW, LONG)):
        yield from pair_up(f"rows of {n}", [*large_rows(m, n, count=2), 1.0, False])


def large_cross_entropy(op: str) -> Callable[[], Large]:
    def large() -> Large:
        for V in (N, 50257):
            rows = 2**31 // V + 17
            logits = large_rows(rows, V)[0]
            target = (torch.zeros(rows, dtype=torch.int64), torch.zeros(16, dtype=torch.int64))
            what, options, total = f"rows of {V}", (-100, 0, 0.0, 0.0, 0.0), (-100, 2, 0.0, 0.0, 0.0)
            if op == "cross_entropy_fwd":
                yield from pair_up(what, [logits, target, *options, False], lambda t: t[..., -1:], programs=1)
                args = [logits, target, *total, True]
                yield from pair_up(f"{what}, gradient", args, last_row_of(V), programs=1)
                continue
            dloss = large_rows(rows, dtype=torch.float32)[0]
            small = CPU.cross_entropy_fwd(logits[1], target[1], *options, False)[2]
            lse = (torch.empty(2, rows), small)
            lse[0][:, -16:] = small
            out = [False, (torch.empty_like(logits[0]), torch.empty_like(logits[1]))] if op == "cross_entropy_bwd_out" else []
            yield from pair_up(what, [dloss, logits, target, lse, *options, *out], programs=1)

    return large


def strided(B: int, H: int, T: int, D: int, stride: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(tensor of these strides, its contiguous copy)"""
    small = torch.randn(B, H, T, D).bfloat16()
    extent = 1 + sum((n - 1) * s for n, s in zip((B, H, T, D), (*stride, 1), strict=True))
    return torch.empty(extent, dtype=torch.bfloat16).as_strided(small.shape, (*stride, 1)).copy_(small), small


def large_attention(backward: bool) -> Callable[[], Large]:
    options = (None, None, None, 0.125, 0.0, 0.0, 0, -1, 0)

    def given(q, k, v) -> list:
        if not backward:
            return [q, k, v, *options]
        o, lse = CPU.attention_fwd(q[1], k[1], v[1], *options)
        do = torch.randn(o.shape).bfloat16()
        return [(torch.empty_strided(q[0].shape, q[0].stride(), dtype=o.dtype).copy_(do), do), q, k, v, o, lse, *options, False]

    def large() -> Large:
        for what, shape, stride in (
            ("tokens far apart", (1, 1, 17, 64), (64, 64, 2**27 + 64)),
            ("heads far apart", (1, 3, 17, 64), (64, 2**30 + 64, 64)),
            ("batches far apart", (3, 1, 17, 64), (2**30 + 64, 64, 64)),
        ):
            yield from pair_up(what, given(*(strided(*shape, stride) for _ in range(3))), lambda t: t)
        # as many heads as make the outputs large, too; the last one is computed
        H, T, D = 2**31 // (64 * 64) + 1, 64, 64
        pairs = []
        for length in (T, 16, 16, T, T):
            small = torch.randn(1, 1, length, D).bfloat16()
            pairs.append((torch.empty(1, H, length, D, dtype=torch.bfloat16), small))
        q, k, v, o, do = pairs
        args = [q, k, v, *options]
        if backward:
            o[1][:], lse = CPU.attention_fwd(q[1], k[1], v[1], *options)
            lse = (torch.empty(1, H, T), lse)
            lse[0][:, -1:] = lse[1]
            args = [do, q, k, v, o, lse, *options, False]
        for whole, small in pairs:
            whole[:, -1:] = small
        yield from pair_up("many heads", args, lambda t: t[:, -1:] if t.dim() > 1 else t)

    return large


LARGE: dict[str, Callable[[], Large]] = {
    "dropout_fwd": large_dropout_fwd,
    "gelu_fwd": large_gelu_fwd,
    "gelu_bwd": large_gelu_bwd,
    "layer_norm_fwd": large_norm_fwd(2),
    "layer_norm_bwd": large_norm_bwd(2, True),
    "rms_norm_fwd": large_norm_fwd(1),
    "rms_norm_bwd": large_norm_bwd(1),
    "softmax_fwd": large_softmax_fwd,
    "softmax_bwd": large_softmax_bwd,
    **{op: large_cross_entropy(op) for op in ("cross_entropy_fwd", "cross_entropy_bwd", "cross_entropy_bwd_out")},
    "attention_fwd": large_attention(False),
    "attention_bwd": large_attention(True),
}
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
    for what, args, small, meet, programs in LARGE[op]():
        print(what, flush=True)
        expected = results(op, small)
        with triton_tools.only(programs):
            actual = results(op, args)
        for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
            # another number of rows may be cut otherwise
            torch.testing.assert_close(meet(a), meet(e), msg=lambda m, at=f"{what}: result {n}": f"{at}: {m}")
        del actual, args
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert used < RSS, f"{used} bytes of memory were touched"


if __name__ == "__main__":
    torch.manual_seed(0)
    {"guard": guard, "large": large}[sys.argv[1]](sys.argv[2])
