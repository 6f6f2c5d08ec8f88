"""Every op of the simulator's library, forward and backward, on small shapes under three schedules: what sanitizers watch.
PYTHONPATH=.:tests GPT_KERNELS_SIM_LIBRARY=... python tests/sim/ops.py [op ...]"""

import sys

import sim_tools
import torch

import gpt_kernels
from gpt_kernels.ops.attention import attention

SEEDS = (0, 1, 5)
STATE = torch.tensor([7, 0])


def rows(*shapes):
    """(x, weight, bias) of each shape"""
    return [(shape, shape[-1:], shape[-1:]) for shape in shapes]


def heads(Tq, Tk, D):
    return ((1, 2, Tq, D), (1, 1, Tk, D), (1, 1, Tk, D))


NORM = rows((9, 768), (5, 33), (3, 2056))
# name -> (call, the shapes of its arguments)
CALLS = {
    "layer_norm": (gpt_kernels.layer_norm, NORM),
    "rms_norm": (lambda x, w, b: gpt_kernels.rms_norm(x, w), NORM),
    "gelu": (lambda x, w, b: gpt_kernels.gelu(x, b), NORM),
    # by warps; by a block, masked and causal; in shared memory; in parts
    "softmax": (gpt_kernels.softmax, [((5, 33),), ((4, 17001),), ((1, 40001),)]),
    "softmax masked": (lambda x, m: gpt_kernels.softmax(x, m, 0.5, True), [((2, 9, 40), (9, 40)), ((3, 9, 1100), (9, 1))]),
    "cross_entropy": (
        lambda x: gpt_kernels.cross_entropy(x, torch.arange(x.shape[0]) - 1, ignore_index=-1, label_smoothing=0.1),
        [((5, 33),), ((3, 1100),), ((4, 17001),), ((1, 40001),)],
    ),
    "dropout": (
        lambda x, r: gpt_kernels.dropout(x, 0.3, residual=r, rng_state=STATE),
        [((9, 768), (9, 768)), ((5, 33), (5, 33))],
    ),
    "attention": (lambda *qkv: attention(*qkv, scale=0.3, window_right=0)[0], [heads(70, 70, 64), heads(33, 40, 24)]),
    "attention dropout": (lambda *qkv: attention(*qkv, None, None, STATE, scale=0.3, dropout_p=0.3)[0], [heads(40, 70, 128)]),
    "attention bias": (lambda *qkvb: attention(*qkvb, scale=0.3, softcap=5.0)[0], [(*heads(20, 33, 80), (1, 2, 20, 33))]),
}


def main(chosen):
    torch.set_num_threads(1)  # OpenMP's own barriers are unknown to ThreadSanitizer
    sim_tools.register()
    names = [name for name in CALLS if not chosen or name.split()[0] in chosen]
    count = 0
    with gpt_kernels.use_backend("cuda_sim"):
        for name in names:
            call, cases = CALLS[name]
            for seed in SEEDS:
                for dtype in (torch.float32, torch.bfloat16):
                    for shapes in cases:
                        arguments = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
                        with sim_tools.configured(seed=seed):
                            call(*arguments).sum().backward()
                        count += 1
    print(f"{count} calls of {', '.join(dict.fromkeys(name.split()[0] for name in names))}")


main(sys.argv[1:])
