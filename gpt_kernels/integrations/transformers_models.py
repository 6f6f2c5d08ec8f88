"""What all of transformers' models share: the functions that their attention modules call, and their language-model loss.

- attention: `ALL_ATTENTION_FUNCTIONS` and `eager_attention_forward` in a module's forward (substitute.py). "sdpa" and "eager"
  are served, with masks as they come, grouped heads, softcap, position biases. What there is no kernel for is done by
  the function that would have been called: other implementations, and functions registered in their place; attention weights
  that were asked for, or that a forward hook under "eager" would see; arguments of other functions (paged caches, sinks ...);
  keys and values of another dtype than the queries; additive masks that hide every key from some query (left padding under
  "eager", which then takes the mean of all values; under torch.compile, every additive mask, as its values cannot be looked
  at). Where "eager" returns the weights unasked, None stands in their place. An eager function is probed first.
- loss: ForCausalLMLoss. Other loss functions, float64 logits (whose loss is float32 there), labels that are not int64 are
  transformers'.
"""

from __future__ import annotations

import contextvars
import dis
import functools
import inspect
import itertools
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..hooks.transformers_attention import attend
from ..masks import hides_all
from ..ops.attention import MAX_HEAD_DIM, attention
from ..ops.cross_entropy import cross_entropy
from ..patch import dense, droppable, left_by_autocast, register, unhooked
from ..probe import compared, random_state_kept, results
from ..reading import codes_of, reading, unwrapped
from ..serving import own_class, plain
from ..substitute import Substitute, finders
from . import transformers_private as private

# ---- masks ----


def mask_serves(mask: Any, q: Tensor, Tk: int, implementation: str, window: int = 0) -> bool:
    """Does our kernel mean by the mask what the implementation does? q: (B, H, Tq, D). window: as hides_all has it."""
    if not plain(mask) and type(mask) is not nn.Parameter or mask.ndim != 4 or mask.layout is not torch.strided:
        return False
    if any(m not in (1, n) for m, n in zip(mask.shape, (*q.shape[:3], Tk), strict=True)):
        return False
    if mask.dtype == torch.bool:
        # "eager" would add it
        return implementation == "sdpa"
    if mask.dtype != q.dtype and not (implementation == "eager" and mask.dtype == torch.float32 and q.dtype.itemsize == 2):
        return False
    return not torch.compiler.is_compiling() and not hides_all(mask, window)


# ---- attention ----


def _shapes_serve(q: Any, k: Any, v: Any, groups: int) -> bool:
    # caches may hold another dtype, batch or nothing
    if not dense(q, k, v) or q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or not q.numel() or not k.numel():
        return False
    (B, H, _, D), (Bk, Hk, _, Dk) = q.shape, k.shape
    return (
        D == Dk <= MAX_HEAD_DIM
        and v.shape[:3] == k.shape[:3]
        and 0 < v.shape[3] <= MAX_HEAD_DIM
        and Bk == B
        and type(groups) is int
        and H == Hk * groups
        and left_by_autocast(q)
    )


def _groups(module: Any) -> Any:
    return getattr(module, "num_key_value_groups", 1)


def _scaled(scaling: Any) -> bool:
    # torch's own kernels for a CPU answer NaN to a scale of 0 or less
    return scaling is None or type(scaling) in (float, int) and scaling > 0


def _laid_out(o: Tensor) -> Tensor:
    return o.transpose(1, 2).contiguous()  # (B, T, H, D)


def sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None, cache=None,
         **kwargs):  # fmt: skip
    """As transformers' sdpa_attention_forward. Returns (o (B, T, H, D), None)."""
    o: Tensor | str = "what it has not"
    # which it does not read
    if kwargs.get("softcap") is None and not kwargs.get("output_attentions", False):
        o = attend(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, cache, exact=True
        )  # fmt: skip
    if not isinstance(o, str):
        return o, None
    return private.sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, cache, **kwargs
    )


class _Table:
    """transformers' table of attention functions, with ours where "sdpa" is transformers' own."""

    def __init__(self, table: Any):
        self.table = table

    def get_interface(self, implementation, default):
        return _or_ours(self.table.get_interface(implementation, default))

    def get(self, implementation, default=None):
        return _or_ours(self.table.get(implementation, default))

    def __getitem__(self, implementation):
        return _or_ours(self.table[implementation])

    def __contains__(self, implementation):
        return implementation in self.table

    def __getattr__(self, name):
        return getattr(self.table, name)


def _or_ours(function: Any) -> Any:
    return sdpa if function is private.sdpa_attention_forward else function


def table_over(table: Any) -> _Table:
    return _Table(table)


# what an eager attention function may be given, in torch's names or as its own
_KNOWN = ("module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "position_bias")


def eager_over(own: Any, named: tuple[str, ...]) -> Any:
    """Ours in the place of an eager attention function that has these arguments."""
    groups_read = "num_key_value_groups" in _read(own).names
    places = unwrapped(own).__code__.co_varnames[: unwrapped(own).__code__.co_argcount][5:]  # type: ignore[union-attr]

    @functools.wraps(own, updated=())
    def eager(module, query, key, value, attention_mask, *args, **kwargs):
        if _eager_serves(module, query, key, value, attention_mask, places, args, kwargs):
            more = {**dict(zip(places, args, strict=False)), **kwargs}
            bias, position_bias = attention_mask, more.get("position_bias")
            if position_bias is not None:
                bias = position_bias if bias is None else position_bias + bias
            o, _ = attention(
                query, key, value, bias, scale=more["scaling"], softcap=more.get("softcap") or 0.0,
                dropout_p=more.get("dropout", 0.0) if module.training else 0.0,
            )  # fmt: skip
            return _laid_out(o), None
        return own(module, query, key, value, attention_mask, *args, **kwargs)

    def _eager_serves(module, q, k, v, mask, places, args, kwargs):
        more = {**dict(zip(places, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling() or private.wants_attentions() or not _unseen(module):
            return False
        # unknown arguments of its own; what it does not name it does not read
        if any(value is not None for name, value in more.items() if name in named and name not in _KNOWN):
            return False
        softcap, scaling, position_bias = more.get("softcap"), more.get("scaling"), more.get("position_bias")
        if softcap is not None and not ("softcap" in named and type(softcap) in (float, int) and softcap > 0):
            return "softcap" not in named
        if more.get("output_attentions") or scaling is None or not _scaled(scaling) or not droppable(more.get("dropout", 0.0)):
            return False
        if not _shapes_serve(q, k, v, _groups(module) if groups_read else 1):
            return False
        if position_bias is not None and not (
            "position_bias" in named
            and type(position_bias) is Tensor
            and position_bias.dtype == q.dtype
            and mask_serves(position_bias, q, k.shape[2], "eager")
        ):
            return False
        return mask is None or mask_serves(mask, q, k.shape[2], "eager")

    return eager


def _unseen(module: Any) -> bool:
    """Does no hook see the weights? transformers' own collects them while somebody wants them."""
    return unhooked(module) or (
        all(private.collects_outputs(hook) for hook in module._forward_hooks.values())
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and not torch.nn.modules.module._has_any_global_hook()
    )


def _read(function: Any) -> Any:
    return reading(object, function)


class _StandIn:
    """A module of which an eager function is to read no more than this."""

    training, num_key_value_groups, head_dim = False, 2, 8


@functools.cache
def _eager_form(function: Any, device: torch.device) -> tuple[tuple[str, ...], str] | str:
    """(the names of its arguments, what the plan says), or why our kernel does not stand in for it."""
    inner = unwrapped(function)
    if inner is None or private.no_eager() is not None:
        return private.no_eager() or "its eager attention is not written in Python"
    named = tuple(inspect.signature(inner).parameters)
    code = inner.__code__
    if code.co_flags & inspect.CO_VARKEYWORDS:
        rest = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
        loads = (i.argval for c in codes_of(code) for i in dis.get_instructions(c) if i.opname.startswith("LOAD"))
        if any(rest in (argval if isinstance(argval, tuple) else (argval,)) for argval in loads):
            return "its eager attention reads arguments that it does not name"
    read = _read(function)
    groups = 2 if "num_key_value_groups" in read.names else 1
    generator, worst = torch.Generator().manual_seed(5), (0.0, 0.0)
    caps = (None, 3.0) if "softcap" in named else (None,)
    biased = (False, True) if "position_bias" in named else (False,)
    with random_state_kept(device), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # several queries, and one behind a cache
            for masked, cap, bias, Tq in itertools.product((False, True), caps, biased, (5, 1)):
                shapes = [(2, 4, Tq, 8), (2, 4 // groups, 6, 8), (2, 4 // groups, 6, 8)]
                shapes += [(2, 1, Tq, 6)] * masked + [(1, 4, Tq, 6)] * bias
                xs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
                options = {"scaling": 0.3, **({"softcap": cap} if cap else {})}

                def call(f, q, k, v, *more, masked=masked, bias=bias, options=options):
                    extra = {"position_bias": more[-1]} if bias else {}
                    return f(_StandIn(), q, k, v, more[0] if masked else None, **options, **extra)[0]

                def ours(q, k, v, *more, cap=cap):
                    total = sum(more[1:], more[0]) if more else None
                    o, _ = attention(q, k, v, total, scale=0.3, softcap=cap or 0.0)
                    return _laid_out(o)

                try:
                    eager = results(lambda *x, call=call: call(function, *x), xs, {})
                    truth = results(lambda *x, call=call: call(function, *x), [x.double() for x in xs], {})
                    mine = results(ours, xs, {})
                except Exception as error:
                    return f"its eager attention is another: {type(error).__name__}: {error}"[:200]
                wrong, *errors = compared(mine, eager, truth)
                if wrong is not None:
                    return f"its eager attention is another: {wrong} ({str(dtype)[6:]})"
                worst = max(worst, (errors[0], errors[1])) if dtype == torch.float32 else worst
    return named, f"eager attention's probe: error {worst[0]:.1e}, eager's {worst[1]:.1e}"


def _find(value: Any, module: nn.Module, device: torch.device) -> Substitute | str | None:
    if private.is_attention_table(value):
        reason = private.absent("sdpa_attention_forward")
        implementation = private.attention_implementation(module)
        if implementation not in ("sdpa", "eager"):
            return f"attention implementation {implementation!r}"
        return reason or Substitute(table_over, (), "attention", "flash attention, heads and masks as they come")
    if isinstance(value, FunctionType) and _named(value)[:5] == _KNOWN[:5]:
        found = _eager_form(value, device)
        return found if isinstance(found, str) else Substitute(eager_over, (found[0],), "attention", found[1])
    return None


def _named(function: FunctionType) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


finders.append(_find)


# ---- attention that a module writes out ----


class WrittenOut(private.WritesAttentionOut):
    """Methods to register for such a class, with serves=weights_asked_for. Ours has no weights: where somebody wants them, the
    class's own runs. attention_options(query, key): of ops/attention.py, the scale among them; None: it is not served."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _weights_wanted.set(True)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _weights_wanted.reset(token)

    def attend(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, None] | None:
        options = self.attention_options(query, key)
        if options is None or not _written_serves(
            self, query, key, value, mask, options["scale"], options.get("window_left", -1) + 1
        ):
            return None
        drop = self.attn_dropout
        return attention(query, key, value, mask, dropout_p=drop.p if drop.training else 0.0, **options)[0], None


_weights_wanted: contextvars.ContextVar[bool] = contextvars.ContextVar("weights_wanted", default=False)


def weights_asked_for(module: Any, *args: Any, **kwargs: Any) -> bool:
    if torch.compiler.is_dynamo_compiling():  # then all of it is the class's own
        return False
    place = _place_of_weights(own_class(module))
    return bool(kwargs.get("output_attentions", args[place] if place is not None and place < len(args) else False))


@functools.cache
def _place_of_weights(cls: Any) -> int | None:
    names = list(inspect.signature(cls.forward).parameters)[1:]
    return names.index("output_attentions") if "output_attentions" in names else None


def _written_serves(module: Any, q: Any, k: Any, v: Any, mask: Any, scale: Any, window: int) -> bool:
    drop = module.attn_dropout
    return (
        private.no_eager() is None
        and not torch.compiler.is_compiling()
        and not _weights_wanted.get()
        and not private.wants_attentions()
        and _unseen(module)
        and own_class(drop) is nn.Dropout
        and unhooked(drop)
        and droppable(drop.p)
        and _scaled(scale)
        and _shapes_serve(q, k, v, 1)
        and (mask is None or mask_serves(mask, q, k.shape[2], "eager", window))
    )


# ---- loss ----


def _loss_serves(logits: Any, target: Any, vocab_size: Any, ignore_index: Any) -> bool:
    return (
        type(ignore_index) is int
        and type(vocab_size) is int
        and plain(target)
        and target.dtype == torch.int64
        and dense(logits)
        # float32 is what transformers takes them through
        and logits.dtype != torch.float64
        and logits.is_contiguous()
        and logits.numel() == vocab_size * target.numel() > 0
    )


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
):
    """transformers' ForCausalLMLoss without the copy of the logits in float32: our kernel reads them as they are.

    logits: (..., V); labels, shift_labels: (...) int64. Returns () in float32. What there is no kernel for, float64 logits
    among it, goes to ForCausalLMLoss itself.
    """
    if not _loss_serves(logits, labels if shift_labels is None else shift_labels, vocab_size, ignore_index):
        return private.ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    target = shift_labels.view(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    # transformers' loss is that of logits in float32
    loss: Any = cross_entropy(
        logits.view(-1, vocab_size), target, ignore_index=ignore_index, reduction=reduction, dtype=torch.float32
    )
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _has_loss(module: nn.Module) -> bool:
    if not isinstance(module, PreTrainedModel):
        return False
    own: Any = own_class(module)
    read = reading(own, own.forward)
    return read is not None and "loss_function" in read.names


@register(_has_loss, ("cross_entropy",), "cross entropy without float32 logits", unless=private.no_causal_lm_loss)
class CausalLM:
    @property
    def loss_function(self):
        # asked anew each time: a loss function set after patch is used
        return causal_lm_loss if private.no_causal_lm_loss(self) is None else super().loss_function

    @loss_function.setter
    def loss_function(self, value):
        PreTrainedModel.loss_function.fset(self, value)
