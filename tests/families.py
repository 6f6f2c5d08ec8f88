"""Small models of the families that patch and the hooks are tested on: one table, family -> how to make it and what it takes.

Weights are ten times the usual, so that attention and activations leave their linear range. Every size is small, and every
family's own trait is there: tied embeddings, sliding windows shorter than the text, soft caps, partial rotary dimensions,
biases or none, key heads for groups of query heads.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import nanogpt
import torch
from torch import Tensor, nn

TABLE = "GPT_KERNELS_FAMILIES"
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
    "GPT-Neo": _hf("GPTNeoForCausalLM", "GPTNeoConfig", window=True, vocab_size=V, max_position_embeddings=64,
                   hidden_size=32, num_layers=2,
                   attention_types=[[["global", "local"], 1]], num_heads=4, window_size=6, initializer_range=0.2, **TOKENS),
    "GPT-NeoX": _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES, **TOKENS, intermediate_size=48, max_position_embeddings=64),
    "GPT-J": _hf("GPTJForCausalLM", "GPTJConfig", vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4,
                 initializer_range=0.2, **TOKENS),
    "OPT": _hf("OPTForCausalLM", "OPTConfig", vocab_size=V, hidden_size=32, num_hidden_layers=2, ffn_dim=48,
               num_attention_heads=4,
               max_position_embeddings=64, init_std=0.2, word_embed_proj_dim=32, **TOKENS),
    "Llama": _hf("LlamaForCausalLM", "LlamaConfig", **LLAMA),
    "Mistral": _hf("MistralForCausalLM", "MistralConfig", window=True, **LLAMA, sliding_window=6),
    "Qwen2": _hf("Qwen2ForCausalLM", "Qwen2Config", window=True, **LLAMA, use_sliding_window=True, sliding_window=6,
                 max_window_layers=1),
    "Qwen3": _hf("Qwen3ForCausalLM", "Qwen3Config", **LLAMA, head_dim=8),
    "Gemma 2": _hf("Gemma2ForCausalLM", "Gemma2Config", window=True, **LLAMA, head_dim=8, sliding_window=6,
                   query_pre_attn_scalar=8,
                   attn_logit_softcapping=5.0, final_logit_softcapping=7.0),
    "Gemma 3": _hf("Gemma3ForCausalLM", "Gemma3TextConfig", window=True, **LLAMA, head_dim=8, sliding_window=6,
                   query_pre_attn_scalar=8,
                   layer_types=["sliding_attention", "full_attention"]),
    "Phi-3": _hf("Phi3ForCausalLM", "Phi3Config", window=True, **LLAMA, sliding_window=6),
    "OLMo 2": _hf("Olmo2ForCausalLM", "Olmo2Config", **LLAMA),
    "SmolLM": _hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_attention_heads": 3, "num_key_value_heads": 1,
                  "hidden_size": 24},
                  tie_word_embeddings=True),
    "BERT": _hf("BertForMaskedLM", "BertConfig", "masked", **BERT),
    "RoBERTa": _hf("RobertaForMaskedLM", "RobertaConfig", "masked", **BERT),
    "DistilBERT": _hf("DistilBertForMaskedLM", "DistilBertConfig", "masked", vocab_size=V, dim=32, n_layers=2, n_heads=4,
                      hidden_dim=48,
                      max_position_embeddings=64, initializer_range=0.2, pad_token_id=0),
    "T5": _hf("T5ForConditionalGeneration", "T5Config", "seq2seq", vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2,
              num_heads=4,
              feed_forward_proj="gated-gelu", initializer_factor=1.0, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0),
    "ViT": _hf("ViTForImageClassification", "ViTConfig", "image", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
               intermediate_size=48, image_size=8, patch_size=2, num_labels=7, initializer_range=0.2),
}  # fmt: skip


# ---- models without transformers ----


class MinAttention(nn.Module):
    """minGPT's: scores, a mask that is a buffer, softmax, two dropouts, written out."""

    def __init__(self, size: int, heads: int, block: int, p: float):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.attn_dropout, self.resid_dropout = nn.Dropout(p), nn.Dropout(p)
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))
        self.n_head, self.n_embd = heads, size

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, dim=2)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(nn.functional.softmax(att, dim=-1))
        return self.resid_dropout(self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, C)))


class MinGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class MinBlock(nn.Module):
    def __init__(self, size: int, heads: int, block: int, p: float):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(size), MinAttention(size, heads, block, p), nn.LayerNorm(size)
        parts = {
            "c_fc": nn.Linear(size, 4 * size),
            "c_proj": nn.Linear(4 * size, size),
            "act": MinGELU(),
            "dropout": nn.Dropout(p),
        }
        self.mlp = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        m = self.mlp
        return x + m.dropout(m.c_proj(m.act(m.c_fc(self.ln_2(x)))))


class MinGPT(nn.Module):
    def __init__(self, vocabulary: int = V, block: int = 64, layers: int = 2, heads: int = 4, size: int = 32, p: float = 0.1):
        super().__init__()
        embeddings = {"wte": nn.Embedding(vocabulary, size), "wpe": nn.Embedding(block, size), "drop": nn.Dropout(p)}
        blocks = nn.ModuleList(MinBlock(size, heads, block, p) for _ in range(layers))
        self.transformer = nn.ModuleDict({**embeddings, "h": blocks, "ln_f": nn.LayerNorm(size)})
        self.lm_head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(idx.size(1), device=idx.device).unsqueeze(0)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        if targets is None:
            return logits, None
        return logits, nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class Scaled(nn.Module):
    """A norm that nobody else wrote: 1 + weight, its names its own."""

    def __init__(self, width: int):
        super().__init__()
        self.gain, self.tiny = nn.Parameter(torch.zeros(width)), 1e-5

    def forward(self, stream: Tensor) -> Tensor:
        return stream / (stream.square().mean(-1, keepdim=True) + self.tiny).sqrt() * (1 + self.gain)


class Gated(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.into, self.out = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        left, right = self.into(stream).chunk(2, -1)
        return self.out(nn.functional.silu(left) * right)


class MadeUp(nn.Module):
    """A class that the tests make up: gated MLPs and norms of its own, one of them used twice, and no attention."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.tokens, self.norm, self.last = nn.Embedding(V, width), Scaled(width), nn.LayerNorm(width, bias=False)
        self.steps = nn.ModuleList(Gated(width, 48) for _ in range(2))
        self.drop = nn.Dropout(0.1)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        stream = self.tokens(idx)
        for step in self.steps:
            stream = stream + self.drop(step(self.norm(stream)))
        logits = self.last(stream) @ self.tokens.weight.mT
        return logits, None if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class SelfAttention(nn.Module):
    """torch.nn.MultiheadAttention of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True), nn.LayerNorm(32)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return x + self.attention(y := self.norm(x), y, y, key_padding_mask=padding, need_weights=False)[0]


class Encoder(nn.Module):
    """torch.nn.TransformerEncoderLayers."""

    def __init__(self, first: bool = False):
        super().__init__()
        layers = (nn.TransformerEncoderLayer(32, 4, 48, 0.1, "gelu", batch_first=True, norm_first=first) for _ in range(2))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x


def _own(kind: str, make: Callable[..., nn.Module]) -> Family:
    def made() -> nn.Module:
        model = make().eval()
        for name, p in model.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.2)
            elif "norm" not in name and "ln" not in name:
                nn.init.normal_(p, std=0.1)
        return model

    return Family(kind, made, hf=False)


def _nanogpt() -> nn.Module:
    sizes = {"block_size": 64, "vocab_size": V, "n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.1, "bias": False}
    return nanogpt.GPT(nanogpt.GPTConfig(**sizes))


FAMILIES |= {
    "nanoGPT": _own("own", _nanogpt),
    "minGPT": _own("own", MinGPT),
    "torch.nn.TransformerEncoderLayer": _own("torch", Encoder),
    "torch.nn.MultiheadAttention": _own("torch", SelfAttention),
    "a class of the tests": _own("own", MadeUp),
}


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


def run(
    family: Family, model: nn.Module, batch: dict[str, Tensor], seen: dict[str, set[str]] | None = None, **options: Any
) -> dict[str, Tensor]:
    """{name: tensor}: logits, loss and every parameter's gradient. seen: {"forward", "backward": our ops that run there}."""
    seen = {} if seen is None else seen
    with ran(seen.setdefault("forward", set())):
        loss, logits = forward(family, model, batch, **options)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with ran(seen.setdefault("backward", set())):
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


# ---- docs/families.md ----


@contextlib.contextmanager
def ran(into: set[str]) -> Iterator[None]:
    """Our ops that run inside, as torch's profiler sees them, in a compiled graph too. None without a table."""
    if not os.environ.get(TABLE):
        yield
        return
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        yield
    names = (event.name for event in profile.function_events)
    into |= {re.sub(r"_(fwd|bwd).*", "", name.removeprefix("gpt_kernels::")) for name in names if "gpt_kernels::" in name}


def record(name: str, column: str, value: Any = True) -> None:
    """A line in the file that GPT_KERNELS_FAMILIES names. value: what was shown; of a set of ops, for which."""
    if path := os.environ.get(TABLE):
        with open(path, "a") as file:
            file.write(json.dumps([name, column, sorted(value) if isinstance(value, set) else value]) + "\n")
