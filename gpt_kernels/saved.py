"""What accelerate() served in a program, and what that saved: each kind of call once more, by ours and by what stood there.

accelerate.recorded() names the kinds. Of each, tensors of its dtypes and shapes are made here, of random numbers, and the call
is timed with our kernels in ATen's slots and out of them, in turn. A kind above autograd that trained is timed forward and
backward; of the others, the backward is a slot of its own. What is saved is a difference of times measured after the program.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .accelerate import SLOTS, accelerated
from .table import duration

SECONDS = 0.3  # of one kind, about, for each of the two
ROUNDS = 5, 40  # at least, at most
SHORT = 2e-4  # seconds: a call that takes less is repeated within a round


@dataclass
class Saved:
    """calls: of the kind, in the program. ours, torchs: seconds of one, None where it could not be called again."""

    slot: str
    kind: str
    calls: int
    ours: float | None
    torchs: float | None

    @property
    def seconds(self) -> float:
        return 0.0 if self.ours is None or self.torchs is None else self.calls * (self.torchs - self.ours)


def saved(kinds: Counter[str], device: str = "cpu") -> list[Saved]:
    """Each kind of accelerate.recorded() timed again, those first that saved most."""
    rows = []
    for kind, calls in kinds.items():
        slot, _, rest = kind.partition(" ")
        try:
            ours, torchs = _timed(_OF[slot](*_words(rest), device), next(op for op in SLOTS if slot in SLOTS[op]))
        except (RuntimeError, MemoryError):  # its tensors beside the program's do not fit
            rows.append(Saved(slot, rest, calls, None, None))
            continue
        rows.append(Saved(slot, rest, calls, ours, torchs))
    return sorted(rows, key=lambda row: -row.seconds)


def table(rows: list[Saved]) -> tuple[list[str], list[list[str]]]:
    """(head, cells) for people."""
    cells = []
    for row in rows:
        times = ["-", "-"] if row.ours is None or row.torchs is None else [duration(row.torchs), duration(row.ours)]
        sign = "-" if row.seconds < 0 else ""
        cells.append([row.slot, row.kind, str(row.calls), *times, sign + duration(abs(row.seconds))])
    return ["ATen's slot", "kind", "calls", "torch's", "ours", "saved"], cells


def _timed(call: Callable[[], object], op: str) -> tuple[float, float]:
    """Seconds of a call with ours in the slots of op, and without."""

    def once(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    samples: tuple[list[float], list[float]] = ([], [])
    times = 1
    while (len(samples[0]) < ROUNDS[0] or sum(map(sum, samples)) * times < 2 * SECONDS) and len(samples[0]) < ROUNDS[1]:
        with accelerated(ops=(op,)):
            call()
            ours = once(times)
        call()
        torchs = once(times)
        if times == 1 and min(ours, torchs) < SHORT:
            times = int(SHORT / min(ours, torchs)) + 1
            continue
        samples[0].append(ours)
        samples[1].append(torchs)
    return statistics.median(samples[0]), statistics.median(samples[1])


# ---- each slot's call, made again from the words of its kind ----


def _words(rest: str) -> tuple[list[tuple[torch.dtype, list[int]]], list[str]]:
    """ "float32 2x512x768 1 bias": the tensors, and what stands behind them."""
    words, tensors = rest.split(" "), []
    while len(words) > 1 and isinstance(getattr(torch, words[0], None), torch.dtype):
        tensors.append((getattr(torch, words[0]), [int(n) for n in words[1].split("x") if n]))
        words = words[2:]
    return tensors, words


def _of_all(make: Callable) -> Callable:
    def call(tensors, more, device):
        return make(*(torch.randn(shape, dtype=dtype, device=device) for dtype, shape in tensors), *more)

    return call


def _column(x: Tensor, n: str, dtype: str) -> tuple[list[int], Tensor | None]:
    shape = list(x.shape[-int(n) :])
    return shape, None if dtype == "-" else torch.randn(shape, dtype=getattr(torch, dtype), device=x.device)


def _layer_norm(backward: bool) -> Callable:
    def make(x, n, dtype, bias):
        shape, weight = _column(x, n, dtype)
        b = None if bias == "-" else torch.randn(shape, dtype=x.dtype if weight is None else weight.dtype, device=x.device)
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, b, 1e-5)
        if not backward:
            return lambda: torch.native_layer_norm(x, shape, weight, b, 1e-5)
        mask = [True, weight is not None, b is not None]
        return lambda: torch.ops.aten.native_layer_norm_backward(y, x, shape, mean, rstd, weight, b, mask)

    return _of_all(make)


def _rms_norm(backward: bool) -> Callable:
    def make(x, n, dtype):
        shape, weight = _column(x, n, dtype)
        if backward:  # torch has no op for it on a CPU: forward and backward, as torch composes them
            return _training(lambda x: torch.nn.functional.rms_norm(x, shape, weight), x)
        return lambda: torch.nn.functional.rms_norm(x, shape, weight)

    return _of_all(make)


def _training(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable:
    x = x.requires_grad_()
    dy = torch.ones_like(call(x))
    return lambda: torch.autograd.grad(call(x), x, dy)


def _flash(backward: bool) -> Callable:
    def make(q, k, mask):
        more = {}
        if mask == "mask":
            more["attn_mask"] = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
        ops, causal = torch.ops.aten, mask == "causal"
        forward = ops._scaled_dot_product_flash_attention_for_cpu
        if not backward:
            return lambda: forward(q, k, k, 0.0, causal, **more)
        o, lse = forward(q, k, k, 0.0, causal, **more)
        gradients = ops._scaled_dot_product_flash_attention_for_cpu_backward
        return lambda: gradients(o, q, k, k, o, lse, 0.0, causal, **more)

    return _of_all(make)


def _attention(q, k, mask, causal, dropout_p, mode):
    bias = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device) if mask == "True" else None
    gqa = q.dim() > 2 and q.shape[-3] != k.shape[-3]

    def call(q):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, k, bias, float(dropout_p), causal == "True", enable_gqa=gqa
        )  # fmt: skip

    return _training(call, q) if mode == "training" else lambda: call(q)


def _dropout(x, p, mode):
    def call(x):
        return torch.nn.functional.dropout(x, float(p))

    return _training(call, x) if mode == "training" else lambda: call(x)


def _cross_entropy(x, reduction, smoothing, mode):
    target = torch.randint(x.shape[1], x.shape[:1], device=x.device)
    how = ("none", "mean", "sum")[int(reduction)]

    def call(x):
        return torch.nn.functional.cross_entropy(x, target, reduction=how, label_smoothing=float(smoothing))

    return _training(call, x) if mode == "training" else lambda: call(x)


def _native_dropout_backward(dy):
    mask = torch.rand(dy.shape, device=dy.device) > 0.1
    return lambda: torch.ops.aten.native_dropout_backward(dy, mask, 1.1)


_OF: dict[str, Callable] = {
    "native_layer_norm": _layer_norm(False),
    "native_layer_norm_backward": _layer_norm(True),
    "_fused_rms_norm": _rms_norm(False),
    "_fused_rms_norm_backward": _rms_norm(True),
    "_softmax": _of_all(lambda x: lambda: torch.softmax(x, -1)),
    "_softmax_backward_data": _of_all(lambda y: lambda: torch.ops.aten._softmax_backward_data(y, y, -1, y.dtype)),
    "gelu": _of_all(lambda x, how: lambda: torch.nn.functional.gelu(x, approximate=how)),
    "gelu_backward": _of_all(lambda x, how: lambda: torch.ops.aten.gelu_backward(x, x, approximate=how)),
    "_scaled_dot_product_flash_attention_for_cpu": _flash(False),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _flash(True),
    "native_dropout": _of_all(lambda x, p: lambda: torch.native_dropout(x, float(p), True)),
    "native_dropout_backward": _of_all(_native_dropout_backward),
    "_scaled_dot_product_attention_math": _of_all(_attention),
    "dropout": _of_all(_dropout),
    "cross_entropy_loss": _of_all(_cross_entropy),
}
