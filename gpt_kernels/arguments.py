"""A command's arguments are the fields of its Settings: name, default, help and what is allowed stand there, and nowhere else.

| a field                                                          | is typed                                      |
|------------------------------------------------------------------|-----------------------------------------------|
| `file: str = option(help="to read", metavar="FILE")`             | FILE, which must be given: it has no default  |
| `steps: int = option(40, "optimizer steps", type=positive)`      | --steps N                                     |
| `against: Sequence[str] = option((), "beside ours", of=PEERS)`   | --against A,B                                 |
| `compile: bool = option(True, "leave torch.compile out")`        | --no-compile                                  |
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

from .errors import UserError

# ---- what a word may be ----


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, got {text}")
    return value


def names(text: str) -> list[str]:
    """A,B"""
    return [name for name in text.split(",") if name]


# ---- a field, its flag, and the words that give its value ----


def option(default: Any = dataclasses.MISSING, help: str = "", *, words: Any = False, of: Any = None, **more: Any) -> Any:
    """A field of Settings. of: what a list is made of, see check(). words: the list is no flag but all words of the line, or,
    "rest", all that stand after the positional ones, another program's flags among them.
    more: type, choices and metavar of argparse. `of` and `choices` may be functions, which are called when they are asked
    for: what they import costs no other command anything."""
    return dataclasses.field(default=default, metadata={"help": help, "words": words, "of": of, "more": more})


def device() -> Any:
    return option("auto", "auto: a GPU where torch sees one", choices=("auto", "cpu", "cuda"))


def _now(values: Any) -> Iterable[str]:
    return values() if callable(values) else values


def _positional(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING or field.metadata["words"]


def _flag(field: dataclasses.Field) -> str:
    """As it is typed; a positional one's name in messages."""
    if _positional(field):
        return field.metadata["more"].get("metavar", field.name).lower()
    return f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}"


def _typed(value: Any) -> str:
    return ",".join(value) if isinstance(value, (list, tuple)) else str(value)


def add(parser: argparse.ArgumentParser, settings: type) -> None:
    """Every field of settings as an argument of the parser, whose namespace is then what settings takes."""
    for field in dataclasses.fields(settings):
        default, how, help = field.default, dict(field.metadata["more"]), field.metadata["help"]
        if field.metadata["of"] is not None:
            how["type"] = str if field.metadata["words"] else names
            help += f"; of {', '.join(_now(field.metadata['of']))}"
        if "choices" in how:
            how["choices"] = tuple(_now(how["choices"]))
        if isinstance(default, bool):
            how |= {"action": f"store_{not default}".lower()}
        elif default is not dataclasses.MISSING:
            kind = type(default) if isinstance(default, (int, float)) else str
            how = {"type": kind, "metavar": None if "choices" in how else {int: "N", float: "X"}.get(kind)} | how
        if default is not dataclasses.MISSING:
            how["default"] = default
            if not isinstance(default, bool) and default not in (None, ()):
                help += f" (default: {_typed(default)})"
        if field.metadata["words"]:
            how["nargs"] = argparse.REMAINDER if field.metadata["words"] == "rest" else "*"
        elif not _positional(field):
            how["dest"] = field.name
        name = field.name if _positional(field) else _flag(field)
        parser.add_argument(name, help=help.lstrip().replace("%", "%%") or None, **how)


def check(settings: Any) -> None:
    """Raises UserError for a word in a list that is none of what it is made of."""
    for field in dataclasses.fields(settings):
        if field.metadata["of"] is not None:
            known = tuple(_now(field.metadata["of"]))
            for name in getattr(settings, field.name):
                if name not in known:
                    raise UserError(f"{_flag(field)}: unknown {name!r}, expected {', '.join(known)}")


def typed(settings: Any) -> list[str]:
    """The words that give these settings: the positional ones, then the flags whose values are not the defaults."""
    positional, flags = [], []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata["words"]:
            positional += value
        elif _positional(field):
            positional.append(_typed(value))
        elif _typed(value) != _typed(field.default):
            flags += [_flag(field)] if isinstance(value, bool) else [_flag(field), _typed(value)]
    rest = any(field.metadata["words"] == "rest" for field in dataclasses.fields(settings))
    return flags + positional if rest else positional + flags


def chosen_device(name: str) -> str:
    """cpu or cuda, of a device(). Raises UserError where there is no GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no GPU here")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
