"""Fused kernels for a GPT: one API over C++ (CPU) kernels and their PyTorch reference."""

from .dispatch import isa, ops, set_isa, use_backend, use_isa, where
from .info import info
from .ops.layer_norm import layer_norm

from .version import __version__
