"""Self-attention that somebody wrote out: linear layers for queries, keys and values, scores, a mask, softmax, and a product.

    one linear layer n -> 3 n, another n -> n          minGPT's and most textbooks'
    three linear layers, one n -> n behind them        the same apart; keys for groups of query heads
    three linear layers n -> d alone                   one head

Proposed are the layouts of heads, the scales and the places of dropouts that are in use, causal or not; the probe decides. What
calls torch's attention function itself is not proposed: its function is replaced (functional.py).
"""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .masks import is_uniform_or_causal
from .ops.attention import MAX_HEAD_DIM, scaled_dot_product_attention
from .probe import linear_sizes
from .reading import Reading, attribute, globals_read, unwrapped
from .serving import dense, droppable, own_class, unhooked

Args = tuple[Any, ...]
PROBED, LONGEST = 7, 1 << 40  # tokens of the probe's longest text; tokens where nothing limits them
ELSEWHERE = ("torch", "math", "einops", "typing", "builtins")  # libraries in which no window is
LAYOUTS = ("parts", "heads", "heads last")


def proposed(module: nn.Module, read: Reading, guards: tuple) -> Iterator[Args]:
    """Arguments of `attention`."""
    children = dict(module.named_children())
    linear = {name: sizes for name, child in children.items() if (sizes := linear_sizes(child)) is not None}
    drops = tuple(name for name, child in children.items() if isinstance(child, nn.Dropout))
    if len(linear) + len(drops) != len(children) or len(drops) > 2 or not branches_are_known(read.codes):
        return
    # each is used once
    either: list[str | None] = [*drops, None, None]
    places = [p for p in dict.fromkeys(itertools.permutations(either, 2)) if {d for d in p if d} == set(drops)]
    if not _all_is_read(module, read, guards):
        return
    # what no probe of a few tokens sees: a window, or another number that lengths are compared with
    longest = min((n for n in _numbers(module, read, guards, linear) if n > PROBED), default=LONGEST)
    if not all(is_uniform_or_causal(b) for b in module._buffers.values() if b is not None and b.dim() >= 2):
        return
    counts = [path for path, value in guards if type(value) is int and 1 <= value <= 512]
    counts.sort(key=lambda path: "head" not in path)
    lengths = tuple(name for name, b in module._buffers.items() if b is not None and b.dim() >= 2)
    names = list(linear)
    ways: list[tuple[tuple[str, ...], str | None, str | int]] = []
    if len(names) == 2:
        for qkv, last in itertools.permutations(names):
            if linear[qkv][1] == 3 * linear[last][0]:
                ways += [((qkv,), last, count) for count in counts]
    elif len(names) == 4:
        # by their names, or in their order
        for last in sorted(names, key=lambda name: not any(word in name.lower() for word in ("out", "proj", "o"))):
            q, k, v = _in_order([name for name in names if name != last])
            if linear[last][0] == linear[q][1] and linear[k] == linear[v]:
                ways += [((q, k, v), last, count) for count in counts]
    elif len(names) == 3 and len(set(linear.values())) == 1:
        ways += [(tuple(order), None, 1) for order in dict.fromkeys([tuple(_in_order(names)), *itertools.permutations(names)])]
    for parts, out, heads in ways:
        scores = linear[parts[0]][1] // (3 if len(parts) == 1 else 1)
        number: int = attribute(module, heads) if isinstance(heads, str) else heads
        if scores % number or scores // number > MAX_HEAD_DIM:
            continue
        for (inner, outer), scale, causal, layout in itertools.product(
            places, ("head", "width"), (True, False), LAYOUTS if len(parts) == 1 else LAYOUTS[:1]
        ):
            yield parts, out, heads, layout, scale, causal, inner, outer, lengths, longest


def _functions(module: nn.Module, read: Reading) -> list[FunctionType]:
    own: Any = own_class(module)
    return [f for f in (unwrapped(own.forward), *(unwrapped(f) for _, f in read.functions)) if f is not None]


def _all_is_read(module: nn.Module, read: Reading, guards: tuple) -> bool:
    """Has the code no part that was not read: a parent's method by super(), a function of elsewhere, or one in an attribute?"""
    if "super" in read.names or any(callable(value) and not isinstance(value, type) for _, value in guards):
        return False
    library = own_class(module).__module__.split(".")[0]
    for function in _functions(module, read):
        for value in globals_read(function).values():
            home = getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", None)
            root = (home or "torch").split(".")[0]
            if root not in ELSEWHERE and not (isinstance(value, FunctionType) and root == library):
                return False
    return True


def _numbers(module: nn.Module, read: Reading, guards: tuple, linear: dict[str, tuple[int, int]]) -> Iterator[int]:
    """Whole numbers that the forward reads, wherever they are, but for the layers' own sizes as attributes."""
    sizes = {n for pair in linear.values() for n in pair}
    for path, value in guards:
        sized = value in sizes and not any(
            word in path.lower() for word in ("window", "block", "len", "context", "local", "span")
        )
        if type(value) is int and not sized:
            yield value
        elif isinstance(value, tuple):
            yield from (n for n in value if type(n) is int)
    for function in _functions(module, read):
        yield from (n for n in (*(function.__defaults__ or ()), *globals_read(function).values()) if type(n) is int)
    for code in read.codes:
        yield from (abs(n) for n in code.co_consts if type(n) is int)


def _in_order(names: list[str]) -> list[str]:
    """Queries, keys, values, as far as their names say it."""

    def place(name: str) -> int:
        low = name.lower()
        words = (("query", "wq", "q_"), ("key", "wk", "k_"), ("value", "wv", "v_"))
        for i, known in enumerate(words):
            if low == known[0][0] or any(word in low for word in known) or low.endswith(known[0][0]):
                return i
        return 3

    return sorted(names, key=place)


# ---- branches ----


_WAYS_ON = ("JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT")  # no branch
_BETWEEN = ("EXTENDED_ARG", "CACHE", "TO_BOOL", "UNARY_NOT", "NOT_TAKEN")


@functools.cache
def branches_are_known(codes: tuple[CodeType, ...]) -> bool:
    """Does the code branch by attributes of the module, by what is None, and to raise, only? And loop over what is written out?

    A probe sees a few lengths: it cannot vouch for a way that is taken for others."""
    for code in codes:
        if {"range", "len", "zip", "enumerate"} & set(code.co_names):
            return False
        found = list(dis.get_instructions(code))
        for at, i in enumerate(found):
            if "JUMP" not in i.opname or i.opname in _WAYS_ON or i.opname.endswith(("_NONE", "_NOT_NONE")):
                continue
            before = next((f.opname for f in found[at - 1 :: -1] if f.opname not in _BETWEEN), None)
            after = next((f for f in found[at + 1 :] if f.opname not in _BETWEEN), None)
            raises = after is not None and ("ASSERTION" in after.opname or after.argval in ("AssertionError", "ValueError"))
            if not raises and before not in ("LOAD_ATTR", "IS_OP"):
                return False
    return True


# ---- the way ----


def attention(
    base: Any, parts: tuple[str, ...], out: str | None, heads: str | int, layout: str, scale: str, causal: bool,
    inner: str | None, outer: str | None, lengths: tuple[str, ...], longest: int,
) -> tuple[Callable[..., Any], Callable[..., bool]]:  # fmt: skip
    """parts: the linear layers of q, k, v, or of all three. heads: their number, or the attribute with it. layout: the three
    as parts of the features, inside each head, or as the last dimension. scale: over the head's width, or the input's.
    inner, outer: dropouts of the probabilities and at the end. lengths: buffers with a mask, beyond which there is none.
    longest: texts of more tokens are the class's own: a number that it reads may be a window."""

    def forward(self: Any, x: Tensor) -> Tensor:
        children = self._modules
        B, T, C = x.shape
        H = attribute(self, heads) if type(heads) is str else heads
        if len(parts) == 3:
            q, k, v = (children[part](x) for part in parts)
            D = q.shape[-1] // H
            q, k, v = (t.view(B, T, -1, D).transpose(1, 2) for t in (q, k, v))
        else:
            qkv = children[parts[0]](x)
            if layout == "parts":
                q, k, v = qkv.view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4).unbind(0)
            elif layout == "heads":
                q, k, v = qkv.view(B, T, H, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
            else:
                q, k, v = (t.transpose(1, 2) for t in qkv.view(B, T, H, -1, 3).unbind(-1))
                q, k, v = (t.contiguous() for t in (q, k, v))
        factor = (q.shape[-1] if scale == "head" else C) ** -0.5
        drop = None if inner is None else children[inner]
        groups = q.shape[1] != k.shape[1]
        if drop is None or not drop.training or _droppable(drop):
            p = drop.p if drop is not None and drop.training else 0.0
            y = scaled_dot_product_attention(q, k, v, None, p, causal, scale=factor, enable_gqa=groups)
        else:
            y = _written(q, k, v, factor, causal, drop)
        y = y.transpose(1, 2).reshape(B, T, -1)
        if out is not None:
            y = children[out](y)
        return y if outer is None else children[outer](y)

    def takes(self: Any, x: Tensor) -> bool:
        if x.ndim != 3 or not dense(x) or not x.numel() or (inner is not None and not unhooked(self._modules[inner])):
            return False
        T = x.shape[1]
        if T > longest:
            return False
        for name in lengths:
            mask = self._buffers.get(name)
            if mask is None or mask.shape[-1] < T or mask.shape[-2] < T:
                return False
            if not torch.compiler.is_compiling() and not is_uniform_or_causal(mask):
                return False
        return True

    return forward, takes


def _droppable(drop: Any) -> bool:
    return own_class(drop) is nn.Dropout and droppable(drop.p)


def _written(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, drop: nn.Module) -> Tensor:
    """With a dropout of another class than torch's, which is called on the probabilities."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * scale
    if causal:
        T = s.shape[-1]
        s = s.masked_fill(torch.ones(T, T, dtype=torch.bool, device=s.device).triu(1), float("-inf"))
    return drop(s.softmax(-1)) @ v
