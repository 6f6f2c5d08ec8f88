// What the forward and backward launchers of attention on the CPU share: AttentionArgs, per-thread scratch.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>

#include "launch.h"
#include "philox_launch.h"

#include "../args/attention.h"

namespace gk {

constexpr int64_t key_block = 64;  // keys per tile: K^T and V of one tile and head_dim 64 fit L1
constexpr int64_t few_queries = 2;  // up to here packing a key costs more than using it: few_scores

// Multiplications in the two products of every query with every key.
inline double score_work(const AttentionArgs& s) { return double(s.B * s.H) * s.Tq * s.Tk * (s.D + s.Dv) + 1; }

// run(first, last, scratch) over [0, tasks) in parallel, each thread with `bytes` of memory aligned to a cache line. work: of
// all tasks, in multiplications; a thread gets what takes it some microseconds at least, so that a tiny call stays on its own.
template <class Run> inline void run_with_scratch(const char* op, int64_t tasks, double work, int64_t bytes, const Run& run) {
  std::atomic<bool> out_of_memory{false};  // nothing may be thrown on another thread
  const int64_t grain = std::max<int64_t>(1, (int64_t)(std::min(1.0, 1e5 / work) * tasks));
  parallel_for(0, tasks, grain, [&](int64_t t0, int64_t t1) {
    const std::unique_ptr<char, void (*)(void*)> scratch((char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
    if (scratch) run(t0, t1, scratch.get());
    else out_of_memory = true;
  });
  GK_CHECK(!out_of_memory, op, ": out of memory, ", bytes, " bytes of scratch per thread were asked for");
}

}  // namespace gk
