"""The sizes of a GPT, and those of the published ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ops.attention import MAX_HEAD_DIM

PRESETS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}
# fields that change what the weights compute and leave no trace in their shapes
FUNCTION = ("n_head", "approximate", "layer_norm_eps", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")


@dataclass
class GPTConfig:
    """Sizes of a GPT. The first seven fields are nanoGPT's; the rest is what Hugging Face's GPT-2 configurations need.

    approximate: the GELU, "none" (erf, nanoGPT's) unless given; "tanh" is GPT-2's, which `preset`, `from_hf` and
    `from_pretrained` set. attn_dropout and embd_dropout follow `dropout` unless given. n_inner is 4 * n_embd unless given.
    tie_word_embeddings: lm_head is the embedding of the tokens. The token ids are carried to and from config.json and not
    interpreted. Raises TypeError or ValueError naming the field.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    n_inner: int = None  # type: ignore[assignment]
    approximate: str = "none"
    layer_norm_eps: float = 1e-5
    attn_dropout: float = None  # type: ignore[assignment]
    embd_dropout: float = None  # type: ignore[assignment]
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    @classmethod
    def preset(cls, name: str, **overrides) -> GPTConfig:
        """The published models: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"; 50257 tokens, GELU by tanh."""
        if name not in PRESETS:
            raise ValueError(f"GPTConfig: unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(**{"vocab_size": 50257, "approximate": "tanh", **PRESETS[name], **overrides})

    def __post_init__(self):
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_inner"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"GPTConfig: {name} must be an int, got {value!r}")
            if not 0 < value < 2**31:
                raise ValueError(f"GPTConfig: {name} must be positive and below 2**31, got {value}")
        self.attn_dropout = self.dropout if self.attn_dropout is None else self.attn_dropout
        self.embd_dropout = self.dropout if self.embd_dropout is None else self.embd_dropout
        for name in ("dropout", "attn_dropout", "embd_dropout", "layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"GPTConfig: {name} must be a number, got {value!r}")
            limit = 1.0 if "dropout" in name else math.inf
            if not 0.0 <= value < limit:
                raise ValueError(f"GPTConfig: {name} must be in [0, {limit:g}), got {value}")
        for name in ("bias", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"GPTConfig: {name} must be a bool, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.n_embd // self.n_head > MAX_HEAD_DIM:
            raise ValueError(f"GPTConfig: head dim {self.n_embd // self.n_head} is above {MAX_HEAD_DIM}")
        if self.approximate not in ("tanh", "none"):
            raise ValueError(f"GPTConfig: approximate must be 'tanh' or 'none', got {self.approximate!r}")

    def scale(self, layer: int) -> float:
        """What the attention scores of block `layer` are multiplied with."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale
