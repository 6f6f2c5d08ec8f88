"""What is compiled without a GPU: every op's compiled() calls (gpt_kernels/cases), on tensors without memory, as a matrix."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_kernels import cases
from gpt_kernels.architectures import ARCHITECTURES
from gpt_kernels.cases import Compiled
from gpt_kernels.triton import common
from gpt_kernels.triton.common import Launch

from . import liger

ARCHS = tuple(name for name, row in ARCHITECTURES.items() if row.matrix)  # whose machine code we read
PR_ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    """Makes "meta" tensors; unaligned ones start one element past a 16-byte boundary, as a slice may."""

    dtype: torch.dtype
    aligned: bool

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        memory = torch.empty(math.prod(shape) + 1, dtype=dtype or self.dtype, device="meta")
        return memory[:-1].view(shape) if self.aligned else memory[1:].view(shape)


@dataclass(frozen=True)
class Problem:
    """One op, forward and backward, on one shape."""

    op: str
    of: Compiled

    @property
    def id(self) -> str:
        return f"{self.op}-{self.of.name}"

    @property
    def has_liger(self) -> bool:
        return self.op in liger.OPS and bool(self.of.plain)


PROBLEMS = tuple(Problem(op, compiled) for op in cases.families() for compiled in cases.of(op).compiled())


@dataclass(frozen=True)
class Case:
    """A problem on one architecture in one dtype: the launches of a forward and a backward."""

    problem: Problem
    arch: str
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.problem.id}{'' if self.problem.of.aligned else '-unaligned'}-{self.dtype}-{self.arch}"

    @property
    def inputs(self) -> Inputs:
        return Inputs(DTYPES[self.dtype], self.problem.of.aligned)

    def launches(self) -> list[Launch]:
        with common.recording(self.arch) as launches:
            self.problem.of.launch(self.inputs)
        return launches

    def liger_launches(self) -> list[Launch]:
        """What Liger would launch; nothing where it has no such op."""
        if not self.problem.has_liger:
            return []
        return liger.launches(self.problem.op, self.inputs, self.problem.of.plain, self.arch)


def matrix(subset: str, archs: Collection[str] = ()) -> list[Case]:
    """pr: main problems on four architectures in bf16. full: every problem everywhere, the main ones in every dtype."""
    if subset == "pr":
        return [Case(p, arch, "bf16") for p in PROBLEMS if p.of.main for arch in archs or PR_ARCHS]
    return [Case(p, arch, d) for p in PROBLEMS for arch in archs or ARCHS for d in DTYPES if p.of.main or d == "bf16"]
