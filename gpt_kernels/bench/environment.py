"""What figures are valid for: processor, clocks, threads, versions, settings. No name of a host, no path."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import subprocess
from typing import Any

import torch

from ..library import isa
from ..triton.common import arch
from ..triton.tuned import machine
from ..version import __version__
from .contention import others
from .measure import cache_bytes, on_gpu

PACKAGES = ("triton", "transformers", "numpy", "liger-kernel", "flash-attn", "xformers", "apex")
# that change what is measured, and hold no path
VARIABLES = re.compile(r"(OMP|MKL|KMP|OPENBLAS|GOMP|MALLOC|GPT_KERNELS|TRITON|TORCHINDUCTOR|CUDA_VISIBLE|NVIDIA_TF32)_?.*")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def output(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """Of the checkout that this package is imported from; an installed one has none."""
    return output("git", "-C", str(ROOT), "describe", "--always", "--dirty") if (ROOT / ".git").exists() else None


def cpu() -> dict[str, Any]:
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    found = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    clocks = [float(value) for name, value in found if name == "cpu MHz"]
    names = [value for name, value in found if name == "model name"]
    facts: dict[str, Any] = {"cpu": names[0] if names else platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if clocks:
        facts["MHz now"] = f"{min(clocks):.0f}" if max(clocks) - min(clocks) < 1 else f"{min(clocks):.0f} to {max(clocks):.0f}"
    with contextlib.suppress(OSError):
        governor = pathlib.Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        facts["governor"] = governor.read_text().strip()
    return facts | {"last-level cache, MiB": cache_bytes() >> 20}


def gpu() -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    facts: dict[str, Any] = {k: v for k, v in machine(device, arch(device)).items() if k in ("gpu", "arch", "driver")}
    properties = torch.cuda.get_device_properties(device)
    facts |= {"gpus": torch.cuda.device_count(), "processors": properties.multi_processor_count}
    facts |= {"GPU memory, GiB": round(properties.total_memory / 2**30, 1), "L2": getattr(properties, "L2_cache_size", None)}
    facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    asked = "clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    if clocks := output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", f"--id={device.index}"):
        facts["clocks: SM, its most, memory; power limit"] = clocks
    return facts


def environment() -> dict[str, Any]:
    facts = cpu() | {"threads": torch.get_num_threads(), "isa": isa()}
    if on_gpu():
        facts |= gpu()
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "gpt_kernels": __version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    values = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name) and "/" not in value}
    return facts | {
        "system": f"{platform.system()} {platform.machine()}",
        "variables": " ".join(f"{name}={value}" for name, value in sorted(values.items())) or "none",
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),
        "processors in use by others": others(),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
    }
