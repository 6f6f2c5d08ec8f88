"""What the op tests iterate over, in one place: the backend under test, dtypes, instruction sets, how slow it is.

The tests are the same for every backend. CPU kernels run them in full; with TRITON_INTERPRET=1 in the environment the Triton
kernels do, in an interpreter some thousand times slower, on fewer sizes; with GPT_KERNELS_TEST_BACKEND=cuda_sim the CUDA
kernels do, on the CPU model of csrc/sim; with GPT_KERNELS_TEST_DEVICE=cuda the tests run on the GPU, where every tensor of
theirs then is (conftest.py), on the Triton kernels or, with GPT_KERNELS_TEST_BACKEND=cuda, on the CUDA kernels.
"""

import os
import pathlib

import torch

from gpt_kernels import library
from gpt_kernels.names import families
from gpt_kernels.triton import INTERPRETED

DEVICE = os.environ.get("GPT_KERNELS_TEST_DEVICE", "cpu")
BACKEND = os.environ.get("GPT_KERNELS_TEST_BACKEND") or ("triton" if INTERPRETED or DEVICE == "cuda" else "cpu")
SLOW = 0 if BACKEND == "cpu" else 2 if BACKEND == "triton" and INTERPRETED else 1  # as gpt_kernels.cases has it
if BACKEND == "cpu":
    DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ISAS = tuple(library.ISA_LEVELS[: library.ISA_LEVELS.index(library.best_isa()) + 1]) if library.cpu else ()
else:
    DTYPES = (torch.float32, torch.bfloat16, torch.float16)
    ISAS = (library.best_isa(),)  # of the CPU: nothing to the kernels under test


def on_the_backend_under_test(file: str | os.PathLike[str]) -> bool:
    """The ops' own test files, and those that say so of themselves."""
    path = pathlib.Path(file)
    return path.stem in [f"test_{op}" for op in families()] or "\nON_THE_BACKEND_UNDER_TEST = True" in path.read_text()
