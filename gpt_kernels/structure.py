"""Structure proposes: what a module may be, from its parameters, its children and what its forward reads, whoever wrote it.
A probe (probe.py) decides between the proposals.

    no parameter, no child                 an activation (GELU, either one), a softmax, a norm without weights
    one or two vectors, no child           RMS norm with weight or 1 + weight, layer norm; eps is an attribute or a constant
    two linear layers, an activation       MLP: the bias of the first in one pass with the GELU; GLU of a fused gate_up
    three linear layers, an activation     SwiGLU, GeGLU of gate, up and down
    a linear layer, dropout, layer norm    dropout and the residual in one pass
    two to four linear layers, a softmax   attention written out (structure_attention.py)
    a global function for which there is ours      the class's own code over ours (substitute.py)

A replacement calls the module's children as they are, so that LoRA, quantised, sharded, parametrised and hooked ones keep
working; the weight of a child is read only where the child is exactly torch's Linear, unhooked.

A form is picklable and hashable: names and numbers. With it goes what the probe found: the ranks and dtypes in which it agrees,
and the attributes that the forward reads, which must still be what they were for a call to be served.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import structure_attention
from .functional import last_softmax, softmax_serves
from .ops.common import stat_dtype
from .ops.dropout import dropout
from .ops.gelu import gelu
from .ops.glu import geglu, swiglu
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm
from .probe import PROBED, Candidate, Verdict, linear_sizes, probe, random_state_kept, twin
from .reading import Reading, attribute, attributes, reading, unchanged, unwrapped
from .serving import DTYPES, dense, droppable, own_class, parameter, stand_ins, unhooked
from .substitute import substituted

Builder = Callable[..., Any]
Method = tuple[Callable[..., Any], Callable[..., bool]]  # and whether it serves a call


@dataclass(frozen=True)
class Form:
    """A way of ours to run a module. build(base, *args) -> (forward, takes): forward(self, *inputs), and takes(self, *inputs),
    whether it may for these. Where `inputs` is 0 it makes {method: (function, serves)}, which take what the class's own do."""

    build: Builder
    args: tuple
    ops: tuple[str, ...]
    why: str
    fuses: tuple[str, ...] = ()
    inputs: int = 1
    ranks: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    guards: tuple[tuple[str, Any], ...] = ()
    children: tuple[tuple[str, Any, Any], ...] = ()  # activations whose work is done inside: class and attributes


@functools.cache
def methods_of(form: Form, base: Any) -> dict[str, Method]:
    """{method: (function, serves)} for a class over `base`."""
    if not form.inputs:
        return form.build(base, *form.args)
    forward, takes = form.build(base, *form.args)
    read = reading(base, base.forward)
    own_methods = read.functions if read is not None else ()
    names = tuple(_parameter_names(base.forward)[: form.inputs])
    count, ranks, dtypes, guards, children = form.inputs, form.ranks, form.dtypes, form.guards, form.children
    acts: tuple[tuple[str, Any, Any, Any], ...] = tuple((name, cls, cls.forward, known) for name, cls, known in children)

    def inputs_of(args: tuple, kwargs: dict) -> tuple:
        return (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)) if kwargs else args

    def serves(self: Any, *args: Any, **kwargs: Any) -> bool:
        x = inputs_of(args, kwargs)
        if len(x) != count or len(args) + len(kwargs) != count or not isinstance(x[0], Tensor):
            return False
        if x[0].ndim not in ranks or x[0].dtype not in dtypes or (guards and not unchanged(self, guards)):
            return False
        for name, function in own_methods:
            if getattr(base, name) is not function:
                return False
        for name, act_class, known_forward, known in acts:
            act = self._modules.get(name)
            if act is None or act_class.forward is not known_forward or own_class(act) is not act_class or not unhooked(act):
                return False
            if known and not unchanged(act, known):
                return False
        return takes(self, *x)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *inputs_of(args, kwargs))

    return {"forward": (called, serves)}


def _parameter_names(forward: Any) -> tuple[str, ...]:
    function = unwrapped(forward)
    assert function is not None
    return function.__code__.co_varnames[1 : function.__code__.co_argcount]


# ---- norms, activations: one op ----


def _read(self: Any, eps: float | str) -> Any:
    return attribute(self, eps) if type(eps) is str else eps


def _wide(x: Tensor) -> bool:
    # autocast on a GPU casts some of what a forward in Python is made of to float32
    return x.dtype.itemsize >= 4 or x.is_cpu or not torch._C._is_any_autocast_enabled()


def norm(base: Any, kind: str, weight: str | None, bias: str | None, eps: float | str, plus: bool):
    """kind: "rms" or "layer". weight, bias: attributes, or None. eps: its value, or the attribute. plus: 1 + weight."""

    def takes(self: Any, x: Tensor) -> bool:
        w = None if weight is None else parameter(self, weight)
        b = None if bias is None else parameter(self, bias)
        e = _read(self, eps)
        return (
            type(e) is float
            and e >= 0.0
            and dense(x, w, b)
            and x.is_contiguous()
            and x.numel() > 0
            and (w is None or w.shape == x.shape[-1:] and w.is_contiguous())
            and (b is None or b.shape == x.shape[-1:] and b.is_contiguous())
            and _wide(x)
        )

    def forward(self: Any, x: Tensor) -> Tensor:
        w = None if weight is None else parameter(self, weight)
        if plus and w is not None:
            w = w.to(stat_dtype(w.dtype)) + 1.0
        if kind == "rms":
            return rms_norm(x, w, _read(self, eps))
        return layer_norm(x, w, None if bias is None else parameter(self, bias), _read(self, eps))

    return forward, takes


def _elementwise(x: Tensor) -> bool:
    return dense(x) and x.is_contiguous() and x.numel() > 0 and x.ndim > 0 and _wide(x)


def activation(base: Any, approximate: str):
    return lambda self, x: gelu(x, None, approximate), lambda self, x: _elementwise(x)


def soft(base: Any):
    return lambda self, x: last_softmax(x), lambda self, x: softmax_serves(x)


# ---- MLPs ----


def _plain(linear: nn.Module) -> bool:
    """Is it torch's Linear and nothing else, so that its weight and bias may be read?"""
    if type(linear) is not nn.Linear or not unhooked(linear):
        return False
    p = linear._parameters
    w, b = p.get("weight"), p.get("bias")
    return all(type(t) is nn.Parameter or type(t) in stand_ins for t in (w, b)) and w.dtype is b.dtype  # type: ignore[union-attr]


def _gelu_of_linear(linear: Any, x: Tensor, approximate: str) -> Tensor:
    if not _plain(linear):
        h = linear(x)
        return gelu(h, None, approximate)
    p = linear._parameters
    return gelu(nn.functional.linear(x, p["weight"]), p["bias"], approximate)


def _same_dtype(self: Any, x: Tensor, names: tuple[str, ...]) -> bool:
    for name in names:
        w = getattr(self._modules[name], "weight", None)
        if type(w) is not nn.Parameter or w.dtype is not x.dtype:
            return False
    return not torch._C._is_any_autocast_enabled()


def _taken(self: Any, x: Tensor, alike: tuple[str, ...]) -> bool:
    return dense(x) and x.numel() > 0 and (not alike or _same_dtype(self, x, alike))


def mlp(
    base: Any,
    up: str,
    down: str | None,
    approximate: str,
    inner: str | None,
    outer: str | None,
    alike: tuple[str, ...],
):
    """down(gelu(up(x))) with dropouts by name after the GELU and at the end. alike: children whose weights have x's dtype where
    the class's own forward looks at dtypes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        children = self._modules
        x = _gelu_of_linear(children[up], x, approximate)
        if inner is not None:
            x = children[inner](x)
        if down is not None:
            x = children[down](x)
        return x if outer is None else children[outer](x)

    return forward, lambda self, x: _taken(self, x, alike)


def glu(
    base: Any, gate: str, up: str | None, down: str | None, kind: str, flipped: bool, inner: str | None, outer: str | None,
    alike: tuple[str, ...],
):  # fmt: skip
    """down(act(gate(x)) * up(x)); up None: gate(x) has both, gate first unless flipped. kind: silu, or none, tanh (GELUs)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        children = self._modules
        g = children[gate](x)
        u = None if up is None else children[up](x)
        x = swiglu(g, u, up_first=flipped) if kind == "silu" else geglu(g, u, kind, up_first=flipped)
        if inner is not None:
            x = children[inner](x)
        if down is not None:
            x = children[down](x)
        return x if outer is None else children[outer](x)

    return forward, lambda self, x: _taken(self, x, alike)


def residual(base: Any, linear: str, drop: str, norm: str | None):
    """norm(dropout(linear(x)) + y), dropout and sum in one pass."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        children = self._modules
        x, d = children[linear](x), children[drop]
        if own_class(d) is nn.Dropout and unhooked(d) and droppable(d.p) and not d.inplace and x.dtype == y.dtype:
            x = dropout(x.contiguous(), d.p, d.training, y.contiguous())
        else:
            x = d(x) + y
        return x if norm is None else children[norm](x)

    return forward, lambda self, x, y: dense(x) and dense(y) and x.numel() > 0 and x.shape[:-1] == y.shape[:-1]


# ---- proposals ----


def _eps(module: nn.Module, read: Reading, guards: tuple) -> list[float | str]:
    """Where an eps may be: names with "eps" first, then other small numbers, constants last."""
    small = [path for path, value in guards if type(value) is float and 0.0 < value <= 1e-2]
    small.sort(key=lambda path: "eps" not in path)
    constants: list[float | str] = [c for c in read.floats if 0.0 < c <= 1e-2]
    none = [torch.finfo(torch.float32).eps] if not small and not constants else []
    return [*small, *constants, *none]


def _norms(module: nn.Module, read: Reading, guards: tuple) -> Iterator[Form]:
    names = [name for name, p in module._parameters.items() if p is not None]
    # code that adds 1 to the weight has a 1 in it
    ones = (True, False) if 1.0 in read.floats or any(1 in c.co_consts for c in read.codes) else (False, True)
    for eps in _eps(module, read, guards):
        left = tuple(guard for guard in guards if guard[0] != eps)
        if len(names) == 2:
            for weight, bias in (names, names[::-1]):
                yield Form(norm, ("layer", weight, bias, eps, False), ("layer_norm",), "layer norm", guards=left)
            continue
        only = names[0] if names else None
        for plus in ones if only else (False,):
            why = f"RMS norm, eps {eps}{', 1 + weight' if plus else ''}"
            yield Form(norm, ("rms", only, None, eps, plus), ("rms_norm",), why, guards=left)
        yield Form(norm, ("layer", only, None, eps, False), ("layer_norm",), "layer norm", guards=left)


GLUS = {"silu": "SwiGLU", "none": "GeGLU", "tanh": "GeGLU (tanh)"}


def _mlps(module: nn.Module, read: Reading, guards: tuple) -> Iterator[Form]:
    children = {name: child for name, child in module.named_children()}
    linear = {name: sizes for name, child in children.items() if (sizes := linear_sizes(child)) is not None}
    drops = [name for name, child in children.items() if isinstance(child, nn.Dropout)]
    acts = [name for name in children if name not in linear and name not in drops]
    if len(acts) > 1 or len(drops) > 2 or any(next(children[n].parameters(), None) is not None for n in acts):
        return
    if not acts and not any(word in name.lower() for name in read.names for word in ("gelu", "silu", "swish", "act")):
        return
    watched: list[tuple[str, Any, Any]] = []
    for name in acts:
        cls: Any = own_class(children[name])
        act_read = reading(cls, cls.forward)
        known = attributes(children[name], act_read) if act_read is not None else ()
        if isinstance(known, str) or next(children[name].children(), None) is not None or not unhooked(children[name]):
            return
        watched.append((name, cls, known))
    places: list[tuple[str | None, str | None]] = [(None, None)]
    if drops:
        places = [*((d, None) for d in drops), *((None, d) for d in drops)]
    if len(drops) == 2:
        places = [(drops[0], drops[1]), (drops[1], drops[0])]
    rest: dict = dict(fuses=tuple(acts), guards=guards, children=tuple(watched))
    alike = tuple(linear) if "dtype" in read.names else ()
    names = list(linear)
    for inner, outer in places:
        if len(names) <= 2:
            for up, *more in itertools.permutations(names):
                down = more[0] if more else None
                n, m = linear[up][1], linear[down][0] if down else linear[up][1]
                for kind in ("none", "tanh") if n == m else ():
                    yield Form(mlp, (up, down, kind, inner, outer, alike), ("gelu",), "bias and GELU in one pass", **rest)
                for kind, flipped in itertools.product(GLUS, (False, True)) if n == 2 * m or down is None else ():
                    args: tuple = (up, None, down, kind, flipped, inner, outer, alike)
                    yield Form(glu, args, ("glu",), f"{GLUS[kind]} in one pass", **rest)
        elif len(names) == 3:
            for gate, up, down in itertools.permutations(names):
                if linear[gate] == linear[up] and linear[down][0] == linear[gate][1]:
                    for kind in GLUS:
                        args = (gate, up, down, kind, False, inner, outer, alike)
                        yield Form(glu, args, ("glu",), f"{GLUS[kind]} in one pass", **rest)


def _residuals(module: nn.Module, guards: tuple) -> Iterator[Form]:
    children = dict(module.named_children())
    linear = [name for name, child in children.items() if linear_sizes(child) is not None]
    drops = [name for name, child in children.items() if isinstance(child, nn.Dropout)]
    norms = [name for name in children if name not in linear and name not in drops]
    if len(linear) == len(drops) == 1 and len(norms) <= 1:
        args = (linear[0], drops[0], norms[0] if norms else None)
        why = "dropout and residual in one pass"
        yield Form(residual, args, ("dropout",), why, inputs=2, fuses=tuple(drops), guards=guards)


# ---- decided ----


@dataclass(frozen=True)
class Found:
    """The form that serves a module, or None, and what the plan says of it."""

    form: Form | None
    why: str


_cache: dict[Any, Found | None] = {}


Lacking = Callable[[str], str | None]  # of an op: why there is no kernel of it for the module's device


def find(
    module: nn.Module, dtype: torch.dtype, device: torch.device, lacking: Lacking = lambda op: None, probed: bool = True
) -> Found | None:
    """What a module of no known class is to be replaced by, or why by nothing; None: it does not look like anything of ours.

    dtype, device: of its parameters, or its model's. probed=False: the first proposal is taken at its word.
    A module like one that was probed before, by class, attributes, shapes and dtypes, is not probed again.
    """
    cls: Any = own_class(module)
    if cls.__module__.split(".")[0] in ("torch", __package__) or "forward" in module.__dict__:
        return None
    read = reading(cls, cls.forward)
    if read is None or isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return None
    over = substituted(module, cls, device, lacking)
    if isinstance(over, str):
        return Found(None, over)
    if over is None:
        return _find(module, cls, read, dtype, device, lacking, probed)
    # a module that is one op or a few is better done in one pass
    whole = _find(module, cls, read, dtype, device, lacking, probed) if over.torchs else None
    if whole is not None and whole.form is not None:
        return whole
    why = over.why if whole is None else f"{over.why}; {whole.why}"
    return Found(Form(over.build, over.args, over.ops, why, inputs=0), why)


def _find(module: nn.Module, cls: Any, read: Reading, dtype: torch.dtype, device: torch.device, lacking: Lacking,
          probed: bool) -> Found | None:  # fmt: skip
    """By its structure."""
    kind = _kind(module, cls, read)
    if kind is None:
        return None
    guards = attributes(module, read)
    if isinstance(guards, str):
        return Found(None, f"its forward reads {guards}, which may change")
    proposals = list(_proposed(kind, module, read, guards))
    absent = {form: why for form in proposals for why in map(lacking, form.ops) if why is not None}
    if absent:
        proposals = [form for form in proposals if form not in absent]
        if not proposals:
            return Found(None, next(iter(absent.values())))
    if not proposals:
        return None
    if read.writes:
        return Found(None, "its forward writes what is not its own")
    if read.by_shape and kind != "attention":
        return Found(None, "its forward may take another way for another shape of input")
    if not probed:
        return Found(replace(proposals[0], ranks=(1, 2, 3, 4, 5), dtypes=tuple(DTYPES)), f"{proposals[0].why}; not probed")
    shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False))
    children = tuple((n, own_class(c), linear_sizes(c)) for n, c in module.named_children())
    key = (cls, read.codes, tuple(proposals), shapes, children, dtype, device)
    if key not in _cache:
        _cache[key] = _decided(kind, module, cls, proposals, dtype, device)
    return _cache[key]


def _kind(module: nn.Module, cls: Any, read: Reading) -> str | None:
    """Which proposals are worth making."""
    function = unwrapped(cls.forward)
    assert function is not None
    inputs = len(_parameter_names(cls.forward))
    own = [p for p in module._parameters.values() if p is not None]
    if next(module.children(), None) is None:
        if next(module.buffers(), None) is not None or len(own) > 2 or inputs < 1:
            return None
        if all(p.dim() == 1 and p.shape == own[0].shape and p.numel() > 1 for p in own):
            return "norm" if own else "bare"
        return None
    linear = sum(linear_sizes(child) is not None for child in module.children())
    softmaxes = not {"softmax", "Softmax"}.isdisjoint(read.names) and "scaled_dot_product_attention" not in read.names
    if not own and softmaxes and 2 <= linear <= 4 and inputs - len(function.__defaults__ or ()) == 1:
        return "attention"
    if own or next(module.buffers(recurse=False), None) is not None or not 1 <= linear <= 3 or len(list(module.children())) > 6:
        return None
    return {1: "mlp", 2: "residual"}.get(inputs)


def _proposed(kind: str, module: nn.Module, read: Reading, guards: tuple) -> Iterator[Form]:
    if kind == "attention":
        for args in structure_attention.proposed(module, read, guards):
            yield Form(structure_attention.attention, args, ("attention",), "attention in one pass", guards=guards)
    elif kind == "mlp":
        yield from _mlps(module, read, guards)
    elif kind == "residual":
        yield from _residuals(module, guards)
    elif kind == "norm" or any(word in type(module).__name__.lower() for word in ("norm", "rms")):
        yield from _norms(module, read, guards)
    else:
        for approximate in ("none", "tanh"):
            yield Form(activation, (approximate,), ("gelu",), "one-pass GELU", guards=guards)
        yield Form(soft, (), ("softmax",), "softmax over the last dimension", guards=guards)


def _decided(
    kind: str, module: nn.Module, cls: Any, proposals: list[Form], dtype: torch.dtype, device: torch.device
) -> Found | None:
    layered = kind in ("mlp", "residual", "attention")
    scales: tuple[float, ...] = (1.0, 8.0) if layered else (1.0, 10.0, 100.0)
    if kind == "attention":
        scales = (0.3, 1.0)  # larger scores saturate, and every kernel keeps a rounding of them that the written form has not
    if proposals[0].build is norm:
        small = [_read(module, f.args[3]) for f in proposals]
        scales = (1.0, 30.0, max(1e-6, min(small)) ** 0.5, 1e-3)
    forms = [replace(form, ranks=(2, 3, 4), dtypes=PROBED) for form in proposals]
    verdict = Verdict(wrong="")
    with random_state_kept(device), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for small_twin in (True, False) if layered else (False,):
            try:
                torch.manual_seed(11)  # the same verdict in every process
                like = twin(module, cls, device, small_twin)
            except Exception as error:
                return Found(None, f"it cannot be copied to be probed: {type(error).__name__}: {error}"[:160])
            candidates = [Candidate(*methods_of(form, cls)["forward"]) for form in forms]
            for shapes in _shapes(kind, like):
                index, verdict = probe(like, cls.forward, candidates, shapes, scales, dtype, device)
                if index is not None:
                    form = replace(proposals[index], ranks=verdict.ranks, dtypes=verdict.dtypes)
                    return Found(form, f"{form.why}; {verdict}")
                if not (verdict.wrong or "").startswith("its forward does not run"):
                    break
            else:
                continue
            break
    if kind == "bare" or (verdict.wrong or "").startswith("its forward does not run"):
        return None
    return Found(None, f"not {' or '.join(dict.fromkeys(op for f in proposals for op in f.ops))}: {verdict}")


def _shapes(kind: str, like: nn.Module) -> list[tuple[tuple[tuple[int, ...], ...], ...]]:
    """Shapes of inputs to try one after the other: of each, three ranks."""
    linear = [sizes for child in like.children() if (sizes := linear_sizes(child)) is not None]
    if kind == "residual":
        widths: list[tuple[int, ...]] = [linear[0]]
    elif kind == "mlp":
        widths = [(n,) for n in dict.fromkeys(n for n, _ in linear)]
    elif kind == "attention":
        return [(((2, 7, n),), ((3, 1, n),), ((1, 4, n),)) for n in dict.fromkeys(n for n, _ in linear)]
    else:
        widths = [(next((p.shape[0] for p in like.parameters()), 8),)]
    ranks = ((2, 3), (5,), (2, 2, 3))
    return [tuple(tuple((*rank, n) for n in width) for rank in ranks) for width in widths]
