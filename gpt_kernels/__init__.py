"""Fused kernels for a GPT: one API over C++ (CPU) and Triton (GPU) kernels and their PyTorch reference."""

import importlib as _importlib
from typing import Any as _Any

from . import gpu as _gpu
from . import names as _names
from .accelerate import accelerate, accelerated, decelerate
from .dispatch import Served, use_backend, where
from .estimate import estimate
from .explain import explain
from .hooks.kernelized import kernel_config, kernel_mapping
from .hooks.torch_flash import register_flash_attention
from .hooks.transformers_attention import register_transformers
from .info import info
from .library import isa, set_isa, use_isa
from .memory import reuse_memory
from .models.config import GPTConfig
from .models.gpt import GPT, MLP, Block, CausalSelfAttention
from .modules import GELU, Dropout, LayerNorm, RMSNorm, Softmax
from .ops.attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    scaled_dot_product_attention,
)
from .ops.cross_entropy import cross_entropy
from .ops.dropout import dropout
from .ops.gelu import gelu
from .ops.glu import geglu, swiglu
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm
from .ops.rotary import apply_rotary_emb, apply_rotary_pos_emb
from .ops.softmax import softmax
from .patch import Plan, keep, patch, patched, unpatch
from .triton import slots as _slots
from .verify import verify
from .version import __version__

# every op is there, whether or not a line above names it for readers and type checkers
_homes = [_importlib.import_module(f"{__name__}.ops.{family}") for family in _names.families()]


def __getattr__(name: str) -> _Any:
    for home in _homes:
        if name in home.__all__:
            return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_slots.register()
_gpu.settle()
