"""What every op is called with, one file an op: the only list of its inputs. What holds for all ops goes over these files.

| in <op>.py          | what                                                          | who goes over it                      |
|---------------------|---------------------------------------------------------------|---------------------------------------|
| `TAKES`             | what the op takes, in a line                                  | `support`, docs/support.md            |
| `small(dtype)`      | Examples of a few elements, one for each way to call the op   | layouts, compile, opcheck, bad input  |
| `odd(dtype, slow)`  | Examples at both sides of every boundary                      | accuracy, on every backend and ISA    |
| `threaded(slow)`    | Examples cut among threads in every way                       | the same bits on 1, 2 and 4           |
| `empty()`           | Examples without elements                                     | empty results, gradients of zeros     |
| `special(dtype)`    | Examples with NaN, infinities, zeros, huge and tiny numbers   | they stand where eager has them       |
| `exact()`           | Examples whose results have no rounding                       | equal, bit for bit                    |
| `derivatives()`     | Functions                                                     | every derivative that torch has       |
| `magnitudes()`      | Functions                                                     | each result by itself, to the largest |
| `streamed(dtype)`   | Streamed calls whose outputs do not fit the cache             | the bits of their parts               |
| `watched()`         | Watched calls, on the CUDA kernels' model                     | sanitizers                            |
| `step(sizes, new)`  | kernel calls of a GPT's training step                         | `tune`, `info`, the GPU kit           |
| `calls(new)`        | kernel calls with every kind of argument                      | launchers on "meta", fakes, GPUs      |
| `bounds(name)`      | kernel calls on edges of tiles                                | every access inside a tensor          |
| `huge(name)`        | Huge kernel calls, on more than 2^31 elements                 | 64-bit offsets                        |
| `compiled()`        | Compiled calls, for every GPU architecture without a GPU      | the compile matrix, its budgets       |
| `bench(settings)`   | the benchmark's cases                                         | `bench`                               |

A file may also have `interpreted()`: launch parameters in force where the interpreter runs its kernels.
slow: 0 on a CPU, 1 on its model of a GPU, 2 in Triton's interpreter, which gets fewer sizes and the same tolerances.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..accuracy import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from ..names import families

# what each file has, beside TAKES
ROLES = (
    "small", "odd", "threaded", "empty", "special", "exact", "derivatives", "magnitudes", "streamed", "watched", "step",
    "calls", "bounds", "huge", "compiled", "bench",
)  # fmt: skip


def of(family: str) -> types.ModuleType:
    """The file of a family, by its name."""
    return importlib.import_module(f"{__name__}.{family}")


# ---- calls of the public functions ----


@dataclass(frozen=True)
class Example:
    """One call: `ours` and `eager`, plain PyTorch, take the same arguments and give one tensor. Floating ones are
    differentiated.

    eager computes in the dtype of its arguments, so that in float64 it is the truth. again: arguments of other sizes, where one
    compiled graph serves both. layouts: which arguments may lie in memory in any way.
    """

    what: str
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    args: tuple[Any, ...]
    again: tuple[Any, ...] = ()
    layouts: tuple[int, ...] = (0,)
    factors: tuple[float, ...] = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)  # of accuracy.py; the last serves the rest
    dy: Tensor | None = None  # the output gradient; drawn where there is none
    said: tuple[int, ...] | None = None  # of the output (0) and the gradients (1, ...) those that eager says right; None: all


class Function(NamedTuple):
    """A call by the shapes of its arguments, all of them differentiated; `plain` has every derivative."""

    what: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


class Watched(NamedTuple):
    """A call, and the shapes of its arguments, one tuple a run."""

    what: str
    call: Callable[..., Tensor]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Streamed:
    """A call whose results have the rows of args[0]: bit for bit those of its parts. gradient: args[0]'s is one of them."""

    what: str
    call: Callable[..., Any]
    args: tuple[Tensor, ...]
    all_parts: bool = True  # or the first alone, where a row's result depends on its place
    gradient: bool = True


COLUMNS = (1, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 1023, 1024, 1025, 4096)
FEW_COLUMNS = (1, 7, 33, 64, 127, 257, 1000, 1025, 4096)
ROWS = (0, 1, 2, 17)


def columns(slow: int) -> tuple[int, ...]:
    return FEW_COLUMNS if slow == 2 else COLUMNS


def boundary_rows(slow: int) -> list[tuple[int, int]]:
    """Without the product of the two: every boundary column with a few rows, every row count with odd columns."""
    return [(2 + i % 2, n) for i, n in enumerate(columns(slow))] + [(m, n) for m in ROWS for n in (1, 33, 1025)]


def norm_rows(slow: int) -> list[tuple[int, int]]:
    """The same for the norms, of which the interpreter is slow and the geometry depends on the columns alone."""
    if slow < 2:
        return boundary_rows(slow)
    return [(2 + n % 2, n) for n in (1, 33, 64, 127, 257, 1025, 4096)] + [(0, 33), (1, 33), (17, 33)]


STREAMED_PARTS = 7
EMPTY_ROWS = ((0, 5), (3, 0), (0, 0), (2, 0, 4), (0,))


def streamed_rows(dtype: torch.dtype) -> Iterator[Tensor]:
    """x of STREAMED_PARTS equal parts, together 17 MB: with its gradient beyond the 32 MB from which on rows are streamed."""
    for rows, n in ((32, 768), (33, 1000)):  # 1000 of 16 bits are no whole lines: written as ever
        per_part = -(-17 * 2**20 // (rows * n * dtype.itemsize * STREAMED_PARTS))
        yield torch.randn(per_part * STREAMED_PARTS, rows, n).to(dtype)


# ---- calls of the kernels ----


@dataclass(frozen=True)
class Sizes:
    """Of a GPT's training step."""

    batch: int
    context: int
    width: int
    heads: int
    vocab: int = 50257


SIZES = {
    "gpt2": Sizes(8, 1024, 768, 12),
    "gpt2-medium": Sizes(8, 1024, 1024, 16),
    "gpt2-large": Sizes(8, 1024, 1280, 20),
    "gpt2-xl": Sizes(8, 1024, 1600, 25),
}
Call = tuple[str, tuple[Any, ...]]  # (kernel, arguments)
NamedCall = tuple[str, str, tuple[Any, ...]]  # (what, kernel, arguments)


@dataclass(frozen=True)
class New:
    """Makes tensors; on "meta" they have shapes and no numbers, and may be fake."""

    dtype: torch.dtype
    device: torch.device | str

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def rng_state(self) -> Tensor:
        return torch.arange(1, 3, device=self.device)

    def classes(self, V: int, *shape: int) -> Tensor:
        return torch.randint(V, shape, device=self.device)


def op(name: str) -> Callable[..., Any]:
    """The kernel of this name, by way of the dispatcher."""
    return getattr(torch.ops.gpt_kernels, name).default


def step(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Iterator[Call]:
    """(kernel, arguments) of a training step, forward before backward; what a backward has saved comes from the dispatcher's
    forward."""
    for family in families():
        yield from of(family).step(sizes, New(dtype, device))


SMALL = Sizes(2, 48, 96, 2, vocab=257)


def calls(dtype: torch.dtype, device: torch.device | str, sizes: Sizes = SMALL) -> Iterator[NamedCall]:
    """(what, kernel, arguments): the training step, then optional arguments left out or given, layouts, odd sizes, none"""
    for name, args in step(sizes, dtype, device):
        yield f"step {name}", name, args
    for family in families():
        yield from of(family).calls(New(dtype, device))


def forward_backward(what: str, name: str, args: tuple, backward: Callable[..., tuple]) -> Iterator[NamedCall]:
    """backward: forward's outputs -> the backward kernel's arguments"""
    yield what, f"{name}_fwd", args
    result = op(f"{name}_fwd")(*args)
    yield what, f"{name}_bwd", backward(*(result if isinstance(result, tuple) else (result,)))


ODD_ROWS = ((1, 1), (3, 33), (2, 1025), (0, 7), (5, 4097))  # of calls


def like(x: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape or x.shape).to(x.dtype)


EDGES = ((1, 1), (3, 7), (17, 33), (2, 129), (5, 768), (3, 1000), (3, 1025), (2, 4099))


def edge_rows(*more: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """(what, x) of bounds(): float32 and bfloat16 in turn, long rows in both."""
    dtypes = (torch.float32, torch.bfloat16)
    for i, shape in enumerate((*EDGES, *more)):
        for dtype in (dtypes[i % 2], dtypes[1 - i % 2])[: 2 if shape[1] > 512 else 1]:
            yield f"{shape} {dtype}", torch.randn(shape).to(dtype)


# ---- calls that are compiled without a GPU ----


@dataclass(frozen=True)
class Compiled:
    """The launches of a forward and a backward on one shape. `main` ones are compiled in every dtype, and with each change."""

    name: str
    launch: Callable[[Callable[..., Tensor]], Any]  # new(*shape, dtype=...) -> calls launchers
    main: bool = False
    aligned: bool = True  # else tensors start one element past a 16-byte boundary, as a slice may
    columns: int = 0  # of a row: what a block pads them to is idle lanes
    wide: float = 0.75  # least share of a hot loop's bytes that moves 16 at a time; of unaligned tensors nothing is asked
    matrix: str = ""  # the tensor-core instruction, where it is not the architecture's newest
    plain: tuple[int, ...] = ()  # the shape, where the call has no option that others' kernels lack
