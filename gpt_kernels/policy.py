"""patch(model, policy="measured"): which modules stay as they are because our kernels are slower there, on this machine.

What was measured lies in the private cache (cache.py), one JSON file per machine and versions. A file is believed if it is ours
to the letter; otherwise it is refused as a whole with one warning that names it, and everything is measured again. It holds
times, never code: the worst that a wrong one can do is to keep the slower of two right ways.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import cache, library
from .dispatch import ops, where
from .info import cpu_name
from .measured import CERTAIN, Kind, both, met, timed
from .sample import arguments_of, left_as_it_was
from .serving import own_class
from .table import duration
from .version import __version__

POLICIES = ("measured",)
SCHEMA = 1
LARGEST = 4 << 20  # bytes: some ten thousand entries
# of one kind of call: seconds of one call, forward and backward, and the share of the rounds in which ours took longer
FIELDS = ("eager", "ours", "slower")


# ---- the machine ----


def machine(device: torch.device) -> dict[str, str]:
    """What a measurement is valid for."""
    facts = {"cpu": cpu_name(), "isa": str(library.isa()), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return facts | {"torch": torch.__version__, "gpt_kernels": __version__}


def _served(device: torch.device) -> str:
    """What fills the slots now: another backend is another measurement."""
    return " ".join(f"{op}={where(op)[key].backend}" for op in ops() for key in (device.type.upper(),) if key in where(op))


# ---- the file ----


class Measurements:
    """The measurements of one machine, read at once; kinds by digest."""

    def __init__(self, machine: dict[str, str]):
        self.machine = machine
        text = json.dumps(machine, sort_keys=True)
        slug = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", machine["cpu"]).lower()).strip("-")[:40]
        self.name = f"policy-{slug}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.found: dict[str, dict[str, float]] = {}
        try:
            self.found = self._read()
        except cache.NoHome:
            pass
        except Exception as error:  # whatever is in that file, it is measured again
            self._warn("refused, everything is measured again", error)

    def _read(self) -> dict[str, dict[str, float]]:
        data = cache.read(self.name, LARGEST)
        if data is None:
            return {}
        found = json.loads(data)
        if not isinstance(found, dict) or found.keys() != {"schema", "machine", "kinds"}:
            raise ValueError("it is not a file of measurements")
        if found["schema"] != SCHEMA:
            raise ValueError(f"its schema is {found['schema']!r:.80}, expected {SCHEMA}")
        if found["machine"] != self.machine:
            raise ValueError(f"it was measured on {found['machine']!r:.200}, this is {self.machine}")
        if not isinstance(found["kinds"], dict):
            raise ValueError("its kinds are not a table")
        for key, entry in found["kinds"].items():
            if not re.fullmatch(r"[0-9a-f]{64}", key):
                raise ValueError(f"{key!r:.80} names no kind")
            if not isinstance(entry, dict) or entry.keys() != set(FIELDS):
                raise ValueError(f"kind {key[:8]} must have exactly the fields {', '.join(FIELDS)}")
            for name, value in entry.items():
                if type(value) not in (int, float) or not (0 <= value <= (1 if name == "slower" else 1e6)):
                    raise ValueError(f"{name} of kind {key[:8]} is {value!r:.80}")
        return found["kinds"]

    def add(self, key: str, entry: Mapping[str, float]) -> None:
        self.found[key] = {name: float(entry[name]) for name in FIELDS}

    def write(self) -> None:
        """The whole file, or as it was; what another process has written since is lost. Says where it cannot."""
        content = {"schema": SCHEMA, "machine": self.machine, "kinds": self.found}
        try:
            cache.write(self.name, (json.dumps(content, indent=1) + "\n").encode())
        except cache.NoHome:
            pass
        except OSError as error:
            self._warn("not kept", error)

    def _warn(self, what: str, error: Exception) -> None:
        try:
            path = cache.directory() / self.name
        except cache.NoHome:
            path = pathlib.Path(self.name)
        said = str(error) or type(error).__name__
        warnings.warn(f"measurements of patch {what}: {path}: {said}", RuntimeWarning, stacklevel=2)


# ---- the decision ----


def check(policy: str | None, sample: Any) -> None:
    """Raises ValueError for a policy that is none, and for one without a sample or a sample without one."""
    if policy is None:
        if sample is not None:
            raise ValueError("patch: sample is there to be measured: it needs policy='measured'")
    elif policy not in POLICIES:
        raise ValueError(f"patch: unknown policy {policy!r}, expected one of {', '.join(POLICIES)}")
    elif sample is None:
        raise ValueError(f"patch: policy={policy!r} needs sample=, a batch of the model")


def slower(
    model: nn.Module, made: Mapping[nn.Module, type], sample: Any, known: Mapping[nn.Module, str]
) -> dict[nn.Module, str]:
    """Of the modules in `made` (module -> the class that patch would give it) those that are slower by it, and by how much.

    The model runs on the sample once, by its own classes but for what is measured, in its own mode, under the autograd and
    autocast that are in force. known: kept for that reason already; they are not looked at again.
    """
    args, kwargs = arguments_of(model, sample, "patch")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    measurements, new = Measurements(machine(device)), False
    spent: dict[nn.Module, list[tuple[int, Kind, Mapping[str, float]]]] = {}
    with left_as_it_was(model):
        for module in model.modules():
            module.__class__ = own_class(module)
        for kind in met(model, {module: cls for module, cls in made.items() if module not in known}, args, kwargs):
            key = hashlib.sha256(f"{kind.text}\n{versions(kind)}\n{_served(device)}".encode()).hexdigest()
            if key not in measurements.found:
                entry = measured(kind)
                if entry is None:
                    continue
                measurements.add(key, entry)
                new = True
            for module in kind.modules:
                spent.setdefault(module, []).append((kind.calls, kind, measurements.found[key]))
    if new:
        measurements.write()
    return {module: reason for module, found in spent.items() if (reason := _reason(found)) is not None}


def versions(kind: Kind) -> str:
    """Of the library that the module's class comes from, and of our forward."""
    package = own_class(kind.module).__module__.split(".")[0]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return f"{package} {version} {[base.__qualname__ for base in kind.made.__mro__] if kind.made else ''}"


def measured(kind: Kind) -> dict[str, float] | None:
    """FIELDS of one kind; None where one of the two cannot be run alone."""
    timing = timed(kind, both(kind))
    if timing.slower is None:
        return None
    return {**{name: timing.seconds[name].total for name in ("eager", "ours")}, "slower": timing.slower}


def _reason(found: list[tuple[int, Kind, Mapping[str, float]]]) -> str | None:
    """Why the module is kept; None where it is not. found: (calls, kind, FIELDS) of the calls it gets."""
    total = sum(calls * entry["ours"] for calls, _, entry in found)
    eager = sum(calls * entry["eager"] for calls, _, entry in found)
    # its rounds count by what they cost
    weight = sum(calls * entry["ours"] * entry["slower"] for calls, _, entry in found)
    if not total > eager or weight < CERTAIN * total:
        return None
    _, kind, worst = max(found, key=lambda f: f[0] * (f[2]["ours"] - f[2]["eager"]))
    times = f"{duration(worst['eager'])} against {duration(worst['ours'])}"
    return f"eager was faster here: {times} at {kind.shapes or 'its call'}"
