"""The CUDA kernels on their CPU model, from Python: `from csrc import sim` in the repository's root. README.md tells more.

register() makes the library that `make test` builds the backend "cuda_sim". A launch that goes wrong raises Fault or Deadlock,
with what the model knows as attributes. GPT_KERNELS_SIM_LIBRARY names another build of it, as the one for ThreadSanitizer.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpt_kernels import dispatch

BUILD = "GPT_KERNELS_BUILD=sim python setup.py build_ext --inplace"
PATH = pathlib.Path(os.environ.get("GPT_KERNELS_SIM_LIBRARY") or pathlib.Path(dispatch.__file__).with_name("_cuda_sim.so"))
SEEDS = range(10)  # schedules: in order, reversed, first and last warp ahead, six random ones
_loaded: dict[pathlib.Path, Any] = {}
_namespace = torch.library.Library("gpt_kernels_cuda_sim", "FRAGMENT")


class Fault(RuntimeError):
    """A kernel did what a GPU would not forgive: at block (x, y, z), by a warp and a lane; `what` says it without the place."""

    def __init__(self, report: Any):
        super().__init__(report.text)
        self.report = report
        self.kernel: str = report.kernel
        self.block: tuple[int, int, int] = report.block
        self.warp: int = report.warp
        self.lane: int = report.lane
        self.what: str = report.what


class Deadlock(Fault):
    """No thread of the block can go on. waits: for each group of lanes its warp, lanes, and what they are `at`: "barrier", with
    its number and how many have arrived of how many, a warp operation's name, or "" where they have exited."""

    def __init__(self, report: Any):
        super().__init__(report)
        self.waits: list[Any] = report.waits


def load(path: pathlib.Path = PATH) -> Any:
    """The model in a library: its dials, take_counters() and take_report(). Raises RuntimeError where it was not built."""
    path = pathlib.Path(path).resolve()
    if path not in _loaded:
        if not path.exists():
            raise RuntimeError(f"the CUDA kernels were not built for the simulator: {BUILD}")
        loader = importlib.machinery.ExtensionFileLoader("_cuda_sim", str(path))
        spec = importlib.util.spec_from_loader("_cuda_sim", loader)
        assert spec is not None
        _loaded[path] = importlib.util.module_from_spec(spec)
        loader.exec_module(_loaded[path])
    return _loaded[path]


def register() -> None:
    """Every op that the library has becomes the kernel of backend "cuda_sim" for CPU tensors."""
    for op in dispatch.ops():
        schema = str(getattr(torch.ops.gpt_kernels, op).default._schema)
        _namespace.define(schema.partition("::")[2])
    model = load()  # which registers its kernels for these ops
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for op in dispatch.ops():
        name = f"gpt_kernels_cuda_sim::{op}"
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            handle = torch.library.get_kernel(name, "CPU")
            dispatch.kernel(op, "cuda_sim", "CPU")(
                reporting(model, lambda *args, handle=handle: handle.call_boxed(keyset, *args))
            )


def reporting(model: Any, call: Callable) -> Callable:
    """A call of kernels that raises what the model reports of them."""

    def reported(*args: Any) -> Any:
        try:
            return call(*args)
        except RuntimeError:
            # torch hands on the words alone
            if (report := model.take_report()) is not None:
                raise (Deadlock if report.waits else Fault)(report) from None
            raise

    return reported


@contextlib.contextmanager
def configured(of: Any = None, **dials: int) -> Iterator[None]:
    """Dials (seed, count, arch, processors, trap) inside the block; afterwards as they were. AttributeError for another."""
    its = (of or load()).dials
    before = {name: getattr(its, name) for name in dials}
    try:
        for name, value in dials.items():
            setattr(its, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(its, name, value)


@contextlib.contextmanager
def counting(of: Any = None) -> Iterator[dict[str, Any]]:
    """Filled at the end of the block: kernel -> Counters of its launches (mma, bank conflicts, sectors, ...)."""
    model = of or load()
    counters: dict[str, Any] = {}
    model.take_counters()
    with configured(model, count=1):
        yield counters
    counters.update(model.take_counters())
