"""accelerate(): our kernels in ATen's own slots, for programs that know nothing of us. Process-wide, and reversible.

| op            | ATen's slot                                                 | ours there                                   |
|---------------|-------------------------------------------------------------|----------------------------------------------|
| layer_norm    | native_layer_norm, native_layer_norm_backward               | C++                                          |
| rms_norm      | _fused_rms_norm, _fused_rms_norm_backward                   | C++                                          |
| softmax       | _softmax, _softmax_backward_data: over the last dimension   | C++                                          |
| gelu          | gelu, gelu_backward                                         | C++                                          |
| attention     | _scaled_dot_product_flash_attention_for_cpu, its backward   | C++: masks and grouped heads, too            |
|               | _scaled_dot_product_attention_math: all that torch computes | above autograd, our Function: dropout, a     |
|               | by products                                                 | mask's gradient, other head dims             |
| dropout       | dropout; native_dropout and its backward                    | above autograd, our Function; C++ without it |
| cross_entropy | cross_entropy_loss, of class indices                        | above autograd, our Function                 |

The slots of C++ (csrc/aten.h) are called by torch's own C++ autograd: no call goes through Python. A call that our kernels do
not compute as ATen's contract has it (another dtype, other strides, a dimension that is not the last) is for the kernel that
stood in the slot, kept here by its handle; so are all calls after decelerate(). There is no _log_softmax: ours would read and
write as much as torch's, and where it matters, cross_entropy_loss never makes it.

Of the two results of _scaled_dot_product_attention_math, which scaled_dot_product_attention calls for the first, the second,
the probabilities, is not made: it is a tensor on the meta device, which raises where it is used.

Under torch.compile, inductor decomposes layer norm, RMS norm, softmax and gelu before it looks for a kernel, and fuses them
with their neighbours: there these slots are not asked. Attention, dropout and cross entropy stay operators of their own, ours.
In GPU slots are the norms, softmax and gelu of the compiled CUDA kernels, and the three above autograd.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import dispatch, library
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
        "_scaled_dot_product_attention_math",
    ),
    "dropout": ("native_dropout", "native_dropout_backward", "dropout"),
    "cross_entropy": ("cross_entropy_loss",),
}
# A mask has steps of 1 / 65536: rarer droppings are torch's, whose rate is finer.
_RAREST = 1 / 1024
_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}
# Elements up to which calling an autograd.Function from Python takes longer than it saves (LOG L170).
FEW, FEW_LOGITS = 4096, 2**17
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_lock = threading.RLock()
_on: tuple[str, ...] = ()
_stood: dict[tuple[str, str], Callable] = {}  # (slot, device key) -> the kernel that stood there when ours came
_libraries: dict[str, torch.library.Library] = {}  # by device key: the ops that C++ calls back
_python: dict[tuple[str, str], list[torch.library.Library]] = {}  # (slot, device key) -> what Python has put into it
_served: Counter[tuple[str, bool]] = Counter()  # (slot, ours?) of those above autograd
_recorded: Counter[str] | None = None


# ---- the kernels that stood there ----


def _kept(slot: str, key: str) -> Callable:
    handle, keys = torch.library.get_kernel(f"aten::{slot}", key), torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return functools.partial(handle.call_boxed, keys)


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
            return _stood[slot, key](*args, **more)
        except Exception as error:
            refused((str(error) or type(error).__name__).encode())
            nothing = torch.empty(0)
            return nothing if results == 1 else (nothing,) * results

    return call


def _define(key: str) -> None:
    """The ops over the kernels that stood there, once in a process."""
    if key in _libraries:
        return
    _libraries[key] = ops = torch.library.Library(_namespace(key), "DEF")
    for slot in (slot for slots in SLOTS.values() for slot in slots):
        if _in_cpp(slot, key):
            schema = getattr(torch.ops.aten, slot).default._schema
            ops.define(str(schema).replace(f"aten::{slot}", slot, 1))
            ops.impl(slot, _callback(slot, key, len(schema.returns)), "CompositeExplicitAutograd")
    with warnings.catch_warnings():  # torch says once in a process that a kernel is being overridden: that is the point
        warnings.simplefilter("ignore")
        ops.define("again() -> ()")
        for _ in range(2):
            ops.impl("again", lambda: None, "CPU", allow_override=True)


# ---- above autograd ----
#
# Python's functions, so that what is raised within (by the hooks of saved tensors, too: checkpointing ends so) passes as it is.


def _plain(t: Tensor | None) -> bool:
    """No wrapper's tensor (a DTensor, a quantised or a nested one), but maybe a compiler's stand-in."""
    kind = type(t)
    return kind is Tensor or kind is torch.nn.Parameter or t is None or kind.__module__.startswith("torch._subclasses")


def _float(t: Tensor) -> bool:
    return t.dtype in _FLOATS and t.layout is torch.strided and (t.is_cpu or (t.is_cuda and t.dtype is not torch.float64))


def _alike(*tensors: Tensor) -> bool:
    first = tensors[0]
    return all(t.dtype is first.dtype and t.device == first.device and t.layout is torch.strided for t in tensors)


def _ours(slot: str, *tensors: Tensor, **more: Any) -> None:
    _served[slot, True] += 1
    if _recorded is not None and not torch.compiler.is_compiling():
        shapes = (f"{str(t.dtype).removeprefix('torch.')} {'x'.join(map(str, t.shape))}" for t in tensors)
        training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        _recorded[" ".join([slot, *shapes, *map(str, more.values()), "training" if training else "-"])] += 1


def _torchs(slot: str, x: Tensor, *args: Any, **more: Any) -> Any:
    _served[slot, False] += 1
    return _stood[slot, "CUDA" if x.is_cuda else "CPU"](x, *args, **more)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, dropout_mask=None, *, scale=None,
               enable_gqa=False):  # fmt: skip
    slot = "_scaled_dot_product_attention_math"
    if (
        dropout_mask is None
        and torch.backends.cuda.flash_sdp_enabled()  # else somebody has asked for products
        and all(map(_plain, (query, key, value, attn_mask)))
        and _float(query)
        and _alike(query, key, value)
        and min(query.dim(), key.dim(), value.dim()) >= (3 if enable_gqa else 2)
        and max(query.shape[-1], value.shape[-1]) <= MAX_HEAD_DIM
        and key.shape[-1] == query.shape[-1] > 0
        and key.shape[-2] == value.shape[-2]
        and 0 <= dropout_p <= 1
        and not (is_causal and attn_mask is not None)
        and (attn_mask is None or _fits(attn_mask, query))
    ):
        if _heads_fit(query, key, value, enable_gqa):
            y = our_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            _ours(slot, query, key, mask=attn_mask is not None, causal=is_causal, dropout=dropout_p)
            return y, torch.empty((*y.shape[:-1], key.shape[-2]), dtype=query.dtype, device="meta")
    more = {"scale": scale, "enable_gqa": enable_gqa}
    return _torchs(slot, query, key, value, attn_mask, dropout_p, is_causal, dropout_mask, **more)


def _heads_fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Else torch has its own words."""
    if enable_gqa:
        return query.shape[:-3] == key.shape[:-3] == value.shape[:-3] and key.shape[-3] == value.shape[-3]
    try:
        torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        return False
    return True


def _fits(mask: Tensor, query: Tensor) -> bool:
    return mask.dtype in (torch.bool, query.dtype, torch.float32) and mask.device == query.device


def _dropout(input, p, train):
    if p == 0 or (not train and 0 <= p <= 1):
        return input
    if type(input) is Tensor and input.is_cpu and input.numel() < FEW:
        if 0 < p < 1 and input.dtype in _FLOATS:
            return torch.native_dropout(input, p, True)[0]  # a slot of C++; above, there is no mask
    elif _RAREST <= p < 1 and _plain(input) and _float(input):
        _ours("dropout", input, p=p)
        return our_dropout(input, p)
    return _torchs("dropout", input, p, train)


def _cross_entropy(self, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0):
    if type(self) is Tensor and self.is_cpu and self.numel() < FEW_LOGITS:
        _served["cross_entropy_loss", False] += 1
        return _stood["cross_entropy_loss", "CPU"](self, target, weight, reduction, ignore_index, label_smoothing)
    if (
        weight is None
        and self.dim() == 2
        and target.dim() == 1
        and target.dtype is torch.int64
        and target.shape[0] == self.shape[0]
        and target.device == self.device
        and _plain(self)
        and _plain(target)
        and _float(self)
        and reduction in _REDUCTIONS
        and 0 <= label_smoothing <= 1
    ):
        with contextlib.suppress(IndexError):  # of a target out of range torch has its own words
            loss = our_cross_entropy(self, target, ignore_index, _REDUCTIONS[reduction], label_smoothing)
            _ours("cross_entropy_loss", self, reduction=reduction, smoothing=label_smoothing)
            return loss
    return _torchs("cross_entropy_loss", self, target, weight, reduction, ignore_index, label_smoothing)


_ABOVE: dict[str, Callable] = {
    "_scaled_dot_product_attention_math": _attention,
    "dropout": _dropout,
    "cross_entropy_loss": _cross_entropy,
}


# ---- in and out ----


def _loaded(key: str) -> Any:
    return library.cpu if key == "CPU" else library.cuda


def _namespace(key: str) -> str:
    """Of the ops that C++ calls back: csrc/cpu/aten.cpp and csrc/cuda/aten.cu have it, too."""
    return f"gpt_kernels_aten_{key.lower()}"


def _in_cpp(slot: str, key: str) -> bool:
    """Does C++ fill it?"""
    if key == "CPU":
        return slot not in _ABOVE
    return any(slot in SLOTS[op] for op in ("layer_norm", "rms_norm", "softmax", "gelu"))


def _keys() -> list[str]:
    return [key for key in ("CPU", "CUDA") if _loaded(key) is not None]


def _put(op: str, into: bool) -> None:
    for slot in SLOTS[op]:
        for key in ("CPU", "CUDA") if torch.backends.cuda.is_built() else ("CPU",):
            cpp = _in_cpp(slot, key)
            if _loaded(key) is None if cpp else slot not in _ABOVE:
                continue
            if into:
                _stand(slot, key)
            if cpp:
                # not ctypes' own call, which lets other threads run: the slot is theirs, too
                ctypes.PyDLL(_loaded(key)._name).gpt_kernels_aten(slot.encode(), int(into))
            elif into:
                _python[slot, key] = [_impl(slot, alias) for alias in (f"Autograd{key}", key)]
            else:
                for put in _python.pop((slot, key)):
                    put._destroy()
        # which kernel serves a key, as a compiler's dispatcher in Python remembers it: of what stood there before, or of ours
        getattr(torch.ops.aten, slot).default._dispatch_cache.clear()


def _impl(slot: str, key: str) -> torch.library.Library:
    put = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in _define
        put.impl(slot, _ABOVE[slot], key, allow_override=True)
    return put


def _set(ops: Iterable[str]) -> None:
    global _on
    wanted = set(ops)
    with _lock:
        for op in SLOTS:
            if (op in wanted) != (op in _on):
                for key in _keys():
                    _define(key)
                _put(op, op in wanted)
                _on = tuple(o for o in SLOTS if (o in _on or o == op) and (o in wanted or o != op))
                dispatch.in_aten.clear()
                dispatch.in_aten.update({o: SLOTS[o] for o in _on})


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
