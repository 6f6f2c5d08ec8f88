"""Put our kernels into a model that exists, and take them out again.

A module is swapped by changing its class: to one made of a replacement's methods over the module's own class, with the
same name. Nothing else about it changes: parameters, buffers, hooks, config, state_dict, isinstance and saved files are
the same objects and the same words, and putting the class back is all that unpatch does.

A swapped module does what its own class does for every argument, attribute and state, also when they change after patch: a
replacement comes with `serves`, which says of a call, from its arguments and from what the module is by then, whether our
kernels do the same; any other call runs the class's own forward. `dense` is what most of them ask. Hooks fire as before:
where forward hooks are set on all modules (torch.nn.modules.module.register_module_forward_hook and its kin), a module that
does the work of its children hands them back that work, so that each of them is seen.

A family of models is one file, integrations/<library>_<family>.py, with a `register` or `keep` line per module class. It is
found by its name, and loaded when patch first sees a class of a module such as <library>.models.<family>.modeling_<family>.
What it says counts after what was said elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from . import integrations, structure
from . import policy as policies
from .dispatch import Served, pushed, where
from .serving import DTYPES, dense, droppable, left_by_autocast, own_class, parameter, unhooked
from .serving import base_of as _base_of
from .table import aligned

__all__ = ["dense", "droppable", "keep", "left_by_autocast", "parameter", "patch", "patched", "register", "unhooked", "unpatch"]


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


Target = type[nn.Module] | Callable[[nn.Module], bool]


@dataclass(frozen=True)
class _Rule:
    target: Target
    why: str
    home: str  # the module that said it
    replacement: Any = None  # None: to be kept
    ops: tuple[str, ...] = ()
    unless: Callable[[Any], str | None] = lambda module: None
    fuses: tuple[str, ...] = ()
    serves: Callable[..., bool] | None = None
    forward: Callable | None = None  # the class's own, as it was when the rule was written for it

    def matches(self, module: nn.Module) -> bool:
        return _own(module) is self.target if isinstance(self.target, type) else self.target(module)


_rules: list[_Rule] = []  # the first that matches counts
_own = own_class


def _add(rule: _Rule) -> None:
    # families are loaded when they are seen: a user's newest word is the first, theirs come after it as they are written
    family = rule.home.startswith(f"{integrations.__name__}.")
    _rules.insert(len(_rules) if family else 0, rule)


def register(
    target: Target,
    ops: tuple[str, ...],
    why: str,
    unless: Callable[[Any], str | None] = lambda module: None,
    fuses: tuple[str, ...] = (),
    serves: Callable[..., bool] | None = None,
):
    """Class decorator: the class's methods replace those of modules whose class is `target`, or for which target(module).

    The methods find the module's own under super(). Only methods of the module's class may be named in it: any other
    name could hide a child module. ops: the ops it calls. unless(module): a reason to keep the module, or None.
    fuses: children whose work is done inside it. serves(module, *args, **kwargs): does the class's forward here do for this
    call what the module's own would? If not, the module's own does it. It is asked at every call: a microsecond at most.
    """
    known = getattr(target, "forward", None) if isinstance(target, type) else None

    def add(replacement: type) -> type:
        _add(_Rule(target, why, replacement.__module__, replacement, ops, unless, fuses, serves, known))
        return replacement

    return add


def keep(target: Target, why: str, *, home: str = "") -> None:
    """The counterpart of register: modules whose class is `target`, or for which target(module), stay as they are, with all
    that is inside them. why: what the plan says of them.

    The last word counts, of register and keep, and both count before the files in integrations/. It holds from the next patch
    on, which gives back its class to a module that was swapped before. patch(model, keep=...) keeps modules of one model.
    home: the __name__ of a file in integrations/ that says so.
    Raises TypeError for a target that is neither a module class nor a function.
    """
    if isinstance(target, nn.Module):
        raise TypeError(f"keep: expected a module class, got a {type(target).__name__}; patch(model, keep=[module]) keeps one")
    if not callable(target) or isinstance(target, type) and not issubclass(target, nn.Module):
        raise TypeError(f"keep: expected a module class or a function of a module, got {target!r:.60}")
    _add(_Rule(target, why, home))


# ---- families ----


def _load_families(model: nn.Module) -> dict[str, str]:
    """Import the files in integrations/ that know classes of the model; {file's name: why it could not be loaded}."""
    files = {file.name for file in pkgutil.iter_modules(integrations.__path__)}
    failed = {}
    for name in sorted({name for module in model.modules() for name in _family_names(_own(module))} & files):
        try:
            importlib.import_module(f"{integrations.__name__}.{name}")
        except Exception as error:
            # of any kind: the file names what another library has, or had
            failed[name] = f"integration {name} could not be loaded: {type(error).__name__}: {error}"
    if failed:
        # half a family is none
        gone = {rule.home for rule in _rules if rule.home.startswith(f"{integrations.__name__}.")} - sys.modules.keys()
        _rules[:] = [rule for rule in _rules if rule.home not in gone]
    return failed


def _family_names(cls: type) -> list[str]:
    """What a file that knows cls may be called: "a_b", "a_c" for a class of module a.b.c."""
    library, *parts = cls.__module__.split(".")
    return [f"{library}_{part}" for part in parts]


# ---- made classes ----


@functools.cache
def _made_class(replacement: Any, base: type) -> type:
    """replacement: a class of methods that was registered, or a form that structure found."""
    # named as the module's class: files and other libraries know classes by their names
    names: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}

    def __reduce_ex__(self, protocol):
        # pickle looks classes up by name and would find the module's own
        _, _, *state = super(made, self).__reduce_ex__(protocol)
        return _new, (replacement, base), *state

    names["__reduce_ex__"] = __reduce_ex__
    if isinstance(replacement, structure.Form):
        for name, (fused, serves) in structure.methods_of(replacement, base).items():
            names[name] = _served(serves, fused, base, name)
        bases: tuple[type, ...] = (base,)
    else:
        rule, bases = _rule_of(replacement), (replacement, base)
        if rule.serves is not None:
            names["forward"] = _served(rule.serves, replacement.forward, base)
    made = type(base)(base.__name__, bases, names)
    _base_of[made] = base
    _replacement_of[made] = replacement
    return made


_replacement_of: dict[type, Any] = {}  # class made here -> what it was made of


def _served(serves: Callable[..., bool], fused: Callable, base: Any, name: str = "forward") -> Callable:
    known = getattr(base, name)

    # wraps: whoever asks for the signature sees the class's own
    @functools.wraps(known)
    def method(self, *args, **kwargs):
        # one that somebody put into the class since is theirs to run; and who kept this one, bound, from before unpatch
        # (accelerate's hooks do) has the class's own
        if getattr(base, name) is known and type(self) is not base and serves(self, *args, **kwargs):
            return fused(self, *args, **kwargs)
        return getattr(base, name)(self, *args, **kwargs)

    return method


def _new(replacement: Any, base: type) -> nn.Module:
    made: Any = _made_class(replacement, base)
    return made.__new__(made)


# ---- patch and unpatch ----


def patch(
    model: nn.Module,
    dry_run: bool = False,
    keep: Iterable[nn.Module | type[nn.Module]] = (),
    *,
    probe: bool = True,
    policy: str | None = None,
    sample: Any = None,
) -> Plan:
    """Swap every module of `model` that a kernel of ours can serve with the same result; returns the plan.

    dry_run: only the plan. keep: modules of the model, or classes, that stay as they are, with all that is inside them.
    probe: compare what a module of an unknown class looks like with what it does, on small random inputs (probe.py); False
    takes it for what it looks like, which may be wrong.
    policy="measured": the model runs on `sample`, a batch as verify() takes it, and what our kernels make slower on this
    machine stays as it is; the row says by how much. It is measured in the mode, under the autograd and the autocast that are
    in force: to decide for inference, call it under torch.no_grad(). The figures are kept in the private cache (policy.py).
    Modules stay the same objects, and patching twice is patching once. Nothing is swapped where our kernels are not there for
    the model's device: a patched model is not to be slower. Raises TypeError for anything but a torch.nn.Module, ValueError
    for a module in keep that is not in the model, and for a policy that is unknown or has no sample.
    """
    policies.check(policy, sample)
    keep = keep if isinstance(keep, nn.Module | type) else list(keep)
    plan, changes = _plan(model, dry_run, keep, probe)
    slower: dict[nn.Module, str] = {}
    while policy is not None:
        classes: dict[nn.Module, type] = {module: type(module) for module in model.modules()}
        offered = {module: new for module, new in (classes | dict(changes)).items() if new in _base_of}
        found = policies.slower(model, offered, sample, slower)
        if not found:
            break
        # what is kept may have had children's work done inside it, which are then looked at by themselves
        slower |= found
        plan, changes = _plan(model, dry_run, keep, probe, slower)
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
def patched(model: nn.Module, keep: Iterable[nn.Module | type[nn.Module]] = (), *, probe: bool = True) -> Iterator[Plan]:
    """patch(model, keep=keep, probe=probe) inside the block; afterwards the model is as it was, patched or not."""
    plan, changes = _plan(model, False, keep, probe)
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


def _plan(
    model: nn.Module, dry_run: bool, keep: Iterable, probe: bool, slower: Mapping[nn.Module, str] | None = None
) -> tuple[Plan, list[tuple[nn.Module, type]]]:
    """The plan, and the modules that it changes, with their new classes. slower: kept for that reason, their children not."""
    _require_module(model, "patch")
    asked = _asked(model, keep)
    failed = _load_families(model)
    kept: dict[nn.Module, str] = {}
    rules: dict[nn.Module, _Rule | None] = {}
    for path, module in model.named_modules():
        rule = rules[module] = next((rule for rule in _rules if rule.matches(module)), None)
        why = rule.why if rule is not None and rule.replacement is None else None
        if module in asked or _own(module) in asked:
            why = "keep= asks for it"
        if why is not None:
            for inner in module.modules():
                kept.setdefault(inner, why if inner is module else f"inside {path or 'the model'}, which is kept: {why}")

    rows: list[Row] = []
    changes: list[tuple[nn.Module, type]] = []
    fused: set[str] = set()
    for path, module in model.named_modules():
        rule, swapped, cls = rules[module], type(module) in _base_of, type(module).__name__
        if path in fused:
            rows.append(Row(path, cls, None, "its work is done inside its parent"))
            continue
        reason = kept.get(module) or (slower or {}).get(module)
        if swapped and reason is None:
            # a module keeps the replacement that it has
            rule = _rule_of(_replacement_of[type(module)])
        elif rule is None and reason is None:
            rule, reason = _found(module, model, probe)
        if rule is not None and reason is None:
            reason = next((f"its {name} is kept" for name in rule.fuses if getattr(module, name, None) in kept), None)
        if swapped and reason is not None:
            changes.append((module, _own(module)))
        elif rule is not None and reason is None and not swapped:
            reason = _reason_to_keep(module, rule, model)
        if rule is None or reason is not None:
            rows.append(Row(path, cls, None, reason or _why_no_rule(module, failed)))
            continue
        rows.append(Row(path, cls, "+".join(rule.ops), rule.why))
        fused |= {f"{path}.{child}".lstrip(".") for child in rule.fuses}
        if not swapped:
            changes.append((module, _made_class(rule.replacement, _own(module))))
    return Plan(type(model).__name__, rows, dry_run), changes


_found_rules: dict[structure.Form, _Rule] = {}


def _found(module: nn.Module, model: nn.Module, probe: bool) -> tuple[_Rule | None, str | None]:
    """(the rule that structure and probe make for a module of a class that no rule names, why there is none)."""
    like = _like(module, model)
    if like is not None and (like.dtype not in DTYPES or like.is_meta):
        return None, None
    dtype, device = (torch.float32, torch.device("cpu")) if like is None else (like.dtype, like.device)

    def lacking(op: str) -> str | None:
        why = _no_kernel(f"{op}_fwd", device.type.upper())
        return why and f"{op} has no kernel here: {why}"

    found = structure.find(module, dtype, device, lacking, probe)
    if found is None or found.form is None:
        return None, None if found is None else found.why
    form = found.form
    # the words of the first probe stay with the form: a patched model's plan reads as it did
    rule = _Rule(type(module), found.why, structure.__name__, form, form.ops, fuses=form.fuses)
    return _found_rules.setdefault(form, rule), None


def _like(module: nn.Module, model: nn.Module) -> torch.Tensor | None:
    """A parameter that tells the module's dtype and device: its own, or the model's first."""
    like = next(module.parameters(), None)
    return next(model.parameters(), None) if like is None else like


def _asked(model: nn.Module, keep: Iterable) -> set:
    """The modules and classes in patch's keep, checked."""
    if isinstance(keep, nn.Module | type):
        # some of which could be iterated over
        raise TypeError("patch: keep: expected a list of modules and module classes, got one of them")
    asked, modules = list(keep), set(model.modules())
    for one in asked:
        if isinstance(one, nn.Module):
            if one not in modules:
                raise ValueError(f"patch: keep has a {type(one).__name__} that is not in the model")
        elif not (isinstance(one, type) and issubclass(one, nn.Module)):
            raise TypeError(f"patch: keep: expected modules and module classes, got {one!r:.60}")
    return {_base_of.get(one, one) if isinstance(one, type) else one for one in asked}


def _rule_of(replacement: Any) -> _Rule:
    if isinstance(replacement, structure.Form):
        # one that came in a pickle was not found here
        rule = _Rule(nn.Module, replacement.why, structure.__name__, replacement, replacement.ops, fuses=replacement.fuses)
        return _found_rules.setdefault(replacement, rule)
    return next(rule for rule in _rules if rule.replacement is replacement)


def _reason_to_keep(module: nn.Module, rule: _Rule, model: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if rule.forward is not None and type(module).forward is not rule.forward:
        return "its class's forward was replaced"
    try:
        reason = rule.unless(module)
    except Exception as error:
        # it reads attributes that another version of the library may not have
        return f"{rule.home} does not know it: {type(error).__name__}: {error}"
    if reason is not None:
        return reason
    like = _like(module, model)
    if like is None:
        return None
    if like.dtype not in DTYPES:
        return f"its parameters are {like.dtype}"
    if like.dtype == torch.float64 and like.device.type != "cpu":
        return f"its parameters are float64, for which there is no kernel on {like.device.type}"
    absent = ((op, _no_kernel(f"{op}_fwd", like.device.type.upper())) for op in rule.ops)
    return next((f"{op} has no kernel here: {why}" for op, why in absent if why is not None), None)


def _no_kernel(op: str, key: str) -> str | None:
    """Why tensors of device `key` have no kernel of op here, or None where they have one."""
    served = where(op).get(key, Served("reference", "no kernels for this device"))
    # a reference that was pushed was asked for
    return str(served) if served.backend == "reference" and pushed(op) != "reference" else None


def _why_no_rule(module: nn.Module, failed: dict[str, str]) -> str:
    if _own(module).__module__.split(".")[0] == __package__:
        return "runs on our kernels already"
    for name in _family_names(_own(module)):
        if name in failed:
            return failed[name]
    return (
        "its parts are looked at one by one" if next(module.children(), None) is not None else "no replacement for this class"
    )
