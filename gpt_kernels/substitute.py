"""A module's own code over functions of ours: what stands in its methods as a global name (a rotary embedding, a table of
attention functions, F.scaled_dot_product_attention) is replaced there, and nowhere else.

A method is rebuilt from the class's own code with other globals (reading.rebuilt). It serves only while those of the module
are still what they were: a function that somebody puts in their place later is theirs to run.

What a name in a forward may be replaced by is said by finders: finder(value, module, device) -> Substitute, a reason not to, or
None. Families add theirs (integrations/). torch's own functions (functional.py) are replaced in all methods of a class, so that
the loss of a Lightning module's training_step is ours, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from . import functional
from .ops.rotary import apply_rotary_pos_emb
from .probe import compared, random_state_kept, results
from .reading import globals_read, methods, rebuilt, unwrapped
from .serving import dense


@dataclass(frozen=True)
class Substitute:
    """What is put in the place of a global: make(its value, *args). Picklable: make is a module's function, args are plain."""

    make: Callable[..., Any]
    args: tuple
    op: str
    why: str


@dataclass(frozen=True)
class Substituted:
    build: Callable[..., Any]
    args: tuple
    ops: tuple[str, ...]
    why: str
    torchs: bool  # are all of them functions of torch's?


Finder = Callable[[Any, nn.Module, torch.device], "Substitute | str | None"]
finders: list[Finder] = []  # of families
Replaced = tuple[str, str, Callable[..., Any], tuple]  # method, global, make, args


def substituted(
    module: nn.Module, cls: Any, device: torch.device, lacking: Callable[[str], str | None]
) -> Substituted | str | None:
    """The substitutes for what the methods of `cls` name, a reason why there is none, or None where nothing is to be.

    lacking(op): why there is no kernel of it for the device."""
    found: list[Replaced] = []
    ops: dict[str, str] = {}  # with what the plan says
    reasons: list[str] = []
    inner = unwrapped(cls.forward)
    for name, value in globals_read(inner).items() if inner is not None else ():
        for finder in (rotary, *finders):
            answer = finder(value, module, device)
            if answer is not None and not isinstance(answer, str):
                if (why := lacking(answer.op)) is None:
                    found.append(("forward", name, answer.make, answer.args))
                    ops[answer.op] = answer.why
                answer = why
            if answer is not None and answer not in reasons:
                reasons.append(answer)
    torchs = not found
    for method, function in methods(cls).items():
        inner = unwrapped(function)
        named = functional.named(inner) if inner is not None else {}
        served = {path: op for path, op in named.items() if lacking(op) is None}
        if not served or rebuilt(function, {}) is None:
            continue
        for name in dict.fromkeys(path[0] for path in served):
            found.append((method, name, functional.over, tuple(sorted(path[1:] for path in served if path[0] == name))))
        for op in sorted(set(served.values())):
            ops.setdefault(op, "torch's functions over ours")
    if not found:
        return "; ".join(reasons) or None
    if any(method == "forward" for method, *_ in found) and rebuilt(cls.forward, {}) is None:
        return "its forward is under a decorator that hides it, or writes globals, or reads some that are not there"
    return Substituted(build, tuple(found), tuple(ops), "; ".join(dict.fromkeys((*ops.values(), *reasons))), torchs)


def build(base: Any, *replaced: Replaced) -> dict[str, tuple[Callable[..., Any], Callable[..., bool]]]:
    """{method: (function, serves)} over base's own. Raises TypeError where one cannot be rebuilt."""
    return {name: _built(base, name, [one[1:] for one in replaced if one[0] == name]) for name, *_ in replaced}


def _built(base: Any, method: str, replaced: list[tuple[str, Callable[..., Any], tuple]]) -> Any:
    own = getattr(base, method)
    inner = unwrapped(own)
    assert inner is not None
    read = globals_read(inner)
    function = rebuilt(own, {name: make(read[name], *args) for name, make, args in replaced})
    if function is None:
        raise TypeError(f"{base.__qualname__}.{method} cannot be rebuilt (reading.rebuilt)")
    scope, known = inner.__globals__, tuple(read.items())
    numbers = {name: value for name, value in known if isinstance(value, int | float | str | None)}
    now = _peek(scope, tuple(numbers))
    then = tuple(numbers.values())
    torchs = tuple((read[name], args) for name, make, args in replaced if make is functional.over)

    def serves(self: Any, *args: Any, **kwargs: Any) -> bool:
        if torch.compiler.is_dynamo_compiling():
            # which guards each that is asked for, and must be told of a number that is another by now
            return now() == then
        for name, value in known:
            if scope.get(name) is not value:
                return False
        for value, paths in torchs:
            if not functional.unchanged(value, paths):
                return False
        return True

    return function, serves


def _peek(scope: dict[str, Any], names: tuple[str, ...]) -> Callable[[], tuple]:
    """A function that reads these globals where they are, as any code there does."""
    code = compile(f"lambda: ({''.join(name + ', ' for name in names)})", "<globals>", "eval")
    return FunctionType(next(c for c in code.co_consts if isinstance(c, CodeType)), scope)


# ---- rotary embeddings ----


def rotary(value: Any, module: nn.Module, device: torch.device) -> Substitute | str | None:
    """A function of (q, k, cos, sin, ...)."""
    names = _parameters(value)
    if len(names) < 4 or {"cos", "sin"} != set(names[2:4]):
        return None
    found = _rotary_form(value, device)
    return found if isinstance(found, str) else Substitute(rotary_over, found[0], "rotary", found[1])


def _parameters(function: Any) -> tuple[str, ...]:
    inner = unwrapped(function)
    return () if inner is None else inner.__code__.co_varnames[: inner.__code__.co_argcount]


@functools.cache
def _rotary_form(function: Any, device: torch.device) -> tuple[tuple, str] | str:
    """((interleaved, part of the dimensions too), what the plan says), or why not."""
    names, wrong = _parameters(function), ""
    if names[2] != "cos":
        return "its rotary embedding has its tables in another order"
    unsqueezed = (1, 2) if "unsqueeze_dim" in names else (1,)
    with random_state_kept(device), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for interleaved in (False, True):
            agreed, worst = [], (0.0, 0.0)
            for width in (8, 4):
                part = [
                    _rotary_agrees(function, interleaved, width, dim, dtype, device)
                    for dim in unsqueezed
                    for dtype in (torch.float32, torch.bfloat16, torch.float16)
                ]
                wrong = next((p for p in part if isinstance(p, str)), wrong)
                if any(isinstance(p, str) for p in part):
                    break
                agreed.append(width)
                worst = max(worst, *(p for p in part if not isinstance(p, str)))
            if agreed:
                return (
                    interleaved,
                    4 in agreed,
                ), f"rotary embedding in one pass, probe: error {worst[0]:.1e}, eager's {worst[1]:.1e}"
    return f"its rotary embedding is another: {wrong}"[:200]


def _rotary_agrees(function, interleaved, width, dim, dtype, device) -> tuple[float, float] | str:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, width), (2, 5, width))
    xs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    if dim == 2:
        xs[:2] = [x.transpose(1, 2).contiguous() for x in xs[:2]]
    options: dict[str, Any] = {} if dim == 1 else {"unsqueeze_dim": dim}
    try:
        eager = results(lambda *x: function(*x, **options), xs, {})
        truth = results(lambda *x: function(*x, **options), [x.double() for x in xs], {})
        ours = results(
            lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=dim, interleaved=interleaved), xs, {}
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wrong, *errors = compared(ours, eager, truth)
    return wrong or (errors[0], errors[1])


def rotary_over(own: Any, interleaved: bool, part: bool) -> Callable[..., Any]:
    """Ours in the place of `own`, which does what ours does not."""
    names = _parameters(own)[4:]
    inner = unwrapped(own)
    assert inner is not None
    defaults = dict(zip(reversed(_parameters(own)), reversed(inner.__defaults__ or ()), strict=False))
    given = defaults.get("unsqueeze_dim", 1)

    @functools.wraps(own, updated=())
    def apply(q, k, cos, sin, *args, **kwargs):
        more = {**dict(zip(names, args, strict=False)), **kwargs}
        dim = more.pop("unsqueeze_dim", given)
        if (
            dense(q, k)
            and (dense(q, cos, sin) or q.dtype.itemsize == 2 and dense(cos, sin) and cos.dtype is torch.float32)
            and q.device == cos.device
            and dim in (1, 2)
            and not any(value is not None for value in more.values())
            and q.ndim == k.ndim == 4
            and cos.ndim == 3
            and q.numel() > 0
            and k.numel() > 0
            and q.shape[3 - dim] == k.shape[3 - dim] == cos.shape[1]
            and q.shape[0] == k.shape[0]
            and cos.shape[0] in (1, q.shape[0])
            and sin.shape == cos.shape
            and q.shape[-1] == k.shape[-1]
            and (q.shape[-1] == cos.shape[-1] or part and q.shape[-1] > cos.shape[-1])
            and cos.shape[-1] % 2 == 0
        ):
            if q.dtype is not cos.dtype:  # torch's own product of the two is float32, too
                q, k = q.float(), k.float()
            return apply_rotary_pos_emb(q, k, cos, sin, dim, interleaved=interleaved)
        return own(q, k, cos, sin, *args, **kwargs)

    return apply
