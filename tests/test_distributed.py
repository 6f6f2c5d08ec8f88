"""Several processes of this machine over gloo give what one gives: loss and every gradient (distributed_checks.py)."""

import distributed_checks
import pytest

FAST = (
    "data_parallel", "tensor_parallel", "context_parallel_balanced", "fully_sharded_tensor_parallel_is_refused",
    "dropout_of_parts",
)  # fmt: skip
ALL = (
    "ops_on_dtensors", "dropout_of_parts", "data_parallel", "fully_sharded", "tensor_parallel",
    "fully_sharded_tensor_parallel_is_refused", "context_parallel", "context_parallel_balanced",
    "llama_data_parallel", "llama_fully_sharded", "llama_tensor_parallel",
)  # fmt: skip


def check(names, processes, kept=None):
    results = distributed_checks.run(names, processes, kept)
    wrong = {name: result for name, result in results.items() if not isinstance(result, int) or not result}
    assert not wrong, "\n".join(f"{name}: {result}" for name, result in wrong.items())


def test_two_processes():
    check(FAST, 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", (2, 4))
def test_all_checks(processes):
    check(ALL, processes)


@pytest.mark.slow
def test_a_checkpoint_is_loaded_on_another_number_of_processes(tmp_path):
    check(["checkpoint_saved"], 2, str(tmp_path))
    for processes in (1, 3, 4):
        check(["checkpoint_loaded"], processes, str(tmp_path))
