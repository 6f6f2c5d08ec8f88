"""What the op tests iterate over, in one place: dtypes, instruction sets that this CPU has, boundary sizes."""

import torch

from gpt_kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ISAS = tuple(dispatch.ISA_LEVELS[: dispatch.ISA_LEVELS.index(dispatch.best_isa()) + 1]) if dispatch.library else ()
ROWS = (0, 1, 2, 17)
COLUMNS = (1, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 1023, 1024, 1025, 4096)
