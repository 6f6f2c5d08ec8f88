"""The GPU kit's own tests. Without a GPU they are skipped.

Those that need nothing of CUDA's own API can be rehearsed with TRITON_INTERPRET=1 GPT_KERNELS_REHEARSE=1.
"""

import os
import pathlib

import pytest
import torch

from gpt_kernels import triton, use_backend

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses its products in deterministic mode
BACKEND = os.environ.get("GPT_KERNELS_TEST_BACKEND") or "triton"
HERE = pathlib.Path(__file__).parent
REHEARSAL = triton.INTERPRETED and os.environ.get("GPT_KERNELS_REHEARSE") == "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none")
    with use_backend(BACKEND):
        yield torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def device(request):
    """The GPU; in the rehearsal the CPU, with the Triton kernels in the interpreter."""
    if not REHEARSAL:
        yield request.getfixturevalue("cuda")
        return
    with use_backend("triton"):
        yield torch.device("cpu")


@pytest.fixture
def two_gpus(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", 0), torch.device("cuda", 1)
