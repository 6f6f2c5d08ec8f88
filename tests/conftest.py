"""Every test runs with NaN in freshly allocated memory (our C++ outputs included) and one thread per xdist worker."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty and its kin hand out NaN: a kernel that leaves an element unwritten is seen at once."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
