"""Hugging Face's GPT-2 (transformers 5): attention and MLP on our kernels; its loss is that of all models.

What there is no kernel for is done by the class's own forward, or for attention by the function that it would call, for that
call (see patch.py):

- attention: attention weights that were asked for, or that a forward hook under "eager" would see; cross-attention;
  reorder_and_upcast_attn; implementations other than "sdpa" and "eager", and functions that were registered in their place;
  arguments that the function has of its own (paged caches, position_bias, is_causal ...); keys and values of another dtype
  than the queries; masks of another rank or dtype; and additive masks that hide every key from some query (left padding
  under "eager", which then takes the mean of all values; under torch.compile, every additive mask, as its values cannot be
  looked at). Where "eager" returns the weights unasked, None stands in their place.
- MLP: act with hooks, hooks on all modules, activations other than GELUs. A c_fc with hooks or of another class (LoRA,
  quantised) is called as it is.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import Conv1D, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.models.gpt2 import modeling_gpt2

from ..ops.attention import MAX_HEAD_DIM, attention
from ..ops.gelu import gelu
from ..patch import dense, droppable, keep, left_by_autocast, parameter, register, unhooked
from . import transformers_private as private
from .transformers_models import mask_serves

keep(Conv1D, "matrix product: torch's", home=__name__)


# ---- attention ----

# the functions that the kernel stands in for, and the keyword arguments that mean something to them
_INTERFACES = private.attention_interfaces(modeling_gpt2)
_READ = frozenset(
    (
        "module",
        "query",
        "key",
        "value",
        "dropout",
        "scaling",
        "is_causal",
        "position_bias",
        "cache",
        "softcap",
        "output_attentions",
    )
)


# what its forward calls the cache: past_key_values up to transformers 5.23
_CACHE = "cache" if "cache" in inspect.signature(modeling_gpt2.GPT2Attention.forward).parameters else "past_key_values"


def _keep_attention(module: Any) -> str | None:
    # a name that Attention.forward lacks would go into its kwargs, unseen
    known, own = (list(inspect.signature(f).parameters) for f in (Attention.forward, type(module).forward))
    if [_CACHE if name == "past_key_values" else name for name in known] != own:
        return f"the arguments of its forward are others: {', '.join(own)}"
    if type(module.scaling) not in (float, int):
        return f"its scaling is {module.scaling!r}"
    if module.is_cross_attention:
        return "cross-attention"
    if module.head_dim > MAX_HEAD_DIM:
        return f"head dim {module.head_dim} is above {MAX_HEAD_DIM}"
    implementation = private.attention_implementation(module)
    interface = _INTERFACES.get(implementation or "", f"attention implementation {implementation!r}")
    if isinstance(interface, str):
        return interface
    if implementation == "eager" and module.reorder_and_upcast_attn:
        return "reorder_and_upcast_attn"
    return None


def _serves_attention(
    module: Any,
    hidden_states,
    past_key_values=None,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    output_attentions=False,
    **kwargs,
) -> bool:
    if _CACHE == "cache" and type(kwargs.get(_CACHE)) not in (type(None), DynamicCache, StaticCache):
        return False
    return (
        encoder_hidden_states is None
        and not isinstance(past_key_values, EncoderDecoderCache)
        and not (module.reorder_and_upcast_attn and private.attention_implementation(module) == "eager")
    )


def _kernel_serves(module: Any, implementation: str, q, k, v, mask, p: Any, kwargs: dict) -> bool:
    """Does the kernel do what the function registered for `implementation` does with these?"""
    own = _INTERFACES.get(implementation)
    if (
        own is None
        or isinstance(own, str)
        or private.is_replaced(implementation, own, modeling_gpt2)
        or not _READ.isdisjoint(kwargs)
    ):
        return False
    scaling = module.scaling
    # torch's own kernels for a CPU answer NaN to a scale of 0 or less
    if type(scaling) not in (float, int) or not scaling > 0 or not droppable(p) or "num_key_value_groups" in module.__dict__:
        return False
    # caches may hold another dtype, batch or nothing
    if not dense(q, k, v) or v.shape != k.shape or not q.numel() or not k.numel():
        return False
    (B, H, _, D), (Bk, Hk, Tk, Dk) = q.shape, k.shape
    if D > MAX_HEAD_DIM or Dk != D or Hk != H or Bk != B or not left_by_autocast(q):
        return False
    if implementation == "eager":
        # its masks are additive, whose values cannot be looked at there
        if torch.compiler.is_compiling():
            return False
        # who hooks it may want the weights
        if private.wants_attentions() or not unhooked(module):
            return False
    elif mask is None and type(module.is_causal) is not bool:
        return False
    return mask is None or mask_serves(mask, q, Tk, implementation)


@register(
    modeling_gpt2.GPT2Attention,
    ("attention",),
    "flash attention, q, k and v by stride",
    unless=_keep_attention,
    fuses=("attn_dropout",),
    serves=_serves_attention,
)
class Attention:
    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        output_attentions=False,
        **kwargs,
    ):
        qkv, split = self.c_attn(hidden_states), self.split_size
        if qkv.ndim == 3 and qkv.shape[2] == 3 * split:
            # as below, in two views
            B, T, _ = qkv.shape
            q, k, v = qkv.view(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.split(split, dim=2)
            q, k, v = (t.view(*t.shape[:-1], -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
        keys, values = k, v  # (B, H, T, D), by stride
        if _CACHE == "cache" and _CACHE in kwargs:
            past_key_values = kwargs.pop(_CACHE)
        if past_key_values is not None:
            keys, values = past_key_values.update(k, v, self.layer_idx)
            # a cache that was empty holds copies of k and v: these spare the backward pass through the copy
            if type(past_key_values) is DynamicCache and keys.shape == k.shape and keys.dtype == k.dtype:
                keys, values = k, v
        implementation = private.attention_implementation(self)
        p, weights = self.attn_dropout.p if self.training else 0.0, None
        if _kernel_serves(self, implementation, q, keys, values, attention_mask, p, kwargs):
            # "sdpa" passes no mask where causal says it all, "eager" always passes one; top-left: a static cache's tail is
            # hidden
            causal = attention_mask is None and q.shape[2] > 1 and implementation == "sdpa" and self.is_causal
            right = 0 if causal else -1
            o, _ = attention(q, keys, values, attention_mask, scale=self.scaling, dropout_p=p, window_right=right)
            o = o.transpose(1, 2)
        else:
            interface = private.attention_function(implementation, modeling_gpt2)
            o, weights = interface(self, q, keys, values, attention_mask, dropout=p, scaling=self.scaling, **kwargs)
        o = o.reshape(*o.shape[:-2], -1).contiguous()
        return self.resid_dropout(self.c_proj(o)), weights


# ---- MLP ----


def _keep_mlp(module: Any) -> str | None:
    if private.gelu_of(module.act) is None:
        return f"activation {type(module.act).__name__} has no kernel"
    return None if unhooked(module.act) else "act has hooks"


def _child(module: Any, name: str) -> Any:
    """As module.<name>, without nn.Module.__getattr__."""
    children = module._modules
    return children[name] if name in children else getattr(module, name)


def _serves_mlp(module: Any, hidden_states) -> bool:
    act = _child(module, "act")
    return private.gelu_of(act) is not None and unhooked(act) and _gelu_serves(hidden_states)


def _gelu_serves(x: Any) -> bool:
    left = dense(x) and x.is_contiguous() and x.ndim > 0 and x.numel() > 0
    return left and (x.dtype.itemsize != 2 or left_by_autocast(x))


def _bias_apart(c_fc: Any, hidden_states: Any) -> bool:
    """Is it a plain Conv1D, whose bias may be added with the GELU?"""
    if type(c_fc) is not Conv1D or not unhooked(c_fc):
        return False
    weight, bias = parameter(c_fc, "weight"), parameter(c_fc, "bias")
    return bias is not None and dense(hidden_states, weight, bias) and bias.is_contiguous() and bias.shape == (c_fc.nf,)


@register(modeling_gpt2.GPT2MLP, ("gelu",), "bias and GELU in one pass", unless=_keep_mlp, fuses=("act",), serves=_serves_mlp)
class MLP:
    def forward(self, hidden_states):
        c_fc, act = _child(self, "c_fc"), _child(self, "act")
        if _bias_apart(c_fc, hidden_states):
            hidden_states = hidden_states @ parameter(c_fc, "weight")
            hidden_states = gelu(hidden_states, parameter(c_fc, "bias"), private.gelu_of(act))
        else:  # hooked, of another class: LoRA, quantised
            hidden_states = c_fc(hidden_states)
            hidden_states = (
                gelu(hidden_states, None, private.gelu_of(act)) if _gelu_serves(hidden_states) else act(hidden_states)
            )
        return self.dropout(self.c_proj(hidden_states))
