"""accelerate(): our kernels in ATen's own slots, for programs that know nothing of us. Process-wide, and reversible.

| op            | ATen's slot                                                         | who calls ours                       |
|---------------|---------------------------------------------------------------------|--------------------------------------|
| layer_norm    | native_layer_norm, native_layer_norm_backward                       | torch's C++ autograd                 |
| rms_norm      | _fused_rms_norm, _fused_rms_norm_backward                           | torch's C++ autograd                 |
| softmax       | _softmax, _softmax_backward_data, over the last dimension           | torch's C++ autograd                 |
| gelu          | gelu, gelu_backward                                                 | torch's C++ autograd                 |
| attention     | _scaled_dot_product_flash_attention_for_cpu and its backward        | torch's C++ autograd                 |
|               | scaled_dot_product_attention: what torch would compute by products, | above autograd: our Functions        |
|               | masks and dropout among it                                          |                                      |
| dropout       | native_dropout, native_dropout_backward: with a mask, what is small | torch's C++ autograd                 |
|               | dropout: without a mask, the rest                                   | above autograd: our Function         |
| cross_entropy | cross_entropy_loss of class indices, but for what is small          | above autograd: our Function         |

The functions in the slots are C++ (csrc/aten.h): no call goes through Python that torch's own would not, but for those large
ones above autograd. A call that our kernels do not compute as ATen's contract has it (another dtype, other strides, a dimension
that is not the last) is the kernel's that stood in the slot, kept here by its handle; so are all calls after decelerate().
There is no _log_softmax: ours would read and write as much as torch's; where it matters, cross_entropy_loss never makes it.

Under torch.compile, inductor decomposes layer norm, RMS norm, softmax, gelu, dropout and cross entropy before it looks for a
kernel, and fuses them with their neighbours: there these slots are not asked. Attention stays an operator of its own, ours.
In GPU slots are the norms, softmax and gelu of the compiled CUDA kernels; attention without a fused kernel of torch's, dropout
and cross entropy by our Functions.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import library
from .ops.attention import MAX_HEAD_DIM
from .ops.attention import scaled_dot_product_attention as our_attention
from .ops.cross_entropy import cross_entropy as our_cross_entropy
from .ops.dropout import dropout as our_dropout

SLOTS = {
    "layer_norm": ("native_layer_norm", "native_layer_norm_backward"),
    "rms_norm": ("_fused_rms_norm", "_fused_rms_norm_backward"),
    "softmax": ("_softmax", "_softmax_backward_data"),
    "gelu": ("gelu", "gelu_backward"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "scaled_dot_product_attention",
    ),
    "dropout": ("native_dropout", "native_dropout_backward", "dropout"),
    "cross_entropy": ("cross_entropy_loss",),
}
# A mask has steps of 1 / 65536: rarer droppings are torch's, whose rate is finer.
_RAREST = 1 / 1024
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_lock = threading.RLock()
_on: tuple[str, ...] = ()
_stood: dict[tuple[str, str], Callable] = {}  # (slot, device key) -> the kernel that stood there when ours came
_libraries: dict[str, torch.library.Library] = {}  # by device key: the ops that C++ calls back
_python: dict[str, list[torch.library.Library]] = {}  # op -> what Python itself has put into a GPU's slots
_served: Counter[tuple[str, bool]] = Counter()  # (slot, ours?) of those above autograd
_recorded: Counter[str] | None = None


# ---- the kernels that stood there ----


def _kept(slot: str, key: str) -> Callable:
    handle, keys = torch.library.get_kernel(f"aten::{slot}", key), torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda *args, **more: handle.call_boxed(keys, *args, **more)


def _rms_norm_backward(dy, x, normalized_shape, rstd, weight, output_mask):
    """torch has no kernel for it on a CPU, where it differentiates what it composes RMS norm of."""
    rows, wide = list(range(-len(normalized_shape), 0)), rstd.dtype
    x_hat, g = x.to(wide) * rstd, dy.to(wide) if weight is None else dy.to(wide) * weight.to(wide)
    dx = ((g - x_hat * (g * x_hat).mean(rows, keepdim=True)) * rstd).to(x.dtype) if output_mask[0] else None
    if not output_mask[1]:
        return dx, None
    return dx, (dy.to(wide) * x_hat).sum_to_size(normalized_shape).to(weight.dtype)


def _stand(slot: str, key: str) -> None:
    if slot == "_fused_rms_norm_backward" and key == "CPU":
        _stood[slot, key] = _rms_norm_backward
    else:
        _stood[slot, key] = _kept(slot, f"Autograd{key}" if slot in _ABOVE else key)


def _callback(slot: str, key: str, results: int) -> Callable:
    """What C++ calls. An exception would lose its words on the way through C: they go beside it."""
    refused = _loaded(key).gpt_kernels_aten_refused
    refused.argtypes = [ctypes.c_char_p]

    def call(*args, **more):
        try:
            return (_ABOVE[slot] if slot in _ABOVE else _stood[slot, key])(*args, **more)
        except Exception as error:
            if torch.compiler.is_compiling():
                raise
            refused((str(error) or type(error).__name__).encode())
            nothing = torch.empty(0)
            return nothing if results == 1 else (nothing,) * results

    return call


def _define(key: str) -> None:
    """The ops over the kernels that stood there, once in a process."""
    if key in _libraries:
        return
    _libraries[key] = ops = torch.library.Library(f"gpt_kernels_aten_{key.lower()}", "DEF")
    for op in _in_slots(key):
        for slot in SLOTS[op]:
            schema = getattr(torch.ops.aten, slot).default._schema
            ops.define(str(schema).replace(f"aten::{slot}", slot, 1))
            alias = "CompositeImplicitAutograd" if slot in _ABOVE else "CompositeExplicitAutograd"
            ops.impl(slot, _callback(slot, key, len(schema.returns)), alias)
    with warnings.catch_warnings():  # torch says once in a process that a kernel is being overridden: that is the point
        warnings.simplefilter("ignore")
        ops.define("again() -> ()")
        for _ in range(2):
            ops.impl("again", lambda: None, "CPU", allow_override=True)


# ---- above autograd ----


def _plain(*tensors: Tensor | None) -> bool:
    """Tensors that are no wrapper's (DTensor, a quantised or a nested tensor), or a compiler's stand-ins for such."""
    return all(
        t is None or type(t) in (Tensor, torch.nn.Parameter) or type(t).__module__.startswith("torch._subclasses")
        for t in tensors
    )  # fmt: skip


def _floats(*tensors: Tensor) -> bool:
    first = tensors[0]
    if first.dtype not in _FLOATS or (first.is_cuda and first.dtype is torch.float64) or not (first.is_cuda or first.is_cpu):
        return False
    return all(t.dtype is first.dtype and t.device == first.device and t.layout is torch.strided for t in tensors)


def _count(slot: str, ours: bool, *tensors: Tensor, **more: Any) -> None:
    _served[slot, ours] += 1
    if ours and _recorded is not None and not torch.compiler.is_compiling():
        shapes = (f"{str(t.dtype).removeprefix('torch.')} {'x'.join(map(str, t.shape))}" for t in tensors)
        _recorded[" ".join([slot, *shapes, *map(str, more.values())])] += 1


def _above(slot: str, x: Tensor) -> Callable:
    return _stood[slot, "CUDA" if x.is_cuda else "CPU"]


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    ours = (
        _plain(query, key, value, attn_mask)
        and _floats(query, key, value)
        and min(query.dim(), key.dim(), value.dim()) >= (3 if enable_gqa else 2)
        and max(query.shape[-1], value.shape[-1]) <= MAX_HEAD_DIM
        and key.shape[-1] == query.shape[-1] > 0
        and 0 <= dropout_p <= 1
        and (attn_mask is None or (not is_causal and attn_mask.dtype in (torch.bool, query.dtype, torch.float32)
                                   and attn_mask.device == query.device))
        and torch.backends.cuda.flash_sdp_enabled()  # else somebody has asked for products
        and not (query.is_cuda and _fused_on_gpu(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))
    )  # fmt: skip
    _count("scaled_dot_product_attention", ours, query, key, mask=attn_mask is not None, causal=is_causal, dropout=dropout_p)
    call = our_attention if ours else _above("scaled_dot_product_attention", query)
    return call(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _fused_on_gpu(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> bool:
    """Has torch a fused kernel for it?"""
    math = torch._C._SDPBackend.MATH.value
    return torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    ) != math  # fmt: skip


def _dropout(input, p, train):
    ours = train and _plain(input) and _floats(input) and _RAREST <= p < 1
    _count("dropout", ours, input, p=p)
    return our_dropout(input, p) if ours else _above("dropout", input)(input, p, train)


def _cross_entropy(self, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0):
    ours = (
        weight is None
        and _plain(self, target)
        and _floats(self)
        and self.dim() == 2
        and target.dim() == 1
        and target.dtype is torch.int64
        and target.device == self.device
        and target.shape[0] == self.shape[0]
        and 0 <= label_smoothing <= 1
        and reduction in (0, 1, 2)
    )
    stood = _above("cross_entropy_loss", self)
    if ours:
        with contextlib.suppress(IndexError):  # of a target out of range torch has its own words
            loss = our_cross_entropy(self, target, ignore_index, ("none", "mean", "sum")[reduction], label_smoothing)
            _count("cross_entropy_loss", True, self, reduction=reduction, smoothing=label_smoothing)
            return loss
    _count("cross_entropy_loss", False, self)
    return stood(self, target, weight, reduction, ignore_index, label_smoothing)


_ABOVE: dict[str, Callable] = {
    "scaled_dot_product_attention": _attention,
    "dropout": _dropout,
    "cross_entropy_loss": _cross_entropy,
}


# ---- in and out ----


def _loaded(key: str) -> Any:
    return library.cpu if key == "CPU" else library.cuda


def _in_slots(key: str) -> list[str]:
    """The ops whose slots C++ fills."""
    return [op for op in SLOTS if key == "CPU" or not any(slot in _ABOVE for slot in SLOTS[op])]


def _keys() -> list[str]:
    return [key for key in ("CPU", "CUDA") if _loaded(key) is not None]


def _put(op: str, into: bool) -> None:
    for key in _keys():
        if op in _in_slots(key):
            for slot in SLOTS[op]:
                if into:
                    _stand(slot, key)
                # not ctypes' own call, which lets other threads run: the slot is theirs, too
                ctypes.PyDLL(_loaded(key)._name).gpt_kernels_aten(slot.encode(), int(into))
    for slot in SLOTS[op]:
        if slot in _ABOVE and torch.backends.cuda.is_built():
            if into:
                _stand(slot, "CUDA")
                _python[slot] = [_gpu_slot(slot, key) for key in ("AutogradCUDA", "CUDA")]
            else:
                for put in _python.pop(slot):
                    put._destroy()


def _gpu_slot(slot: str, key: str) -> torch.library.Library:
    put = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        put.impl(slot, _ABOVE[slot], key, allow_override=True)
    return put


def _set(ops: Iterable[str]) -> None:
    global _on
    with _lock:
        wanted = tuple(op for op in SLOTS if op in set(ops))
        for op in SLOTS:
            if (op in wanted) != (op in _on):
                for key in _keys():
                    _define(key)
                _put(op, op in wanted)
                _on = tuple(o for o in SLOTS if (o in _on or o == op) and (o in wanted or o != op))


def _chosen(function: str, ops: Iterable[str] | None) -> tuple[str, ...]:
    chosen = tuple(SLOTS if ops is None else (ops,) if isinstance(ops, str) else ops)
    for op in chosen:
        if op not in SLOTS:
            raise ValueError(f"{function}: unknown op {op!r}, expected {', '.join(SLOTS)}")
    if library.cpu is None:
        raise RuntimeError(f"{function}: ATen's slots are filled by the compiled kernels, and {library.cpu_error}")
    return chosen


def accelerate(*, ops: Iterable[str] | None = None) -> None:
    """Put our kernels into ATen's own slots: from now on every torch program of this process runs on them, unchanged.

    ops: names of SLOTS above, all by default; those that are in already stay. Forward and backward come together. What ours do
    not serve, the kernels that stood there do. decelerate() takes them out again. info() and where() tell of it.

    Results are those of ATen's contract: shapes, dtypes and strides; values by the library's rule of accuracy, not bit for bit.
    An error that torch raises in a slot comes as RuntimeError, in torch's words. Attention, dropout and cross entropy are
    differentiated by our autograd.Functions; a model that runs under torch.compile is compiled anew.

    Raises ValueError for an unknown op, RuntimeError where the C++ kernels were not built.
    """
    _set((*_on, *_chosen("accelerate", ops)))


def decelerate(*, ops: Iterable[str] | None = None) -> None:
    """Take our kernels out of ATen's slots, all or those of `ops`: the very kernels that stood there stand again.

    Raises ValueError for an unknown op.
    """
    gone = tuple(SLOTS) if ops is None else _chosen("decelerate", ops)
    _set(op for op in _on if op not in gone)


@contextlib.contextmanager
def accelerated(*, ops: Iterable[str] | None = None) -> Iterator[None]:
    """accelerate(ops=ops) inside the block, in all threads; afterwards the slots are as they were before it."""
    before = _on
    accelerate(ops=ops)
    try:
        yield
    finally:
        _set(before)


def state() -> dict[str, dict[str, int]]:
    """Of each op whose slots are ours now, how many calls of each of its slots were ours since the process began."""
    return {op: {slot: calls(slot)[0] for slot in SLOTS[op]} for op in _on}


def calls(slot: str) -> tuple[int, int]:
    """(served by ours, by what stood there) since the process began."""
    ours, torchs = _served[slot, True], _served[slot, False]
    for key in _keys():
        count = _loaded(key).gpt_kernels_aten_count
        count.restype = ctypes.c_int64
        ours += max(count(slot.encode(), 1), 0)
        torchs += max(count(slot.encode(), 0), 0)
    return ours, torchs


def record(on: bool) -> None:
    """Note the kinds of calls from now on, or no more."""
    global _recorded
    _recorded = Counter() if on else None
    for key in _keys():
        _loaded(key).gpt_kernels_aten_record(int(on))


def recorded() -> Counter[str]:
    """ "gelu float32 2x512x3072 none" and so on -> calls, of all that were ours since record(True)."""
    kinds = Counter(_recorded or {})
    for key in _keys():
        told = _loaded(key).gpt_kernels_aten_recorded
        told.restype = ctypes.c_char_p
        for line in told().decode().splitlines():
            times, _, kind = line.partition(" ")
            kinds[kind] += int(times)
    return kinds
