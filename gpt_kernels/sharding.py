"""DTensors in the public functions, and attention under PyTorch's context parallelism: what each process computes of a call.

A sharding rule is a function here: which dimensions of the first argument may be cut over a mesh, and how the others go with
it. The call then runs on each process's own parts between to_local and from_local, whose derivatives
know that the gradient of what is whole beside a cut x is a sum over the processes:

| function             | x may be cut in                             | beside it                                               |
|----------------------|---------------------------------------------|---------------------------------------------------------|
| layer_norm, rms_norm | all dimensions but the last                 | weight and bias whole, their gradients partial sums     |
| gelu                 | all                                         | bias cut with the last dimension, else whole            |
| softmax              | all but the last, and but `causal`'s rows   | mask cut where it has x's dimension                     |
| swiglu, geglu        | all; but the last of a packed gate          | up cut as the gate                                      |
| rotary embeddings    | batch, positions, heads                     | cos and sin cut where they have the dimension           |
| dropout              | all                                         | residual cut as x                                       |
| cross_entropy        | rows                                        | target cut as the logits; a mean counts all rows        |
| attention            | batch; heads; queries' rows                 | keys' heads as queries'; keys whole beside cut rows     |

What no rule takes (a cut last dimension of a norm, partial sums, heads that do not divide) is made whole first, as DTensor does
for its own operators; nothing is computed from a part as if it were the whole. A plain tensor beside a DTensor raises
RuntimeError, as with torch's operators, unless inside torch.distributed.tensor.experimental.implicit_replication().

Dropout: every process takes the random state of the mesh's first one, and each part draws a mask of its own from it. So whole
tensors stay equal on all processes; parts have other masks than one process has.

Nothing here imports torch.distributed.tensor before a DTensor is there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


def spread(*tensors: Any) -> bool:
    """Is one of them a DTensor? By name: a compiler asks, too, and torch.distributed.tensor need not be there."""
    return any(type(t).__name__ == "DTensor" for t in tensors)


Dims = Callable[[int], "int | None"]  # a dimension of x -> that of another tensor which is cut with it, None: it is whole


class Parts:
    """What a rule has decided: `cut[i]` is the dimension of x that mesh dimension i cuts, None where x is whole on it."""

    def __init__(self, op: str, x: Any, may_cut: Callable[[int, int], bool]):
        """may_cut(dimension, into how many parts), for each dimension of x."""
        from torch.distributed.tensor import Shard

        self.op = op
        if not spread(x):
            raise self._mixed(x)
        self.mesh, self.x = x.device_mesh, x
        self.cut: list[int | None] = []
        for i, p in enumerate(x.placements):
            d = p.dim % x.dim() if type(p) is Shard else None
            if d is None or d in self.cut or not may_cut(d, self.mesh.size(i)):
                d = None
            self.cut.append(d)

    def local(self, t: Any, dims: Dims = lambda d: d) -> Any:
        """This process's part of t, differentiable; None for None."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if t is None:
            return None
        if not spread(t):
            if not isinstance(t, Tensor) or not DTensor._op_dispatcher._allow_implicit_replication:
                raise self._mixed(t)
            t = DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        if t.device_mesh != self.mesh:
            raise RuntimeError(f"{self.op}: all DTensors must be on one mesh, got {self.mesh} and {t.device_mesh}")
        places: list[Any] = [Replicate()] * self.mesh.ndim
        grads: list[Any] = [Replicate()] * self.mesh.ndim
        for i, d in enumerate(self.cut):
            if d is not None:
                other = dims(d)
                places[i], grads[i] = (Replicate(), Partial()) if other is None else (Shard(other), Shard(other))
        return t.redistribute(placements=places).to_local(grad_placements=grads)

    def whole(self, y: Tensor, shape: Sequence[int] | None = None, dims: Dims = lambda d: d) -> Any:
        """The DTensor of this shape, x's unless told, of which y is this process's part; a dimension that is None: a partial
        sum."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        shape = torch.Size(self.x.shape if shape is None else shape)
        places: list[Any] = [Replicate()] * self.mesh.ndim
        for i, d in enumerate(self.cut):
            if d is not None:
                places[i] = Partial() if (own := dims(d)) is None else Shard(own)
        return DTensor.from_local(y, self.mesh, places, run_check=False, shape=shape, stride=_strides_as(y, shape))

    def random(self, state: Tensor) -> Tensor:
        """The random state (seed, offset) of this process's part: the first process's, other bits for every part."""
        from torch.distributed.tensor import Replicate, distribute_tensor

        state = distribute_tensor(state, self.mesh, [Replicate()] * self.mesh.ndim).to_local()
        return _for_part(state, self.part())

    def part(self) -> int:
        """Which one of the different parts of x this process has."""
        index = 0
        for i, d in enumerate(self.cut):
            if d is not None:
                index = index * self.mesh.size(i) + self.mesh.get_local_rank(i)
        return index

    def _mixed(self, t: Any) -> RuntimeError:
        return RuntimeError(
            f"{self.op}: got mixed torch.Tensor and DTensor, a {type(t).__name__} among them; distribute all of them"
        )


def _strides_as(y: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Of a dense tensor of this shape, its dimensions in memory in the order of y's."""
    order, strides, step = sorted(range(y.dim()), key=lambda d: (y.stride(d), -d)), [0] * y.dim(), 1
    for d in order:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


def _for_part(state: Tensor, part: int) -> Tensor:
    if not part:
        return state
    state, step = state.clone(), part * _GOLDEN % 2**64
    state[0] += step - 2**64 * (step >= 2**63)
    return state


# ---- the rules ----


def rows(op: str, call: Callable[..., Tensor], x: Any, *params: Any) -> Any:
    """call(x, *params), of which every row of x is by itself; params are of rows."""
    parts = Parts(op, x, lambda d, n: d < x.dim() - 1)
    return parts.whole(call(parts.local(x), *(parts.local(t, lambda d: None) for t in params)))


def gelu(call: Callable[..., Tensor], x: Any, bias: Any) -> Any:
    """call(x, bias)"""
    parts = Parts("gelu", x, lambda d, n: True)
    return parts.whole(call(parts.local(x), parts.local(bias, lambda d: 0 if d == x.dim() - 1 else None)))


def softmax(call: Callable[..., Tensor], x: Any, mask: Any, causal: bool) -> Any:
    """call(x, mask) over the last dimension"""
    parts = Parts("softmax", x, lambda d, n: d < x.dim() - (2 if causal else 1))
    return parts.whole(call(parts.local(x), parts.local(mask, _broadcast(mask, x.dim()))))


def _broadcast(t: Any, rank: int) -> Dims:
    """The dimensions of t, which is broadcast to this rank: None where it has 1 or none."""

    def dims(d):
        own = d - (rank - t.dim())
        return own if own >= 0 and t.shape[own] > 1 else None

    return dims


def glu(call: Callable[..., Tensor], gate: Any, up: Any) -> Any:
    """call(gate, up); without an up, halves of the last dimension."""
    last = gate.dim() - 1
    parts = Parts("glu", gate, lambda d, n: up is not None or d != last)
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    return parts.whole(call(parts.local(gate), parts.local(up)), shape)


def rotary(call: Callable[..., Tensor], x: Any, cos: Any, sin: Any) -> Any:
    """call(x, cos, sin), (B, S, H, D) and (B or 1, S, R)"""
    parts = Parts("rotary", x, lambda d, n: d < 3)

    def of_table(d):
        return None if d == 2 or cos.shape[d] == 1 else d

    return parts.whole(call(parts.local(x), parts.local(cos, of_table), parts.local(sin, of_table)))


def dropout(call: Callable[..., Tensor], x: Any, residual: Any, rng_state: Tensor) -> Any:
    """call(x, residual, rng_state)"""
    parts = Parts("dropout", x, lambda d, n: True)
    return parts.whole(call(parts.local(x), parts.local(residual), parts.random(rng_state)))


def cross_entropy(call: Callable[..., Any], logits: Any, target: Any, ignore_index: int, reduction: str) -> tuple[Any, Any]:
    """(loss, z_loss) of call(logits, target, reduction)"""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = Parts("cross_entropy", logits, lambda d, n: d < logits.dim() - 1 and target.dim() == logits.dim() - 1)
    x, t = parts.local(logits), parts.local(target)
    if reduction == "none":
        return tuple(parts.whole(y, logits.shape[:-1]) for y in call(x, t, reduction))  # type: ignore[return-value]
    if reduction == "mean" and any(d is not None for d in parts.cut):
        own: list[Any] = [Replicate() if d is None else Partial() for d in parts.cut]
        count = DTensor.from_local((t != ignore_index).sum(), parts.mesh, own, run_check=False)
        of_all = count.redistribute(placements=[Replicate()] * parts.mesh.ndim).to_local()
        sums = [y / of_all for y in call(x, t, "sum")]
    else:
        sums = call(x, t, reduction)
    return tuple(parts.whole(y, (), lambda d: None) for y in sums)  # type: ignore[return-value]


def attention(call: Callable[..., tuple[Tensor, Tensor]], q: Any, k: Any, v: Any, bias: Any, slopes: Any, rng_state: Any,
              causal_offset: int) -> tuple[Any, Any]:  # fmt: skip
    """(o, lse) of call(q, k, v, bias, slopes, rng_state, causal_offset), in the core's shapes (ops/attention.py)

    A part of the queries' rows has its own place on the diagonal: PyTorch's context parallelism, whose head-and-tail order of
    rows is in force while its dispatcher is, is undone.
    """
    (_, H, Tq, _), Hk = q.shape, k.shape[1]
    parts = Parts("attention", q, lambda d, n: d in (0, 2) or (d == 1 and H % n == 0 and (Hk % n == 0 or Hk == 1)))
    balanced = 2 in parts.cut and _head_and_tail()

    def of_keys(d):
        return None if d == 2 or (d == 1 and Hk == 1) else d

    def of_slopes(d):
        return None if d == 2 else _broadcast(slopes, 2)(d)

    ql, kl, vl = parts.local(q), parts.local(k, of_keys), parts.local(v, of_keys)
    own, sl = parts.local(bias, _broadcast(bias, 4) if bias is not None else of_keys), parts.local(slopes, of_slopes)
    state = None if rng_state is None else parts.random(rng_state)
    if 2 not in parts.cut:
        o, lse = call(ql, kl, vl, own, sl, state, causal_offset)
    else:
        i = parts.cut.index(2)
        n, rank, each = parts.mesh.size(i), parts.mesh.get_local_rank(i), -(-Tq // parts.mesh.size(i))
        pieces = [(0, ql.shape[2], rank * each)]  # from, to, and the place of the first in the whole sequence
        if balanced:
            if Tq % (2 * n) or k.shape[2] % (2 * n) or bias is not None:
                raise RuntimeError(
                    f"attention: context parallelism's order of rows needs lengths that {2 * n} divides and no mask, got "
                    f"{Tq} queries, {k.shape[2]} keys and {'no' if bias is None else 'a'} mask"
                )
            kl, vl = (_in_order(t, n) for t in (kl, vl))
            half = each // 2
            pieces = [(0, half, rank * half), (half, each, (2 * n - 1 - rank) * half)]
        results = []
        for number, (start, end, place) in enumerate(pieces):
            mask = own if own is None or own.shape[2] == 1 else own[:, :, start:end]
            random = state if state is None else _for_part(state, number * math.prod(parts.mesh.shape))
            results.append(call(ql[:, :, start:end], kl, vl, mask, sl, random, causal_offset + place))
        o, lse = results[0] if len(results) == 1 else (torch.cat(each, 2) for each in zip(*results, strict=True))
    return parts.whole(o, (*q.shape[:3], v.shape[3])), parts.whole(lse, q.shape[:3])


# ---- PyTorch's context parallelism (prototype in torch: read where it keeps what it has replaced) ----

_CONTEXT = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",
)


def _context_module() -> Any:
    return next((sys.modules[name] for name in _CONTEXT if hasattr(sys.modules.get(name), "_replaced_functions")), None)


def _head_and_tail() -> bool:
    """Has context parallelism put the rows into its balanced order, process i with parts i and 2 n - 1 - i?"""
    from torch.distributed.tensor import DTensor

    module = _context_module()
    handled = torch.ops.aten._scaled_dot_product_flash_attention.default in DTensor._op_dispatcher._custom_op_handlers
    return module is not None and handled and bool(module._cp_options.enable_load_balance)


def _in_order(t: Tensor, n: int) -> Tensor:
    """(B, H, T, D) from the balanced order of 2 n chunks into the sequence's."""
    chunks = t.chunk(2 * n, 2)
    return torch.cat([*chunks[::2], *chunks[::-2]], 2)


def context_mesh() -> Any:
    """The mesh over which torch's context_parallel() cuts sequences, inside its block; None outside.

    Raises RuntimeError where this torch's is not as known: attention of a part alone must never pass for the whole's.
    """
    function: Any = F.scaled_dot_product_attention
    if type(function) is not FunctionType:  # torch's own is built in
        return None
    module = _context_module()
    if module is None or function not in module._replaced_functions:
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if "device_mesh" not in cells:
        raise RuntimeError("attention: this torch's context_parallel() is not known to gpt_kernels; use torch's attention")
    return cells["device_mesh"].cell_contents


def in_context(mesh: Any, *tensors: Any) -> list[Any]:
    """Parts (B, H, T / n, D) of sequences as DTensors; None stays None."""
    from torch.distributed.tensor import DTensor, Shard

    return [t if t is None or spread(t) else DTensor.from_local(t, mesh, [Shard(2)], run_check=False) for t in tensors]


def positions(start: int, length: int, device: torch.device) -> Tensor:
    """(length,) int64: the places of tokens in their sequence, start ... start + length - 1; under context_parallel() those of
    this process's part, of `length` tokens."""
    mesh = context_mesh()
    if mesh is None:
        return torch.arange(start, start + length, device=device)
    rank, n = mesh.get_local_rank(), mesh.size()
    whole = torch.arange(start, start + length * n, device=device)
    if not _head_and_tail():
        return whole[rank * length :][:length]
    chunks = whole.chunk(2 * n)
    return torch.cat((chunks[rank], chunks[2 * n - 1 - rank]))
