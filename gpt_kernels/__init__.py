"""Fused kernels for a GPT: one API over C++ (CPU) and Triton (GPU) kernels and their PyTorch reference."""

from . import gpu as _gpu
from . import triton as _triton
from .dispatch import isa, set_isa, use_backend, use_isa, where
from .gpt import GELU, GPT, MLP, Block, CausalSelfAttention, Dropout, GPTConfig, LayerNorm, RMSNorm, Softmax
from .info import info
from .memory import reuse_memory
from .ops.attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    scaled_dot_product_attention,
)
from .ops.cross_entropy import cross_entropy
from .ops.dropout import dropout
from .ops.gelu import gelu
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm
from .ops.softmax import softmax
from .patch import Plan, patch, patched, unpatch
from .verify import verify
from .version import __version__

_triton.register()
_gpu.settle()
