"""The modules that patch swaps, timed as a model calls them: by their own code, by ours, and as others have them.

A model runs once, forward, on a batch, each module by its own class. What it is called with is kept, once of each kind: modules
alike (class, code, attributes, parameters) that are called alike (shapes, strides, dtypes, mode, autograd, autocast). Then each
candidate runs a kind's call alone, forward and backward, in turn with the others, round by round, so that a slow minute of the
machine hits all of them; each time after an untimed call of its own. The allocator is as the process has it. A module's hooks
do not run in these calls; its children's do.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .dispatch import NAMESPACE
from .reading import unwrapped
from .serving import own_class

SECONDS = 0.3  # of one kind, about, for each candidate
ROUNDS = 5, 40  # at least, at most
SHORT = 2e-4  # seconds: a call that takes less is repeated within a round
CERTAIN = 0.75  # of the rounds in which one must be slower to count as slower
_APART = ("training", "layer_idx")  # said elsewhere, and where a layer stands, which is no other kind
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size, slice, type(None))


# ---- kinds of calls ----


@dataclass(eq=False)
class Kind:
    """Calls alike of modules alike. `args`, `kwargs`: of the first of them."""

    module: nn.Module
    made: Any  # the class that patch gives it
    args: tuple
    kwargs: dict[str, Any]
    problem: str | None  # why it cannot be called again
    text: str  # the same for the same kind, in every process
    shapes: str  # for people
    grad: bool
    autocast: torch.dtype | None
    calls: int = 0
    paths: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def met(model: nn.Module, made: Mapping[nn.Module, type | None], args: tuple, kwargs: dict[str, Any]) -> list[Kind]:
    """The kinds of calls of the modules in `made` that model(*args, **kwargs) makes, in order. Every module runs as it is."""
    kinds: dict[tuple[str, type | None], Kind] = {}
    paths = {module: path for path, module in model.named_modules()}
    signatures = {module: signature(module) for module in made}

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        grad, dtype = torch.is_grad_enabled(), _autocast(args, kwargs)
        mode = f"training={module.training} grad={grad} autocast={dtype}"
        text = "\n".join((signatures[module], _described((args, kwargs)), mode))
        kind = kinds.get((text, made[module]))
        if kind is None:
            (given, named), problem = _kept((args, kwargs))
            kind = Kind(module, made[module], given, named, problem, text, _shapes((args, kwargs)), grad, dtype)
            kinds[text, made[module]] = kind
        kind.calls += 1
        if module not in kind.modules:
            kind.modules.append(module)
            kind.paths.append(paths[module])

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in made]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return list(kinds.values())


def signature(module: nn.Module) -> str:
    """What a module is, in words that are the same in every process: class, code, attributes, parameters, children."""
    cls: Any = own_class(module)
    function = unwrapped(cls.forward)
    code = b"" if function is None else function.__code__.co_code + repr(function.__code__.co_names).encode()
    parameters = [f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in module.named_parameters()]
    values = {n: v for n, v in vars(module).items() if type(v) in (bool, int, float, str) and n not in _APART}
    attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
    named = f"{cls.__module__}.{cls.__qualname__} {hashlib.sha256(code).hexdigest()[:16]} {attention}"
    return "\n".join((named, repr(sorted(values.items())), repr(module), *parameters))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.requires_grad} {value.device}"
    if type(value) is dict:
        return "{" + ", ".join(f"{k}: {_described(v)}" for k, v in value.items()) + "}"
    if type(value) in (tuple, list):
        return "(" + ", ".join(map(_described, value)) + ")"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__


def _shapes(value: Any) -> str:
    found = [t for t in _tensors(value) if t.dim() and t.is_floating_point()] or [t for t in _tensors(value) if t.dim()]
    return f"{tuple(found[0].shape)} {str(found[0].dtype).removeprefix('torch.')}" if found else ""


def _autocast(args: tuple, kwargs: dict[str, Any]) -> torch.dtype | None:
    device = next((t.device.type for t in _tensors((args, kwargs))), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


# ---- which of our ops run ----


class Ops(TorchDispatchMode):
    """Counts calls of our ops, by name and the shape and dtype of the first tensor."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[tuple[str, str, str]] = Counter()  # (op, shape, device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            first = next(_tensors(args))
            shape = f"{tuple(first.shape)} {str(first.dtype).removeprefix('torch.')}"
            self.counts[func._opname, shape, first.device.type] += 1
        return func(*args, **(kwargs or {}))


# ---- time ----


@dataclass(frozen=True)
class Seconds:
    """Of one call: medians over the rounds. backward: None where there is none."""

    forward: float
    backward: float | None

    @property
    def total(self) -> float:
        return self.forward + (self.backward or 0.0)


class Candidate(NamedTuple):
    """A way to run a module: its class meanwhile, and what is called as its forward, the module first."""

    cls: type
    forward: Callable


def both(kind: Kind) -> dict[str, Candidate]:
    """The module's own code and, where patch gives it a class, ours."""
    own: Any = own_class(kind.module)
    made = {} if kind.made is None else {"ours": Candidate(kind.made, kind.made.forward)}
    return {"eager": Candidate(own, own.forward), **made}


@dataclass
class Timing:
    seconds: dict[str, Seconds]
    slower: float | None  # in this share of the rounds "ours" took longer than "eager"; None where one is missing
    absent: dict[str, str]  # candidate -> why it has no numbers


def timed(kind: Kind, candidates: Mapping[str, Candidate], seconds: float = SECONDS) -> Timing:
    """Each candidate, forward and backward, in turns; kind.module is afterwards of its class again."""
    if kind.problem is not None:
        return Timing({}, None, dict.fromkeys(candidates, kind.problem))
    runs: dict[str, list[tuple[float, float | None]]] = {}
    absent: dict[str, str] = {}
    repeats: dict[str, int] = {}
    once: dict[str, float] = {}
    for name, candidate in candidates.items():
        try:
            for _ in range(3):  # what is slow the first time: compilers, fresh pages
                taken = sum(t or 0.0 for t in once_through(kind, candidate))
                once[name] = min(once.get(name, taken), taken)
                if len(runs) and once[name] > 1.0:
                    break
            repeats[name], runs[name] = max(1, int(SHORT / once[name])), []
        except Exception as error:  # whatever others' code raises, the row says it
            absent[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    least, most = ROUNDS
    lap = sum(once[name] * (1 + repeats[name]) for name in runs)
    rounds = max(least, min(most, int(seconds * len(runs) / max(lap, 1e-9))))
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for n in range(rounds):
            # whoever comes second finds the inputs in cache
            order = list(runs.items())[:: 1 if n % 2 else -1]
            for name, samples in order:
                # untimed: it finds the heap as the other left it, and may have to get from the system what that gave back
                once_through(kind, candidates[name])
                taken_now = [once_through(kind, candidates[name]) for _ in range(repeats[name])]
                forward_seconds = statistics.fmean(t[0] for t in taken_now)
                back = [t[1] for t in taken_now if t[1] is not None]
                samples.append((forward_seconds, statistics.fmean(back) if back else None))
    finally:
        if enabled:
            gc.enable()
    found = {name: _median(samples) for name, samples in runs.items()}
    slower = None
    if "eager" in runs and "ours" in runs:
        pairs = zip(runs["ours"], runs["eager"], strict=True)
        slower = statistics.fmean(sum(t or 0.0 for t in ours) > sum(t or 0.0 for t in eager) for ours, eager in pairs)
    return Timing(found, slower, absent)


def _median(samples: Sequence[tuple[float, float | None]]) -> Seconds:
    back = [b for _, b in samples if b is not None]
    return Seconds(statistics.median(f for f, _ in samples), statistics.median(back) if back else None)


@contextlib.contextmanager
def of_class(module: nn.Module, cls: type) -> Iterator[None]:
    before = module.__class__
    module.__class__ = cls
    try:
        yield
    finally:
        module.__class__ = before


def once_through(kind: Kind, candidate: Candidate) -> tuple[float, float | None]:
    """Seconds of one forward, and of its backward to every input and parameter; None where nothing of it has a gradient."""
    module, device, forward = kind.module, _device(kind), candidate.forward
    args, kwargs = _fresh((kind.args, kind.kwargs))
    with contextlib.ExitStack() as around:
        around.enter_context(of_class(module, candidate.cls))
        around.enter_context(torch.set_grad_enabled(kind.grad))
        if kind.autocast is not None:
            around.enter_context(torch.autocast(device, kind.autocast))
        _wait(device)
        begin = time.perf_counter()
        out = forward(module, *args, **kwargs)
        _wait(device)
        taken = time.perf_counter() - begin
        ends = [t for t in _tensors(out) if t.requires_grad]
        # a model is differentiated from its loss, not from its logits too
        ends = [t for t in ends if not t.dim()] or ends
        del out  # logits that nobody holds need not be kept beside their gradient
    wanted = [t for t in (*_tensors((args, kwargs)), *module.parameters()) if t.requires_grad]
    if not ends or not wanted:
        return taken, None
    ones = [torch.ones_like(t) for t in ends]
    _wait(device)
    begin = time.perf_counter()
    torch.autograd.grad(ends, wanted, ones, allow_unused=True)
    _wait(device)
    return taken, time.perf_counter() - begin


def _kept(value: Any) -> tuple[Any, str | None]:
    """What a call is given, as it is before the call, and why that cannot be kept."""
    try:
        return _fresh(value), None
    except Exception as error:  # of others' objects
        return ((), {}), f"its arguments cannot be copied: {type(error).__name__}"


class _Detached(TorchFunctionMode):
    """Tensors in what is copied are not copied, and are leaves."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__deepcopy__:
            return args[0].detach().requires_grad_(args[0].requires_grad)
        return func(*args, **(kwargs or {}))


def _fresh(value: Any) -> Any:
    """Tensors as they are, so that they require gradients of their own; what may change when it is called with (a cache of keys
    and values) as a copy."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if type(value) is dict:
        return {k: _fresh(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_fresh, value))
    if isinstance(value, (*_PLAIN, nn.Module)) or callable(value):
        return value
    with _Detached():
        return copy.deepcopy(value)


def _device(kind: Kind) -> str:
    tensors = (*_tensors((kind.args, kind.kwargs)), *kind.module.parameters())
    return next((t.device.type for t in tensors), "cpu")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
