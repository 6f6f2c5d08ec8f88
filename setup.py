"""Builds the C++ kernels into gpt_kernels/_cpu.so, where a compiler and torch's headers are there; installs without them else.

GPT_KERNELS_BUILD=auto (default): build what can be built, say what is left out and why.
                  cpu:  build the C++ kernels or fail.      none: build nothing.

torch is never imported here: its headers are found beside the Python that runs this, also from inside pip's isolated
build environment, so `pip install .` downloads no second torch and takes about a minute.
"""

import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
TORCH_TARGET = "0x020a000000000000"  # the LibTorch stable ABI of torch 2.10: one binary for every torch since
CXXFLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC bug 105593
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
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


def plan():
    """("cpu" or "none", why)"""
    wish = os.environ.get("GPT_KERNELS_BUILD") or "auto"
    if wish not in ("auto", "cpu", "none"):
        sys.exit(f"GPT_KERNELS_BUILD={wish}: expected auto, cpu or none")
    if wish == "none":
        return "none", "GPT_KERNELS_BUILD=none"
    if not find_compiler():
        if wish == "cpu":
            sys.exit("GPT_KERNELS_BUILD=cpu, but there is no C++ compiler: install g++ or set CXX")
        return "none", "no C++ compiler found (install g++ or set CXX to have the CPU kernels)"
    return "cpu", f"C++ kernels for the CPU, with {find_compiler()}"


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname):
        # no Python symbol inside: one file for every Python, loaded by torch.ops.load_library
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        torch = find_torch()
        if torch is None:
            sys.exit("torch's C++ headers were not found: pip install 'torch>=2.10' first, or set GPT_KERNELS_BUILD=none")
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = pathlib.Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # no path of this machine in the library
        maps = [f"-ffile-prefix-map={ROOT.resolve()}=.", f"-ffile-prefix-map={torch}=torch"]
        # exported: the C entry points and nothing else, so that no symbol of ours or of libstdc++ meets another library's
        (build / "exports.map").write_text("{ global: gpt_kernels_*; local: *; };\n")
        rules = [
            f"cxx = {find_compiler()}",
            f"flags = {shell(*CXXFLAGS, *maps, '-isystem', torch / 'include')}",
            f"libs = {shell('-L', torch / 'lib', '-ltorch_cpu')}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            # --as-needed off: libtorch_cpu holds the stable C entry points and must be named as needed
            "rule link",
            "  command = $cxx -shared $in -o $out -s -Wl,--version-script=exports.map -Wl,--no-as-needed $libs",
            "  description = link",
        ]
        objects = [f"{pathlib.Path(s).stem}.o" for s in ext.sources]
        rules += [f"build {o}: compile {escape((ROOT / s).resolve())}" for o, s in zip(objects, ext.sources, strict=True)]
        rules += [f"build {escape(target)}: link {' '.join(objects)}", ""]
        (build / "build.ninja").write_text("\n".join(rules))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([ninja(), "-C", str(build), *jobs]).returncode != 0:
            sys.exit("the C++ kernels did not compile, see above; GPT_KERNELS_BUILD=none installs without them")


def shell(*words):
    """A command's words for a ninja rule."""
    return shlex.join(map(str, words)).replace("$", "$$")


def escape(path):
    """A path for a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


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


what, why = plan()
nothing = "nothing, " if what == "none" else ""
print(f"gpt_kernels: building {nothing}{why}; CUDA kernels: none in this version", file=sys.stderr)
sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))
setup(
    ext_modules=[Extension("gpt_kernels._cpu", sources)] if what == "cpu" else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    # asked for in an isolated build only where no torch is installed to take the headers from
    setup_requires=["torch>=2.10"] if what == "cpu" and find_torch() is None else [],
)
