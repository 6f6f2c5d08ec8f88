// What the model tells of itself, to the host and to Python: its dials, what it counted, what went wrong.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gk::sim {

// README.md says what each means; in the environment GPT_KERNELS_SIM_<NAME>.
struct Dials { int64_t seed = 0, count = 0, arch = 80, processors = 3, trap = 0; };
extern Dials dials;

struct Counters {
  int64_t launches, blocks, mma, ldmatrix, cp_async, shared_requests, shared_wavefronts, shared_ideal, global_requests,
      global_sectors, global_ideal, global_bytes, global_bytes_16;
};
// Kernel -> counters, since the last call.
std::map<std::string, Counters> take_counters();

// What some lanes of a warp wait for in a deadlock.
struct Wait {
  int warp;
  std::vector<int> lanes;
  std::string at;  // "barrier", a warp operation's name, or "" for those that have exited
  int barrier = -1, arrived = 0, expected = 0;  // of a barrier
};
struct Report {
  std::string kernel, what, text;  // what: without the place; text: all of it
  int block[3];
  int warp = -1, lane = -1;  // that went wrong; -1 in a deadlock
  std::vector<Wait> waits;   // of a deadlock
};
// Of the last launch that went wrong, once.
std::optional<Report> take_report();

}  // namespace gk::sim
