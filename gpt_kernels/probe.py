"""Does a candidate do what a module's own forward does? Both are run on small random inputs and compared by accuracy.py, output
and the gradients of inputs and parameters, against the module's own in float64.

The module itself is never run. What runs is its twin: a copy with random parameters in which linear layers are small ones of
the same proportions (a fused gate_up stays twice as wide as the rest) and dropout is a fixed pattern, so that the probe of a
large module is small, and an element that was dropped elsewhere is seen. So parameters, gradients, buffers, hooks, modes and
counters of the module are what they were; the random number generators of torch, Python and NumPy are put back.

Inputs are of several magnitudes, each judged alone: an eps beside the square root shows in small rows, a clip in large ones.
Every dtype is probed, in training and in evaluation mode; what agrees may be served in that dtype. Not served is a forward that
changes the module, or its input, or asks for a value of a tensor (an `if` on its contents).
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .accuracy import FORWARD, INPUT_GRADIENT, SAME_FORMULA, WEIGHT_GRADIENT, judge

# float32 first, in which another formula shows soonest
PROBED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = 1 << 24  # elements of a twin: a module above them is not copied


@dataclass(frozen=True)
class Verdict:
    """What agreed: the ranks of inputs and the dtypes; and the largest error of a tensor, relative to its largest element, ours
    and eager's, in the module's own dtype. Where nothing did: why."""

    ranks: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    error: float = 0.0
    eager_error: float = 0.0
    wrong: str | None = None

    def __str__(self) -> str:
        return self.wrong or f"probe: error {self.error:.1e}, eager's {self.eager_error:.1e}"


# ---- state that a probe puts back ----


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """The generators of torch (CPU and device), Python and NumPy, where it is loaded, are afterwards what they were."""
    numpy = sys.modules.get("numpy")
    state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(state[0])
            if numpy:
                numpy.random.set_state(state[1])


# ---- the twin ----


class _Pattern(nn.Dropout):
    """Stands for a dropout: what it drops depends on the place alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.arange(x.numel(), device=x.device).mul(2654435761).remainder(97).view(x.shape) > 30
        return x * kept / 0.75


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer of whatever class: torch's, quantised, LoRA's; None for all else."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if sizes == (None, None):
        sizes = getattr(module, "nx", None), getattr(module, "nf", None)
    return sizes if type(sizes[0]) is type(sizes[1]) is int else None  # type: ignore[return-value]


def small_sizes(children: Iterable[nn.Module]) -> dict[int, int]:
    """What each size of linear layers is in the twin: in proportion, where that is smaller."""
    sizes = sorted({n for child in children for n in linear_sizes(child) or ()})
    unit = math.gcd(*sizes) if sizes else 1
    factor = max(1, 8 * unit // sizes[0]) if sizes else 1
    return {n: min(n, n // unit * factor) if max(sizes) // unit * factor <= max(sizes) else n for n in sizes}


def twin(module: nn.Module, own: type, device: torch.device, small: bool = True) -> nn.Module:
    """A copy with random parameters in float32, of its own class `own`, on the device; linear layers that are children are
    torch's, small ones in proportion if `small`. Raises ValueError for a module too large to copy, and what deepcopy raises."""
    memo: dict[int, Any] = {}
    children = dict(module.named_children())
    sizes = small_sizes(children.values()) if small else {}
    count = 0
    for child in children.values():
        if (linear := linear_sizes(child)) is not None:
            n, m = (sizes.get(size, size) for size in linear)
            bias = getattr(child, "bias", None) is not None
            # in the form of the child: who reads child.weight finds what it expects
            made: Any = copy.copy(child) if _is_conv1d(child) else nn.Linear(n, m, bias=bias, device="meta")
            if _is_conv1d(child):
                made._parameters = {"weight": nn.Parameter(torch.empty(n, m)), "bias": nn.Parameter(torch.empty(m))}
                made.nx, made.nf = n, m
            memo[id(child)] = made
            count += n * m
        elif isinstance(child, nn.Dropout):
            memo[id(child)] = _Pattern(child.p)
    rest = sum(p.numel() for p in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    if count + rest > LARGEST:
        raise ValueError(f"{count + rest} elements are too many to copy")
    # replaced below: their values, of which a stand-in has none, are not copied
    memo.update({id(p): nn.Parameter(torch.empty(p.shape, device="meta")) for p in module.parameters() if id(p) not in memo})
    made = copy.deepcopy(module, memo)
    made.__class__ = own
    for inner in made.modules():
        for hooks in (inner._forward_hooks, inner._forward_pre_hooks, inner._backward_hooks, inner._backward_pre_hooks):
            hooks.clear()
        for name, p in inner._parameters.items():
            if p is not None:
                fan = p.shape[-1] if p.dim() > 1 else 1
                inner._parameters[name] = nn.Parameter(torch.randn(p.shape, device=device) / fan**0.5)
    return made


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and not hasattr(module, "in_features")


# ---- runs ----


class _Values(TorchDispatchMode):
    """Notes whether a value of a tensor reached Python."""

    asked: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "allclose"):
            self.asked = name
        return func(*args, **(kwargs or {}))


def results(call: Callable[..., Any], inputs: Sequence[Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of call(*inputs) and the gradients of a fixed function of them: {"output 0": …, "gradient of …": …}.

    Raises TypeError for what is no tensor or tuple of them."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    before = [x._version for x in inputs]
    outs = call(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    if not outs or not all(isinstance(y, Tensor) for y in outs):
        raise TypeError("it returns what is no tensor")
    if [x._version for x in inputs] != before:
        raise TypeError("it changes its input")
    found = {f"output {i}": y.detach() for i, y in enumerate(outs)}
    wanted = {f"gradient of input {i}": x for i, x in enumerate(inputs) if x.requires_grad}
    wanted |= {f"gradient of {name}": p for name, p in parameters.items()}
    if any(y.requires_grad for y in outs):
        dys = [_cotangent(y) for y in outs if y.requires_grad]
        grads = torch.autograd.grad([y for y in outs if y.requires_grad], list(wanted.values()), dys, allow_unused=True)
        found |= {name: g for name, g in zip(wanted, grads, strict=True) if g is not None}
    return found


def _cotangent(y: Tensor) -> Tensor:
    # the same in every dtype
    return torch.cos(torch.arange(y.numel(), device=y.device, dtype=torch.float64)).view(y.shape).bfloat16().to(y.dtype)


def _factor(name: str) -> float:
    if name.startswith("output"):
        return FORWARD
    return INPUT_GRADIENT if name.startswith("gradient of input") else WEIGHT_GRADIENT


def compared(ours: dict, eager: dict, truth: dict) -> tuple[str | None, float, float]:
    """(what is wrong, our largest error, eager's), the errors relative to each tensor's largest element."""
    if ours.keys() != eager.keys():
        return f"{' and '.join(sorted(ours.keys() ^ eager.keys()))} on one side alone", 0.0, 0.0
    worst = eager_worst = 0.0
    for name, y in ours.items():
        if (y.shape, y.dtype) != (eager[name].shape, eager[name].dtype):
            expected = f"{tuple(eager[name].shape)} {eager[name].dtype}"
            return f"{name} is {tuple(y.shape)} {y.dtype}, expected {expected}", torch.inf, 0.0
        judged = judge(y, truth[name].double(), eager[name], _factor(name))
        if judged.wrong is not None:
            return f"{name}: {judged.wrong}", judged.error, judged.eager_error
        finite = truth[name][torch.isfinite(truth[name])]
        size = finite.abs().max().item() if finite.numel() else 0.0
        if size:
            worst, eager_worst = max(worst, judged.error / size), max(eager_worst, judged.eager_error / size)
    return None, worst, eager_worst


@dataclass
class Candidate:
    """One way of ours to run a module: forward(module, *inputs), and serves(module, *inputs), its word on whether it may."""

    forward: Callable[..., Any]
    serves: Callable[..., bool]


Shapes = Sequence[Sequence[tuple[int, ...]]]  # of each rank that is tried, the inputs' shapes


def probe(
    original: nn.Module,
    own: Callable,
    candidates: Sequence[Candidate],
    shapes: Shapes,
    scales: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int | None, Verdict]:
    """Which of the candidates, the first that agrees, does what own(module, *inputs) does; and how well.

    original: a twin. shapes: the first must work in the module's own dtype `dtype`. scales: magnitudes of the inputs.
    """
    generator = torch.Generator().manual_seed(17)
    drawn = {
        (rank, scale): [torch.randn(s, generator=generator).mul(scale).bfloat16().float().to(device) for s in rank]
        for rank in map(tuple, shapes)
        for scale in scales
    }
    first = next(iter(drawn.values()))
    if (unfit := _unfit(original, own, first)) is not None:
        return None, Verdict(wrong=unfit)
    closest: tuple[float, str] = (torch.inf, "no candidate takes its input")
    for index, candidate in enumerate(candidates):
        distance = _distance(original, own, candidate, first)
        if isinstance(distance, str):
            continue
        if distance > SAME_FORMULA[torch.float32]:
            closest = min(closest, (distance, f"the nearest candidate is off by {distance:.1e} of its output"))
            continue
        verdict = _verdict(original, own, candidate, drawn, dtype)
        if verdict.wrong is None:
            return index, verdict
        closest = min(closest, (-1.0, verdict.wrong))
    return None, Verdict(wrong=closest[1])


def _unfit(module: nn.Module, own: Callable, inputs: Sequence[Tensor]) -> str | None:
    """Why a forward is not to be replaced, whatever it returns; or why it does not run."""
    before = _state(module)
    for training in (True, False):
        module.train(training)
        try:
            with torch.no_grad(), _Values() as values:
                own(module, *(x.clone() for x in inputs))
        except Exception as error:
            return f"its forward does not run on {', '.join(str(tuple(x.shape)) for x in inputs)}: {_short(error)}"
        if values.asked is not None:
            return "its forward asks for values of tensors"
    return None if before == _state(module) else "its forward changes its state"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def _state(module: nn.Module) -> list:
    """What a forward may have changed, so that it can be compared."""
    found: list = []
    for inner in module.modules():
        for name, value in inner.__dict__.items():
            if name not in ("training", "_parameters", "_buffers", "_modules"):
                found.append((name, _counted(value)))
        for name, t in (*inner._parameters.items(), *inner._buffers.items()):
            if t is not None:
                found.append(
                    (name, t.dtype, tuple(t.shape), t.detach().cpu().reshape(-1).tolist() if t.numel() < 65536 else t._version)
                )
    return found


def _counted(value: Any) -> Any:
    if isinstance(value, int | float | str | bool | None.__class__):
        return value
    if isinstance(value, list | tuple | set | dict):
        return len(value), repr(value) if len(value) < 8 else None
    inner = getattr(value, "__dict__", None)
    return {k: v for k, v in inner.items() if isinstance(v, int | float | str)} if isinstance(inner, dict) else id(value)


def _distance(module: nn.Module, own: Callable, candidate: Candidate, inputs: Sequence[Tensor]) -> float | str:
    """How far the outputs lie apart in float32, of the largest element."""
    module.eval()
    with torch.no_grad():
        expected = own(module, *inputs)
        try:
            if not candidate.serves(module, *inputs):
                return "not served"
            actual = candidate.forward(module, *inputs)
        except Exception as error:
            return _short(error)
    apart = 0.0
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (actual, expected)), strict=False):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return torch.inf
        apart = max(apart, ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item())
    return apart if apart == apart else torch.inf


def _verdict(module: nn.Module, own: Callable, candidate: Candidate, drawn: dict, dtype: torch.dtype) -> Verdict:
    ranks: list[int] = []
    dtypes, errors, wrong = [], (0.0, 0.0), None
    exact = copy.deepcopy(module).double()
    cpu = next(iter(drawn.values()))[0].is_cpu
    for tried in (dtype, *(d for d in PROBED if d != dtype and (cpu or d != torch.float64))):
        cast = copy.deepcopy(module).to(tried)
        # the parameters as that dtype has them
        with torch.no_grad():
            for p, q in zip(exact.parameters(), cast.parameters(), strict=True):
                p.copy_(q)
        agreed: list[int] = []
        refused: set[int] = set()  # ranks: one of their shapes did not agree
        worst = (0.0, 0.0)
        for shapes in dict.fromkeys(shapes for shapes, _ in drawn):
            if ranks and tried != dtype and len(shapes[0]) not in ranks:
                continue
            found = _agree(exact, cast, own, candidate, [x for s, x in drawn.items() if s[0] == shapes], tried)
            if isinstance(found, str):
                wrong = wrong or found
                refused.add(len(shapes[0]))
                continue
            agreed.append(len(shapes[0]))
            worst = max(worst[0], found[0]), max(worst[1], found[1])
        agreed = [rank for rank in dict.fromkeys(agreed) if rank not in refused]
        if tried == dtype:
            if not agreed:
                return Verdict(wrong=f"{wrong} ({str(tried)[6:]})")
            ranks, errors = agreed, worst
        if agreed == ranks:
            dtypes.append(tried)
        elif tried == torch.float32:
            return Verdict(wrong=f"{wrong} (float32)")  # another formula, which a coarser dtype hides
    return Verdict(tuple(ranks), tuple(dtypes), *errors)


def _agree(exact, cast, own, candidate, inputs, dtype) -> tuple[float, float] | str:
    """Our largest relative error and eager's over these inputs and both modes, or what is wrong."""
    worst = (0.0, 0.0)
    for training in (True, False):
        exact.train(training), cast.train(training)
        for xs in inputs:
            xs = [x.to(dtype) for x in xs]
            try:
                eager = results(lambda *x: own(cast, *x), xs, dict(cast.named_parameters()))
                truth = results(lambda *x: own(exact, *x), [x.double() for x in xs], dict(exact.named_parameters()))
            except Exception as error:
                return f"its own forward: {_short(error)}"
            try:
                if not candidate.serves(cast, *xs):
                    return "the candidate does not serve it"
                ours = results(lambda *x: candidate.forward(cast, *x), xs, dict(cast.named_parameters()))
            except Exception as error:
                return f"the candidate: {_short(error)}"
            wrong, *errors = compared(ours, eager, truth)
            if wrong is not None:
                return f"{wrong}, in {'training' if training else 'evaluation'} mode"
            worst = max(worst[0], errors[0]), max(worst[1], errors[1])
    return worst
