"""Do two trees' kernels give the same bits? `python -m tools.bitwise OTHER [--backends cpu cuda_sim triton]`.

Each tree answers in processes of its own: every kernel call of gpt_kernels/cases, in every dtype, on every instruction set of
the CPU, and on the backends asked for. OTHER is a checkout with its libraries built; the calls are this tree's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def made(backend: str, folder: str) -> None:
    """The calls, once: (what, kernel, arguments), for both trees to read."""
    import torch

    from gpt_kernels import cases

    dtypes = (torch.float32, torch.bfloat16, torch.float16, *(torch.float64,) * (backend == "cpu"))
    found = []
    for dtype in dtypes:
        torch.manual_seed(0)
        sizes = cases.Sizes(2, 40, 64, 2, vocab=257)
        if dtype == torch.float64:  # float32 parameters stand beside 16 bits alone
            calls = [("step", name, args) for name, args in cases.step(sizes, dtype, "cpu")]
        else:
            calls = list(cases.calls(dtype, "cpu", sizes))
        for family in cases.families():
            for kernel in ("fwd", "bwd"):
                if backend == "cpu" and hasattr(torch.ops.gpt_kernels, f"{family}_{kernel}"):
                    calls += [
                        (what, f"{family}_{kernel}", args) for what, args in cases.of(family).bounds(f"{family}_{kernel}")
                    ]
        found += [(f"{dtype} {what}", name, list(args)) for what, name, args in calls]
    torch.save(found, pathlib.Path(folder) / "calls.pt")


def answered(backend: str, folder: str) -> None:
    """A line per call and instruction set: what it is, and the hash of its results or its error."""
    import torch

    import gpt_kernels

    if backend == "cuda_sim":
        from csrc import sim

        sim.register()
    levels = ("base", "avx2", "avx512", "avx512_bf16")
    isas = levels[: levels.index(str(gpt_kernels.isa())) + 1] if backend == "cpu" else (str(gpt_kernels.isa()),)
    for isa in isas:
        with gpt_kernels.use_isa(isa), gpt_kernels.use_backend(backend):
            for what, name, args in torch.load(pathlib.Path(folder) / "calls.pt"):
                out = [a for a in args if isinstance(a, torch.Tensor)][-1:] if name.endswith("_out") else None
                try:
                    result = getattr(torch.ops.gpt_kernels, name).default(*args)
                    tensors = out or [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
                    digest = hashlib.sha256()
                    for t in tensors:
                        digest.update(str((t.dtype, tuple(t.shape), t.stride())).encode())
                        digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b"")
                    answer = digest.hexdigest()
                except (RuntimeError, IndexError) as error:
                    answer = f"raises: {error}"
                print(json.dumps([f"{isa} {name} {what}", answer]), flush=True)


def run(tree: pathlib.Path, *arguments: str, **more: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(tree), **more}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(arguments)}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bitwise", description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=pathlib.Path)
    parser.add_argument("--backends", nargs="+", default=["cpu"], choices=["cpu", "cuda_sim", "triton"])
    settings = parser.parse_args()
    folder, different = ROOT / "build" / "bitwise", 0
    folder.mkdir(parents=True, exist_ok=True)
    for backend in settings.backends:
        more = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
        # by its path: the other tree may have no such file
        this = f"import runpy; this = runpy.run_path({__file__!r}); "
        run(ROOT, "-c", f"{this}this['made']({backend!r}, {str(folder)!r})")
        script = f"{this}this['answered']({backend!r}, {str(folder)!r})"
        ours, theirs = (
            dict(json.loads(line) for line in run(tree, "-c", script, **more).splitlines())
            for tree in (ROOT, settings.other.resolve())
        )
        wrong = [what for what, answer in ours.items() if theirs.get(what) != answer]
        print(f"{backend}: {len(ours)} results, {len(ours) - len(wrong)} the same bit for bit")
        for what in wrong:
            print(f"  {what}: {theirs.get(what, 'not there')[:90]} -> {ours[what][:90]}")
        different += len(wrong)
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
