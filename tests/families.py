"""Small models of the families that patch and the hooks are tested on: one table, family -> how to make it and what it takes.

Weights are ten times the usual, so that attention and activations leave their linear range. Every size is small, and every family's
own trait is there: tied embeddings, sliding windows shorter than the text, soft caps, partial rotary dimensions, biases or none,
key heads for groups of query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

V, T = 97, 17
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = {**SIZES, **TOKENS, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
BERT = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Family:
    """make(**config): a model in eval mode. kind: what it is called with and what it returns:

    causal: tokens, a mask and labels; logits, loss; generates
    masked: the same of a bidirectional encoder
    seq2seq: the same with a decoder; generates
    image: pixels and labels
    torch: hidden states (B, T, 32) and a padding mask, no config; a tensor
    own: tokens and labels; (logits, loss)
    """

    kind: str
    make: Callable[..., nn.Module]
    window: bool = False  # has sliding windows
    hf: bool = True

    @property
    def generates(self) -> bool:
        return self.kind in ("causal", "seq2seq")


def _hf(model: str, config: str, kind: str = "causal", window: bool = False, **sizes: Any) -> Family:
    def make(cls: str = model, **overrides: Any) -> nn.Module:
        import transformers

        implementation = {k: overrides.pop(k) for k in ("attn_implementation",) if k in overrides}
        made = getattr(transformers, config)(**{**sizes, **overrides})
        model_class: Any = getattr(transformers, cls)
        return model_class._from_config(made, **implementation).eval()

    return Family(kind, make, window)


FAMILIES: dict[str, Family] = {
    "GPT-2": _hf("GPT2LMHeadModel", "GPT2Config", vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                 initializer_range=0.2, **TOKENS),
    "GPT-Neo": _hf("GPTNeoForCausalLM", "GPTNeoConfig", window=True, vocab_size=V, max_position_embeddings=64, hidden_size=32, num_layers=2,
                   attention_types=[[["global", "local"], 1]], num_heads=4, window_size=6, initializer_range=0.2, **TOKENS),
    "GPT-NeoX": _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES, **TOKENS, intermediate_size=48, max_position_embeddings=64),
    "GPT-J": _hf("GPTJForCausalLM", "GPTJConfig", vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4,
                 initializer_range=0.2, **TOKENS),
    "OPT": _hf("OPTForCausalLM", "OPTConfig", vocab_size=V, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
               max_position_embeddings=64, init_std=0.2, word_embed_proj_dim=32, **TOKENS),
    "Llama": _hf("LlamaForCausalLM", "LlamaConfig", **LLAMA),
    "Mistral": _hf("MistralForCausalLM", "MistralConfig", window=True, **LLAMA, sliding_window=6),
    "Qwen2": _hf("Qwen2ForCausalLM", "Qwen2Config", window=True, **LLAMA, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "Qwen3": _hf("Qwen3ForCausalLM", "Qwen3Config", **LLAMA, head_dim=8),
    "Gemma 2": _hf("Gemma2ForCausalLM", "Gemma2Config", window=True, **LLAMA, head_dim=8, sliding_window=6, query_pre_attn_scalar=8,
                   attn_logit_softcapping=5.0, final_logit_softcapping=7.0),
    "Gemma 3": _hf("Gemma3ForCausalLM", "Gemma3TextConfig", window=True, **LLAMA, head_dim=8, sliding_window=6, query_pre_attn_scalar=8,
                   layer_types=["sliding_attention", "full_attention"]),
    "Phi-3": _hf("Phi3ForCausalLM", "Phi3Config", window=True, **LLAMA, sliding_window=6),
    "OLMo 2": _hf("Olmo2ForCausalLM", "Olmo2Config", **LLAMA),
    "SmolLM": _hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24},
                  tie_word_embeddings=True),
    "BERT": _hf("BertForMaskedLM", "BertConfig", "masked", **BERT),
    "RoBERTa": _hf("RobertaForMaskedLM", "RobertaConfig", "masked", **BERT),
    "DistilBERT": _hf("DistilBertForMaskedLM", "DistilBertConfig", "masked", vocab_size=V, dim=32, n_layers=2, n_heads=4, hidden_dim=48,
                      max_position_embeddings=64, initializer_range=0.2, pad_token_id=0),
    "T5": _hf("T5ForConditionalGeneration", "T5Config", "seq2seq", vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
              feed_forward_proj="gated-gelu", initializer_factor=1.0, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0),
    "ViT": _hf("ViTForImageClassification", "ViTConfig", "image", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
               intermediate_size=48, image_size=8, patch_size=2, num_labels=7, initializer_range=0.2),
}  # fmt: skip
