"""What is compiled without a GPU: problems, whose calls reach a launcher on tensors without memory, and cases of them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from gpt_kernels.architectures import ARCHITECTURES
from gpt_kernels.triton import common
from gpt_kernels.triton.common import Launch

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
    """One op, forward and backward, on one shape. `main` ones are compiled in every dtype, and are the PR's subset."""

    op: str
    name: str
    ours: Callable[[Inputs], None]
    liger: Callable[[Inputs], None] | None = None
    main: bool = False
    aligned: bool = True
    columns: int = 0  # of a row: what a block pads them to is idle lanes
    wide: float = 0.75  # least share of a hot loop's bytes that moves 16 at a time; of unaligned tensors nothing is asked
    matrix: str = ""  # the tensor-core instruction, where it is not the architecture's newest

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


@dataclass(frozen=True)
class Case:
    """A problem on one architecture in one dtype: the launches of a forward and a backward."""

    problem: Problem
    arch: str
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.problem.id}{'' if self.problem.aligned else '-unaligned'}-{self.dtype}-{self.arch}"

    def launches(self) -> list[Launch]:
        with common.recording(self.arch) as launches:
            self.problem.ours(Inputs(DTYPES[self.dtype], self.problem.aligned))
        return launches

    def liger_launches(self) -> list[Launch]:
        """What Liger would launch; nothing where it has no such op."""
        if self.problem.liger is None:
            return []
        with _recording_liger(self.arch) as launches:
            self.problem.liger(Inputs(DTYPES[self.dtype], self.problem.aligned))
        # its backwards launch one program per processor, and know none where the tensors are not on a GPU
        programs = ARCHITECTURES[self.arch].processors
        for n, launch in enumerate(launches):
            if launch.grid == (1,):
                rows = {k: common.cdiv(v, programs) for k, v in launch.parameters.items() if k == "rows_per_program"}
                launches[n] = dataclasses.replace(launch, grid=(programs,), parameters={**launch.parameters, **rows})
        return launches


@contextlib.contextmanager
def _recording_liger(arch: str) -> Iterator[list[Launch]]:
    from liger_kernel.ops import cross_entropy, utils
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **parameters):
        bound = kernel.signature.bind_partial(
            *args, **{k: v for k, v in parameters.items() if k in kernel.signature.parameters}
        )
        options = {k: v for k, v in parameters.items() if k not in kernel.signature.parameters}
        launches.append(Launch(kernel, grid, (), {**bound.arguments, **options}))

    generation = {"sm_100": "blackwell", "sm_120": "blackwell_consumer"}.get(arch, "")
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(cross_entropy, "infer_device_arch", lambda: generation),
        mock.patch.object(cross_entropy, "is_hip", lambda: arch.startswith("gfx")),
        mock.patch.object(utils, "is_hip", lambda: arch.startswith("gfx")),
    ):
        yield launches
