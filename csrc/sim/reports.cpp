// What went wrong, where, and what everybody waited for.
#include "model.h"

namespace gk::sim {

static std::optional<Report> last;  // until Python takes it

static Report report_here() {
  Report r;
  r.kernel = kernel_name;
  r.block[0] = int(place.index.x), r.block[1] = int(place.index.y), r.block[2] = int(place.index.z);
  std::ostringstream s;
  s << "simulator: kernel " << r.kernel << ", block (" << r.block[0] << ", " << r.block[1] << ", " << r.block[2] << ")";
  r.text = s.str();
  return r;
}

void stop_with(const std::string& what) {
  if (dials.trap) raise(SIGTRAP);
  Report r = report_here();
  r.what = what, r.warp = running->number / lanes, r.lane = running->lane;
  r.text += ", warp " + std::to_string(r.warp) + ", lane " + std::to_string(r.lane) + ": " + what;
  report = last = r;
  leave_to_host();
  std::abort();
}

void trap() { stop("__trap()"); }

static std::string lane_list(uint32_t mask) {
  std::ostringstream s;
  for (int i = 0; i < lanes; i++) {
    if (!(mask >> i & 1)) continue;
    int end = i;
    while (end + 1 < lanes && mask >> (end + 1) & 1) end++;
    s << (s.tellp() ? ", " : "") << i;
    if (end > i) s << '-' << end;
    i = end;
  }
  return s.str();
}

Report deadlock() {
  Report r = report_here();
  r.what = "deadlock", r.text += ": deadlock";
  for (int w = 0; w < threads / lanes; w++) {
    std::map<std::string, uint32_t> groups;
    for (int l = 0; l < lanes; l++) {
      const Fiber& f = *fibers[w * lanes + l];
      std::ostringstream what;
      if (f.state == State::done) what << "have exited";
      else if (f.state == State::at_warp) what << "wait for the whole warp at " << f.waits_for;
      else
        what << "wait at barrier " << f.barrier << " (" << barriers[f.barrier].arrived << " of " << barriers[f.barrier].expected
             << " threads arrived)";
      groups[what.str()] |= 1u << l;
    }
    for (const auto& [what, mask] : groups) {
      r.text += "\n  warp " + std::to_string(w) + ": lanes " + lane_list(mask) + ' ' + what;
      const Fiber& f = *fibers[w * lanes + lowest(mask)];
      Wait wait = {w, {}, f.state == State::done ? "" : f.waits_for};
      for (int l = 0; l < lanes; l++)
        if (mask >> l & 1) wait.lanes.push_back(l);
      if (f.state == State::at_barrier)
        wait.barrier = f.barrier, wait.arrived = int(barriers[f.barrier].arrived),
        wait.expected = int(barriers[f.barrier].expected);
      r.waits.push_back(wait);
    }
  }
  last = r;
  return r;
}

std::optional<Report> take_report() {
  std::lock_guard<std::mutex> lock(one_launch);
  return std::exchange(last, std::nullopt);
}

}  // namespace gk::sim
