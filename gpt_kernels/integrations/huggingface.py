"""Hugging Face's GPT-2 (transformers 5): attention, MLP and language-model loss on our kernels.

Each replacement does what the class it stands over does for every argument; what it has no kernel for it hands back to
that class's own forward, for that call:

- attention: attention weights that were asked for, cross-attention, reorder_and_upcast_attn, paged caches,
  implementations other than "sdpa" and "eager", and additive masks that hide every key from some query (left padding
  under "eager", which then takes the mean of all values; under torch.compile, every additive mask, as its values cannot
  be looked at). Where "eager" returns the weights unasked, None stands in their place.
- MLP: c_fc with hooks or of another class (LoRA, quantised), activations other than the GELUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_utils import PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _active_collector

from ..ops.attention import MAX_HEAD_DIM, attention
from ..ops.cross_entropy import cross_entropy
from ..ops.gelu import gelu
from ..patch import _KEPT, register

_KEPT[Conv1D] = "matrix product: torch's"


# ---- attention ----


def _keep_attention(module: Any) -> str | None:
    if module.is_cross_attention:
        return "cross-attention"
    if module.head_dim > MAX_HEAD_DIM:
        return f"head dim {module.head_dim} is above {MAX_HEAD_DIM}"
    implementation = module.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"attention implementation {implementation!r}"
    if implementation == "eager" and module.reorder_and_upcast_attn:
        return "reorder_and_upcast_attn"
    return None


def _hands_back(module, past_key_values, attention_mask, encoder_hidden_states, kwargs) -> bool:
    implementation = module.config._attn_implementation
    if implementation not in ("sdpa", "eager") or encoder_hidden_states is not None:
        return True
    if isinstance(past_key_values, EncoderDecoderCache):
        return True
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        if not attention_mask.is_floating_point() or torch.compiler.is_compiling():
            return True
        hidden = torch.finfo(attention_mask.dtype).min / 2
        if attention_mask.shape[-1] and bool((attention_mask.amax(-1) < hidden).any()):
            return True
    if attention_mask is not None and attention_mask.dim() != 4:
        return True
    if implementation == "eager":
        wanted = _active_collector.get()
        return module.reorder_and_upcast_attn or (wanted is not None and "attentions" in wanted)
    return any(kwargs.get(name) is not None for name in ("position_bias", "cache", "is_causal"))


@register(
    modeling_gpt2.GPT2Attention,
    ("attention",),
    "flash attention, q, k and v by stride",
    unless=_keep_attention,
    fuses=("attn_dropout",),
)
class Attention:
    def forward(
        self, hidden_states, past_key_values=None, attention_mask=None, encoder_hidden_states=None,
        encoder_attention_mask=None, output_attentions=False, **kwargs,
    ):  # fmt: skip
        if _hands_back(self, past_key_values, attention_mask, encoder_hidden_states, kwargs):
            return super().forward(
                hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask,
                output_attentions, **kwargs,
            )  # fmt: skip
        B, T, C = hidden_states.shape
        qkv = self.c_attn(hidden_states).view(B, T, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D), by stride
        if past_key_values is not None:
            keys, values = past_key_values.update(k, v, self.layer_idx)
            # a cache that was empty holds copies of k and v: these spare the backward pass through the copy
            if type(past_key_values) is not DynamicCache or keys.shape[2] != T:
                k, v = keys, values
        # "sdpa" passes no mask where causal says it all, "eager" always passes one; top-left: a static cache's tail is hidden
        causal = attention_mask is None and T > 1 and self.config._attn_implementation == "sdpa"
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(q.dtype)
        p = self.attn_dropout.p if self.training else 0.0
        o, _ = attention(q, k, v, attention_mask, scale=self.scaling, dropout_p=p, window_right=0 if causal else -1)
        o = o.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(o)), None


# ---- MLP ----


def _approximate(act: nn.Module) -> str | None:
    """Which GELU `act` is: "tanh", "none" (erf), or None for something else."""
    if isinstance(act, (activations.NewGELUActivation, activations.GELUTanh)):
        return "tanh"
    return "none" if isinstance(act, activations.GELUActivation) else None


def _plain(module: nn.Module) -> bool:
    """Does calling it run its class's forward and nothing else?"""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _keep_mlp(module: Any) -> str | None:
    if type(module.c_fc) is not Conv1D:
        return f"c_fc is a {type(module.c_fc).__name__}"
    if _approximate(module.act) is None:
        return f"activation {type(module.act).__name__} has no kernel"
    if not (_plain(module.c_fc) and _plain(module.act)):
        return "c_fc or act has hooks"
    return None


@register(modeling_gpt2.GPT2MLP, ("gelu",), "bias and GELU in one pass", unless=_keep_mlp, fuses=("act",))
class MLP:
    def forward(self, hidden_states):
        c_fc = self.c_fc
        if type(c_fc) is not Conv1D or not (_plain(c_fc) and _plain(self.act)):
            return super().forward(hidden_states)
        hidden_states = gelu(hidden_states @ c_fc.weight, c_fc.bias, _approximate(self.act))
        return self.dropout(self.c_proj(hidden_states))


# ---- loss ----


def causal_lm_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100, shift_labels: Tensor | None = None, **kwargs,
):  # fmt: skip
    """transformers' ForCausalLMLoss without the copy of the logits in float32: our kernel reads them as they are."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
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


def _wants_causal_lm_loss(model: PreTrainedModel) -> bool:
    own = getattr(model, "_loss_function", None)  # set by hand
    return (own or LOSS_MAPPING.get(model.loss_type, ForCausalLMLoss)) is ForCausalLMLoss


def _keep_loss(model: Any) -> str | None:
    return None if _wants_causal_lm_loss(model) else "its loss function is not the causal language model's"


@register(modeling_gpt2.GPT2LMHeadModel, ("cross_entropy",), "cross entropy without float32 logits", unless=_keep_loss)
class CausalLM:
    @property
    def loss_function(self):
        # asked anew each time: a loss function set after patch is used
        return causal_lm_loss if _wants_causal_lm_loss(self) else super().loss_function

    @loss_function.setter
    def loss_function(self, value):
        PreTrainedModel.loss_function.fset(self, value)
