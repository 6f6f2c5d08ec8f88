"""A job in a process of its own, whose memory is then its own. It answers in JSON lines, and is gone when the asking ends."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from typing import Any


class RunFailed(Exception):
    pass


def events(command: str, job: dict, folder: str, **variables: str) -> Generator[dict, None, None]:
    """What `python -m gpt_kernels COMMAND job.json` sends, as it sends it. job["run"] names the job in errors. The worker and
    all it started are gone when this ends, however it ends."""
    path, log = pathlib.Path(folder, "job.json"), pathlib.Path(folder, "worker.log")
    path.write_text(json.dumps(job))
    # its own session: Ctrl-C reaches us alone, and we end it, with the compiler processes that it may have
    arguments = [sys.executable, "-m", "gpt_kernels", command, str(path)]
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
