"""For which calls our kernels mean the same as torch: what a replacement's `serves` asks (patch.py), at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .ops.calls import autocast_dtype

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))

stand_ins = frozenset((FakeTensor,))  # classes that stand for tensors where nothing is computed: torch.export's, estimate.py's
base_of: dict[type, type] = {}  # class that patch made -> the module's own class


def own_class(module: nn.Module) -> type:
    """The module's own class, swapped or not."""
    return base_of.get(type(module), type(module))


def plain(x: Any) -> bool:
    """Is x a tensor, of no class of its own? No parameter."""
    return type(x) is Tensor or type(x) in stand_ins


# looked up once: dense() is asked at every call
_strided, _float64, _is_compiling = torch.strided, torch.float64, torch.compiler.is_dynamo_compiling
_transform, _is_traced = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing


def dense(x: Any, a: Any = None, b: Any = None) -> bool:
    """Do torch and our kernels mean the same by these tensors, strides aside? x: an ordinary tensor of one of our dtypes, in a
    memory whose kernels take it; a, b: the same in x's dtype, or None. Not under torch.func's transforms, forward-mode
    derivatives or torch.jit's trace, which see through torch's operators only.
    """
    # subclasses mean what they like
    if type(x) is not Tensor and type(x) is not nn.Parameter and type(x) not in stand_ins:
        return False
    dtype = x.dtype
    if dtype not in DTYPES or x.layout is not _strided or x.is_nested:
        return False
    if not (x.is_cpu or x.is_cuda and dtype is not _float64):
        return False
    if a is not None and (a.dtype is not dtype or type(a) is not nn.Parameter and not plain(a)):
        return False
    if b is not None and (b.dtype is not dtype or type(b) is not nn.Parameter and not plain(b)):
        return False
    # the compiler, which has no names for these questions, turns transforms into graphs of its own
    return _is_compiling() or (_transform() is None and forward_ad._current_level < 0 and not _is_traced())


def parameter(module: Any, name: str) -> Any:
    """As module.<name>, without nn.Module.__getattr__, which costs as much as a tiny kernel."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


# dropout's p is rounded to a multiple of 1 / 65536: nearer to 0 or 1 than this, that is an error of more than 1 %
LEAST_P = 2.0**-10


def droppable(p: Any) -> bool:
    """Is p a probability that our dropout takes for what it is?"""
    return type(p) in (float, int) and (p == 0.0 or LEAST_P <= p <= 1.0 - LEAST_P)


def unhooked(module: nn.Module) -> bool:
    """Does calling it run its class's forward and nothing else?"""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def left_by_autocast(x: Tensor) -> bool:
    """Does autocast leave x's dtype alone?"""
    if not torch._C._is_any_autocast_enabled():
        return True
    device = x.device.type
    return not torch.is_autocast_enabled(device) or x.dtype == torch.get_autocast_dtype(device)


def attended(q: Any, k: Any, v: Any) -> bool:
    """May attention be given them: dense, of one dtype, as they are or as autocast casts those of torch's attention?"""
    if dense(q, k, v) and (not torch._C._is_any_autocast_enabled() or left_by_autocast(q)):
        return True
    # positions in float32 make queries and keys float32, which autocast casts back
    return (
        torch._C._is_any_autocast_enabled()
        and all(dense(t) and t.dtype is not _float64 for t in (q, k, v))
        and q.device == k.device == v.device
        and autocast_dtype("attention", q) is not None
    )
