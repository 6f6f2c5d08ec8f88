"""What is installed, what runs where, and why: info() as a dict, print_info() for people, support() as a Markdown table."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
from typing import Any

import torch

from . import cache, dispatch, library, triton
from .accelerate import state
from .names import families, family
from .table import print_table
from .version import __version__

PACKAGES = ("transformers", "tokenizers", "safetensors", "triton", "numpy", "tqdm", "rich", "matplotlib")


def info() -> dict[str, Any]:
    """Versions, CPU and instruction set, GPUs, what serves each op on each device and why, compilers, caches. JSON-ready."""
    cpu = library.cpu
    target = cpu.gpt_kernels_torch_target() if cpu else None
    return {
        "gpt_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "library": {
            "built": cpu is not None,
            "problem": library.cpu_error,
            "compiler": cpu.gpt_kernels_compiler().decode() if cpu else None,
            # the stable ABI keeps major and minor in the two highest bytes
            "torch_stable_abi": f"{target >> 56}.{target >> 48 & 0xFF}" if target else None,
        },
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": library.isa(),
            "best_isa": library.best_isa(),
            "force_isa": f"GPT_KERNELS_ISA={'|'.join(library.ISA_LEVELS)} or gpt_kernels.use_isa(name)",
        },
        "gpu": {
            "archs_built": (library.cuda_archs() or "").split(),
            "problem": library.cuda_error,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "triton": {
            "version": triton.version(),
            "problem": triton.absence(),
            "interpreted": triton.INTERPRETED,
            "tuned": _tuned(),
        },
        "ops": {op: {key: s._asdict() for key, s in dispatch.where(op).items()} for op in dispatch.ops()},
        "accelerate": state(),
        "compilers": {name: _version_line(name) for name in ("g++", "nvcc")},
        "caches": {"tokenizers of the demo": _cache()},
        "packages": {name: _package(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version_line(name: str) -> str | None:
    """ "version (path)" of a compiler on the PATH, None where there is none."""
    path = shutil.which(os.environ.get("CXX") or name) if name == "g++" else shutil.which(name)
    if path is None:
        return None
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    # g++ says it in the first line, nvcc in the one with "release"
    lines = [line for line in output.splitlines() if "release" in line] or output.splitlines() or ["no version"]
    return f"{lines[0].strip()} ({path})"


def _tuned() -> str:
    """Which measured launch parameters serve this machine's GPU (python -m gpt_kernels tune)."""
    if triton.INTERPRETED or triton.absence() or not torch.cuda.is_available():
        return "none: no GPU to launch on"
    from .triton import common, tuned

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        return tuned.tuned(device, common.arch(device)).status()
    except triton.Declined as reason:
        return f"none: {reason}"


def _cache() -> dict[str, Any]:
    try:
        folder = cache.directory()
    except cache.NoHome as error:
        return {"path": None, "files": 0, "bytes": 0, "problem": str(error)}
    sizes, problem = [], cache.problem(folder)
    if problem is None:
        try:
            sizes = [f.stat().st_size for f in folder.iterdir() if f.is_file()]
        except FileNotFoundError:  # not yet, or gone meanwhile
            pass
        except OSError as error:
            problem = f"{folder}: {error.strerror}"
    return {"path": str(folder), "files": len(sizes), "bytes": sum(sizes), "problem": problem}


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_line(gpu: dict[str, Any]) -> str:
    if not gpu["archs_built"]:
        return f"none: {gpu['problem']}"
    return f"built for {', '.join(gpu['archs_built'])}{'' if gpu['devices'] else '; no device'}"


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    built, cpu, gpu, t = facts["library"], facts["cpu"], facts["gpu"], facts["triton"]
    lines = [
        ("gpt_kernels", facts["gpt_kernels"]),
        ("torch, Python", f"{facts['torch']}, {facts['python']} on {facts['platform']}"),
        (
            "C++ kernels",
            f"built with {built['compiler']} for torch >= {built['torch_stable_abi']} (stable ABI)"
            if built["built"]
            else f"none: {built['problem']}",
        ),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"),
        (
            "instruction set",
            f"{cpu['isa']} (best here: {cpu['best_isa']}; force one with {cpu['force_isa']})" if cpu["isa"] else "none",
        ),
        ("GPU", ", ".join(gpu["devices"]) or "none seen by torch"),
        ("CUDA kernels", _cuda_line(gpu)),
        ("Triton kernels", t["problem"] or f"Triton {t['version']}" + ", interpreted on CPU tensors" * t["interpreted"]),
        ("tuned parameters", t["tuned"]),
        ("ATen's slots", f"OURS, process-wide (accelerate): {', '.join(on)}" if (on := facts["accelerate"]) else "torch's own"),
    ]
    lines += [(name, version or "not found on the PATH") for name, version in facts["compilers"].items()]
    for name, c in facts["caches"].items():
        state = f"refused: {c['problem']}" if c["problem"] else f"{c['files']} files, {c['bytes'] / 1e6:.1f} MB"
        lines.append((name, f"{c['path']}, {state}" if c["path"] else state))
    found = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    missing = [name for name, version in facts["packages"].items() if not version]
    return [*lines, ("packages", ", ".join(found) + (f" (not installed: {', '.join(missing)})" if missing else ""))]


def print_info(as_json: bool = False) -> None:
    """Print info() as tables (with rich where it is installed) or as JSON."""
    facts = info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print_table(["", ""], _lines(facts), title="gpt_kernels")
    print_table(
        ["op", "CPU", "CUDA"],
        [(op, *(str(dispatch.Served(**w[key])) for key in ("CPU", "CUDA"))) for op, w in facts["ops"].items()],
        title="which backend serves each op",
    )


# ---- what the ops can do, found by doing it ----

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# what the launchers of csrc/cuda take, for every op: tests/test_info.py holds it against them, on their CPU model
CUDA_DTYPES = ("float32", "bfloat16", "float16")


def _families() -> dict[str, Any]:
    """Of each op: its home file, with its public functions in __all__, and its calls."""
    from . import cases

    return {op: (importlib.import_module(f"{__package__}.ops.{op}"), cases.of(op)) for op in families()}


def _in_triton() -> dict[str, list[str]]:
    """op -> dtypes for which its Triton launchers, forward and backward, make their launches; recorded, not done."""
    from . import cases

    done: dict[str, list[str]] = {op: [] for op in families()}
    if triton.absence():
        return done
    from .triton import common, slots

    for dtype in DTYPES:
        for op in done:
            made = []
            for name, args in cases.of(op).step(cases.Sizes(1, 8, 16, 1, vocab=32), cases.New(dtype, "meta")):
                try:
                    with common.recording("sm_80") as launches:
                        slots.launcher(name)(*args)
                    made.append(bool(launches))
                except (KeyError, RuntimeError, ModuleNotFoundError):
                    made.append(False)
            if made and all(made):
                done[op].append(str(dtype).removeprefix("torch."))
    return done


def support() -> str:
    """A Markdown table: op, dtypes whose forward and backward ran here on the C++ kernels, and what the op takes.

    For the Triton and the CUDA kernels, the dtypes that their launchers take: whether they run well is for tests and for a
    GPU to tell.
    """
    heads = ("op", "public functions", "forward and backward on a CPU", "in Triton, for GPUs", "in CUDA C++, for GPUs", "takes")
    lines, in_triton = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"], _in_triton()
    for op, (home, calls) in _families().items():
        done = []
        for dtype in DTYPES:
            with (
                contextlib.suppress(RuntimeError),
                dispatch.use_backend("cpu", *(n for n in dispatch.ops() if family(n) == op)),
            ):
                for example in calls.small(dtype):
                    given = [
                        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in example.args
                    ]
                    example.ours(*given).sum().backward()
                done.append(str(dtype).removeprefix("torch."))
        functions = ", ".join(f"`{name}`" for name in home.__all__)
        cells = (op, functions, ", ".join(done), ", ".join(in_triton[op]), ", ".join(CUDA_DTYPES), calls.TAKES)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
