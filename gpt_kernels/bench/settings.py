"""What a user of the benchmark chooses: its targets and its flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arguments import device, option, positive
from ..names import DTYPES, families

# target -> the module that has its cases, and the function there
MODELS = ("gpt", "decode", "llama", "bert")
TARGETS = {op: (f"..cases.{op}", "bench") for op in families()} | {
    "sweep": ("..cases.attention", "sweep"),
    **{model: (".models", model) for model in MODELS},
}
PRODUCTS = "products"  # the variant of a whole model that is its matrix products alone (products.py)
GROUPS = {"all": tuple(TARGETS), "ops": families()}
OUT = "bench-out"


def _peers() -> Sequence[str]:
    from .peers import PEERS

    return tuple(PEERS)


def _backends() -> Sequence[str]:
    from ..dispatch import BACKENDS

    return tuple(BACKENDS)


@dataclass
class Settings:
    targets: Sequence[str] = option(("all",), "what to measure", words=True, metavar="TARGET", of=(*GROUPS, *TARGETS))
    quick: bool = option(False, "fewer and smaller cases, shorter timing: a few minutes")
    huge: bool = option(False, "also the largest sizes, of several GB")
    reuse: bool = option(False, "with gpt_kernels.reuse_memory(), for every variant: no fresh pages in a call")
    device: str = device()
    threads: int | None = option(None, "torch's threads (otherwise its own choice)", type=positive, metavar="N")
    dtypes: Sequence[str] = option(DTYPES[:2], "the first everywhere, all of them in the main cases", metavar="A,B", of=DTYPES)
    against: Sequence[str] = option((), "kernels of others beside ours", metavar="A,B", of=_peers)
    backends: Sequence[str] = option((), "our other backends beside the one that serves", metavar="A,B", of=_backends)
    accelerate: bool = option(False, "eager once more, with our kernels in ATen's slots (gpt_kernels.accelerate)")
    compile: bool = option(True, "leave torch.compile out")
    cases: int | None = option(None, "the first N of each target alone", type=positive, metavar="N")
    out: str = option(OUT, "for bench.json, bench.csv, report.html and plots", metavar="DIR")

    @property
    def seconds(self) -> float:
        """Timing of one variant of one row, about."""
        return 0.1 if self.quick else 0.25
