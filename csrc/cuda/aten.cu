// This library's kernels in ATen's own slots for GPUs: all of ../aten.h.
#ifdef GK_SIM
#define GK_ATEN_KEY "CPU"
#define GK_ATEN_TORCH "gpt_kernels_aten_sim::"
#else
#define GK_ATEN_KEY "CUDA"
#define GK_ATEN_TORCH "gpt_kernels_aten_cuda::"
#endif
#include "../aten.h"
