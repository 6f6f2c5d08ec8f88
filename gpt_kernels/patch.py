"""Put our kernels into a model that exists, and take them out again.

A module is swapped by changing its class: to one made of a replacement's methods over the module's own class, with the
same name. Nothing else about it changes: parameters, buffers, hooks, config, state_dict, isinstance and saved files are
the same objects and the same words, and putting the class back is all that unpatch does.

A swapped module does what its own class does for every argument, attribute and state, also when they change after patch: a
replacement comes with `serves`, which says of a call, from its arguments and from what the module is by then, whether our
kernels do the same; any other call runs the class's own forward. `dense` is what most of them ask. Hooks fire as before:
where forward hooks are set on all modules (torch.nn.modules.module.register_module_forward_hook and its kin), a module that
does the work of its children hands them back that work, so that each of them is seen.

A family of models is one file in integrations/, with a `register` line per module class and a `keep` line for what stays as it
is; see integrations/__init__.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from . import integrations
from .dispatch import Served, pushed, where
from .table import aligned

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
_keeps: list[tuple[Callable[[nn.Module], bool], str]] = []
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
    matches = _matcher(target)

    def add(replacement: type) -> type:
        _rules.append(_Rule(matches, replacement, ops, why, unless, fuses, serves, known))
        return replacement

    return add


def keep(target: nn.Module | type | Callable[[nn.Module], bool], why: str) -> None:
    """Leave modules as they are in every patch() from now on: this module and what is in it, those of this class, or those
    for which target(module). The plan says `why`.

    Raises TypeError for anything else, and ValueError for a module that is swapped already: unpatch it first.
    """
    if isinstance(target, nn.Module):
        if is_patched(target):
            raise ValueError(f"keep: {type(target).__name__} is swapped already; unpatch it first")
        found = weakref.WeakSet(target.modules())
        _keeps.append((lambda module: module in found, why))
    elif isinstance(target, type) or callable(target):
        _keeps.append((_matcher(target), why))
    else:
        raise TypeError(f"keep: expected a module, a class of modules or a function of one, got {type(target).__name__}")


def _matcher(target: type | Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    return (lambda module: type(module) is target) if isinstance(target, type) else target


@functools.cache
def _made_class(replacement: Any, base: Any) -> Any:
    # named as the module's class: files and other libraries know classes by their names
    names: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}

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
    problems = _load_families(model)
    rows: list[Row] = []
    changes: list[tuple[nn.Module, type]] = []
    fused: set[str] = set()
    for path, module in model.named_modules():
        cls = type(module).__name__
        if path in fused:
            rows.append(Row(path, cls, None, "its work is done inside its parent"))
            continue
        own, reason = _base_of.get(type(module)), None
        try:
            if own is None:
                reason = next((why for matches, why in _keeps if matches(module)), None)
            rule = next((r for r in _rules if r.matches(module)), None) if own is None else _rule_of(type(module).__bases__[0])
            reason = reason or (_reason_to_keep(module, rule, model) if own is None else None)
        except Exception as error:  # an attribute that another version of its library has not
            rule, reason = None, f"its rule fails: {type(error).__name__}: {error}"
        if rule is None or reason is not None:
            rows.append(Row(path, cls, None, reason or _problem(type(module), problems) or _why_no_rule(module)))
            continue
        rows.append(Row(path, cls, "+".join(rule.ops), rule.why))
        fused |= {f"{path}.{child}".lstrip(".") for child in rule.fuses}
        if own is None:
            changes.append((module, _made_class(rule.replacement, type(module))))  # type: ignore[arg-type]
    return Plan(type(model).__name__, rows, dry_run), changes


def _load_families(model: nn.Module) -> dict[str, str]:
    """Import the integrations that the model's classes ask for; file -> why it could not be."""
    problems = {}
    for file in sorted({file for module in model.modules() for file in integrations.of(type(module))}):
        rules, keeps = len(_rules), len(_keeps)
        try:
            importlib.import_module(f"{integrations.__name__}.{file}")
        except Exception as error:
            # half of a family is none
            del _rules[rules:], _keeps[keeps:]
            problems[file] = f"integrations/{file}.py could not be loaded: {type(error).__name__}: {error}"
    return problems


def _problem(cls: type, problems: dict[str, str]) -> str | None:
    return next((problems[file] for file in integrations.of(cls) if file in problems), None)


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


def _why_no_rule(module: nn.Module) -> str:
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
