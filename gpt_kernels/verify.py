"""Is the model on our kernels as right as it was without them? Both are compared with the same model in float64.

    max |ours - truth| <= factor * max |eager - truth| + floor,   and the same for the root mean square
    floor = 2 * eps * max |truth|   (two roundings of the largest value; for float64, where eager is the truth, 1e-12 of it)

for the loss, every output and the gradient of every parameter; and NaN and inf stand where the truth or eager has them. Factors
and floor are those of accuracy.py; a truth that is no larger than eager's own error is allowed four times as much.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .accuracy import MODEL_GRADIENT, MODEL_OUTPUT, NOTHING, misplaced, model_floor
from .dispatch import use_backend
from .generate import evaluating
from .models.gpt import GPT
from .patch import patched, unpatch
from .sample import arguments_of, left_as_it_was, loss_of, outputs_of
from .table import aligned


@dataclass
class Comparison:
    """One tensor: largest and root mean square errors against float64, and what is allowed."""

    name: str
    shape: tuple[int, ...]
    error: float
    eager_error: float
    allowed: float
    rms: float
    eager_rms: float
    allowed_rms: float
    same_nonfinite: bool

    @property
    def ok(self) -> bool:
        return self.same_nonfinite and self.error <= self.allowed and self.rms <= self.allowed_rms


@dataclass
class Report:
    """What verify found. `ok` is the verdict; prints as a table with repeated layers folded into their worst."""

    model: str
    dtype: str
    swapped: str
    rows: list[Comparison]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict:
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        return {"model": self.model, "dtype": self.dtype, "swapped": self.swapped, "ok": self.ok, "rows": rows}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        folded: dict[str, list[Comparison]] = {}
        for row in self.rows:
            folded.setdefault(re.sub(r"\b\d+\b", "*", row.name), []).append(row)
        lines: list[tuple[str, ...]] = [("tensor", "n", "ours", "eager", "allowed", "")]
        for name, rows in folded.items():
            worst = max(rows, key=lambda r: (not r.ok, r.error / r.allowed if r.allowed else r.error))
            verdict = "ok" if worst.ok else "FAIL" if worst.same_nonfinite else "FAIL: NaN or inf"
            lines.append(
                (name, str(len(rows)), *(f"{x:.2e}" for x in (worst.error, worst.eager_error, worst.allowed)), verdict)
            )
        bad = [row.name for row in self.rows if not row.ok]
        verdict = (
            "every tensor is as close to float64 as eager is"
            if self.ok
            else f"{len(bad)} worse than eager: {', '.join(bad[:4])}"
        )
        return "\n".join(
            [
                f"{self.model} in {self.dtype}; {self.swapped}",
                *aligned(lines, right=range(1, 5)),
                f"{'OK' if self.ok else 'FAIL'}: of {len(self.rows)} tensors, {verdict}",
            ]
        )


def compare(name: str, ours: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, factor: float) -> Comparison:
    """The rule of this module's docstring for one tensor. truth is float64; dtype is what the model computes in."""
    o, e, t = ours.detach().double(), eager.detach().double(), truth.detach()
    same = misplaced(o, t, e) is None
    finite = torch.isfinite(o) & torch.isfinite(e) & torch.isfinite(t)
    floor = model_floor(t, dtype)
    (error, rms), (eager_error, eager_rms) = _errors(o - t, finite), _errors(e - t, finite)
    if _errors(t, finite)[0] <= eager_error:
        factor *= NOTHING
    return Comparison(name, tuple(truth.shape), error, eager_error, factor * eager_error + floor,
                      rms, eager_rms, factor * eager_rms + floor, same)  # fmt: skip


def _errors(difference: Tensor, where: Tensor) -> tuple[float, float]:
    """(largest, root mean square)"""
    d = difference[where]
    return (d.abs().max().item(), d.square().mean().sqrt().item()) if d.numel() else (0.0, 0.0)


def verify(model: nn.Module, batch, show: bool = True) -> Report:
    """Compare `model` on our kernels with itself in eager PyTorch, as it would run here, both against float64; print the table.

    model: anything patch() swaps modules of, patched or not, or a GPT (whose eager is the reference backend). batch: a
    dict of the model's arguments, a tuple of them, or token ids (B, T), which then are their own labels. Forward, and
    backward from the loss, or from a fixed sum of the outputs where there is none; dropout is off. The model's modes,
    gradients, classes and random state are afterwards as before. Called under autocast, it compares what autocast makes of the
    model, against float64 without autocast, and allows what autocast's dtype does.

    Memory: a float64 copy of the model while it runs, then its outputs and gradients in float64 beside two sets in the
    model's dtype.

    Raises TypeError for another kind of model or batch, ValueError if nothing in the model runs on our kernels or no
    parameter has a gradient.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: expected a torch.nn.Module, got {type(model).__name__}")
    args, kwargs = arguments_of(model, batch, "verify")
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not params:
        raise ValueError("verify: no parameter of the model requires a gradient")
    dtype = max((p.dtype for _, p in params), key=lambda d: torch.finfo(d).eps)
    device, computed = params[0][1].device.type, str(dtype).removeprefix("torch.")
    if torch.is_autocast_enabled(device):
        dtype = max(dtype, torch.get_autocast_dtype(device), key=lambda d: torch.finfo(d).eps)
        computed = f"{computed} under autocast to {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
    with left_as_it_was(model), evaluating(model), torch.enable_grad():
        unpatch(model)
        with torch.autocast(device, enabled=False), use_backend("reference"), _Float64():
            args64, kwargs64 = (_map(lambda t: t.double() if t.is_floating_point() else t, a) for a in (args, kwargs))
            truth = _run(copy.deepcopy(model).double(), args64, kwargs64, dtype)
        with use_backend("reference"):
            eager = _run(model, args, kwargs, dtype)
        with patched(model) as plan:
            own = isinstance(model, GPT) or any(type(m).__module__.split(".")[0] == __package__ for m in model.modules())
            if not plan.swapped and not own:
                raise ValueError(f"verify: nothing to compare: {plan.summary()}")
            ours = _run(model, args, kwargs, dtype)
    rows = []
    for name in list(truth | eager | ours):
        factor = MODEL_GRADIENT if name.startswith("grad ") else MODEL_OUTPUT
        # popped: each is freed as soon as it is compared; a gradient that one run lacks is zero there
        found = [run.pop(name, None) for run in (ours, eager, truth)]
        like = next(t for t in found if t is not None)
        o, e, t = (torch.zeros_like(like) if t is None else t for t in found)
        rows.append(compare(name, o, e, t.double(), dtype, factor))
    swapped = plan.summary().split(": ", 1)[1] if plan.swapped else "its own modules run on our kernels"
    report = Report(type(model).__name__, computed, swapped, rows)
    if show:
        print(report)
    return report


class _Float64(TorchFunctionMode):
    """Casts to a lower precision that are written in the model's code (`.float()`, dtype=torch.float32) go to float64."""

    _low = (torch.float32, torch.float16, torch.bfloat16)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in self._low else a for a in args)
        kwargs = {k: torch.float64 if isinstance(a, torch.dtype) and a in self._low else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _map(f, value):
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, dict):
        return {k: _map(f, v) for k, v in value.items()}
    return type(value)(_map(f, v) for v in value) if isinstance(value, (tuple, list)) else value


def _run(model: nn.Module, args: tuple, kwargs: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs by name and gradients as "grad <parameter>"; no .grad is touched."""
    outputs = outputs_of(model(*args, **kwargs))
    loss = loss_of(outputs, dtype)
    names, params = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    return {name: t.detach() for name, t in outputs.items()} | {
        f"grad {name}": g for name, g in zip(names, gradients, strict=True) if g is not None
    }
