"""Run a Python program as it is, on our kernels: they stand in ATen's own slots while it runs (gpt_kernels.accelerate).

python -m gpt_kernels run train.py --its=flags. Processes that the program starts by itself run on torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arguments import option


@dataclass
class Settings:
    script: str = option(help="the program, or with --module a module's name", metavar="SCRIPT")
    args: Sequence[str] = option((), "the program's own", words="rest", metavar="ARGS")
    accelerate: bool = option(True, "torch's own kernels: the program as Python runs it")
    module: bool = option(False, "SCRIPT names a module, as with python -m")
    report: bool = option(False, "at the end, on standard error: what was served how often, and what that saved")

    def __post_init__(self) -> None:
        self.args = tuple(self.args)


def run(settings: Settings) -> int:
    import importlib.util
    import pathlib
    import sys

    from ..errors import UserError

    if settings.module:
        if importlib.util.find_spec(settings.script.partition(".")[0]) is None:
            raise UserError(f"--module: there is no module {settings.script!r}")
    elif not pathlib.Path(settings.script).is_file():
        raise UserError(f"there is no file {settings.script!r}")
    if settings.report and not settings.accelerate:
        raise UserError("--report tells of our kernels, --no-accelerate leaves them out")
    from .. import library

    if settings.accelerate and library.cpu is None:
        raise UserError(f"ATen's slots are filled by the compiled kernels, and {library.cpu_error}")
    ours = sys.stdout, sys.stderr, sys.argv, sys.path[:]
    sys.stdout, sys.stderr = (getattr(stream, "stream", stream) for stream in ours[:2])  # the program's are Python's own
    try:
        return _run(settings)
    finally:
        sys.stdout, sys.stderr, sys.argv, sys.path[:] = ours


def _run(settings: Settings) -> int:
    import pathlib
    import runpy
    import sys
    import traceback

    from ..accelerate import accelerate, record

    sys.argv = [settings.script, *settings.args]
    sys.path[0] = "" if settings.module else str(pathlib.Path(settings.script).resolve().parent)
    if settings.accelerate:
        accelerate()
    record(settings.report)
    try:
        if settings.module:
            runpy.run_module(settings.script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(settings.script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as Python tells it, without the frames above the program's
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != _file(settings):
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames or error.__traceback__)
        return 1
    finally:
        sys.stdout.flush()
        if settings.report:
            _report()
    return 0


def _file(settings: Settings) -> str:
    import importlib.util

    if not settings.module:
        return settings.script
    spec = importlib.util.find_spec(settings.script)
    return (spec.origin if spec and spec.origin else "") or ""


def _report() -> None:
    import contextlib
    import sys

    import torch

    from ..accelerate import SLOTS, calls, decelerate, record, recorded
    from ..saved import saved, table
    from ..table import duration, print_table

    kinds = recorded()
    served = [(slot, *calls(slot)) for slots in SLOTS.values() for slot in slots]
    record(False)
    decelerate()
    with contextlib.redirect_stdout(sys.stderr):
        print_table(
            ["ATen's slot", "ours", "torch's own"],
            [(slot, str(a), str(b)) for slot, a, b in served if a or b],
            title="calls served, by whom", right=(1, 2),
        )  # fmt: skip
        if torch.cuda.is_initialized():  # the kinds do not say on which device they were
            print("the program used a GPU: what was saved is not measured again")
            return
        rows = saved(kinds)
        print_table(*table(rows), title="kinds of calls that were ours, timed again after the run", right=(2, 3, 4, 5))
        total = sum(row.seconds for row in rows)
        print(f"{sum(kinds.values())} calls were ours; saved about {'-' * (total < 0)}{duration(abs(total))}")
