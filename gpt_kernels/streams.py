"""Standard output and error that cannot end a command."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

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
