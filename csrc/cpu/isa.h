// Which instruction set the CPU kernels use: read by GK_BEST at each call, set once at load or by a test.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GK_X86_TARGETS 1
#else
#define GK_X86_TARGETS 0
#endif

namespace gk {
extern int isa_level;  // 0 base, 1 avx2, 2 avx512, 3 avx512_bf16
}
