"""Small models of the families that patch and the hooks are tested on: one table, family -> how to make it and what it takes.

Weights are ten times the usual, so that attention and activations leave their linear range. Every size is small, and every family's
own trait is there: tied embeddings, sliding windows shorter than the text, soft caps, partial rotary dimensions, biases or none,
key heads for groups of query heads.
"""

from __future__ import annotations

import copy
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


# ---- what a model is called with, and what is looked at ----


def padding(side: str | None) -> Tensor:
    """(2, T): one row padded at that side."""
    mask = torch.ones(2, T, dtype=torch.int64)
    if side == "left":
        mask[0, :5] = 0
    if side == "right":
        mask[1, -4:] = 0
    return mask


def batch_of(family: Family, side: str | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of a call, labels included. Labels are left out where a token is padding, or predicted from padding."""
    generator = torch.Generator().manual_seed(seed)
    if family.kind == "image":
        pixels = torch.randn(2, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, 7, (2,), generator=generator)}
    if family.kind == "torch":
        return {"x": torch.randn(2, T, 32, generator=generator), "padding": padding(side) == 0}
    tokens = torch.randint(3, V, (2, T), generator=generator)
    if family.kind == "own":
        return {"idx": tokens, "targets": tokens.roll(-1, 1)}
    mask = padding(side)
    before = nn.functional.pad(mask, (1, 0))[:, :-1] if family.kind == "causal" else mask
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask * before == 0, -100)}
    if family.kind == "seq2seq":
        batch["labels"] = torch.randint(3, V, (2, T - 4), generator=generator)
    return batch


def cast(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


def forward(family: Family, model: nn.Module, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, logits), of logits what stands at padding set to 0."""
    if family.kind == "torch":
        out = model(batch["x"], batch["padding"]).masked_fill(batch["padding"][..., None], 0.0)
        return out.square().sum(), out
    if family.kind == "own":
        logits, loss = model(**batch)
        return loss, logits
    out = model(**batch, **options)
    if family.kind in ("causal", "masked"):
        return out.loss, out.logits.masked_fill(batch["attention_mask"][..., None] == 0, 0.0)
    return out.loss, out.logits


def run(family: Family, model: nn.Module, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """{name: tensor}: logits, loss and every parameter's gradient."""
    loss, logits = forward(family, model, batch, **options)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    found = {f"grad {name}": g for (name, _), g in zip(named, gradients, strict=True) if g is not None}
    return {"loss": loss.detach(), "logits": logits.detach()} | found


def truth_of(family: Family, model: nn.Module, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """run() of a copy of the model in float64, where the code says float32, too."""
    from gpt_kernels.verify import _Float64

    with _Float64():
        return run(family, copy.deepcopy(model).double(), cast(batch, torch.float64), **options)


def differences(ours: dict, eager: dict, truth: dict, dtype: torch.dtype) -> list[Any]:
    """What is further from the truth than accuracy.py allows, or is not there in all three."""
    from gpt_kernels.accuracy import MODEL_GRADIENT, MODEL_OUTPUT
    from gpt_kernels.verify import compare

    wrong: list[Any] = [f"{name} is not in all" for name in sorted(ours.keys() ^ eager.keys() | eager.keys() ^ truth.keys())]
    for name in ours.keys() & eager.keys() & truth.keys():
        factor = MODEL_GRADIENT if name.startswith("grad") else MODEL_OUTPUT
        judged = compare(name, ours[name], eager[name], truth[name], dtype, factor)
        if not judged.ok:
            wrong.append(judged)
    return wrong
