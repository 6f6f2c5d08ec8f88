"""Every test runs with NaN in freshly allocated memory (our C++ outputs included) and one thread per xdist worker."""

import contextlib
import os
import pathlib
import sys

import grids
import pytest
import torch

from gpt_kernels import dispatch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # csrc and tools, whose tests these are
collect_ignore = ["made_up"]  # laid over a copy of the tree (test_added_op.py)

if grids.BACKEND == "cuda_sim":
    from csrc import sim

    sim.register()

if grids.DEVICE != "cpu":
    # before any test module makes a tensor; the reference's products must be as deterministic as what is tested
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_default_device(grids.DEVICE)

    def drawn_on_the_cpu(draw):
        """The numbers that every other backend is tested on: eager's error, which the tolerance follows, is theirs."""

        def drawn(*size, device=None, requires_grad=False, **more):
            return draw(*size, device="cpu", **more).to(device or grids.DEVICE).requires_grad_(requires_grad)

        return drawn

    for _name in ("randn", "rand", "randint", "randperm"):
        setattr(torch, _name, drawn_on_the_cpu(getattr(torch, _name)))


def pytest_generate_tests(metafunc):
    """The op tests run on the backend under test, and their names say so; for the CPU backend there is nothing to push."""
    if grids.BACKEND != "cpu" and grids.on_the_backend_under_test(metafunc.module.__file__):
        metafunc.parametrize("backend", [grids.BACKEND], indirect=True)


@pytest.fixture(autouse=True)
def backend(request):
    """autouse: a test that does not name a fixture gets no parameter of it either"""
    name = getattr(request, "param", None)
    with contextlib.ExitStack() as stack:
        if name is not None:
            stack.enter_context(dispatch.use_backend(name))
        yield


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty and its kin hand out NaN: a kernel that leaves an element unwritten is seen at once."""
    # eager's own scatters have no deterministic form on a GPU: a warning, not an error, where eager is only compared with
    torch.use_deterministic_algorithms(True, warn_only=grids.DEVICE != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
