"""make bench: options of the micro-benchmarks, and one of them per op, shape, dtype, direction and backend."""

import pytest
import torch

from gpt_kernels.bench import run
from gpt_kernels.bench.measure import Settings, configure
from gpt_kernels.names import families

BACKENDS = ("eager", "compile", "ours", "reference")


def pytest_addoption(parser):
    group = parser.getgroup("gpt_kernels")
    group.addoption("--quick", action="store_true", help="the tiny and the main cases alone")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--dtypes", default="float32,bfloat16")
    group.addoption("--backends", default="eager,compile,ours", help=f"of {', '.join(BACKENDS)}")


def settings(config):
    backends = config.getoption("--backends").split(",")
    if unknown := set(backends) - set(BACKENDS):
        raise pytest.UsageError(f"--backends: unknown {unknown.pop()!r}, expected some of {', '.join(BACKENDS)}")
    return Settings(
        quick=config.getoption("--quick"),
        device=config.getoption("--device"),
        dtypes=config.getoption("--dtypes").split(","),
        compile="compile" in backends,
        backends=[b for b in backends if b == "reference"],
    )


def pytest_configure(config):
    settings(config)  # a wrong option ends it before anything is collected


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    chosen = settings(metafunc.config)
    backends = metafunc.config.getoption("--backends").split(",")
    cases = [case for op in families() for case in run.cases(op, chosen)]
    parameters = [
        pytest.param(
            case,
            case.op,
            case.shape,
            str(case.dtype).removeprefix("torch."),
            direction,
            backend,
            id=f"{case.op}-{case.shape}-{str(case.dtype).removeprefix('torch.')}-{direction}-{backend}",
        )
        for case in cases
        for direction in case.directions
        for backend in backends
    ]
    # each by its own name, so that --benchmark-group-by=param:backend and the like work
    metafunc.parametrize("case, op, shape, dtype, direction, backend", parameters)


@pytest.fixture(scope="session")
def chosen(request):
    found = settings(request.config)
    configure(found)
    yield found
    torch.set_default_device(None)
