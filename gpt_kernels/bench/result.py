"""A result on disk: written a row per line, read with every field checked, so that a report can trust what it shows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..names import families
from .settings import MODELS, TARGETS

SCHEMA = 1
LARGEST = 64 << 20  # bytes of a result: a row has some thousand


def dumps(result: dict[str, Any]) -> str:
    """JSON with a row per line: readable, and a diff of two says which rows changed."""
    rest = {name: value for name, value in result.items() if name != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in result["rows"])
    return json.dumps(rest, indent=1)[:-2] + ',\n "rows": [\n' + rows + "\n ]\n}\n"


def load(path: str | os.PathLike) -> dict[str, Any]:
    """A result's JSON. Raises UserError for anything else."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{path}: more than {LARGEST >> 20} MiB, not a result of python -m gpt_kernels bench")
        result = json.loads(data)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: no JSON of ours: nested too deeply") from None
    if not isinstance(result, dict) or not {"schema", "rows", "environment", "limits"} <= result.keys():
        raise UserError(f"{path}: not a result of python -m gpt_kernels bench")
    if result["schema"] != SCHEMA:
        raise UserError(f"{path}: its schema is {result['schema']!r:.80}, expected {SCHEMA}")
    try:
        validate(result)
    except ValueError as error:
        raise UserError(f"{path}: not a result of python -m gpt_kernels bench: {error}") from None
    return result


def number(value: Any) -> bool:
    """Finite, and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1e300


def positive(value: Any) -> bool:
    return number(value) and value > 0


def mapping(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def kind(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def or_none(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


TEXT = kind(str)
# what a report reads: fields that must be there, those that may
RESULT = {"command": TEXT, "environment": mapping(kind(str, int, float, type(None))), "rows": kind(list),
          "failed": mapping(TEXT), "interrupted": kind(bool), "seconds": number, "limits": mapping(positive)}  # fmt: skip
ROW = {"target": one_of(*TARGETS), "op": one_of(*families(), *MODELS), "shape": TEXT, "dtype": TEXT, "direction": TEXT,
       "main": kind(bool), "length": or_none(lambda v: positive(v) and isinstance(v, int)), "served": TEXT,
       "mismatch": or_none(TEXT), "absent": mapping(TEXT)}  # fmt: skip
MEASURED = {"timed": one_of("warm", "cold"), "variants": mapping(kind(dict)), "bytes": positive, "flops": number,
            "tiny": kind(bool), "limits": mapping(positive), "bound": one_of("copy", "gemm"), "of_limit": positive,
            "ratio": or_none(positive)}  # fmt: skip
VARIANT = {"seconds": positive, "spread": number, "memory": or_none(number),
           "samples": lambda v: isinstance(v, list) and all(map(positive, v))}  # fmt: skip
ROW_MAY = {"disturbed": number, "stolen": number, "repeated": number, "truth": TEXT}
MAY = {"host": positive, "warm": or_none(positive), "cold": or_none(positive), "first": number, "launch": positive,
       "errors": lambda v: isinstance(v, list) and all(map(number, v))}  # fmt: skip


def validate(result: dict[str, Any]) -> None:
    """Raises ValueError naming the first field that is missing or is not what bench writes."""

    def check(what: Any, where: str, must: dict, may: dict | None = None) -> None:
        if not isinstance(what, dict):
            raise ValueError(f"{where} is {what!r:.80}")
        for name, test in {**must, **(may or {})}.items():
            if name not in what and name in must:
                raise ValueError(f"{where} has no {name}")
            if name in what and not test(what[name]):
                raise ValueError(f"{where}: {name} is {what[name]!r:.80}")

    check(result, "it", RESULT)
    for i, row in enumerate(result["rows"]):
        check(row, f"row {i}", ROW, ROW_MAY)
        if row["mismatch"] is not None:
            row["variants"] = {}
            continue
        check(row, f"row {i}", MEASURED)
        for limits, names in ((row["limits"], ("copy", "gemm")), (result["limits"], ("copy", f"gemm {row['dtype']}"))):
            check(limits, f"the limits of row {i}", dict.fromkeys(names, positive))
        check(row["variants"], f"row {i}", {"ours": kind(dict)})
        for name, figures in row["variants"].items():
            check(figures, f"row {i}, {name}", VARIANT, MAY)
