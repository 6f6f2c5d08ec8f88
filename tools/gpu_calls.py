"""What the GPU kit runs in processes of their own: one call of each op, its cost to the host, what a sanitizer watches."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import torch

from gpt_kernels import dispatch, library
from gpt_kernels.bench.environment import ROOT

DRY = "dry run on a CPU: no figures"


def backends(device: str) -> list[str]:  # the last serves by default
    return ["triton", *["cuda"] * bool(device == "cuda" and library.cuda_archs())]


def op(name: str) -> Callable:
    return getattr(getattr(torch.ops, dispatch.NAMESPACE), name).default


def calls_of(backend: str, dtype: torch.dtype, device: str) -> Iterator[tuple[str, str, tuple]]:
    """(what, op, arguments): small calls of every op with every kind of argument."""
    sys.path.insert(0, str(ROOT / "tests"))
    from kernel_calls import with_kernel

    from gpt_kernels.cases import calls

    return with_kernel(backend, calls(dtype, device))


def first_calls(backend: str, device: str) -> Iterator[tuple[str, tuple]]:
    """(op, arguments) once per op, and no call of another kind, each of which Triton would compile."""
    left = {name for name in dispatch.ops() if dispatch.kernel_of(name, backend)}
    for _, name, args in calls_of(backend, torch.bfloat16, device):
        if name in left:
            yield name, args
            left.discard(name)
        if not left:
            return


def run_smoke(device: str, backend: str) -> int:
    """Prints what was called; failures, one line each, on stderr."""
    failed, done = [], set()
    with dispatch.use_backend(backend):
        for name, args in first_calls(backend, device):
            done.add(name)
            try:
                op(name)(*args)
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # each op is asked
                failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    streams = library.cuda.gpt_kernels_cuda_streams() if backend == "cuda" and library.cuda else None
    bound = f", torch's streams from {pathlib.Path(streams.decode()).name}" if streams else ""
    print("\n".join(failed), file=sys.stderr)
    print(f"{len(done) - len(failed)} of {len(done)} ops{bound}")
    return bool(failed)


def run_host_cost(device: str, backend: str) -> int:
    loops, seen = (3, {}) if device == "cpu" else (200, {})
    with torch.no_grad(), dispatch.use_backend(backend):
        for name, args in first_calls(backend, device):
            rounds = []
            for _ in range(6):  # the first compiles
                begin = time.perf_counter()
                for _ in range(loops):
                    op(name)(*args)
                rounds.append((time.perf_counter() - begin) / loops)
                if device == "cuda":
                    torch.cuda.synchronize()
            seen[name] = min(rounds[1:]) * 1e6
    figures = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in seen.items())
    print(DRY if device == "cpu" else f"{figures} us")
    return 0


def run_slice(device: str, quick: bool) -> None:
    """What the sanitizer watches."""
    for backend in backends(device):
        with dispatch.use_backend(backend) if device == "cuda" else contextlib.nullcontext():
            every = (call[1:] for dtype in (torch.float32, torch.bfloat16) for call in calls_of(backend, dtype, device))
            for name, args in first_calls(backend, device) if quick else every:
                op(name)(*args)
    if device == "cuda":
        torch.cuda.synchronize()
