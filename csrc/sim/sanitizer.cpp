// ThreadSanitizer's instrumentation, served by the model: kernels are compiled with -fsanitize=thread in the plain build too, so that
// every load and store comes by here.
#include "model.h"

#if !defined(GK_SIM_TSAN) && !defined(__SANITIZE_ADDRESS__)
namespace gk::sim {
static inline void see(uintptr_t pc, const void* address, int bytes, bool write, bool aligned) {
  if (!running) return;  // a launcher's own
  check_access(address, bytes, aligned);
  if (dials.count) note(pc, address, bytes, write);
}
}  // namespace gk::sim
#define GK_SEEN(name, bytes, write, aligned) \
  extern "C" void __tsan_##name(void* p) { gk::sim::see((uintptr_t)__builtin_return_address(0), p, bytes, write, aligned); }
#define GK_SEE(n)                             \
  GK_SEEN(read##n, n, false, true)            \
  GK_SEEN(write##n, n, true, true)            \
  GK_SEEN(unaligned_read##n, n, false, false) \
  GK_SEEN(unaligned_write##n, n, true, false)
GK_SEE(1)
GK_SEE(2)
GK_SEE(4)
GK_SEE(8)
GK_SEE(16)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, unsigned long n) {
  gk::sim::see((uintptr_t)__builtin_return_address(0), p, int(n), false, false);
}
void __tsan_write_range(void* p, unsigned long n) {
  gk::sim::see((uintptr_t)__builtin_return_address(0), p, int(n), true, false);
}
// launchers only: reference counts and guards of statics
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_load(const volatile long* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic64_store(volatile long* p, long v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
}
#endif
