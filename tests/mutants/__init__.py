"""Seeded faults: each breaks one line of a kernel, and the tests it names must go red.

<environment>_<op>.toml holds entries of name, file, old, new and tests (pytest's arguments), and where a fault cannot be seen
survives = "why". Each runs in a copy of the tree of its own; the tests must pass there before the fault is put in.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = pathlib.Path(__file__).parents[2]
# by a file's prefix; any other needs none
ENVIRONMENT = {"triton": {"TRITON_INTERPRET": "1"}, "cuda": {"GPT_KERNELS_TEST_BACKEND": "cuda_sim"}}
KILLED, SURVIVED, INVALID = "killed", "SURVIVED", "INVALID"
# seconds, and a multiple of the unmutated tests' own: a fault may turn a bound into a hang, and neighbours make tests slow
LIMIT = (60, 10)


@dataclass(frozen=True)
class Mutant:
    group: str  # its toml's stem
    name: str
    file: str
    old: str
    new: str
    tests: str
    survives: str = ""

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"

    @property
    def command(self) -> tuple[str, str]:
        return self.group.split("_")[0], self.tests


class Result(NamedTuple):
    mutant: Mutant
    verdict: str
    seconds: float
    why: str  # the first red test, or what is wrong with the mutant

    @property
    def ok(self) -> bool:
        return self.verdict == (SURVIVED if self.mutant.survives else KILLED)


def load(folder: pathlib.Path, filters: list[str]) -> list[Mutant]:
    """The mutants whose "group: name" contains any of the filters, all without one."""
    found = [Mutant(f.stem, **m) for f in sorted(folder.glob("*.toml")) for m in tomllib.loads(f.read_text())["mutant"]]
    return [m for m in found if not filters or any(f in str(m) for f in filters)]


def copy_tree(root: pathlib.Path, to: pathlib.Path) -> None:
    """What git tracks or is about to, as it is now, and the built libraries with the simulator's objects."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    built = [str(f.relative_to(root)) for pattern in ("gpt_kernels/*.so", "build/temp*/sim/*[a-z]") for f in root.glob(pattern)]
    for name in {*filter(None, listed.split("\0")), *built}:
        if (root / name).is_file():  # not one just deleted
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


def run_tests(tree: pathlib.Path, command: tuple[str, str], limit: float | None) -> tuple[int | None, str]:
    """(pytest's exit status, None past the time limit; its first red test or last line)"""
    kind, tests = command
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | ENVIRONMENT.get(kind, {})
    # no .pyc: a fault of the same length put in within a second would be taken for the file it replaces
    env |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *shlex.split(tests)]
    with subprocess.Popen(
        pytest, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            out = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also the processes that the tests have started
            process.communicate()
            return None, f"nothing within {limit:.0f} s"
    red = re.search(r"^(?:FAILED|ERROR) (.*)", out, re.M)
    if red:
        return process.returncode, red[1]
    return process.returncode, (out.strip().splitlines() or [""])[-1]


def build_simulator(tree: pathlib.Path, file: str) -> str:
    """Compiles for the simulator what includes the file, everything else is as it was built; what went wrong, or nothing."""
    build = next(tree.glob("build/temp*/sim"), None)
    if build is None:
        return "the simulator was not built: GPT_KERNELS_BUILD=sim python setup.py build_ext --inplace"
    kernels, changed = tree / "csrc" / "cuda", {pathlib.Path(file).name}
    includes = {f.name: set(re.findall(r'#include "([^"]+)"', f.read_text())) for f in kernels.iterdir()}
    while more := {name for name, of in includes.items() if of & changed} - changed:  # headers include headers
        changed |= more
    if not any(name.endswith(".cu") for name in changed):
        return f"no kernel includes {file}"
    library, lines = tree / "gpt_kernels" / "_cuda_sim.so", []
    for line in (build / "build.ninja").read_text().splitlines():
        if found := re.match(r"build (\S+\.o): (\S+) (\S+)", line):
            name = pathlib.Path(found[3]).name
            line = f"build {found[1]}: {found[2]} {kernels / name}" if name in changed else ""
        elif found := re.match(r"build \S+: link (.*)", line):
            line = f"build {library}: link {found[1]}"
        lines.append(line)
    (build / "build.ninja").write_text("\n".join([*lines, ""]))
    library.unlink(missing_ok=True)
    done = subprocess.run(["ninja", "-j1"], cwd=build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return "" if done.returncode == 0 else f"does not compile: {done.stdout[-300:]}"


def verdict(status: int | None, why: str) -> tuple[str, str]:
    if status is None or status < 0 or status == 1:  # hung, crashed (a guard page), red
        return KILLED, f"crashed with signal {-status}" if status is not None and status < 0 else why
    if status == 0:
        return SURVIVED, "the tests pass"
    return INVALID, why  # nothing ran: not collected, not found


def try_mutant(root: pathlib.Path, mutant: Mutant, limit: float) -> tuple[str, str]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = pathlib.Path(folder)
        copy_tree(root, tree)
        file = tree / mutant.file
        text = file.read_text() if file.is_file() else ""
        if (count := text.count(mutant.old)) != 1 or mutant.old == mutant.new:
            what = f"occurs {count} times in {mutant.file}" if count != 1 else "is the same as the new one"
            return INVALID, f"the old text {what}"
        file.write_text(text.replace(mutant.old, mutant.new))
        if mutant.file.startswith("csrc/cuda/") and (wrong := build_simulator(tree, mutant.file)):
            return INVALID, wrong
        return verdict(*run_tests(tree, mutant.command, limit))


def run(root: pathlib.Path, mutants: list[Mutant], jobs: int, report: Callable[[Result], None]) -> list[Result]:
    """Every mutant, after its tests have passed without it; report is called as each is done."""

    def baseline(command: tuple[str, str]) -> tuple[str, float]:
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            copy_tree(root, pathlib.Path(folder))
            began = time.monotonic()
            status, why = run_tests(pathlib.Path(folder), command, None)
            return "" if status == 0 else f"without the fault: {why}", time.monotonic() - began

    def one(mutant: Mutant) -> Result:
        wrong, took = unmutated[mutant.command]
        began = time.monotonic()
        found, why = (INVALID, wrong) if wrong else try_mutant(root, mutant, LIMIT[0] + LIMIT[1] * took)
        result = Result(mutant, found, time.monotonic() - began, why)
        report(result)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        commands = list(dict.fromkeys(m.command for m in mutants))
        unmutated = dict(zip(commands, pool.map(baseline, commands), strict=True))
        return list(pool.map(one, mutants))
