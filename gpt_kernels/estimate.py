"""What a step will need, without running it: activation memory, FLOPs and traffic of each op, eager against ours, and the time
that a roofline predicts.

Forward and backward run on FakeTensors: every op is dispatched, none computes, no memory is taken. Of each op are counted

    flops    of matrix products and attention, in the convention of torch.utils.flop_counter: a causal mask does not halve them
    bytes    of the tensors that it reads and writes, each once; views and fresh memory cost nothing
    seconds  max(flops / peak, bytes / bandwidth) of a device: "predicted", the least that it can take

Activations are what autograd saves for the backward pass: whole storages, each once, without parameters and the batch. They are
those of a real step, to the byte, on a CPU. For a GPU dropout is off, and attention saves what flash attention does.
Not counted: the optimizer's step, what an op needs while it runs, what the allocator wastes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import checkpoint
from .dispatch import NAMESPACE, use_backend
from .info import cpu_name
from .models.config import PRESETS, GPTConfig
from .models.gpt import GPT
from .names import DTYPES
from .patch import patch, unpatch
from .table import aligned, duration
from .workflows.models import of_config

# ---- devices ----


@dataclass(frozen=True)
class Device:
    """Published peaks: flop/s of dense products by dtype, bytes/s of memory, bytes of memory; None where it is not told."""

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: int | None
    source: str


def _gpu(name: str, float32: float, half: float, bandwidth: float, memory: int, source: str) -> Device:
    """TFLOP/s, GB/s, GB. float32 is without tensor cores, as torch multiplies unless TF32 is allowed."""
    flops = {"float32": float32 * 1e12, "bfloat16": half * 1e12, "float16": half * 1e12}
    return Device(name, flops, bandwidth * 1e9, memory * 10**9, source)


DEVICES = {
    "a100": _gpu("NVIDIA A100 SXM 80 GB", 19.5, 312, 2039, 80, "NVIDIA A100 Tensor Core GPU datasheet"),
    "h100": _gpu("NVIDIA H100 SXM 80 GB", 67, 989, 3350, 80, "NVIDIA H100 Tensor Core GPU datasheet, without sparsity"),
    "h200": _gpu("NVIDIA H200 SXM 141 GB", 67, 989, 4800, 141, "NVIDIA H200 Tensor Core GPU datasheet, without sparsity"),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 82.6, 165.2, 1008, 24, "NVIDIA Ada GPU architecture, 16 bits summed in float32"),
    "l4": _gpu("NVIDIA L4", 30.3, 121, 300, 24, "NVIDIA L4 Tensor Core GPU datasheet, without sparsity"),
}
CPU = "cpu"  # this one, measured
SHOWN = 1e-3  # of the time: ops that take less are printed as one


def _median(call: Callable[[], Any], rounds: int = 9) -> float:
    call()
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def this_cpu(dtype: str) -> Device:
    """Measured now, as the benchmark does: a copy beyond cache, a product of two square matrices."""
    source, target, n = torch.ones(1 << 25), torch.zeros(1 << 25), 1024
    a = torch.randn(n, n).to(getattr(torch, dtype))
    rate = 2 * n**3 / _median(functools.partial(torch.mm, a, a))
    bandwidth = 2 * source.nbytes / _median(lambda: target.copy_(source))
    return Device(f"{cpu_name()}, {torch.get_num_threads()} threads", {dtype: rate}, bandwidth, None, "measured here, now")


# ---- what is counted ----


@dataclass
class Cost:
    calls: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0  # predicted

    def add(self, other: Cost) -> None:
        self.calls += other.calls
        self.flops += other.flops
        self.bytes += other.bytes
        self.seconds += other.seconds


_aten = torch.ops.aten
# no traffic: fresh memory, and views that are not said to be
_FREE = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided, _aten._unsafe_view}
_FREE |= {_aten.detach, _aten.detach_, _aten.is_same_size, _aten._local_scalar_dense, _aten.lift_fresh}
# the first argument is written and not read
_WRITTEN = {_aten.copy_, _aten.fill_, _aten.zero_}
# of the first argument only as much is read as comes out
_PARTLY = {_aten.embedding, _aten.gather, _aten.index_select, _aten.index, _aten.nll_loss_forward}


@functools.cache
def _torchs() -> Any:
    from torch.utils import flop_counter  # it imports Triton

    return flop_counter


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    # key heads that serve several query heads are multiplied for each
    heads = (q.shape[0], q.shape[1])
    return _torchs().sdpa_flop_count(q.shape, (*heads, *k.shape[2:]), (*heads, *v.shape[2:]))


def _attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    heads = (q.shape[0], q.shape[1])
    return _torchs().sdpa_backward_flop_count(do.shape, q.shape, (*heads, *k.shape[2:]), (*heads, *v.shape[2:]))


# those that torch's counter does not know: its own attention on a CPU, and ours
_FLOPS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    f"{NAMESPACE}::attention_fwd": _attention,
    f"{NAMESPACE}::attention_bwd": _attention_backward,
}


def flops_of(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    if (count := _torchs().flop_registry.get(func._overloadpacket)) is not None:
        return count(*args, **kwargs, out_val=out)
    own = _FLOPS.get(f"{func.namespace}::{func._opname}")
    return own(*args) if own is not None else 0


def _size(t: Tensor) -> int:
    """Bytes of memory that it covers, each once however it is expanded."""
    return math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) * t.element_size() if t.numel() else 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)


def bytes_of(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    packet, schema = func._overloadpacket, func._schema
    if packet in _FREE or func.is_view or func.namespace == "prim":
        return 0
    given = [*zip((a for a in schema.arguments if not a.kwarg_only), args, strict=False)]
    given += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
    moved = 0
    for i, (argument, value) in enumerate(given):
        written = argument.alias_info is not None and argument.alias_info.is_write
        for t in _tensors(value):
            read = not (i == 0 and packet in (_WRITTEN | _PARTLY)) and not (argument.is_out and written)
            moved += _size(t) * (read + written)
    returned = zip(schema.returns, out if isinstance(out, (tuple, list)) and len(schema.returns) > 1 else (out,), strict=False)
    fresh = sum(_size(t) for r, value in returned if r.alias_info is None for t in _tensors(value))
    return moved + fresh * (2 if packet in _PARTLY else 1)


class Counter(TorchDispatchMode):
    """Costs by op, and what autograd saves, of what runs inside; predictions for a device in a dtype."""

    def __init__(self, device: Device | None = None, dtype: str = "float32"):
        super().__init__()
        self.device, self.dtype = device, dtype
        self.ops: dict[str, Cost] = {}
        self._saved: dict[int, Tensor] = {}  # by storage; held, or another storage would get its address

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        flops, moved = flops_of(func, args, kwargs, out), bytes_of(func, args, kwargs, out)
        if flops or moved:
            seconds = 0.0
            if self.device is not None:
                seconds = max(flops / self.device.flops[self.dtype], moved / self.device.bandwidth)
            # attention on a CPU stands for that on a GPU
            name = f"{'' if func.namespace == 'aten' else func.namespace + '::'}{func._opname}".replace("_for_cpu", "")
            self.ops.setdefault(name, Cost()).add(Cost(1, flops, moved, seconds))
        return out

    def saving(self) -> Any:
        def pack(t: Tensor) -> Tensor:
            self._saved.setdefault(t.untyped_storage()._cdata, t)
            return t

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)

    def saved_bytes(self, without: Iterator[Tensor]) -> int:
        """Of the storages that were saved, but for those of these tensors."""
        apart = {t.untyped_storage()._cdata for t in without}
        return sum(t.untyped_storage().nbytes() for key, t in self._saved.items() if key not in apart)


def counted(model: nn.Module, args: tuple, kwargs: dict, counter: Counter) -> int:
    """One forward and backward inside the counter; returns the bytes that autograd saved. Real tensors or fake ones."""
    params = [p for p in model.parameters() if p.requires_grad]
    with counter, torch.enable_grad():
        with counter.saving():
            result = model(*args, **kwargs)
        found = [t for t in _floats(result) if t.requires_grad]
        scalars = [t for t in found if not t.dim()]
        if params and found:
            ends = scalars[:1] or found
            torch.autograd.grad(ends, params, [torch.ones_like(t) for t in ends], allow_unused=True)
    given = _tensors([*args, *kwargs.values()])
    return counter.saved_bytes(iter([*model.parameters(), *model.buffers(), *given]))


def _floats(result: Any) -> Iterator[Tensor]:
    values = list(result.values()) if isinstance(result, Mapping) else result
    return (t for t in _tensors(values) if t.is_floating_point())


# ---- the model on FakeTensors ----


def _faked(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """The model with fake parameters and buffers on the CPU, in dtype or in its own; tied ones stay tied."""
    memo: dict[int, Any] = {}

    def fake(t: Tensor, kind: torch.dtype) -> None:
        with mode:
            made = torch.empty_strided(t.shape, t.stride(), dtype=kind, device="cpu")
            memo[id(t)] = nn.Parameter(made, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else made

    for p in model.parameters():
        fake(p, dtype if dtype is not None and p.is_floating_point() else p.dtype)
    # the others keep their dtype: they may be tables in float32
    for module in model.modules():
        for t in (*module._buffers.values(), *vars(module).values()):
            if isinstance(t, Tensor) and id(t) not in memo:
                fake(t, t.dtype)
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _served() -> Iterator[None]:
    """What our kernels serve is asked of fake tensors as of real ones."""
    with contextlib.ExitStack() as around:
        around.enter_context(use_backend("reference"))  # whatever is built here
        if "transformers" in sys.modules:
            from .integrations.transformers_private import not_packed

            around.enter_context(not_packed())
        yield


def _arguments(model: nn.Module, batch: int, seq: int, mode: FakeTensorMode) -> tuple[tuple, dict[str, Any]]:
    with mode:
        ids = torch.empty(batch, seq, dtype=torch.int64, device="cpu")
        other = torch.empty(batch, seq, dtype=torch.int64, device="cpu")
    names = inspect.signature(model.forward).parameters
    if "input_ids" in names:
        more = {"labels": other, "use_cache": False}
        return (), {"input_ids": ids} | {name: value for name, value in more.items() if name in names}
    return ((ids, other) if isinstance(model, GPT) else (ids,)), {}


def _positions(config: Any) -> int | None:
    found = (getattr(config, name, None) for name in ("block_size", "n_positions", "max_position_embeddings"))
    return next((n for n in found if isinstance(n, int)), None)


def _of_hf(config: Any) -> nn.Module:
    with torch.device("meta"):
        return of_config(config)


def _models(model: Any) -> tuple[str, dict[str, Any], dict[str, str], Any]:
    """(name, {"eager", "ours": models without memory}, {variant: why it is not there}, its config)."""
    if isinstance(model, str):
        if model not in PRESETS:
            raise ValueError(f"estimate: unknown model {model!r}, expected one of {', '.join(PRESETS)}")
        name, variants, absent, config = _models(GPTConfig.preset(model))
        return model, variants, absent, config
    if isinstance(model, GPT):
        _, variants, absent, config = _models(model.config)
        return "GPT", {**variants, "ours": model}, absent, config
    if isinstance(model, GPTConfig):
        with torch.device("meta"):
            ours = {"ours": GPT(model)}
        if importlib.util.find_spec("transformers") is None:
            return "GPT", ours, {"eager": "Hugging Face's GPT-2 is not there: transformers is not installed"}, model
        from transformers import GPT2Config

        values = checkpoint.config_to_hf(model, torch.float32, model.tie_word_embeddings)
        drops = {"resid_pdrop": model.dropout, "attn_pdrop": model.attn_dropout, "embd_pdrop": model.embd_dropout}
        return "GPT", {"eager": _of_hf(GPT2Config(**{**values, **drops})), **ours}, {}, model
    if isinstance(model, nn.Module):
        return type(model).__name__, {"eager": model, "ours": model}, {}, getattr(model, "config", None)
    if hasattr(model, "model_type") and hasattr(model, "to_dict"):
        made = _of_hf(model)
        return type(made).__name__, {"eager": made, "ours": made}, {}, model
    raise TypeError(
        f"estimate: expected a torch.nn.Module, a GPTConfig, a transformers config or a name, got {type(model).__name__}"
    )


# ---- estimate ----


@dataclass
class Side:
    """Eager's, or ours. Bytes."""

    activations: int
    ops: dict[str, Cost]

    @property
    def total(self) -> Cost:
        total = Cost()
        for cost in self.ops.values():
            total.add(cost)
        return total


@dataclass
class Estimate:
    """Prints as tables; to_dict(), to_json()."""

    model: str
    batch: int
    seq: int
    dtype: str
    device: Device
    training: bool
    parameters: int
    weights: int  # bytes; gradients are as many
    moments: int  # bytes of AdamW's two
    swapped: str  # what patch swapped, in words
    sides: dict[str, Side]
    absent: dict[str, str] = field(default_factory=dict)

    def memory(self, side: str) -> int:
        """Bytes of a training step: weights, gradients, AdamW's moments, activations."""
        return 2 * self.weights + self.moments + self.sides[side].activations

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        for name, side in self.sides.items():
            facts["sides"][name] |= {"total": asdict(side.total), "memory": self.memory(name)}
        return facts | {"label": "predicted"}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        d, names = self.device, list(self.sides)
        mode = "training" if self.training else "without dropout"
        lines = [
            f"{self.model}, batch {self.batch} x {self.seq} tokens, {self.dtype}, {mode}: {self.parameters:,} parameters",
            f"{d.name}: {d.flops[self.dtype] / 1e12:.4g} TFLOP/s in {self.dtype}, {d.bandwidth / 1e9:.4g} GB/s ({d.source})",
            self.swapped,
            "",
        ]
        table: list[tuple[str, ...]] = [("one forward and backward", *names)]
        total = {name: self.sides[name].total for name in names}
        rows: list[tuple[str, Callable[[str], str]]] = [
            ("activations saved", lambda n: gib(self.sides[n].activations)),
            ("with weights, gradients and AdamW", lambda n: gib(self.memory(n)) + self._fits(n)),
            ("FLOPs", lambda n: f"{total[n].flops / 1e12:.4g} T"),
            ("traffic", lambda n: f"{total[n].bytes / 1e9:.4g} GB"),
            ("time, predicted (roofline: at least)", lambda n: duration(total[n].seconds)),
        ]
        table += [(head, *(value(name) for name in names)) for head, value in rows]
        lines += [*aligned(table, right=range(1, 1 + len(names))), ""]
        ops = [("op", *(f"{n}: {what}" for n in names for what in ("calls", "GFLOP", "GB", "predicted")))]
        every = {
            op: max(s.ops.get(op, Cost()).seconds for s in self.sides.values()) for s in self.sides.values() for op in s.ops
        }
        shown = [
            op for op in sorted(every, key=lambda op: -every[op]) if every[op] >= SHOWN * max(t.seconds for t in total.values())
        ]
        for op in [*shown, "others"]:
            cells: list[str] = []
            for name in names:
                c = self.sides[name].ops.get(op) if op != "others" else self._others(name, shown)
                figures = (
                    (str(c.calls), f"{c.flops / 1e9:.4g}", f"{c.bytes / 1e9:.3g}", duration(c.seconds)) if c else ("",) * 4
                )
                cells += figures
            ops.append((op, *cells))
        lines += aligned(ops, right=range(1, 1 + 4 * len(names)))
        return "\n".join([*lines, *(f"no {name}: {why}" for name, why in self.absent.items())])

    def _others(self, side: str, shown: list[str]) -> Cost:
        others = Cost()
        for op, cost in self.sides[side].ops.items():
            if op not in shown:
                others.add(cost)
        return others

    def _fits(self, side: str) -> str:
        if self.device.memory is None:
            return ""
        return ", fits" if self.memory(side) <= self.device.memory else f", more than its {gib(self.device.memory)}"


def gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def estimate(model: Any, batch: int, seq: int, device: str = CPU, dtype: str | None = None, show: bool = True) -> Estimate:
    """What one forward and backward of `model` on (batch, seq) tokens needs on a device, eager and by ours; printed.

    model: a torch.nn.Module that takes token ids, neither run nor changed; a GPTConfig (ours is then GPT, eager Hugging
    Face's GPT-2); a transformers config; or the name of a published one ("gpt2-xl"). device: "cpu", this one, measured now, or
    one of DEVICES, by its published peaks. dtype: "float32", "bfloat16" or "float16" of weights and activations; a module's own
    unless given, else float32. On a CPU a model is in training mode (a module in its own), for a GPU without dropout.
    Our kernels are taken to be there, whatever is built here.
    Raises ValueError for unknown names, devices and dtypes, for sizes below 1 and sequences beyond the model's positions,
    TypeError for another kind of model.
    """
    for name, value in (("batch", batch), ("seq", seq)):
        if type(value) is not int or value < 1:
            raise ValueError(f"estimate: {name} must be a whole number of at least 1, got {value!r}")
    if device not in (CPU, *DEVICES):
        raise ValueError(f"estimate: unknown device {device!r}, expected one of {', '.join((CPU, *DEVICES))}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"estimate: unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    named, variants, absent, config = _models(model)
    if (positions := _positions(config)) is not None and seq > positions:
        raise ValueError(f"estimate: seq {seq} is above the model's {positions} positions")
    if dtype is None:
        of = next((p.dtype for p in model.parameters()), torch.float32) if isinstance(model, nn.Module) else torch.float32
        dtype = str(of).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"estimate: the model's parameters are {dtype}; dtype= takes one of {', '.join(DTYPES)}")
    target = this_cpu(dtype) if device == CPU else DEVICES[device]
    training = device == CPU and (model.training if isinstance(model, nn.Module) else True)
    sides, swapped = {}, "ours is gpt_kernels.GPT"
    for side, source in variants.items():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        copied = _faked(source, mode, getattr(torch, dtype)).train(training)
        unpatch(copied)
        with _served():
            if side == "ours" and not isinstance(copied, GPT):
                swapped = f"ours: {patch(copied).summary()}"
            args, kwargs = _arguments(copied, batch, seq, mode)
            counter = Counter(target, dtype)
            with mode:
                saved = counted(copied, args, kwargs, counter)
        sides[side] = Side(saved, counter.ops)
    params = {id(p): p for p in copied.parameters()}.values()
    weights = sum(p.numel() * p.element_size() for p in params)
    moments = 2 * sum(p.numel() * p.element_size() for p in params if p.requires_grad)
    count = sum(p.numel() for p in params)
    found = Estimate(named, batch, seq, dtype, target, training, count, weights, moments, swapped, sides, absent)
    if show:
        print(found)
    return found
