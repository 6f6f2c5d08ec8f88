// What the forward and backward launchers of attention on the CPU share: AttentionArgs, per-thread scratch.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>

#include "launch.h"
#include "philox_launch.h"

#include "../attention_args.h"

namespace gk {

constexpr int64_t key_block = 64;  // keys per tile: K^T and V of one tile and head_dim 64 fit L1

// run(first, last, scratch) over [0, tasks) in parallel, each thread with `bytes` of memory aligned to a cache line.
template <class Run> inline void run_with_scratch(const char* op, int64_t tasks, int64_t bytes, const Run& run) {
  std::atomic<bool> out_of_memory{false};  // nothing may be thrown on another thread
  parallel_for(0, tasks, 1, [&](int64_t t0, int64_t t1) {
    const std::unique_ptr<char, void (*)(void*)> scratch((char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
    if (scratch) run(t0, t1, scratch.get());
    else out_of_memory = true;
  });
  GK_CHECK(!out_of_memory, op, ": out of memory, ", bytes, " bytes of scratch per thread were asked for");
}

}  // namespace gk
