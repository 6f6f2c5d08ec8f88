"""Put our kernels into a model that exists, and take them out again.

A module is swapped by changing its class: to one made of a replacement's methods over the module's own class, with the
same name. Nothing else about it changes: parameters, buffers, hooks, config, state_dict, isinstance and saved files are
the same objects and the same words, and putting the class back is all that unpatch does.

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

from .dispatch import where
from .ops.gelu import gelu
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm

# package in which a module's class lives -> file in integrations/ that knows it
FAMILIES = {"transformers": "huggingface"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]]).rstrip() for line in lines
        ]
        return "\n".join([self.summary(), *table])


# ---- the registry ----


@dataclass(frozen=True)
class _Rule:
    matches: Callable[[nn.Module], bool]
    replacement: type
    ops: tuple[str, ...]
    why: str
    unless: Callable[[nn.Module], str | None]
    fuses: tuple[str, ...]


_rules: list[_Rule] = []
_base_of: dict[type, type] = {}  # class made here -> the module's own class


def register(target: type | Callable[[nn.Module], bool], ops: tuple[str, ...], why: str,
             unless: Callable[[nn.Module], str | None] = lambda module: None, fuses: tuple[str, ...] = ()):  # fmt: skip
    """Class decorator: the class's methods replace those of modules whose class is `target`, or for which target(module).

    The methods find the module's own under super(). Only methods of the module's class may be named in it: any other
    name could hide a child module. ops: the ops it calls. unless(module): a reason to keep the module, or None.
    fuses: children whose work is done inside it.
    """
    matches = (lambda module: type(module) is target) if isinstance(target, type) else target

    def add(replacement: type) -> type:
        _rules.append(_Rule(matches, replacement, ops, why, unless, fuses))
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

    made = type(base)(base.__name__, (replacement, base), {**names, "__reduce_ex__": __reduce_ex__})
    _base_of[made] = base
    return made


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
        own = _base_of.get(type(module))
        rule = next((r for r in _rules if r.matches(module)), None) if own is None else _rule_of(type(module))
        reason = _reason_to_keep(module, rule, model) if own is None else None
        if rule is None or reason is not None:
            why = "its work is done inside its parent" if path in fused else reason or _why_no_rule(module)
            rows.append(Row(path, cls, None, why))
            continue
        rows.append(Row(path, cls, "+".join(rule.ops), rule.why))
        fused |= {f"{path}.{child}".lstrip(".") for child in rule.fuses}
        if own is None:
            changes.append((module, _made_class(rule.replacement, type(module))))  # type: ignore[arg-type]
    return Plan(type(model).__name__, rows, dry_run), changes


def _rule_of(made: type) -> _Rule:
    return next(rule for rule in _rules if rule.replacement is made.__bases__[0])


def _reason_to_keep(module: nn.Module, rule: _Rule | None, model: nn.Module) -> str | None:
    if rule is None:
        return None
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if (reason := rule.unless(module)) is not None:
        return reason
    like = next(module.parameters(), None)
    like = next(model.parameters(), None) if like is None else like
    if like is None:
        return None
    if like.dtype not in _DTYPES:
        return f"its parameters are {like.dtype}"
    for op in rule.ops:
        server = where(f"{op}_fwd").get(like.device.type.upper(), "reference (no kernels for this device)")
        # a reference that was pushed was asked for
        if server.startswith("reference") and "pushed" not in server:
            return f"{op} has no kernel here: {server}"
    return None


_KEPT = {
    nn.Linear: "matrix product: torch's",
    nn.Embedding: "row lookup: torch's",
    nn.Dropout: "dropout: torch's",
}


def _why_no_rule(module: nn.Module) -> str:
    for cls, why in _KEPT.items():
        if type(module) is cls:
            return why
    if type(module).__module__.split(".")[0] == __package__:
        return "runs on our kernels already"
    return "its parts are looked at one by one" if next(module.children(), None) else "no replacement for this class"


# ---- torch's own modules ----


def _several_dimensions(module: Any) -> str | None:
    n = len(module.normalized_shape)
    return f"normalises over {n} dimensions" if n != 1 else None


@register(nn.LayerNorm, ("layer_norm",), "fused layer norm", unless=_several_dimensions)
class LayerNorm:
    def forward(self: Any, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


@register(nn.RMSNorm, ("rms_norm",), "fused RMS norm", unless=_several_dimensions)
class RMSNorm:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)


@register(nn.GELU, ("gelu",), "one-pass GELU")
class GELU:
    def forward(self: Any, x: Tensor) -> Tensor:
        return gelu(x, None, self.approximate)
