"""Results of python -m gpt_kernels bench made up for tests: no clock, no kernel."""

import copy
import random


def variant(seconds, noise=0.02, count=20, memory=1 << 20, seed=0):
    draw = random.Random(seed)
    samples = sorted(seconds * (1 + draw.gauss(0, noise)) for _ in range(count))
    draw.shuffle(samples)
    median = sorted(samples)[count // 2]
    return {"seconds": median, "spread": noise * seconds, "samples": samples, "first": 2 * seconds, "memory": memory,
            "cold": 1.5 * seconds}  # fmt: skip


def row(op="layer_norm", shape="8192x768", direction="fwd", dtype="float32", ours=1e-3, eager=2e-3, seed=0, **more):
    variants = {"eager": variant(eager, seed=seed + 1), "ours": variant(ours, seed=seed + 2)}
    made = {
        "target": op, "op": op, "shape": shape, "main": True, "length": None, "dtype": dtype, "direction": direction,
        "served": "cpu (C++ kernel, avx2)", "mismatch": None, "absent": {}, "timed": "warm", "variants": variants,
        "bytes": 10_000_000, "flops": 5_000_000, "tiny": False, "limits": {"copy": 2e10, "gemm": 1e11},
        "limits_spread": {"copy": 1e9}, "bound": "copy",
        "of_limit": 0.5, "ratio": eager / ours,
    }  # fmt: skip
    return made | more


def sweep(lengths=(512, 1024, 2048, 4096, 8192, 16384)):
    """Ours grows with the length, the reference with its square; the reference is absent at the longest."""
    rows = []
    for T in lengths:
        for direction in ("fwd", "bwd"):
            r = row("attention", f"B1 H2 T{T} D64 causal", direction, target="sweep", length=T, main=False, bound="gemm")
            r["variants"]["ours"]["memory"], r["variants"]["eager"]["memory"] = 1000 * T, 1200 * T
            if T < max(lengths):
                r["variants"]["reference"] = variant(1e-2, memory=4 * T * T)
            else:
                r["absent"] = {"reference": "needs about 17.2 GB, 15.0 are free"}
            rows.append(r)
    return rows


def result(rows=None):
    if rows is None:
        tiny = row(shape="1x64", main=False, tiny=True, bytes=512, absent={"liger": "its kernels need a GPU"})
        for v in tiny["variants"].values():
            v["launch"] = 5e-6
        rows = [tiny, row(), row(dtype="bfloat16"), row(op="gpt", direction="step"), *sweep()]
    dtypes = {f"gemm {r['dtype']}": 1e11 for r in rows}
    return copy.deepcopy(
        {
            "schema": 1, "command": "python -m gpt_kernels bench all --quick", "rows": rows, "failed": {}, "interrupted": False,
            "environment": {"cpu": "Test <CPU>", "threads": 2, "isa": "avx2", "torch": "2", "commit": "abc",
                            "date": "2026-01-02"},
            "seconds": 1.5, "limits": {"copy": 2e10} | dtypes,
        }
    )  # fmt: skip
