"""The matrix products of a model's step alone: the bound that no kernel between them can beat.

A step of eager PyTorch is watched once; every product that it calls is then called again, in the same order, on operands of the
same shapes, strides and dtypes, into results that are there: no allocation, no bias, no cast. Operands are shared by products
alike, so that they are rather in cache than the step's: the bound is a little too fast, never too slow. The products inside
attention are fused with its softmax, in eager PyTorch too, and are not among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# overload -> (how many arguments before the two operands, what is called again)
_PRODUCTS: dict[Any, tuple[int, Callable]] = {
    _aten.mm.default: (0, torch.mm),
    _aten.bmm.default: (0, torch.bmm),
    _aten.addmm.default: (1, torch.mm),
    _aten.baddbmm.default: (1, torch.bmm),
    _aten.mv.default: (0, torch.mv),
    _aten.addmv.default: (1, torch.mv),
}


class Products(TorchDispatchMode):
    """What is in force around a step records its products; called afterwards, it does them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._calls: list[tuple[Callable, Tensor, Tensor, Tensor]] = []
        self._operands: dict[tuple, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            skip, product = _PRODUCTS[func]
            a, b = args[skip : skip + 2]
            self.flops += 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
            self._calls.append((product, self._like(a, "a"), self._like(b, "b"), self._like(out, "out")))
        return out

    def _like(self, t: Tensor, role: str) -> Tensor:
        """Another tensor of its shape, strides, dtype and device; one for all of its role that are alike."""
        key = role, tuple(t.shape), t.stride(), t.dtype, t.device
        if key not in self._operands:
            spanned = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
            self._operands[key] = torch.randn(spanned, device=t.device).to(t.dtype).as_strided(t.shape, t.stride())
        return self._operands[key]

    def __len__(self) -> int:
        return len(self._calls)

    @torch.no_grad()
    def __call__(self) -> None:
        for product, a, b, out in self._calls:
            product(a, b, out=out)
