"""What a long command needs of the system: workers in processes of their own, an end that loses nothing, files, memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from typing import Any

from . import cache
from .errors import UserError

# ---- a job in a process of its own, whose memory is then its own: it answers in JSON lines ----


class RunFailed(Exception):
    """A worker that ended with an error: its last words."""


def events(module: str, job: dict, folder: str, **variables: str) -> Generator[dict, None, None]:
    """What the module's function worker(job, send) sends, as it sends it. job["run"] names the job in errors. The worker and
    all it started are gone when this ends, however it ends. variables: of the environment."""
    path, log = pathlib.Path(folder, "job.json"), pathlib.Path(folder, "worker.log")
    path.write_text(json.dumps(job))
    # its own session: Ctrl-C reaches us alone, and we end it, with the compiler processes that it may have
    arguments = [sys.executable, "-m", "gpt_kernels", "worker", module, str(path)]
    with open(log, "w") as stderr:
        process = subprocess.Popen(  # noqa: S603
            arguments, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True, env={**os.environ, **variables}
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:  # half a line: it was killed while it wrote
                break
            yield event
        if process.wait() != 0:
            tail = log.read_text(errors="replace").strip().splitlines()[-12:]
            end = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
            raise RunFailed(f"the {job['run']} process ended with {end}:\n  " + "\n  ".join(tail))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def start(job_path: str) -> tuple[dict[str, Any], Callable[..., None]]:
    """In the worker: the job, and how to send facts to the parent."""
    job = json.loads(pathlib.Path(job_path).read_text())
    # whatever prints goes to the log; only our lines go to the parent
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(**facts: Any) -> None:
        channel.write(json.dumps(facts) + "\n")
        channel.flush()  # a parent that is gone ends us here

    return job, send


# ---- the end of a long command ----


def kill_is_ctrl_c() -> None:
    """From now on `kill` ends this process as cleanly as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def reported(work: Callable[[], None], report: Callable[[bool], None], worth: Callable[[], bool]) -> bool:
    """work(), then report(interrupted), whatever ended the work; returns `interrupted`.

    An error counts as an interruption where what was done so far is worth() a report, and is raised after it; else at once.
    """
    interrupted, failure = False, None
    try:
        work()
    except KeyboardInterrupt:
        interrupted = True
    except Exception as error:
        if not worth():
            raise
        interrupted, failure = True, error
    # a second Ctrl-C must not cut the files in half
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        report(interrupted)
    finally:
        signal.signal(signal.SIGINT, previous)
    if failure is not None:
        raise failure
    return interrupted


# ---- files ----


def out_folder(name: str) -> pathlib.Path:
    """The folder of --out, made if need be. Raises UserError where nothing can be written."""
    try:
        os.makedirs(name, exist_ok=True)
        tempfile.TemporaryFile(dir=name).close()
    except OSError as error:
        raise UserError(f"--out {name}: {error.strerror}") from None
    return pathlib.Path(name)


def write(path: pathlib.Path, content: str | bytes) -> None:
    """A file that others may read, whole or as it was."""
    data = content if isinstance(content, bytes) else content.encode(errors="replace")
    cache.write_atomically(path, data, mode=0o644)


# ---- memory ----


def _mark(name: str) -> int:
    """Bytes, as Linux tells them of this process. Raises OSError elsewhere."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def memory(highest: bool = False) -> int:
    """Bytes of this process now, or at its highest; without Linux's marks, its highest either way."""
    try:
        return _mark("VmHWM" if highest else "VmRSS")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rise(call: Callable[[], Any]) -> int | None:
    """Bytes by which a call raises this process's memory at most; None where Linux's marks are not there."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed blocks kept by malloc would hide what the call needs
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _mark("VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return max(0, _mark("VmHWM") - before)
