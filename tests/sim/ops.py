"""Every op of the simulator's library, forward and backward, on a few shapes under three schedules: what sanitizers watch.
PYTHONPATH=.:tests GPT_KERNELS_SIM_LIBRARY=... python tests/sim/ops.py"""

import sim_tools
import torch

import gpt_kernels
from gpt_kernels import dispatch

CALLS = {
    "layer_norm": lambda x, w, b: gpt_kernels.layer_norm(x, w, b),
    "rms_norm": lambda x, w, b: gpt_kernels.rms_norm(x, w),
    "gelu": lambda x, w, b: gpt_kernels.gelu(x, b),
}

sim_tools.register()
ops = [op for op in dispatch.ops() if "cuda_sim" in dispatch._ops[op].kernels]
count = 0
with gpt_kernels.use_backend("cuda_sim", *ops):
    for call in CALLS.values():
        for seed in (0, 1, 5):
            for dtype in (torch.float32, torch.bfloat16):
                for shape in ((9, 768), (5, 33), (3, 2056)):
                    x, w, b = (torch.randn(s).to(dtype).requires_grad_() for s in (shape, shape[1:], shape[1:]))
                    with sim_tools.configured(seed=seed):
                        call(x, w, b).sum().backward()
                    count += 1
print(f"{count} calls of {', '.join(CALLS)}")
