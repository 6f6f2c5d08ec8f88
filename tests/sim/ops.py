"""Every op of the simulator's library, forward and backward, on small shapes under three schedules: what sanitizers watch.
PYTHONPATH=. GPT_KERNELS_SIM_LIBRARY=... python tests/sim/ops.py [op ...]"""

import itertools
import sys

import torch

import gpt_kernels
from csrc import sim
from gpt_kernels import cases

SEEDS = (0, 1, 5)


def main(chosen):
    torch.set_num_threads(1)  # OpenMP's own barriers are unknown to ThreadSanitizer
    sim.register()
    chosen = chosen or cases.families()
    count = 0
    with gpt_kernels.use_backend("cuda_sim"):
        for op in chosen:
            for watched in cases.of(op).watched():
                for seed, dtype, shapes in itertools.product(SEEDS, (torch.float32, torch.bfloat16), watched.shapes):
                    arguments = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
                    with sim.configured(seed=seed):
                        watched.call(*arguments).sum().backward()
                    count += 1
    print(f"{count} calls of {', '.join(chosen)}")


main(sys.argv[1:])
