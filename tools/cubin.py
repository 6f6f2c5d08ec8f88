"""What a kernel's machine code says about it, on a machine without a GPU: `python -m tools.cubin k.cubin`.

Its facts, and of each hot loop the bounds and the model of tools/model.py, which says what they are worth.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from dataclasses import asdict

from . import loops, model, sass


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cubin", description=__doc__.partition("\n")[0])
    parser.add_argument("cubin", type=pathlib.Path)
    parser.add_argument("-k", "--kernel", default="", help="part of the kernel's name")
    parser.add_argument("--threads", type=int, default=0, help="of a CTA (default: what the cubin says, else 128)")
    parser.add_argument("--shared", type=int, default=0, help="bytes per CTA with the dynamic part, which no cubin tells")
    parser.add_argument("--loop-warps", type=int, default=0, help="warps of a CTA that run the loops, where not all do")
    parser.add_argument("--ctas", type=int, default=0, help="CTAs that the grid gives an SM, where more would fit")
    parser.add_argument("--useful", type=float, default=1.0, help="share of the moved bytes that the algorithm asks for")
    args = parser.parse_args()
    try:
        kernels = sass.read(args.cubin)
    except (OSError, ValueError) as e:
        parser.error(f"{args.cubin}: {e}")
    kernel = next((k for k in kernels if args.kernel in k.name), None)
    if kernel is None:
        parser.error(f"--kernel: {args.kernel!r} is in none of {', '.join(k.name for k in kernels)}")
    threads = args.threads or kernel.threads or 128
    fit, limit = sass.occupancy(kernel.gpu, kernel.registers, threads, args.shared or kernel.shared)
    ctas = min(fit, args.ctas) if args.ctas else fit
    print(
        f"{kernel.name}: sm_{kernel.sm} ({kernel.gpu.gpu}), {kernel.registers} registers, {kernel.spills} spills, "
        f"{kernel.code} bytes of code, {ctas} CTAs of {threads} threads on an SM (limit: {limit})"
    )
    for code in loops.regions(kernel):
        print(f"-- from {code[0].address:#x}")
        figures = model.region(kernel, code, args.loop_warps or threads // 32, max(1, ctas), args.useful)
        for name, value in asdict(figures).items():
            print(f"   {name:16} {value:.3g}" if isinstance(value, float) else f"   {name:16} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
