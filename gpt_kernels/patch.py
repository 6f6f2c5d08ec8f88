"""Put our kernels into a model that exists, and take them out again.

A module is swapped by changing its class: to one made of a replacement's methods over the module's own class, with the
same name. Nothing else about it changes: parameters, buffers, hooks, config, state_dict, isinstance and saved files are
the same objects and the same words, and putting the class back is all that unpatch does.

A swapped module does what its own class does for every argument, attribute and state, also when they change after patch: a
replacement comes with `serves`, which says of a call, from its arguments and from what the module is by then, whether our
kernels do the same; any other call runs the class's own forward. `dense` is what most of them ask. Hooks fire as before:
where forward hooks are set on all modules (torch.nn.modules.module.register_module_forward_hook and its kin), a module that
does the work of its children hands them back that work, so that each of them is seen.

A family of models is one file in integrations/, with a `register` line per module class; see integrations/huggingface.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .dispatch import Served, pushed, where
from .ops.dropout import dropout
from .ops.gelu import gelu
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm
from .table import aligned

# package in which a module's class lives -> file in integrations/ that knows it
FAMILIES = {"transformers": "huggingface"}
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


# ---- the plan ----


class Row(NamedTuple):
    path: str  # as in named_modules(); "" is the model itself
    cls: str
    op: str | None  # what it is swapped by; None: kept
    why: str  # why it is kept, or what the swap does


@dataclass
class Plan:
    """What patch did, or would do: one row per module. Prints as a table with repeated layers folded into one line."""

    model: str
    rows: list[Row]
    dry_run: bool = False

    @property
    def swapped(self) -> list[Row]:
        return [row for row in self.rows if row.op]

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if not row.op]

    def summary(self) -> str:
        verb = "would swap" if self.dry_run else "swapped"
        if not self.swapped:
            return f"{self.model}: {verb} nothing in {len(self.rows)} modules; the rows say why"
        counts = ", ".join(f"{n} {op}" for op, n in Counter(row.op for row in self.swapped).items())
        return f"{self.model}: {verb} {len(self.swapped)} of {len(self.rows)} modules ({counts})"

    def to_dict(self) -> dict:
        return {"model": self.model, "dry_run": self.dry_run, "rows": [row._asdict() for row in self.rows]}

    def __str__(self) -> str:
        # h.0.ln_1 ... h.11.ln_1 are one line, if they share a fate
        folded = Counter(row._replace(path=re.sub(r"\b\d+\b", "*", row.path)) for row in self.rows)
        lines = [("module", "class", "n", "swapped by", "")]
        lines += [(r.path or "(model)", r.cls, str(n), r.op or "-", r.why) for r, n in folded.items()]
        return "\n".join([self.summary(), *aligned(lines)])


# ---- the registry ----


@dataclass(frozen=True)
class _Rule:
    matches: Callable[[nn.Module], bool]
    replacement: type
    ops: tuple[str, ...]
    why: str
    unless: Callable[[nn.Module], str | None]
    fuses: tuple[str, ...]
    serves: Callable[..., bool] | None
    forward: Callable | None  # the class's own, as it was when the rule was written for it


_rules: list[_Rule] = []
_base_of: dict[type, type] = {}  # class made here -> the module's own class


def register(target: type | Callable[[nn.Module], bool], ops: tuple[str, ...], why: str,
             unless: Callable[[nn.Module], str | None] = lambda module: None, fuses: tuple[str, ...] = (),
             serves: Callable[..., bool] | None = None):  # fmt: skip
    """Class decorator: the class's methods replace those of modules whose class is `target`, or for which target(module).

    The methods find the module's own under super(). Only methods of the module's class may be named in it: any other
    name could hide a child module. ops: the ops it calls. unless(module): a reason to keep the module, or None.
    fuses: children whose work is done inside it. serves(module, *args, **kwargs): does the class's forward here do for this
    call what the module's own would? If not, the module's own does it. It is asked at every call: a microsecond at most.
    """
    known = getattr(target, "forward", None) if isinstance(target, type) else None
    matches = (lambda module: type(module) is target) if isinstance(target, type) else target

    def add(replacement: type) -> type:
        _rules.append(_Rule(matches, replacement, ops, why, unless, fuses, serves, known))
        return replacement

    return add


@functools.cache
def _made_class(replacement: type, base: type) -> type:
    # named as the module's class: files and other libraries know classes by their names
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}

    def __reduce_ex__(self, protocol):
        # pickle looks classes up by name and would find the module's own
        _, _, *state = super(made, self).__reduce_ex__(protocol)
        return _new, (replacement, base), *state

    names["__reduce_ex__"] = __reduce_ex__
    rule = _rule_of(replacement)
    if rule.serves is not None:
        names["forward"] = _served(rule.serves, replacement.forward, base)
    made = type(base)(base.__name__, (replacement, base), names)
    _base_of[made] = base
    return made


def _served(serves: Callable[..., bool], fused: Callable, base: Any) -> Callable:
    known = base.forward

    # wraps: whoever asks for the signature sees the class's own
    @functools.wraps(known)
    def forward(self, *args, **kwargs):
        # a forward that somebody put into the class since is theirs to run
        if base.forward is known and serves(self, *args, **kwargs):
            return fused(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    return forward


def _new(replacement: type, base: type) -> nn.Module:
    made: Any = _made_class(replacement, base)
    return made.__new__(made)


# ---- patch and unpatch ----


def patch(model: nn.Module, dry_run: bool = False) -> Plan:
    """Swap every module of `model` that a kernel of ours can serve with the same result; returns the plan.

    dry_run: only the plan. Modules stay the same objects, and patching twice is patching once. Nothing is swapped where
    our kernels are not there for the model's device: a patched model is not to be slower. Raises TypeError for anything
    but a torch.nn.Module.
    """
    plan, changes = _plan(model, dry_run)
    if not dry_run:
        for module, made in changes:
            module.__class__ = made
    return plan


def unpatch(model: nn.Module) -> int:
    """Give every module its own class back; returns how many had been swapped, 0 for a model that is not patched.

    Raises RuntimeError, and changes nothing, if a module's class was changed again after patch.
    """
    _require_module(model, "unpatch")
    modules = [module for module in model.modules() if type(module) in _base_of]
    for path, module in model.named_modules():
        if type(module) not in _base_of and any(base in _base_of for base in type(module).__mro__):
            raise RuntimeError(
                f"unpatch: {path or 'the model'} was given class {type(module).__name__} after patch; undo that first"
            )
    for module in modules:
        module.__class__ = _base_of[type(module)]
    return len(modules)


@contextlib.contextmanager
def patched(model: nn.Module) -> Iterator[Plan]:
    """patch(model) inside the block; afterwards the model is as it was, also if it was already patched."""
    plan, changes = _plan(model, False)
    before = [(module, module.__class__) for module, _ in changes]
    for module, made in changes:
        module.__class__ = made
    try:
        yield plan
    finally:
        for module, own in before:
            module.__class__ = own


def is_patched(model: nn.Module) -> bool:
    """Has any module of `model` been swapped?"""
    return any(type(module) in _base_of for module in model.modules())


def _require_module(model, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")


def _plan(model: nn.Module, dry_run: bool) -> tuple[Plan, list[tuple[nn.Module, type]]]:
    _require_module(model, "patch")
    packages = {type(module).__module__.split(".")[0] for module in model.modules()}
    for package in sorted(packages & FAMILIES.keys()):
        importlib.import_module(f".integrations.{FAMILIES[package]}", __package__)
    rows: list[Row] = []
    changes: list[tuple[nn.Module, type]] = []
    fused: set[str] = set()
    for path, module in model.named_modules():
        cls = type(module).__name__
        if path in fused:
            rows.append(Row(path, cls, None, "its work is done inside its parent"))
            continue
        own = _base_of.get(type(module))
        rule = next((r for r in _rules if r.matches(module)), None) if own is None else _rule_of(type(module).__bases__[0])
        reason = _reason_to_keep(module, rule, model) if own is None else None
        if rule is None or reason is not None:
            rows.append(Row(path, cls, None, reason or _why_no_rule(module)))
            continue
        rows.append(Row(path, cls, "+".join(rule.ops), rule.why))
        fused |= {f"{path}.{child}".lstrip(".") for child in rule.fuses}
        if own is None:
            changes.append((module, _made_class(rule.replacement, type(module))))  # type: ignore[arg-type]
    return Plan(type(model).__name__, rows, dry_run), changes


def _rule_of(replacement: type) -> _Rule:
    return next(rule for rule in _rules if rule.replacement is replacement)


def _reason_to_keep(module: nn.Module, rule: _Rule | None, model: nn.Module) -> str | None:
    if rule is None:
        return None
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if rule.forward is not None and type(module).forward is not rule.forward:
        return "its class's forward was replaced"
    if (reason := rule.unless(module)) is not None:
        return reason
    like = next(module.parameters(), None)
    like = next(model.parameters(), None) if like is None else like
    if like is None:
        return None
    if like.dtype not in _DTYPES:
        return f"its parameters are {like.dtype}"
    if like.dtype == torch.float64 and like.device.type != "cpu":
        return f"its parameters are float64, for which there is no kernel on {like.device.type}"
    for op in rule.ops:
        served = where(f"{op}_fwd").get(like.device.type.upper(), Served("reference", "no kernels for this device"))
        # a reference that was pushed was asked for
        if served.backend == "reference" and pushed(f"{op}_fwd") is None:
            return f"{op} has no kernel here: {served}"
    return None


_KEPT = {
    nn.Linear: "matrix product: torch's",
    nn.Embedding: "row lookup: torch's",
}


def _why_no_rule(module: nn.Module) -> str:
    for cls, why in _KEPT.items():
        if type(module) is cls:
            return why
    if type(module).__module__.split(".")[0] == __package__:
        return "runs on our kernels already"
    return "its parts are looked at one by one" if next(module.children(), None) else "no replacement for this class"


# ---- what our kernels serve ----


# looked up once: dense() is asked at every call
_strided, _float64, _is_compiling = torch.strided, torch.float64, torch.compiler.is_dynamo_compiling
_transform, _is_traced = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing


def dense(x: Any, a: Any = None, b: Any = None) -> bool:
    """Do torch and our kernels mean the same by these tensors, strides aside? x: an ordinary tensor of one of our dtypes, in a
    memory whose kernels take it; a, b: the same in x's dtype, or None. Not under torch.func's transforms, forward-mode
    derivatives or torch.jit's trace, which see through torch's operators only.
    """
    # subclasses mean what they like
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return False
    dtype = x.dtype
    if dtype not in _DTYPES or x.layout is not _strided or x.is_nested:
        return False
    if not (x.is_cpu or x.is_cuda and dtype is not _float64):
        return False
    if a is not None and (a.dtype is not dtype or type(a) is not nn.Parameter and type(a) is not Tensor):
        return False
    if b is not None and (b.dtype is not dtype or type(b) is not nn.Parameter and type(b) is not Tensor):
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


# ---- torch's own modules ----


def _several_dimensions(module: Any) -> str | None:
    shape = module.normalized_shape
    if not isinstance(shape, tuple):
        return f"its normalized_shape is {shape!r}, no tuple"
    return f"normalises over {len(shape)} dimensions" if len(shape) != 1 else None


def _keep_rms_norm(module: Any) -> str | None:
    if module.eps is None and module.weight is not None and module.weight.dtype in (torch.bfloat16, torch.float16):
        return "eps=None in 16 bits: versions of torch take different ones"
    return _several_dimensions(module)


# on a GPU autocast has 16-bit inputs normalised to float32, on a CPU it leaves them alone
_LEFT_BY_AUTOCAST = not any(
    torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", "AutocastCPU") for op in ("layer_norm", "rms_norm")
)


def _norm(x: Any, shape: Any, eps: Any, weight: Any, bias: Any) -> bool:
    return (
        type(eps) is float
        and eps >= 0.0
        and dense(x, weight, bias)
        and x.is_contiguous()
        and shape == x.shape[-1:] != ()
        and (weight is None or weight.is_contiguous())
        and (bias is None or bias.is_contiguous())
        and (x.dtype in _EPS or not torch._C._is_any_autocast_enabled() or x.is_cpu and _LEFT_BY_AUTOCAST)
    )


def _serves_layer_norm(module: Any, input: Tensor) -> bool:
    return _norm(input, module.normalized_shape, module.eps, parameter(module, "weight"), parameter(module, "bias"))


@register(nn.LayerNorm, ("layer_norm",), "fused layer norm", unless=_several_dimensions, serves=_serves_layer_norm)
class LayerNorm:
    def forward(self: Any, input: Tensor) -> Tensor:
        return layer_norm(input, parameter(self, "weight"), parameter(self, "bias"), self.eps)


# in float32 and float64 all versions of torch mean the same by eps=None
_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def _serves_rms_norm(module: Any, x: Tensor) -> bool:
    eps = module.eps
    if eps is None and isinstance(x, Tensor):
        eps = _EPS.get(x.dtype)
    return _norm(x, module.normalized_shape, eps, parameter(module, "weight"), None)


@register(nn.RMSNorm, ("rms_norm",), "fused RMS norm", unless=_keep_rms_norm, serves=_serves_rms_norm)
class RMSNorm:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, parameter(self, "weight"), _EPS[x.dtype] if self.eps is None else self.eps)


def _serves_gelu(module: Any, input: Tensor) -> bool:
    return module.approximate in ("none", "tanh") and dense(input) and input.is_contiguous() and input.ndim > 0


@register(nn.GELU, ("gelu",), "one-pass GELU", serves=_serves_gelu)
class GELU:
    def forward(self: Any, input: Tensor) -> Tensor:
        return gelu(input, None, self.approximate)


def _keep_dropout(module: Any) -> str | None:
    if module.inplace:
        return "drops in place"
    return None if droppable(module.p) else f"p = {module.p}"


def _serves_dropout(module: Any, input: Tensor) -> bool:
    if not droppable(module.p) or module.inplace or not dense(input) or not input.is_contiguous():
        return False
    # torch returns an empty input itself
    return input.ndim > 0 and input.numel() > 0


@register(
    nn.Dropout,
    ("dropout",),
    "dropout without a stored mask, its random numbers in parallel",
    unless=_keep_dropout,
    serves=_serves_dropout,
)
class Dropout:
    def forward(self: Any, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
