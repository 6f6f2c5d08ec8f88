"""make gpu: the GPU kit and its set-up, on the torch that this machine has where that sees a GPU, else on the pinned one.

A driver older than CUDA 13, or a GPU of AMD's, needs the very torch that the machine's owner has put there. The environment
.venv-gpu sees the packages of the Python that runs this, and gets what is missing of requirements-dev.txt, never torch or
Triton. Where no package index answers, what is there must do, and what is missing is named. Nothing of torch is imported here.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
VENV = ROOT / ".venv-gpu"
DRIVER = 580  # of NVIDIA's, the oldest for CUDA 13, which the pinned torch is built for
NEEDED = ("pytest",)  # without it there is nothing to run
# for a Python to tell of its torch and its packages
PROBE = """
import json, site, sys, torch, triton
print(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.is_available() and torch.cuda.get_device_name(),
                  "triton": triton.__version__, "files": [torch.__file__, triton.__file__],
                  "folders": [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]}))
"""


def say(text: str) -> None:
    print(f"gpu: {text}", file=sys.stderr, flush=True)


def probe(python: str | os.PathLike) -> dict | str:
    """What its torch is; a sentence where it has none that would do."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        return f"{python} has no torch with Triton ({(done.stderr.strip().splitlines() or ['it crashed'])[-1]})"
    found = json.loads(done.stdout.splitlines()[-1])
    if tuple(map(int, re.findall(r"\d+", found["torch"])[:2])) < (2, 10):
        return f"torch {found['torch']} of {python} is older than 2.10"
    return found if found["gpu"] else f"torch {found['torch']} of {python} sees no GPU"


def no_pinned_torch() -> str | None:
    """Why the pinned torch would see no GPU here; None where it should."""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = re.search(r"^(\d+)\.", subprocess.run(query, capture_output=True, text=True).stdout, re.M)
        if driver is None or int(driver[1]) >= DRIVER:
            return None
        return f"the pinned torch needs a driver from {DRIVER} on, this is {driver[1]}: install a torch for it"
    if os.path.exists("/dev/kfd"):
        return "the pinned torch is NVIDIA's: install PyTorch's build for ROCm"
    return "no GPU is here (no nvidia-smi, no /dev/kfd); if there is one, install a torch that sees it"


def borrow(folders: list[str]) -> pathlib.Path:
    """An environment that sees these folders behind its own packages; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", VENV], check=True)
    (site,) = VENV.glob("lib/python3*/site-packages")
    # not --system-site-packages: those are another Python's where this one is of an environment
    (site / "machine.pth").write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders))
    return VENV / "bin" / "python"


def missing(python: pathlib.Path) -> dict[str, list[str]]:
    """Package -> its lines in requirements-dev.txt, of those that are not installed in any version."""
    lines: dict[str, list[str]] = {}
    for line in (ROOT / "requirements-dev.txt").read_text().splitlines():
        if name := re.match(r"[\w-]+", line):
            lines.setdefault(name[0], []).append(line)
    code = "import json, importlib.metadata as m; print(json.dumps([d.metadata['Name'] for d in m.distributions()]))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    there = {"torch", "triton", *(re.sub(r"[-_.]+", "-", name).lower() for name in json.loads(done.stdout) if name)}
    return {name: of for name, of in lines.items() if name not in there}


def install(python: pathlib.Path, lines: list[str], *options: str) -> str | None:
    """None, or pip's reason."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--retries", "1", *options, "-r", file.name], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
    return next((line for line in said if line.startswith("ERROR")), said[-1]) if done.returncode else None


def complete(python: pathlib.Path) -> bool:
    """Adds what is missing; False where the kit cannot run without it."""
    lacking = missing(python)
    # liger-kernel asks for torch and for a package "triton", which is not what AMD's Triton is called
    alone = {name: lacking.pop(name) for name in ("liger-kernel",) if name in lacking}
    for lines, options in ((lacking, ()), (alone, ("--no-deps",))):
        if not lines:
            continue
        say(f"installing {', '.join(lines)}")
        if reason := install(python, [line for of in lines.values() for line in of], *options):
            say(f"not installed: {reason}")
    if left := missing(python):
        say(f"goes on without {', '.join(left)}: stages that need one of them say so")
    return not any(name in left for name in NEEDED)


def build(python: pathlib.Path) -> None:
    """The C++ kernels and, where nvcc is, the CUDA kernels for this machine's GPUs; Triton serves what is not built."""
    home = "/usr/local/cuda"  # nvcc is often there and not on the PATH
    found = shutil.which("nvcc") or os.environ.get("CUDA_HOME") or not os.path.exists(f"{home}/bin/nvcc")
    environment = os.environ if found else {**os.environ, "CUDA_HOME": home}
    if subprocess.run([python, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment).returncode:
        say("not all kernels were built, see above: Triton's are tested all the same")


def main(arguments: list[str]) -> int:
    found = probe(sys.executable)
    if isinstance(found, dict):
        say(f"takes torch {found['torch']} with Triton {found['triton']} of {sys.executable}, which sees {found['gpu']}")
        python = borrow(found["folders"])
        if not complete(python):
            say(f"cannot run without {' and '.join(NEEDED)}")
            return 1
        after = probe(python)
        if not isinstance(after, dict) or after["files"] != found["files"]:
            say(f"{VENV.name} has another torch or Triton now: {after}; remove it and try again")
            return 1
    else:
        if reason := no_pinned_torch():
            say(f"{found}; {reason}, and name its Python: make gpu PYTHON=...")
            return 2
        say(f"takes the pinned torch of requirements-dev.txt: {found}")
        if subprocess.run([os.environ.get("MAKE", "make"), "setup", f"PYTHON={sys.executable}"], cwd=ROOT).returncode:
            return 1
        python = ROOT / ".venv" / "bin" / "python"
    build(python)
    return subprocess.run([python, "-m", "tools.gpu", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
