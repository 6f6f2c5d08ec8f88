"""What was measured on this machine: one JSON file in the private cache per GPU, driver and versions.

A file only ever selects among the candidates that the code offers: an entry that is not one of them, or a file that is not
ours to the letter, is refused as a whole with one warning that names it, and the defaults serve.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import re
import threading
import warnings
from typing import Any

import torch

from .. import cache
from ..version import __version__
from . import version

Parameters = dict[str, Any]  # constexprs by name, num_warps, num_stages

SCHEMA = 1
LARGEST = 1 << 20  # bytes: some thousand entries
FIELDS = {"tunable": str, "key": dict, "parameters": dict, "default_ms": float, "best_ms": float}


def plain(value: Any) -> Any:
    """A key's or parameter's value as JSON has it; dtypes by name. Raises TypeError for what has no exact form there."""
    if isinstance(value, torch.dtype):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    raise TypeError(f"a key or parameter must be a number, a string, a dtype or None, got {type(value).__name__}")


def text(values: dict[str, Any]) -> str:
    """One spelling per content: 1, 1.0 and true stay apart, the order of names does not matter."""
    return json.dumps({name: plain(value) for name, value in values.items()}, sort_keys=True)


def machine(device: torch.device, arch: str) -> dict[str, str]:
    """What a measurement is valid for."""
    facts = {"gpu": torch.cuda.get_device_name(device), "arch": arch, "driver": _driver(), "torch": torch.__version__}
    return facts | {"triton": str(version()), "gpt_kernels": __version__}


def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            if found := re.search(r"\d+\.\d+(\.\d+)*", pathlib.Path(path).read_text()):
                return found[0]
    ask = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")
    return f"CUDA {ask()}"


class Tuned:
    """The choices measured on one machine, read at first use and once."""

    def __init__(self, machine: dict[str, str]):
        self.machine = machine
        slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
        self.name = f"tuned-{slug}-{hashlib.sha256(text(machine).encode()).hexdigest()[:16]}.json"
        self.path: pathlib.Path | None = None  # None: no place for it, and nothing to refuse
        self.refused: str | None = None  # why the file is not used
        self._choices: dict[tuple[str, str], dict[str, Any]] = {}  # (tunable, its key) -> entry
        self._lock = threading.RLock()
        try:
            self.path = cache.directory() / self.name
            self._read()
        except cache.NoHome:
            pass
        except Exception as error:  # whatever is in that file, the defaults serve
            self._refuse(str(error) or type(error).__name__)

    def __len__(self) -> int:
        return len(self._choices)

    def _read(self) -> None:
        data = cache.read(self.name, LARGEST)
        if data is None:
            return
        found = json.loads(data)
        if not isinstance(found, dict) or found.keys() != {"schema", "machine", "choices"}:
            raise ValueError("it is not a file of tuned parameters")
        if found["schema"] != SCHEMA:
            raise ValueError(f"its schema is {found['schema']!r}, expected {SCHEMA}")
        if found["machine"] != self.machine:
            raise ValueError(f"it was measured on {found['machine']}, this is {self.machine}")
        if not isinstance(found["choices"], list):
            raise ValueError("its choices are not a list")
        for i, entry in enumerate(found["choices"]):
            if not isinstance(entry, dict) or entry.keys() != FIELDS.keys():
                raise ValueError(f"entry {i} must have exactly the fields {', '.join(FIELDS)}")
            for name, kind in FIELDS.items():
                if not isinstance(entry[name], kind):
                    raise ValueError(f"{name} of entry {i} must be of type {kind.__name__}, got {entry[name]!r:.80}")
            self._choices[entry["tunable"], text(entry["key"])] = entry

    def _refuse(self, reason: str) -> None:
        self._choices.clear()
        if self.refused is None:
            self.refused = reason
            warnings.warn(f"tuned parameters refused, the defaults serve: {self.path}: {reason}", RuntimeWarning, stacklevel=2)

    def find(self, tunable: str, key: dict[str, Any], candidates: list[Parameters]) -> Parameters | None:
        """The candidate that was the fastest; None where nothing was measured, or the file asks for what is not offered."""
        with self._lock:
            entry = self._choices.get((tunable, text(key)))
            if entry is None:
                return None
            try:
                wanted = text(entry["parameters"])
            except TypeError as error:
                wanted = str(error)
            for candidate in candidates:
                if text(candidate) == wanted:
                    return candidate
            self._refuse(f"{tunable} with {text(key)} has no candidate {entry['parameters']!r:.200}")
            return None

    def add(self, tunable: str, key: dict[str, Any], parameters: Parameters, default_ms: float, best_ms: float) -> None:
        """Remember a choice and write the file; what another process has written since is lost. Raises OSError."""
        values = (tunable, json.loads(text(key)), json.loads(text(parameters)), float(default_ms), float(best_ms))
        with self._lock:
            self._choices[tunable, text(key)] = dict(zip(FIELDS, values, strict=True))
            content = {"schema": SCHEMA, "machine": self.machine, "choices": list(self._choices.values())}
            cache.write(self.name, (json.dumps(content, indent=1) + "\n").encode())
            self.refused = None

    def status(self) -> str:
        """For info()."""
        if self.refused is not None:
            return f"{self.path}, refused: {self.refused}"
        if self.path is None:
            return "none: no home directory is known"
        return f"{self.path}, {len(self)} choices" if self else "none for this GPU, driver and versions: defaults"


_tuned: dict[str, Tuned] = {}  # architecture -> its file
_reading = threading.Lock()


def tuned(device: torch.device, arch: str) -> Tuned:
    """This machine's choices for GPUs of one architecture; where they differ in name, those of the first that was used."""
    if arch not in _tuned:
        with _reading:
            if arch not in _tuned:
                _tuned[arch] = Tuned(machine(device, arch))
    return _tuned[arch]
