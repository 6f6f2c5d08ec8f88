// The instruction set in use, and what the library says about its own build. Plain C entry points, called through
// ctypes: they need no Python headers, so one binary serves every Python.
#include "isa.h"

#include <cstdint>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace gk {

static const char* const level_names[] = {"base", "avx2", "avx512", "avx512_bf16"};

static int best_level() {
#if GK_X86_TARGETS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
  if (avx512) return 2;
  if (avx2) return 1;
#endif
  return 0;
}

int isa_level = best_level();

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  // whole 2 MB pages inside the allocation only; refusal costs nothing (LOG L014)
  const uintptr_t page = uintptr_t{2} << 20, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1),
                  end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

bool is_fresh(const void* address) {
#if defined(__linux__)
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = reinterpret_cast<uintptr_t>(address) & ~(page - 1);
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(begin), 1, &resident) == 0 && !(resident & 1);
#else
  (void)address;
  return false;
#endif
}

}  // namespace gk

#define GK_EXPORT extern "C" __attribute__((visibility("default")))

GK_EXPORT const char* gpt_kernels_isa() { return gk::level_names[gk::isa_level]; }
GK_EXPORT const char* gpt_kernels_best_isa() { return gk::level_names[gk::best_level()]; }
#if defined(__clang__)
GK_EXPORT const char* gpt_kernels_compiler() { return __VERSION__; }
#else
GK_EXPORT const char* gpt_kernels_compiler() { return "GCC " __VERSION__; }
#endif
GK_EXPORT int64_t gpt_kernels_torch_target() { return TORCH_TARGET_VERSION; }

// 0 on success, 1 for an unknown name, 2 for a level this CPU does not have.
GK_EXPORT int gpt_kernels_set_isa(const char* name) {
  for (int level = 0; level < 4; level++) {
    if (std::strcmp(name, gk::level_names[level]) != 0) continue;
    if (level > gk::best_level()) return 2;
    gk::isa_level = level;
    return 0;
  }
  return 1;
}
