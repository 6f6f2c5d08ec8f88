"""torch.nn.Modules over one op each: torch's own classes, or as torch would have them, on our kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops.dropout import dropout
from .ops.gelu import gelu
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm
from .ops.softmax import softmax


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension, on our kernel. Raises ValueError for more than one normalised dimension."""

    def __init__(self, normalized_shape, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True, **factory):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, **factory)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"LayerNorm: one normalised dimension, got normalized_shape {tuple(self.normalized_shape)}")

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension, on our kernel, with eps 1e-6 unless given; None is torch's default."""

    def __init__(self, normalized_shape, eps: float = 1e-6, elementwise_affine: bool = True, **factory):
        super().__init__(normalized_shape, eps, elementwise_affine, **factory)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"RMSNorm: one normalised dimension, got normalized_shape {tuple(self.normalized_shape)}")

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Softmax(nn.Module):
    """softmax(scale * x + mask) over `dim`, as torch.nn.Softmax(dim) without options.

    causal is aligned bottom-right on the last two dimensions. Raises TypeError for a dim that is no int.
    """

    def __init__(self, dim: int = -1, *, scale: float = 1.0, causal: bool = False):
        super().__init__()
        if not isinstance(dim, int):
            raise TypeError(f"Softmax: dim must be an int, got {dim!r}; scale is given by name")
        self.dim, self.scale, self.causal = dim, scale, causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return softmax(x, mask, self.scale, self.causal, dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, scale={self.scale}, causal={self.causal}"


class GELU(nn.Module):
    """gelu(x + bias), approximate "tanh" (GPT-2's) or "none" (erf)."""

    def __init__(self, approximate: str = "tanh"):
        super().__init__()
        if approximate not in ("tanh", "none"):
            raise ValueError(f"GELU: approximate must be 'tanh' or 'none', got {approximate!r}")
        self.approximate = approximate

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return gelu(x, bias, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Dropout(nn.Dropout):
    """torch.nn.Dropout on our kernel; a residual is added in the same pass."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:  # as an addition would: under autocast x is in 16 bits and the residual in float32
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
        return dropout(x, self.p, self.training, residual, inplace=self.inplace)
