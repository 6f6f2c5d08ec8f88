"""Command line: python -m gpt_kernels info | demo | support | tune | bench.

Exit codes: 0 done, 1 failed, 2 bad arguments or nothing to run on, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from .version import __version__

FAMILIES = ("attention", "cross_entropy", "dropout", "gelu", "layer_norm", "rms_norm", "softmax")


class UserError(Exception):
    """Something the user can mend; printed without a traceback, exit code 2."""


# ---- standard output and error ----

_SPELLED = {"µ": "u", "±": "+-", "×": "x"}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Of characters that a terminal has no code for."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error("gpt_kernels", _spell)


class _Stream:
    """A standard stream that cannot end a command: what was measured must not be lost where the reader of a pipe has left, the
    disk is full or the terminal is ASCII. What cannot be written is dropped, `failure` says why."""

    def __init__(self, stream: Any):
        self.stream, self.failure = stream, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                coding = self.stream.encoding
                self.stream.write(text.encode(coding, "gpt_kernels").decode(coding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Any) -> None:
        self.failure = self.failure or error
        with contextlib.suppress(OSError, ValueError):  # what is in its buffer must not fail again at exit
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


@contextlib.contextmanager
def streams() -> Iterator[tuple[_Stream, _Stream]]:
    """sys.stdout and sys.stderr inside the block; there, too, where Python was started without them."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as null:
        out, err = (_Stream(null if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
        try:
            yield out, err
        finally:
            sys.stdout, sys.stderr = before


# ---- arguments ----


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, got {text}")
    return value


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpt_kernels", description="Fused GPT kernels.")
    parser.add_argument("--version", action="version", version=f"gpt_kernels {__version__}")
    # no metavar list: commands of our own workers stay out of the usage line
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo,support,tune,bench}")

    info = commands.add_parser(
        "info", help="versions, instruction set, which backend serves each op and why, compilers, caches"
    )
    info.add_argument("--json", dest="as_json", action="store_true", help="the same as JSON")

    commands.add_parser("support", help="the table of ops, dtypes and features, probed here, as Markdown")

    tune = commands.add_parser(
        "tune",
        help="measure the Triton kernels' launch parameters on this GPU and keep the winners",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tune.add_argument("--op", choices=FAMILIES, help="this op alone")
    tune.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="this dtype alone")
    sizes = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "all")
    tune.add_argument("--sizes", choices=sizes, default="gpt2", help="of the model whose training step is tuned")

    demo = commands.add_parser(
        "demo",
        help="train a GPT-2 on real text: eager, torch.compile, ours",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=_positive, default=40, help="optimizer steps per run")
    demo.add_argument(
        "--data", metavar="FILE", help="UTF-8 text to train on (otherwise Python's own sources and documentation)"
    )
    demo.add_argument("--layers", type=_positive, default=4)
    demo.add_argument("--heads", type=_positive, default=6)
    demo.add_argument("--width", type=_positive, default=384)
    demo.add_argument("--context", type=_positive, default=512, help="tokens per sequence")
    demo.add_argument("--batch", type=_positive, default=4, help="sequences per step")
    demo.add_argument("--vocab", type=_positive, default=8192, help="size of the BPE vocabulary")
    demo.add_argument("--dropout", type=_fraction, default=0.1, help="for attention, residuals and embeddings")
    demo.add_argument("--lr", type=float, default=1e-3)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", metavar="DIR", default="demo-out", help="where result.json and demo.png go")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 trains under autocast")
    demo.add_argument("--no-compile", dest="compile", action="store_false", help="leave the torch.compile run out")

    bench = commands.add_parser(
        "bench",
        help="time and memory of our kernels beside eager, torch.compile and peers; a report",
        description="Targets: all (the default), ops, " + ", ".join(FAMILIES) + ", sweep (attention over sequence lengths), "
        "gpt (a training step), decode (generation). `bench diff A.json B.json` compares two results, "
        "`bench report FILE.json` writes tables and plots anew from one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument("targets", nargs="*", metavar="TARGET", default=["all"], help="what to measure")
    bench.add_argument("--quick", action="store_true", help="fewer and smaller cases, shorter timing: a few minutes")
    bench.add_argument("--huge", action="store_true", help="also the largest sizes, of several GB")
    bench.add_argument(
        "--reuse", action="store_true", help="with gpt_kernels.reuse_memory(), for every variant: no fresh pages in a call"
    )
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    bench.add_argument("--threads", type=_positive, help="torch's threads (otherwise its own choice)")
    dtypes = "the first everywhere, all of them in the main cases"
    bench.add_argument("--dtypes", type=_names, metavar="A,B", default=["float32", "bfloat16"], help=dtypes)
    peers = "kernels of others beside ours: liger, flash_attn, xformers, apex"
    bench.add_argument("--against", type=_names, metavar="A,B", default=[], help=peers)
    backends = "our other backends beside the one that serves: reference, cpu, triton, cuda"
    bench.add_argument("--backends", type=_names, metavar="A,B", default=[], help=backends)
    bench.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    bench.add_argument("--cases", type=_positive, metavar="N", help="the first N of each target alone")
    bench.add_argument("--out", metavar="DIR", default="bench-out", help="for bench.json, bench.csv, report.html and plots")

    diff = commands.add_parser("bench-diff", prog=f"{parser.prog} bench diff", description="Is B slower than A, beyond noise?")
    diff.add_argument("a", metavar="A.json")
    diff.add_argument("b", metavar="B.json")
    diff.add_argument("--threshold", type=_fraction, default=0.05, help="smallest change that counts (default: 0.05)")
    diff.add_argument("--alpha", type=_fraction, default=0.01, help="share of false alarms (default: 0.01)")

    report = commands.add_parser(
        "bench-report", prog=f"{parser.prog} bench report", description="Tables and plots of a result."
    )
    report.add_argument("result", metavar="FILE.json")
    report.add_argument("--out", metavar="DIR", default="bench-out", help="for bench.csv, report.html and plots")

    for worker in ("demo-worker", "bench-worker"):
        commands.add_parser(worker).add_argument("job")
    return parser


def _bench(command: str, arguments: dict) -> int:
    from .bench import run

    if command == "bench-worker":
        return run.worker(arguments["job"])
    if command == "bench":
        return run.bench(run.Settings(**arguments))
    if command == "bench-report":
        from .bench import report

        report.rewrite(**arguments)
        return 0
    from .bench.diff import diff

    return diff(**arguments)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with streams() as (out, _):
        code = _main(sys.argv[1:] if argv is None else argv)
        out.flush()
        if out.failure is None:
            return code
        if not isinstance(out.failure, BrokenPipeError):  # a reader who has seen enough (| head) is not worth a word
            print(f"gpt_kernels: standard output: {getattr(out.failure, 'strerror', None) or out.failure}", file=sys.stderr)
        return code or 1


def _main(argv: list[str]) -> int:
    if argv[:1] == ["bench"] and argv[1:2] in (["diff"], ["report"]):  # commands of their own, not targets
        argv = [f"bench-{argv[1]}", *argv[2:]]
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    spoken = command.replace("-", " ")
    try:
        if command == "info":
            from .info import print_info

            print_info(**arguments)
            return 0
        if command == "support":
            from .info import support

            print(support())
            return 0
        if command == "tune":
            from .triton.tune import tune

            return tune(**arguments)
        if command.startswith("bench"):
            return _bench(command, arguments)
        from . import demo

        if command == "demo-worker":
            return demo.worker(arguments["job"])
        return demo.demo(demo.Settings(**arguments))
    except UserError as error:
        print(f"gpt_kernels {spoken}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gpt_kernels {spoken}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gpt_kernels {spoken}: stopped", file=sys.stderr)
        return 130
