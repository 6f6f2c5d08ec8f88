"""What runs on our kernels in a model, what each choice costs here, and why it was made: explain(model, batch).

Each module that patch swaps is timed as the model calls it (measured.py): by its own code in eager PyTorch, by that code under
torch.compile, and by ours. A module contains its matrix products, which all of them share. Our own modules, which have no other
code, stand beside the same in torch's functions. The last rows are the whole step.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import process
from .dispatch import where
from .errors import need
from .info import cpu_name
from .library import isa
from .measured import CERTAIN, SECONDS, Candidate, Kind, Ops, Seconds, Timing, both, met, of_class, once_through, timed
from .models.gpt import MLP, CausalSelfAttention
from .modules import GELU, Dropout, LayerNorm, RMSNorm, Softmax
from .patch import patched
from .sample import arguments_of, device_of, left_as_it_was, loss_of, outputs_of
from .serving import base_of, own_class
from .table import aligned, duration

CANDIDATES = ("eager", "compile", "ours")
# what a plan says of modules that nobody has to choose for
_NO_CHOICE = ("its work is done inside its parent", "its parts are looked at one by one", "runs on our kernels already")
NEAR = 0.03  # faster or slower by less: the same


# ---- what explain found ----


@dataclass
class Choice:
    """One kind of call of modules alike."""

    op: str
    module: str  # path, numbers as *
    cls: str
    shapes: str
    modules: int
    calls: int
    served: str  # by what, as where() says
    ran: str  # our ops in one forward and backward of it, "" where none: its own code ran
    seconds: dict[str, Seconds]  # by candidate
    absent: dict[str, str]  # candidate -> why it has no numbers
    chosen: str  # "ours" or "eager"
    why: str


@dataclass
class Served:
    """One of our ops as one forward and backward of the model calls it."""

    op: str
    shapes: str
    calls: int
    served: str


@dataclass
class Explanation:
    """Prints as tables; to_dict(), to_json(), html(), and write(path) for a page that needs nothing else."""

    model: str
    batch: str
    machine: str
    patched: bool  # was the model, when it was explained?
    training: bool
    choices: list[Choice]
    step: Choice  # forward and backward of the whole model
    ops: list[Served]
    kept: list[tuple[str, int, str]]  # class, how many, why

    def summary(self) -> str:
        times = [f"{name} {duration(s.total)}" for name in CANDIDATES if (s := self.step.seconds.get(name)) is not None]
        state = "as it is patched" if self.patched else "as patch() would have it"
        return f"{self.model}, {self.batch}, {'training' if self.training else 'eval'}, {state}: one step {', '.join(times)}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"summary": self.summary()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        head = ("op", "module", "shape", "calls", *(f"{name} fwd + bwd" for name in CANDIDATES), "chosen", "why")
        lines = [head]
        for c in (*self.choices, self.step):
            times = (cell(c.seconds.get(name)) for name in CANDIDATES)
            lines.append((c.op, c.module, c.shapes, str(c.calls), *times, c.chosen, c.why))
        ops = [("our op", "shape", "calls", "served by"), *((o.op, o.shapes, str(o.calls), o.served) for o in self.ops)]
        parts = [self.summary(), self.machine, "", *aligned(lines, right=(3, 4, 5, 6))]
        parts += ["", *(aligned(ops, right=(2,)) if self.ops else ["none of our ops runs"])]
        if self.kept:
            kept = [("kept", "n", "why"), *((cls, str(n), why) for cls, n, why in self.kept)]
            parts += ["", *aligned(kept, right=(1,))]
        absent = {f"{c.op} {c.module}: {name}: {why}" for c in self.choices for name, why in c.absent.items()}
        return "\n".join([*parts, *(f"no numbers for {line}" for line in sorted(absent))])

    def html(self) -> str:
        """A page. Raises UserError where jinja2 is not installed."""
        need("bench", "jinja2")
        import jinja2

        folder = pathlib.Path(__file__).parent
        loader = jinja2.FileSystemLoader((folder, folder / "bench"))
        template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("explain.html")
        rows = [(c, max((s.total for s in c.seconds.values()), default=0.0)) for c in (self.step, *self.choices)]
        return template.render(e=self, rows=rows, names=CANDIDATES, duration=duration, cell=cell)

    def write(self, path: str | pathlib.Path) -> None:
        """The page as a file, whole or as it was."""
        process.write(pathlib.Path(path), self.html())


def cell(seconds: Seconds | None) -> str:
    if seconds is None:
        return "-"
    back = f" + {duration(seconds.backward)}" if seconds.backward is not None else ""
    return duration(seconds.forward) + back


# ---- our own modules, in torch's functions ----


def _added(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else residual + x


def _dropout(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return _added(F.dropout(x, self.p, self.training), residual)


def _gelu(self: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=self.approximate)


def _softmax(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = x * self.scale if mask is None else x * self.scale + mask
    if self.causal:
        hidden = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1 + x.shape[-1] - x.shape[-2])
        x = x.masked_fill(hidden, float("-inf"))
    return torch.softmax(x, self.dim)


def _attention(self: Any, x: Tensor, cache: Tensor | None = None, start: int = 0, residual: Tensor | None = None) -> Tensor:
    if cache is not None:
        raise ValueError("explain: a call with a cache is not measured")
    B, T, C = x.shape
    q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
    p = self.dropout if self.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, scale=self.scale)
    return _dropout(self.resid_dropout, self.c_proj(y.transpose(1, 2).reshape(B, T, C)), residual)


def _mlp(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return _dropout(self.dropout, self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu.approximate)), residual)


# class -> (its op, the same in torch's functions)
_OWN: dict[type, tuple[str, Callable]] = {
    CausalSelfAttention: ("attention", _attention),
    MLP: ("gelu", _mlp),
    LayerNorm: ("layer_norm", nn.LayerNorm.forward),
    RMSNorm: ("rms_norm", nn.RMSNorm.forward),
    Dropout: ("dropout", _dropout),
    GELU: ("gelu", _gelu),
    Softmax: ("softmax", _softmax),
}


def _own_modules(model: nn.Module) -> dict[nn.Module, None]:
    """Ours that are not inside another that is."""
    found: dict[nn.Module, None] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if own_class(module) in _OWN and module not in inside:
            found[module] = None
            inside.update(module.modules())
    return found


# ---- explain ----


def explain(model: nn.Module, batch: Any, compile: bool = True, show: bool = True, seconds: float = SECONDS) -> Explanation:
    """Time every candidate for everything of `model` that our kernels serve, forward and backward on `batch`; print the table.

    model: patched or not; what is explained is the model as it is patched, else as patch() would have it. batch: a dict of the
    model's arguments, a tuple of them, or token ids (B, T), which then are their own labels. The model runs in its own mode
    (dropout, where it trains), under the autocast that is in force. compile: with torch.compile, which takes a while for each
    kind of module. seconds: of timing, about, for each candidate of each kind. The model's modes, gradients, classes, buffers
    and the random state are afterwards as before; its hooks run.

    Raises TypeError for another kind of model or batch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: expected a torch.nn.Module, got {type(model).__name__}")
    args, kwargs = arguments_of(model, batch, "explain")
    entry = {module: type(module) for module in model.modules() if type(module) in base_of}
    with left_as_it_was(model), torch.enable_grad():
        with patched(model) as plan:
            ours = {module: type(module) for module in model.modules() if type(module) in base_of} | entry
        rows = {module: row for row in plan.rows for module in (model.get_submodule(row.path),)}
        with _classes(entry or ours):
            ops = _ops(model, args, kwargs)
        for module in ours:
            module.__class__ = own_class(module)
        offered: dict[nn.Module, type | None] = {**_own_modules(model), **ours}
        kinds = met(model, offered, args, kwargs)
        (whole,) = met(model, {model: None}, args, kwargs)
        choices = []
        for kind in kinds:
            swapped = not entry or kind.module in entry
            row = rows[kind.module]
            op, how = (_OWN[own_class(kind.module)][0], "ours") if kind.made is None else (row.op or "-", row.why)
            choices.append(_choice(kind, op, swapped or kind.made is None, how, compile and kind.module is not model, seconds))
            if compile and kind.module is model:
                choices[-1].absent["compile"] = "the whole model's stands in the row of the step"
        step = _step(whole, entry or ours, compile, seconds)
    kept = Counter((row.cls, row.why) for row in plan.rows if not row.op and not row.why.startswith(_NO_CHOICE))
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    shape = "" if first is None else f"batch {tuple(first.shape)}"
    found = Explanation(
        own_class(model).__name__, shape, _machine(model), bool(entry), model.training, choices, step, ops,
        [(cls, n, why) for (cls, why), n in kept.items()],
    )  # fmt: skip
    if show:
        print(found)
    return found


@contextmanager
def _classes(classes: Mapping[nn.Module, type]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, cls in classes.items():
            stack.enter_context(of_class(module, cls))
        yield


def _ops(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Served]:
    """Our ops in one forward and backward."""
    params = [p for p in model.parameters() if p.requires_grad]
    with Ops() as ops:
        outputs = outputs_of(model(*args, **kwargs))
        if params and outputs:
            loss = loss_of(outputs, params[0].dtype)
            if loss.requires_grad:
                torch.autograd.grad(loss, params, allow_unused=True)
    return [
        Served(op, shape, n, str(where(op).get(device.upper(), "reference (no kernels for this device)")))
        for (op, shape, device), n in ops.counts.items()
    ]


def _choice(kind: Kind, op: str, swapped: bool, how: str, compile: bool, seconds: float) -> Choice:
    own: Any = own_class(kind.module)
    candidates = both(kind)
    if kind.made is None:
        candidates = {"eager": Candidate(own, _OWN[own][1]), "ours": Candidate(own, own.forward)}
    ran = Ops()
    if kind.problem is None:
        with ran:
            once_through(kind, candidates["ours"])
    if compile:
        torch._dynamo.reset()  # or the limit on recompilations makes later kinds eager in silence
        candidates["compile"] = Candidate(own, torch.compile(candidates["eager"].forward, dynamic=False))
    timing = timed(kind, candidates, seconds)
    device = device_of(kind.module).type.upper()
    served = {str(where(f"{name}_fwd").get(device, "reference")) for name in op.split("+") if op != "-"}
    chosen = "ours" if swapped else "eager"
    why = f"{_verdict(timing)}; {how}" if swapped else f"{_verdict(timing)}; patch kept it"
    paths = dict.fromkeys(re.sub(r"\b\d+\b", "*", path) or "(model)" for path in kind.paths)
    return Choice(
        op, ", ".join(paths), own.__name__, kind.shapes, len(kind.modules), kind.calls, "; ".join(sorted(served)),
        ", ".join(f"{name} x{n}" for name, n in _by_op(ran).items()), timing.seconds, timing.absent, chosen, why,
    )  # fmt: skip


def _by_op(ops: Ops) -> Counter[str]:
    found: Counter[str] = Counter()
    for (op, _, _), n in ops.counts.items():
        found[op] += n
    return found


def _verdict(timing: Timing) -> str:
    """Ours against eager, in words."""
    if timing.slower is None:
        return "not measured"
    ours, eager = timing.seconds["ours"].total, timing.seconds["eager"].total
    if abs(ours - eager) <= NEAR * eager:
        return "as fast as eager"
    if ours < eager:
        return f"{eager / ours:.2f}x as fast as eager"
    sure = timing.slower >= CERTAIN
    return f"{ours / eager:.2f}x eager's time" + (': policy="measured" keeps eager' if sure else ", but not in every round")


def _step(whole: Kind, ours: Mapping[nn.Module, type], compile: bool, seconds: float) -> Choice:
    """The whole model's forward and backward."""
    own: Any = own_class(whole.module)

    def patched_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _classes(ours):
            return type(module).forward(module, *args, **kwargs)

    candidates = {"eager": Candidate(own, own.forward), "ours": Candidate(own, patched_forward)}
    if not ours:
        del candidates["eager"]
    if compile:
        torch._dynamo.reset()
        candidates["compile"] = Candidate(own, torch.compile(own.forward, dynamic=False))
    timing = timed(whole, candidates, seconds)
    return Choice(
        "whole step", "(model)", own.__name__, whole.shapes, 1, whole.calls, "", "", timing.seconds, timing.absent, "ours",
        _verdict(timing),
    )  # fmt: skip


def _machine(model: nn.Module) -> str:
    device = device_of(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {isa()}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
