"""Micro-benchmarks of the ops under pytest-benchmark: `make bench`.

The cases are those of gpt_kernels/bench. One that is wrong on the inputs to be timed fails; what cannot run is skipped with its
reason. Groups are op, shape, dtype, direction; --benchmark-group-by=param:op,param:backend makes others.
`python -m gpt_kernels bench` is the command for people: variants in turn, memory, limits, a report.
"""

import pytest
import torch

last: dict = {}  # (case, direction) -> its trial


def trial_of(case, direction, chosen):
    """The backends of one case are neighbours, and share its inputs and its check."""
    if (case, direction) not in last:
        last.clear()  # before the next one's inputs are made
        torch.manual_seed(0)
        last[case, direction] = case.trial(direction, chosen)
    return last[case, direction]


def test_op(benchmark, chosen, case, op, shape, dtype, direction, backend):
    trial = trial_of(case, direction, chosen)
    assert trial.mismatch is None, trial.mismatch
    if backend not in trial.variants:
        pytest.skip(trial.absent[backend])
    variant = trial.variants[backend]
    wait = torch.cuda.synchronize if chosen.device == "cuda" else None

    def call():
        variant.call()
        if wait:
            wait()

    benchmark.group = f"{op} {shape} {dtype} {direction}"
    served = case.served() if backend == "ours" else backend
    benchmark.extra_info |= {"bytes": trial.bytes, "flops": trial.flops, "served": served}
    with variant.around():
        call()  # compilation, first touch
        benchmark(call)
    if benchmark.stats:  # none under --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"GB/s": trial.bytes / seconds / 1e9, "GFLOP/s": trial.flops / seconds / 1e9}
