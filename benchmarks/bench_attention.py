"""attention against torch.nn.functional.scaled_dot_product_attention, forward and backward apart."""

import torch
import torch.nn.functional as F
from harness import Case, run

import gpt_kernels
from gpt_kernels.ops.attention import attention_cost

# B, H, T, D, causal, dropout
FLOAT32, BFLOAT16 = (torch.float32,), (torch.float32, torch.bfloat16)
CASES = (
    (4, 12, 1024, 64, True, 0.0, BFLOAT16),
    (4, 12, 1024, 64, False, 0.0, FLOAT32),
    (4, 12, 1024, 64, True, 0.1, FLOAT32),
    (1, 12, 4096, 64, True, 0.0, FLOAT32),
    (4, 8, 1024, 128, True, 0.0, BFLOAT16),
    (8, 12, 128, 64, True, 0.0, FLOAT32),
    (1, 2, 16, 32, True, 0.0, FLOAT32),
)


def cases(quick):
    for B, H, T, D, causal, dropout_p, dtypes in CASES[:1] if quick else CASES:
        for dtype in dtypes:
            torch.manual_seed(0)
            # (B, H, T, D) as a model has it: views of (B, T, H, D)
            inputs = [torch.randn(B, T, H, D, dtype=dtype).requires_grad_() for _ in "qkv"]

            def attend(sdpa, q, k, v, p=dropout_p, causal=causal):
                return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=p, is_causal=causal)

            def eager(*qkv, attend=attend):
                return attend(F.scaled_dot_product_attention, *qkv)

            def ours(*qkv, attend=attend):
                return attend(gpt_kernels.scaled_dot_product_attention, *qkv)

            def cost(backward, inputs=inputs, causal=causal):
                return attention_cost(*(x.transpose(1, 2) for x in inputs), causal, backward)

            shape = f"B{B} H{H} T{T} D{D}{' causal' if causal else ''}{f' dropout {dropout_p}' if dropout_p else ''}"
            yield Case("attention", shape, inputs, eager, ours, cost, directions=("fwd", "bwd"), random=dropout_p > 0)


if __name__ == "__main__":
    run(cases, __doc__)
