"""Several processes of this machine over gloo give what one gives: loss and every gradient (distributed_checks.py)."""

import distributed_checks
import pytest

FAST = ("data_parallel", "tensor_parallel", "context_parallel_balanced")
ALL = ("ops_on_dtensors", "data_parallel", "fully_sharded", "tensor_parallel", "context_parallel", "context_parallel_balanced")


def check(names, processes):
    results = distributed_checks.run(names, processes)
    wrong = {name: result for name, result in results.items() if not isinstance(result, int) or not result}
    assert not wrong, "\n".join(f"{name}: {result}" for name, result in wrong.items())


def test_two_processes():
    check(FAST, 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", (2, 4))
def test_all_checks(processes):
    check(ALL, processes)
