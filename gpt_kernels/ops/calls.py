"""How the public functions are called: torch's names and forms of arguments, its overrides, its autocast and its layouts.

A tiny call takes two microseconds in all, of which 30 ns are one question to torch. So each function asks whether the call is a
plain one, the cheapest questions first, and leaves all others to its _general().
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function as handle_torch_function
from torch.overrides import has_torch_function_variadic as has_torch_function_variadic

from .common import count_of

is_grad_enabled = torch.is_grad_enabled
in_any_autocast = torch._C._is_any_autocast_enabled


# ---- autocast ----


def _autocast_devices(*ops: str) -> frozenset[str]:
    """Devices on which torch's autocast casts the arguments of one of the ATen ops."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    devices = ("cpu", "cuda", "xpu", "mps")
    return frozenset(d for d in devices if any(has(f"aten::{op}", f"Autocast{d.upper()}") for op in ops))


# torch's own table, read at import: it differs between devices and versions
_CASTS = {
    "attention": _autocast_devices("scaled_dot_product_attention"),  # to the 16-bit dtype
    "cross_entropy": _autocast_devices("cross_entropy_loss", "log_softmax.int"),  # the rest to float32
    "layer_norm": _autocast_devices("layer_norm"),
    "rms_norm": _autocast_devices("rms_norm"),
    "softmax": _autocast_devices("softmax.int"),
}


def autocast_dtype(op: str, x: Tensor) -> torch.dtype | None:
    """What autocast casts the arguments of op's namesake to on x's device; None where it is off or leaves them."""
    device = x.device.type
    if device not in _CASTS[op] or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if op == "attention" else torch.float32


def cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast casts them: those of floats, but not float64."""
    if dtype is None:
        return tensors
    return tuple(t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


# ---- arguments ----


def one_input(op: str, x: Tensor | None, input: Tensor | None, name: str = "x") -> Tensor:
    """The first argument, which torch calls `input`. Raises TypeError for both, for neither, and for what is no tensor."""
    if x is None:
        x = input
    elif input is not None:
        raise TypeError(f"{op}: {name} and input are two names of one argument, got both")
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    return x


def check_tensors(op: str, **tensors) -> None:
    """Raises TypeError for an optional tensor that is neither a tensor nor None."""
    for name, t in tensors.items():
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor or None, got {type(t).__name__}")


def last_as_one(op: str, x: Tensor, normalized_shape, *params: Tensor | None) -> tuple[Any, ...]:
    """x and its parameters with the dimensions of normalized_shape, the last ones, as one."""
    if isinstance(normalized_shape, int):
        raise TypeError(f"{op}: normalized_shape must be a tuple of ints, got {normalized_shape!r}")
    shape = tuple(normalized_shape)
    n = len(shape)
    if not n or tuple(x.shape[-n:]) != shape:
        raise RuntimeError(f"{op}: normalized_shape must be x's last dimensions, got {shape} for x {tuple(x.shape)}")
    for t in params:
        if t is not None and tuple(t.shape) != shape:
            raise RuntimeError(f"{op}: weight and bias must have normalized_shape {shape}, got {tuple(t.shape)}")
    N = count_of(shape)
    return x.reshape(*x.shape[:-n], N), *(t if t is None else t.reshape(N) for t in params)


# ---- layouts ----


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


def all_contiguous(*tensors: Tensor | None) -> bool:
    """Of parameters: the kernels refuse other strides, which are too rare to be asked for first."""
    return all(t is None or t.is_contiguous() for t in tensors)


def memory_order(x: Tensor) -> list[int]:
    """x's dimensions from the widest stride to the narrowest: those that torch's elementwise functions give their result."""
    strides = torch.empty_like(x, device="meta").stride()
    return sorted(range(x.dim()), key=lambda d: -strides[d])


def restored(order: list[int]) -> list[int]:
    """The order that undoes permute(order)."""
    return sorted(range(len(order)), key=order.__getitem__)


def laid_out(y: Tensor, order: list[int]) -> Tensor:
    """y in memory that has its dimensions in this order."""
    return y.permute(order).contiguous().permute(restored(order))
