"""A GPT-2 on our kernels, with nanoGPT's module and state_dict names and Hugging Face's GPT-2 files.

    x = wte[idx] + wpe[position];   x = x + attn(ln_1(x)), x = x + mlp(ln_2(x)) per block;   logits = ln_f(x) wte^T

idx: (B, T) int64, x: (B, T, C), logits: (B, T, V). Linear weights are (out, in); Hugging Face keeps the transpose of
those in its four Conv1D per block. Source: Radford et al. 2019; names after nanoGPT's model.py.

GPT, GPTConfig and their methods take what nanoGPT's take and mean the same: its train.py and sample.py run on them unchanged, a
seed gives the same initial weights, and checkpoints, the optimizer's too, go both ways. They differ from nanoGPT where it would
be wrong, or dies:

| where                        | here                                                                                        |
|------------------------------|---------------------------------------------------------------------------------------------|
| from_pretrained              | GELU, eps and scales are the file's: GPT-2's GELU is tanh, where nanoGPT takes erf          |
|                              | no download; eval mode and the file's dropout, unless override_args are given               |
| load_state_dict              | GELU, eps and scales of what was trained, which model_args do not name, are kept (warns) |
|                              | a head that is not the embedding is refused, where nanoGPT overwrites the one by the other  |
| load_state_dict(assign=True) | the head stays tied                                                                         |
| generate                     | with a cache, dropout off; temperature 0 takes the likeliest token                          |
| crop_block_size              | the config object that the model was made from is left as it is                             |
| configure_optimizers         | fused AdamW on every device                                                                 |
| all of them                  | errors instead of assertions, nothing is printed                                            |
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from .. import checkpoint, sharding
from ..generate import evaluating, generate
from ..modules import GELU, Dropout, LayerNorm
from ..ops.attention import flash_attn_func, flash_attn_qkvpacked_func
from ..ops.cross_entropy import cross_entropy
from ..serving import unhooked
from .config import FUNCTION, GPTConfig


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.n_head, self.scale, self.dropout = config.n_head, config.scale(layer), config.attn_dropout

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0, residual: Tensor | None = None) -> Tensor:
        """x: (B, T, C). cache: (2, B, S, H, D) keys and values, of which `start` positions are filled; T more are written.
        residual: (B, T, C), added in the pass that drops.
        """
        qkv = self.c_attn(x)
        B, T, _ = qkv.shape  # under tensor parallelism x has a part of the tokens, and qkv of the heads
        qkv = qkv.view(B, T, 3, -1, x.shape[-1] // self.n_head)  # read by stride, never split into copies
        p = self.dropout if self.training else 0.0
        if cache is None:
            y = flash_attn_qkvpacked_func(qkv, p, self.scale, causal=True)  # (B, T, H, D)
        else:
            q, k, v = qkv.unbind(2)
            cache[0, :, start : start + T], cache[1, :, start : start + T] = k, v
            k, v = cache[:, :, : start + T]
            # causal is aligned bottom-right: the last query sees all keys
            y = flash_attn_func(q, k, v, p, self.scale, causal=True)
        return self.resid_dropout(self.c_proj(y.reshape(B, T, -1)), residual)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.gelu = GELU(config.approximate)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if type(self.c_fc) is nn.Linear and unhooked(self.c_fc):
            # its bias is added inside gelu: one pass over (B, T, 4C) less
            x = self.gelu(F.linear(x, self.c_fc.weight), self.c_fc.bias)
        else:  # LoRA, quantised, sharded: more than its weight
            x = self.gelu(self.c_fc(x))
        return self.dropout(self.c_proj(x), residual)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        x = self.attn(self.ln_1(x), cache, start, residual=x)
        return self.mlp(self.ln_2(x), residual=x)


class GPT(nn.Module):
    """GPT-2 with nanoGPT's interface. Set `gradient_checkpointing = True` to recompute each block in backward."""

    transformer: Any  # a ModuleDict, whose attributes type checkers do not know

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=Dropout(config.embd_dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=LayerNorm(config.n_embd, config.layer_norm_eps, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self._init_weights()
        self.register_load_state_dict_post_hook(_tie_again)

    @torch.no_grad()
    def _init_weights(self) -> None:
        std = self.config.initializer_range
        # nanoGPT's order, whose second draws of some weights decide what the later ones get: the same weights from a seed
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # the residual path adds two projections per block: scaled down so that its variance does not grow
                p.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))

    # ---- its state ----

    @property
    def tied(self) -> bool:
        """Is lm_head the embedding of the tokens, now?"""
        return self.lm_head.weight is self.transformer.wte.weight

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # the keys stay nanoGPT's: what no shape tells goes where torch keeps versions
            destination._metadata[prefix[:-1]]["gpt"] = {name: getattr(self.config, name) for name in FUNCTION}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        # torch.compile's prefix, which nanoGPT's train.py takes off the names, is still on this one
        metadata = getattr(state_dict, "_metadata", None) or {}
        saved = local_metadata.get("gpt") or metadata.get(f"{prefix}_orig_mod", {}).get("gpt") or {}
        changed = {name: saved[name] for name in FUNCTION if name in saved and saved[name] != getattr(self.config, name)}
        if changed:
            said = ", ".join(f"{name}={value!r} for {getattr(self.config, name)!r}" for name, value in changed.items())
            warnings.warn(f"GPT: takes over what the loaded weights were trained with: {said}", stacklevel=2)
            self._set_function(replace(self.config, **changed))
        wte, head = (state_dict.get(prefix + name) for name in ("transformer.wte.weight", "lm_head.weight"))
        if self.config.tie_word_embeddings and not checkpoint.same(wte, head):
            error_msgs.append(
                f"{prefix}lm_head.weight differs from {prefix}transformer.wte.weight, and this GPT ties them; "
                "GPTConfig(tie_word_embeddings=False) has a head of its own"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _set_function(self, config: GPTConfig) -> None:
        self.config = config
        self.transformer.ln_f.eps = config.layer_norm_eps
        for layer, block in enumerate(self.transformer.h):
            block.ln_1.eps = block.ln_2.eps = config.layer_norm_eps
            block.mlp.gelu.approximate = config.approximate
            block.attn.n_head, block.attn.scale = config.n_head, config.scale(layer)

    def hidden(self, idx: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """idx (B, T) -> (B, T, C), what lm_head reads. cache: (n_layer, 2, B, S, H, D) with `start` positions filled."""
        if idx.dim() != 2:
            raise ValueError(f"GPT: idx must be (B, T), got shape {tuple(idx.shape)}")
        if idx.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"GPT: idx must be int64 or int32, got {idx.dtype}")
        if start + idx.shape[1] > self.config.block_size:
            raise ValueError(f"GPT: sequence length {start + idx.shape[1]} is above block_size {self.config.block_size}")
        t = self.transformer
        position = sharding.positions(start, idx.shape[1], idx.device)
        x = t.drop(t.wte(idx) + t.wpe(position))  # (B, T, C)
        for i, block in enumerate(t.h):
            if self.gradient_checkpointing and self.training and cache is None:
                x = recomputed(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache[i], start)
        return t.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None, ignore_index: int = -1) -> tuple[Tensor, Tensor | None]:
        """(logits, loss), as nanoGPT: with targets (B, T) logits (B, T, V) and their mean loss; without, the last position's
        logits (B, 1, V) and None. targets are the next tokens, `ignore_index` where there is none.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if targets.shape != idx.shape:
            raise ValueError(f"GPT: targets have shape {tuple(targets.shape)}, idx has {tuple(idx.shape)}")
        logits = self.lm_head(x)
        wide = torch.promote_types(logits.dtype, torch.float32)  # a mean of 16 bits has three digits
        loss: Any = cross_entropy(logits, targets, ignore_index=ignore_index, dtype=wide)
        return logits, loss

    # ---- using it ----

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue idx (B, T), T >= 1, by up to max_new_tokens: (B, T + new) int64.

        temperature 0 takes the likeliest token; top_k and top_p (nucleus) cut the distribution before sampling. A row that
        has produced eos_token_id is filled with it, and generation ends when all have. Keys and values are kept in a cache
        of fixed size; past block_size, where positions shift, each step reads the last block_size tokens anew.
        Raises ValueError for arguments out of range. Dropout is off.
        """
        return generate(self, idx, max_new_tokens, temperature, top_k, top_p, eos_token_id, generator)

    @torch.no_grad()
    def loss(self, tokens: Tensor, stride: int | None = None) -> float:
        """Mean negative log-likelihood, in nats per token, of a text's tokens (N,), N >= 2, of any length; dropout off.

        Windows of block_size tokens start every `stride` tokens (default block_size: each token is read once); a smaller
        stride gives each token more context. Each token but the first is counted exactly once.
        """
        size = self.config.block_size
        stride = size if stride is None else stride
        if tokens.dim() != 1 or tokens.numel() < 2:
            raise ValueError(f"loss: tokens must be (N,) with N >= 2, got shape {tuple(tokens.shape)}")
        if not 1 <= stride <= size:
            raise ValueError(f"loss: stride must be in [1, block_size {size}], got {stride}")
        inputs, targets = tokens[:-1], tokens[1:].long()
        total, counted = 0.0, 0
        with evaluating(self):
            for start in range(0, inputs.numel(), stride):
                end = min(start + size, inputs.numel())
                x = self.hidden(inputs[None, start:end])[0, counted - start :]  # positions not yet counted
                nll: Any = cross_entropy(self.lm_head(x), targets[counted:end], reduction="sum", dtype=torch.float64)
                total += nll.item()
                counted = end
                if end == inputs.numel():
                    break
        return total / counted

    def perplexity(self, tokens: Tensor, stride: int | None = None) -> float:
        """exp(loss(tokens, stride))."""
        return math.exp(self.loss(tokens, stride))

    def num_parameters(self, non_embedding: bool = False) -> int:
        """Number of parameters, the tied lm_head counted once; `non_embedding` leaves out the positions, as nanoGPT."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def get_num_params(self, non_embedding: bool = True) -> int:
        """num_parameters by nanoGPT's name and default."""
        return self.num_parameters(non_embedding)

    def estimate_flops(self, batch_size: int = 1, length: int | None = None, backward: bool = True) -> int:
        """Flops of one step on (batch_size, length) tokens: 2 per weight and token, and the attention's products; backward
        twice the forward. length defaults to block_size. Source: Chowdhery et al. (PaLM), arXiv 2204.02311, appendix B.
        """
        c, T = self.config, self.config.block_size if length is None else length
        weights = self.num_parameters(non_embedding=True) - (0 if self.tied else self.transformer.wte.weight.numel())
        return (2 * weights + 4 * c.n_layer * c.n_embd * T) * batch_size * T * (3 if backward else 1)

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak: float = 312e12) -> float:
        """Share of `peak` flop/s (an A100's in bfloat16, as nanoGPT) that sequences of block_size, fwdbwd_per_iter of them
        forward and backward in dt seconds, come to."""
        return self.estimate_flops() * fwdbwd_per_iter / dt / peak

    def crop_block_size(self, block_size: int) -> None:
        """Keep the first `block_size` positions. Raises ValueError unless 1 <= block_size <= config.block_size."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"crop_block_size: block_size must be in [1, {self.config.block_size}], got {block_size}")
        self.config = replace(self.config, block_size=block_size)  # a copy: others may be made from the same object
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone(), requires_grad=wpe.weight.requires_grad)
        wpe.num_embeddings = block_size

    def configure_optimizers(
        self,
        weight_decay: float = 0.1,
        learning_rate: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        device_type: str | None = None,
    ) -> torch.optim.AdamW:
        """Fused AdamW with weight decay on matrices only (embeddings included), as nanoGPT, whose device_type is not needed:
        it is fused on every device."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    # ---- Hugging Face's files ----

    @classmethod
    def from_hf(cls, model: Any, **overrides) -> GPT:
        """A copy of transformers' GPT2LMHeadModel or GPT2Model, in its mode. overrides: fields of GPTConfig."""
        if not hasattr(getattr(model, "config", None), "to_dict"):
            raise TypeError(f"from_hf: expected a transformers model, got {type(model).__name__}")
        # the module knows, whatever its config says
        tied = not hasattr(model, "lm_head") or model.lm_head.weight is model.transformer.wte.weight
        config = checkpoint.config_from_hf({**model.config.to_dict(), "tie_word_embeddings": tied}, overrides)
        return checkpoint.assemble(cls, config, model.state_dict(), "from_hf").train(model.training)

    @classmethod
    def from_pretrained(
        cls, model_type: str | os.PathLike, override_args: dict | None = None, *, dtype: torch.dtype | None = None, **overrides
    ) -> GPT:
        """Load Hugging Face's GPT-2: a folder of config.json and model.safetensors, or shards with their index; or the name
        of a model ("gpt2", "owner/name") in the local cache of huggingface_hub.

        Names, shapes and dtypes are checked against config.json before anything is allocated; nothing is unpickled or
        downloaded. override_args, as nanoGPT's: dict(dropout=...), for all three dropouts; the model is then in training
        mode, otherwise in eval mode, as transformers' are. dtype: convert to it; by default the files', which must then
        agree. overrides: GPTConfig fields. What the weights compute is the file's, GELU by tanh for GPT-2's.
        Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
        """
        if isinstance(override_args, torch.dtype):
            raise TypeError("from_pretrained: dtype is given by name, dtype=...; the second argument is override_args")
        unknown = set(override_args or {}) - {"dropout"}
        if unknown:
            raise ValueError(
                f"from_pretrained: override_args takes dropout alone, as nanoGPT's, got {sorted(unknown)[0]!r}; "
                "other fields of GPTConfig are given by name"
            )
        if override_args:
            p = override_args["dropout"]
            overrides = {"dropout": p, "attn_dropout": p, "embd_dropout": p, **overrides}
        return checkpoint.load(cls, model_type, dtype, overrides).train(override_args is not None)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write config.json and model.safetensors that GPT2LMHeadModel.from_pretrained and ours read.

        Each file is written beside its place and moved in when complete, so none is ever half-written. Without biases,
        zeros are written for them: the same function. A head that is not the embedding of the tokens is written, and
        config.json says so.
        """
        checkpoint.save(self, path)


def _tie_again(model: Any, incompatible: Any) -> None:
    """load_state_dict(assign=True) gives each name a parameter of its own, and each would be trained by itself."""
    if (
        model.config.tie_word_embeddings
        and not model.tied
        and checkpoint.same(model.lm_head.weight, model.transformer.wte.weight)
    ):
        model.lm_head.weight = model.transformer.wte.weight
