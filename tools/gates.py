"""What is asked of every kernel's machine code: that it compiles, fits, does not spill, has its tensor cores and its 16-byte
accesses, and needs no more than its backend's file in tools/budgets allows. What may do otherwise stands here, with the reason.
"""

from __future__ import annotations

import json
import pathlib
import re
from dataclasses import dataclass

from gpt_kernels.architectures import ARCHITECTURES

from .model import Region
from .problems import Case

BUDGETS = pathlib.Path(__file__).parent / "budgets"
# a budget's figure may grow by a tenth, or by the step in which it is handed out
STEPS = {"registers": 8, "shared": 0, "code": 256}
# pattern of "compiler's version, case, kernel" -> why its spills are tolerated
SPILLS = {
    "3.9.0 attention-B4H16T2048D128-(bf16|fp16)-sm_80 attention_bwd_dkv_kernel": "18, none in the loop over queries; "
    "without any, at 32x64, shared memory binds: bound 0.58 instead of 0.83",
    "3.9.0 attention-B2H8T1024D256-bf16-sm_90 attention_bwd_dkv_kernel": "109, 12 in the loop: descriptors of the keys' and "
    "values' 64 pieces, which ptxas keeps; 58 at 16x64, where the model is 0.30 instead of 0.49",
    "3.9.0 attention-B4H16T2048D128-fp32-sm_80 attention_bwd_dq_kernel": "3: multiply-adds keep whole rows of the operands in "
    "registers, and 16x16 by 8 warps is the smallest tile",
    "3.7.1 attention-B2H8T1024D256-bf16-sm_90 attention_bwd_dkv_kernel": "10, four in loops; 16x64 has none, and a model of "
    "0.31 instead of 0.52",
    "3.7.1 attention-B2H8T1024D256-bf16-sm_90 attention_bwd_dq_kernel": "47, 22 in the loop over masked blocks; 8 warps have "
    "none, and a model of 0.48 instead of 0.86",
    "3.7.1 rms_norm-8192x768-bf16-sm_100 norm_bwd_kernel": "3, none in a loop",
    "3.7.1 layer_norm-8192x1280-bf16-sm_100 norm_bwd_kernel": "9, 6 in the loop, model 0.96; by 8 warps 5, and 0.83",
    "3.7.1 attention-B4H16T1024D80-bf16-sm_80 attention_bwd_dkv_kernel": "6, none in a loop",
    "3.7.1 attention-B8H12T1024D64-dropout-bf16-sm_80 attention_fwd_kernel": "2, none in a loop",
    r"3.7.1 layer_norm-2048x12288-bf16-sm_1[02]0 norm_bwd_kernel": "5 and 21, the row of three chunks that 16 warps just hold",
    r"3.7.1 rms_norm-8192x768-(bf16|fp16)-sm_(86|89|100) norm_bwd_kernel": "3",
    "3.7.1 rms_norm-8192x1280-bf16-sm_80 norm_fwd_kernel": "2",
    "3.7.1 softmax-8191x1023-unaligned-bf16-sm_120 softmax_bwd_kernel": "2",
    r"3.7.1 attention-B4H16T2048D128-(bf16|fp16)-sm_8[69] attention_bwd_dkv_kernel": "2",
    r"3.7.1 attention-B8H12T1024D64-dropout-bf16-sm_8[69] attention_bwd_dq_kernel": "2",
    "3.7.1 attention-B32H32k8T1k4096D128-bf16-sm_120 attention_fwd_kernel": "2",
    "3.7.1 attention-B3H5T1023D64-unaligned-bf16-sm_100 attention_bwd_dkv_kernel": "4, of a tile that goes through registers",
    "3.7.1 attention-B2H8T1024D256-bf16-sm_100 attention_bwd_dkv_kernel": "19, in the 128 registers that 16 "
    "warps leave; on sm_90 it has 10",
    # the tables are chosen by 3.7's and 3.9's machine code
    r"3.6.0 attention-B4H16T(2048D128|1024D80)-(bf16|fp16)-sm_80 attention_bwd_(dkv|dq)_kernel": "2 to 9, none in a loop",
    r"3.6.0 attention-B4H16T2048D128-(bf16|fp16)-sm_90 attention_bwd_dkv_kernel": "5, one in a loop of 427 instructions",
    "3.6.0 attention-B2H8T1024D256-bf16-sm_90 attention_bwd_dq_kernel": "53, 27 in the loop over masked blocks",
    r"3.6.0 attention-\S+-sm_100 attention_(fwd|bwd_dkv)_kernel": "2 to 14, none in a loop",
    r"3.6.0 layer_norm-8192x(768-fp16|1280-bf16)-sm_100 norm_bwd_kernel": "3 and 9, 2 in the loop over rows",
    "3.6.0 layer_norm-8192x768-bf16-sm_120 norm_bwd_kernel": "6 in the loop over rows",
    r"3.6.0 cross_entropy-\S+-sm_100 reduce_kernel": "9 in the one program that adds up the rows' losses",
    "softmax-sm_120 softmax_fwd<(bf16, bf16|f16, f16), false, true, 4, 0>": "CUDA C++: 14, a row of four kept chunks in the 64 "
    "registers that two blocks of 512 threads leave; the other architectures, of the same PTX, have none",
    "attention_bwd-sm_8[69] attention_bwd<b?f16, 128, true>": "CUDA C++: never launched there, it needs more than 99 KB",
    "attention_bwd-sm_8[69] attention_bwd<bf16, 64, true>": "CUDA C++: 42, 19 of them in the loop, model 0.92; float16 "
    "and sm_80, of the same PTX, have none",
}
# the same -> why nothing is asked of the width of its accesses
NARROW = {
    r"cross_entropy-16x128256-\S+ cross_entropy_fwd_long_kernel#4": "adds up the partial sums of split rows: reads no row",
    r"D80-bf16-sm_(86|89|120) attention_bwd_dkv_kernel": "73 %: 16 of its columns, of 32 rows, are 8 bytes of a thread",
    r"3.6.0 attention-B8H12T1024D64-\S*sm_(80|86|89|120) attention_bwd_dkv_kernel": "50 %: it copies lse and delta by cp.async "
    "in the layout of the products, 8 bytes at a time and by every warp",
    r"3.6.0 attention-B4H16T1024D80-bf16-sm_80 attention_bwd_dkv_kernel": "the same",
    r"full-bias-\S+-gfx\w+ attention_bwd_dbias_kernel": "stores the bias's gradient as mfma leaves it, 8 bytes to a lane",
}


@dataclass(frozen=True)
class Facts:
    registers: int
    spills: int
    shared: int  # bytes, static and dynamic
    code: int  # bytes
    threads: int
    ctas: int  # that fit on a processor
    limit: str
    matrix: dict[str, int]
    wide: float  # share of the hot region's bytes that moves 16 or more at a time
    products: bool  # it has any, on tensor cores or off


@dataclass(frozen=True)
class Row:
    """One kernel of a case: its facts, or why there are none; the hot region's figures where they were asked for."""

    case: Case  # or another with id, arch, dtype and problem
    whose: str
    kernel: str
    compiler: str  # its version
    facts: Facts | None = None
    error: str = ""
    regions: tuple[Region, ...] = ()
    lacks: tuple[str, ...] = ()  # what else was asked of it, in words
    states: str = ""  # what the figures do not tell

    @property
    def id(self) -> str:
        return f"{self.case.id} {self.kernel}"

    def excepted(self, table: dict[str, str]) -> bool:
        return any(re.search(pattern, f"{self.compiler} {self.id}") for pattern in table)

    def faults(self) -> list[str]:
        """What is wrong with it, of any compiler."""
        if self.facts is None:
            return [self.error]
        f, arch, problem, found = self.facts, self.case.arch, self.case.problem.of, list(self.lacks)
        row = ARCHITECTURES[arch]
        if f.shared > row.shared * 1024:
            found.append(f"needs {f.shared} bytes of shared memory, {arch} has {row.shared} KB")
        if not f.ctas:
            found.append(f"does not fit on a processor: {f.limit}")
        if f.spills and not self.excepted(SPILLS):
            found.append(f"spills: {f.spills} accesses to local memory")
        want = problem.matrix if problem.matrix and arch.startswith("sm_") else row.matrix
        if f.products and self.case.dtype != "fp32" and want not in f.matrix:
            found.append(f"has products but no {want}, only {f.matrix or 'scalar ones'}")
        if problem.aligned and f.wide < problem.wide and not self.excepted(NARROW):
            found.append(f"moves {f.wide:.0%} of its bytes 16 at a time, expected {problem.wide:.0%}")
        return found

    def budget(self) -> dict[str, int]:
        return {name: getattr(self.facts, name) for name in ("registers", "shared", "code", "spills")}

    def overruns(self, kernels: dict[str, dict[str, int]]) -> list[str]:
        """Where it needs more than a budget's figures and their slack."""
        if self.facts is None:
            return []
        allowed = kernels.get(self.id)
        if allowed is None:
            return ["is not in the baseline: --write-baseline"]
        return [
            f"{name} {value}, the baseline has {allowed[name]}"
            for name, value in self.budget().items()
            if value > allowed[name] + (max(allowed[name] // 10, STEPS[name]) if name in STEPS else 0)
        ]

    def changes(self, kernels: dict[str, dict[str, int]]) -> str:
        before = kernels.get(self.id) if self.facts else None
        now = self.budget() if before else {}
        return ", ".join(f"{name} {before[name]} -> {value}" for name, value in now.items() if value != before[name])


# ---- what each needed before ----


@dataclass(frozen=True)
class Budget:
    """What each kernel needed of one compiler, when its file was written."""

    backend: str
    compiler: str
    kernels: dict[str, dict[str, int]]

    @classmethod
    def load(cls, backend: str, compiler: str) -> Budget:
        """The backend's; where there is none yet, an empty one of the compiler at hand."""
        path = BUDGETS / f"{backend}.json"
        kept = json.loads(path.read_text()) if path.exists() else {backend: compiler, "kernels": {}}
        return cls(backend, kept[backend], kept["kernels"])

    def comparable(self, compiler: str) -> bool:
        """The figures of one compiler say nothing of another's."""
        return self.compiler.split(".")[:2] == compiler.split(".")[:2]

    def save(self) -> None:
        """One kernel a line, so that a diff reads."""
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(self.kernels[k])}" for k in sorted(self.kernels))
        BUDGETS.mkdir(exist_ok=True)
        text = f'{{\n "{self.backend}": "{self.compiler}",\n "kernels": {{\n{lines}\n }}\n}}\n'
        (BUDGETS / f"{self.backend}.json").write_text(text)
