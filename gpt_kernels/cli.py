"""Command line: python -m gpt_kernels COMMAND. What a command is, see commands/.

Exit codes: 0 done, 1 failed, 2 bad arguments or nothing to run on, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import sys
from typing import Any

from . import arguments, commands, process
from .errors import UserError
from .streams import streams
from .version import __version__

PROG = "gpt_kernels"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with streams() as (out, _):
        code = _main(sys.argv[1:] if argv is None else argv)
        out.flush()
        if out.failure is None:
            return code
        if not isinstance(out.failure, BrokenPipeError):  # a reader who has seen enough (| head) is not worth a word
            print(f"{PROG}: standard output: {getattr(out.failure, 'strerror', None) or out.failure}", file=sys.stderr)
        return code or 1


def found() -> dict[str, Any]:
    """Every command's module, by the name of its file."""
    names = sorted(file.name for file in pkgutil.iter_modules(commands.__path__))
    return {name: importlib.import_module(f"{commands.__name__}.{name}") for name in names}


def parsed(argv: list[str]) -> tuple[Any, Any]:
    """The command's module and its Settings."""
    modules = found()
    if "_".join(argv[:2]) in modules:  # `bench diff`: a command of its own, diff is no target of bench
        argv = ["_".join(argv[:2]), *argv[2:]]
    parser = argparse.ArgumentParser(prog=PROG, description="Fused GPT kernels.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    listed = ",".join(name for name in modules if "_" not in name)
    parsers = parser.add_subparsers(dest="command", required=True, metavar=f"{{{listed}}}")
    for name, module in modules.items():
        if name in argv or "_" not in name:  # the help of `bench` tells of `bench diff`
            text = inspect.getdoc(module) or ""
            one = parsers.add_parser(
                name, prog=f"{PROG} {name.replace('_', ' ')}", help=text.partition("\n")[0], description=text
            )
            if name in argv:
                arguments.add(one, module.Settings)
    values = vars(parser.parse_args(argv))
    module = modules[values.pop("command")]
    return module, module.Settings(**values)


def _main(argv: list[str]) -> int:
    spoken = argv[0] if argv else ""
    try:
        if spoken == "worker":  # for ourselves, see process.events
            job, send = process.start(argv[2])
            importlib.import_module(argv[1]).worker(job, send)
            return 0
        module, settings = parsed(argv)
        spoken = module.__name__.rpartition(".")[2].replace("_", " ")
        return module.run(settings)
    except UserError as error:
        print(f"{PROG} {spoken}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{PROG} {spoken}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROG} {spoken}: stopped", file=sys.stderr)
        return 130
