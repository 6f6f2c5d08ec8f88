// The model's state and what its parts ask of one another. One launch at a time, on whichever OS thread asked for it.
// Never compiled with -fsanitize=thread: kernels are, and either meet ThreadSanitizer's runtime (GK_SIM_TSAN) or the hooks of
// sanitizer.cpp, which see every load and store of a kernel.
#pragma once
#include "face.h"
#include "sim.h"

#include <csignal>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <unordered_map>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(GK_SIM_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void __tsan_func_entry(void*);
void __tsan_func_exit();
}
#define TSAN(...) __VA_ARGS__
#else
#define TSAN(...)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif

namespace gk::sim {

constexpr int lanes = 32, max_warps = 32, max_threads = lanes * max_warps, max_barriers = 16;
constexpr size_t stack_bytes = 256 << 10, arena_bytes = 256 << 10, page = 4096;

struct Copy {
  char* to;
  const char* from;
  int bytes, valid, group;
};
struct Warp;
enum class State : uint8_t { ready, at_warp, at_barrier, done };
struct Fiber : Thread {
  Warp* warp;
  int lane, number;
  State state;
  const char* waits_for;
  int barrier;
  char* stack;
#if defined(__x86_64__)
  void* sp;
#else
  ucontext_t context;
#endif
  TSAN(void* tsan, *tsan_agent;)  // its own clock and that of its asynchronous copies
  ASAN(void* fake_stack;)
  int oldest_group, open_group;
  // a ring: no heap in here, whose reuse ThreadSanitizer would take for a race between fibers
  static constexpr unsigned max_copies = 1024;
  unsigned first_copy, end_copy;
  Copy copies[max_copies];
};
struct Access {
  uint32_t mask = 0;
  int bytes = 0;
  bool write = false;
  uintptr_t address[lanes];
};
struct Warp {
  uint32_t ready;
  int arrived;
  const char* operation;
  void* posted[lanes];
  // loads and stores of the lanes since the last rendezvous, by instruction: the n-th of each lane go together
  struct Instruction {
    unsigned seen[lanes] = {};
    std::vector<Access> accesses;
  };
  std::unordered_map<uintptr_t, Instruction> instructions;
};
struct Barrier {
  unsigned expected, arrived;
  uint64_t generation;
};

inline Fiber* fibers[max_threads];
inline Fiber* running;  // `current`, with what kernels need not see
inline Warp warps[max_warps];
inline Barrier barriers[max_barriers];
inline uint32_t ready_warps;
inline int threads, done;
inline char* arena;
inline size_t dynamic_bytes, shared_bytes;
inline int declarations;  // of shared arrays, in this block
inline void (*body)(void*);
inline void* body_args;
inline std::optional<Report> report;  // of this launch
inline const char* kernel_name;
inline const char* host_frame;
inline Counters* counters;  // of the kernel that runs
// A kernel to the runtime: bytes that its launches have declared, and those of dynamic memory that it may have, by GPU.
struct Function {
  size_t declares = 0;
  std::map<int64_t, size_t> most;
  bool asked() const;
  size_t limit() const;  // of a block, declared and dynamic
};
inline Function* launched;
inline std::mutex one_launch;
TSAN(inline void* tsan_host; inline char launch_token, end_token;)
#if defined(__x86_64__)
inline void* host_sp;
#else
inline ucontext_t host_context;
#endif

// ---- fibers.cpp: a thread of a block, and which of them goes on ----
void leave_to_host();
void schedule();
void make_ready(Fiber* f);
void block_at(State state, const char* waits_for);
void make_fibers(int count);
void run_threads(void (*thread)());  // all of a block's, until none goes on
uint32_t random_below(uint32_t n);
void seed_schedule();
inline int lowest(uint32_t mask) { return __builtin_ctz(mask); }
inline int highest(uint32_t mask) { return 31 - __builtin_clz(mask); }

// ---- reports.cpp: what went wrong ----
[[noreturn]] void stop_with(const std::string& what);  // in the running thread
template <class... Args> [[noreturn]] void stop(const Args&... args) {
  std::ostringstream s;
  (s << ... << args);
  stop_with(s.str());
}
Report deadlock();

// ---- memory.cpp: a block's shared memory, asynchronous copies ----
inline bool in_shared(const void* p) { return size_t((const char*)p - arena) < arena_bytes; }
void clear_shared();
void check_copies_done();
inline void check_access(const void* address, int bytes, bool aligned = true) {
  if (aligned && (uintptr_t)address % bytes) stop("misaligned access of ", bytes, " bytes at ", address);
  if (!in_shared(address)) return;
  const size_t offset = (const char*)address - arena;
  if (offset + bytes > shared_bytes)
    stop("access of ", bytes, " bytes at shared offset ", offset, ", past the ", shared_bytes, " bytes of the block");
}

// ---- counters.cpp: bank conflicts and sectors ----
Counters* counters_of(const char* kernel);
void note(uintptr_t instruction, const void* address, int bytes, bool write);
void count_pending(Warp& warp);
void count_shared(const uintptr_t* address, uint32_t mask, int bytes);

}  // namespace gk::sim
