// This library's kernels in ATen's own slots for CPUs: all of ../aten.h.
#ifndef GK_TARGET
#define GK_ATEN_KEY "CPU"
#define GK_ATEN_TORCH "gpt_kernels_aten_cpu::"
#include "../aten.h"
#endif
