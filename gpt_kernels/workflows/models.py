"""A GPT-2 to train, a model of a config, and the loss of any causal language model."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, need
from ..models.gpt import GPT


def gpt2(
    *, vocab: int, context: int, width: int, layers: int, heads: int, dropout: float = 0.0, end: int = 0, seed: int = 0
) -> Any:
    """A Hugging Face GPT-2 with fresh weights from the seed. end: the token that begins and ends a text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab, n_positions=context, n_embd=width, n_layer=layers, n_head=heads, attn_pdrop=dropout,
        resid_pdrop=dropout, embd_pdrop=dropout, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def config_in(folder: str) -> Any | None:
    """The transformers config in a model's folder, or of its config.json; None where there is none. Raises UserError for one
    that transformers cannot read."""
    path = pathlib.Path(folder)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        return None
    need("bench", "transformers")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent if path.name == "config.json" else path, local_files_only=True)
    except Exception as error:  # of any kind: what is in the file is another library's
        raise UserError(f"{path}: no config that transformers reads: {str(error).splitlines()[0]}") from None


def of_config(config: Any) -> Any:
    """A transformers model of the config's own class, or a causal one, with fresh weights."""
    import transformers

    named = next((getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()), None)
    return named(config) if named is not None else transformers.AutoModelForCausalLM.from_config(config)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over the tokens (B, T) of each one's loss given those before it, in nats. model: a GPT, or one of Hugging Face, as
    it is or compiled."""
    if isinstance(model, GPT):
        return model(ids, targets=nn.functional.pad(ids[:, 1:], (0, 1), value=-1))[1]
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def autocast(ids: Tensor, dtype: torch.dtype) -> torch.autocast:
    """Weights stay in float32; a 16-bit dtype is that of the products."""
    return torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32)
