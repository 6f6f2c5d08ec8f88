"""Builds the kernels: csrc/cpu into gpt_kernels/_cpu.so, where a compiler and torch's headers are there, csrc/cuda into
_cuda.so for the GPUs of this machine, where nvcc is there too; installs without them else, and says what is left out and why.

GPT_KERNELS_BUILD=auto (default): what can be built, as above.
                  cpu:  the C++ kernels or fail.      cuda: these and the CUDA kernels or fail; no GPU is needed.
                  none: nothing.
                  sim, sim_tsan, sim_asan: csrc/cuda on its CPU model csrc/sim, for the tests; never part of a wheel.
GPT_KERNELS_CUDA_ARCHS="80 90": machine code for these, not for this machine's GPUs (auto) or all that nvcc and we know (cuda).

torch is never imported here: its headers are found beside the Python that runs this, also from inside pip's isolated
build environment, so `pip install .` downloads no second torch and takes about a minute.
"""

import importlib.util
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = pathlib.Path(__file__).parent
architectures = types.SimpleNamespace(**runpy.run_path(str(ROOT / "gpt_kernels" / "architectures.py")))
# warnings are errors in our tests only: another nvcc warns of other things
WERROR = ["-Werror", "all-warnings"] if os.environ.get("GPT_KERNELS_WERROR") else []
# the LibTorch stable ABI of torch 2.10: one binary for every torch since
TORCH_TARGET_FLAG = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXXFLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC bug 105593 (LOG L003)
    "-Wno-unknown-warning-option", TORCH_TARGET_FLAG,
]  # fmt: skip


def find_torch():
    """The folder of the torch to take headers from: an importable one, else one beside this Python (isolation hides it)."""
    spec = importlib.util.find_spec("torch")
    places = [pathlib.Path(spec.origin).parent] if spec and spec.origin else []
    bases = ({}, {"base": sys.base_prefix, "platbase": sys.base_exec_prefix})  # the second: venvs with system packages
    places += [pathlib.Path(sysconfig.get_path(name, vars=base)) / "torch" for base in bases for name in ("platlib", "purelib")]
    return next((p for p in places if (p / "include/torch/csrc/stable/tensor.h").exists()), None)


def find_compiler():
    """The compiler's command line (CXX may hold options or a wrapper), None when there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    return next((c for c in candidates if shutil.which(shlex.split(c)[0])), None)


def find_nvcc():
    """nvcc of CUDA_HOME or of the PATH, None when there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(os.path.join(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def cudart_folders():
    """-L options: where nvcc would look for its runtime library. (nvcc as the linker would leave their paths in the file.)"""
    said = subprocess.run([find_nvcc(), "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    return re.findall(r'"(-L[^"]+)"', said)


def plan():
    """(the libraries to build, what to say about it)"""
    wish = os.environ.get("GPT_KERNELS_BUILD") or "auto"
    if wish not in ("auto", "cpu", "cuda", "none", *SIMULATORS):
        sys.exit(f"GPT_KERNELS_BUILD={wish}: expected auto, cpu, cuda or none")
    if wish == "none":
        return [], "GPT_KERNELS_BUILD=none"
    if not find_compiler():
        if wish != "auto":
            sys.exit(f"GPT_KERNELS_BUILD={wish}, but there is no C++ compiler: install g++ or set CXX")
        return [], "no C++ compiler found (install g++ or set CXX to have the CPU kernels)"
    if wish in SIMULATORS:
        return [wish], f"the CUDA kernels for the simulator, with {find_compiler()}"
    if wish == "cuda" and not find_nvcc():
        sys.exit("GPT_KERNELS_BUILD=cuda, but there is no nvcc: install the CUDA toolkit, set CUDA_HOME or PATH")
    cpu = f"C++ kernels for the CPU, with {find_compiler()}"
    old = find_nvcc() and (nvcc_version() or OLDEST_CUDA) < OLDEST_CUDA
    too_old = f"nvcc is of CUDA {dotted(nvcc_version())}, the oldest is {dotted(OLDEST_CUDA)}" if old else ""
    if wish == "cuda" and old:
        sys.exit(f"GPT_KERNELS_BUILD=cuda, but {too_old}")
    if wish == "cuda" or (wish == "auto" and find_nvcc() and not old and cuda_archs()):
        left = [a for a in architectures.CUDA_ARCHS if a not in known_archs()]
        unknown = f", which does not know {' '.join(left)}" if left else ""
        return ["cpu", "cuda"], f"{cpu}; CUDA kernels for {' '.join(cuda_archs())}, with {find_nvcc()}{unknown}"
    if wish == "cpu":
        why = "GPT_KERNELS_BUILD=cpu"
    else:
        why = too_old or ("no GPU from sm_80 on here" if find_nvcc() else "no nvcc found")
    return ["cpu"], f"{cpu}; CUDA kernels: none, {why} (GPT_KERNELS_BUILD=cuda to have them)"


def said_by(*command):
    """What a command prints, nothing where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""


def dotted(version):
    return ".".join(map(str, version))


def nvcc_version():
    """(12, 4), or None where nvcc does not say."""
    found = re.search(r"release (\d+)\.(\d+)", said_by(find_nvcc(), "--version"))
    return tuple(map(int, found.groups())) if found else None


def known_archs():
    """Those of the table that the nvcc at hand has machine code for; all where it does not say."""
    known = re.findall(r"sm_(\w+)", said_by(find_nvcc(), "--list-gpu-code"))
    return [a for a in architectures.CUDA_ARCHS if a in known or not known]


def gpus_archs():
    """The entries of known_archs() for the GPUs of this machine, as nvidia-smi names them; none without one."""
    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True).stdout if smi else ""
    present = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", said, re.M)}
    # the newest that runs on it; of GPUs that run none the oldest, for its PTX
    archs = known_archs()
    serves = [[a for a in archs if architectures.runs(a, gpu)] for gpu in present if gpu >= int(archs[0])]
    return sorted({found[-1] if found else archs[0] for found in serves}, key=int)


def cuda_archs():
    """Machine code for each, and the PTX of the oldest: every GPU since runs it, also those that a newer one leaves out."""
    every = known_archs() if os.environ.get("GPT_KERNELS_BUILD") == "cuda" else []
    archs = os.environ.get("GPT_KERNELS_CUDA_ARCHS", "").split() or every or gpus_archs()
    return [*(f"sm_{a}" for a in archs), f"compute_{min(map(architectures.number_of, archs))}"] if archs else []


def gencodes(source):
    """nvcc's options."""
    passes = architectures.passes(source.name, cuda_archs())
    return [f"-gencode=arch=compute_{ptx},code=[{','.join(codes)}]" for ptx, codes in passes.items()]


SIMULATORS = ("sim", "sim_tsan", "sim_asan")
OLDEST_CUDA = (12, 4)
SOURCES = {"cpu": ["csrc/cpu/*.cpp"], "cuda": ["csrc/cuda/*.cu"]}
SOURCES |= {kind: ["csrc/cuda/*.cu", "csrc/sim/*.cpp"] for kind in SIMULATORS}


def library_name(kind):
    return f"gpt_kernels._{'cuda_' if kind in SIMULATORS else ''}{kind}"


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname):
        # no Python symbol inside: one file for every Python, loaded by torch.ops.load_library
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext):
        return []

    def run(self):
        # what an earlier build has left there would be installed, too
        for left in pathlib.Path(self.build_lib, "gpt_kernels").glob("*.so"):
            left.unlink()
        super().run()

    def build_extension(self, ext):
        torch = find_torch()
        if torch is None:
            sys.exit("torch's C++ headers were not found: pip install 'torch>=2.10' first, or set GPT_KERNELS_BUILD=none")
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = next(k for k in SOURCES if library_name(k) == ext.name)
        # sim and sim_tsan share the kernels' objects
        build = pathlib.Path(self.build_temp, "sim" if kind == "sim_tsan" else kind).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # no path of this machine in the library
        maps = [f"-ffile-prefix-map={ROOT.resolve()}=.", f"-ffile-prefix-map={torch}=torch"]
        # exported: the C entry points and nothing else, so that no symbol of ours or of libstdc++ meets another library's
        (build / "exports.map").write_text(f"{{ global: gpt_kernels_*;{' PyInit_*;' * (kind in SIMULATORS)} local: *; }};\n")
        mac = sys.platform == "darwin"  # another linker
        flags = [*CXXFLAGS, *maps]
        link = ["-Wl,-x", "-Wl,-exported_symbol,_gpt_kernels_*"] if mac else ["-s", "-Wl,--version-script=exports.map"]
        libraries = [*([] if mac else ["-Wl,--no-as-needed"]), "-L", torch / "lib", "-ltorch_cpu"]
        compilers = {".cpp": [*flags, "-isystem", torch / "include"]}
        if kind == "cuda":
            # nvcc gives these to a shell: a folder's name may have a space
            quoted = [re.sub(r"=(.*)=", r'="\1"=', option) for option in maps]
            host = ",".join([*quoted, "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"])
            compilers[".cu"] = [
                "-std=c++17", "-O3", *WERROR, "-ccbin", find_compiler(), "-Xcompiler", host,
                f'-DGK_CUDA_ARCHS="{" ".join(cuda_archs())}"', "-DUSE_CUDA", TORCH_TARGET_FLAG, "-isystem", torch / "include",
            ]  # fmt: skip
            # a torch with CUDA keeps its streams in libtorch_cuda, which Python loads for itself alone: libtorch leads to them
            libraries += ["-ltorch", *cudart_folders(), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        elif kind in SIMULATORS:
            sanitizer = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if kind == "sim_asan" else []
            # ThreadSanitizer's instrumentation, met by its runtime or by the model's own (csrc/sim/sanitizer.cpp)
            instrument = sanitizer or ["-fsanitize=thread", "-Wno-tsan"]
            optimise = shlex.split(os.environ.get("GPT_KERNELS_SIM_FLAGS") or "-O1 -g1")
            flags = [*flags, "-DGK_SIM", "-fno-fast-math", "-ffp-contract=off", "-Wno-unknown-pragmas", *optimise]
            compilers[".cu"] = [*flags, *instrument, "-isystem", torch / "include", "-x", "c++"]
            # its Python face: csrc/sim/python.cpp
            python = [option for folder in python_headers() for option in ("-isystem", folder)]
            compilers[".cpp"] = [*flags, "-O2", *sanitizer, *(["-DGK_SIM_TSAN"] if kind == "sim_tsan" else []), *python]
            link = [*sanitizer, "-Wl,--version-script=exports.map"]
        rules = [f"cxx = {find_compiler()}"]
        for suffix, words in compilers.items():
            compiler = "$nvcc $gencodes" if suffix == ".cu" and kind == "cuda" else "$cxx"
            rules += [
                f"rule compile{suffix}",
                f"  command = {compiler} {shell(*words)} -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = compile $out",
            ]
        rules += [
            f"nvcc = {shell(find_nvcc() or 'nvcc')}",
            # --as-needed off: libtorch_cpu holds the stable C entry points and must be named as needed
            "rule link",
            f"  command = $cxx -shared $in -o $out {shell(*link, *libraries)}",
            "  description = link",
        ]
        objects = [
            f"{kind}_{pathlib.Path(s).stem}.o" if s.endswith(".cpp") else f"{pathlib.Path(s).stem}.o" for s in ext.sources
        ]
        for o, s in zip(objects, ext.sources, strict=True):
            rules.append(f"build {o}: compile{pathlib.Path(s).suffix} {escape((ROOT / s).resolve())}")
            if kind == "cuda":
                rules.append(f"  gencodes = {shell(*gencodes(ROOT / s))}")
        rules += [f"build {escape(target)}: link {' '.join(objects)}", ""]
        (build / "build.ninja").write_text("\n".join(rules))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([ninja(), "-C", str(build), *jobs]).returncode != 0:
            what = "C++" if kind == "cpu" else "CUDA"
            if ext.optional:
                raise CompileError(f"the {what} kernels did not compile, see above: installed without them")
            sys.exit(f"the {what} kernels did not compile, see above; GPT_KERNELS_BUILD=none installs without them")


def python_headers():
    """Of pybind11 and of this Python, which the simulator alone needs."""
    try:
        import pybind11
    except ImportError:
        sys.exit("the simulator needs pybind11: pip install pybind11 (requirements-dev.txt names it)")
    here = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(here, "Python.h")):
        sys.exit(
            f"the simulator needs Python's headers, there is no {here}/Python.h; on Debian and Ubuntu: apt install python3-dev"
        )
    return pybind11.get_include(), here


def shell(*words):
    """A command's words for a ninja rule."""
    return shlex.join(map(str, words)).replace("$", "$$")


def escape(path):
    """A path for a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def size(path):
    return path.stat().st_size


def ninja():
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        return shutil.which("ninja") or sys.exit("ninja was not found: pip install ninja")


class Wheel(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        return "py3", "none", platform


libraries, said = plan()
print(f"gpt_kernels: building {'' if libraries else 'nothing, '}{said}", file=sys.stderr)
setup(
    ext_modules=[
        Extension(
            library_name(kind),
            # the largest first: it takes longest
            [str(p.relative_to(ROOT)) for pattern in SOURCES[kind] for p in sorted(ROOT.glob(pattern), key=size, reverse=True)],
            optional=kind == "cuda" and os.environ.get("GPT_KERNELS_BUILD") != "cuda",  # Triton serves the GPU then
        )
        for kind in libraries
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    # asked for in an isolated build only where no torch is installed to take the headers from
    setup_requires=["torch>=2.10"] if libraries and find_torch() is None else [],
)
