// What is counted: bank conflicts of shared memory, sectors of global memory, by request of a warp.
#include "model.h"

#include <vector>

namespace gk::sim {

static std::map<std::string, Counters> counted;

Counters* counters_of(const char* kernel) { return &counted[kernel]; }

std::map<std::string, Counters> take_counters() {
  std::lock_guard<std::mutex> lock(one_launch);
  return std::exchange(counted, {});
}

// Wavefronts of one request to shared memory: 32 banks of 4 bytes; 8-byte requests go by half, 16-byte ones by quarter
// warps; lanes that read one word share it.
static int wavefronts(const uintptr_t* address, uint32_t mask, int bytes, int& ideal) {
  const int group = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  int total = 0;
  for (int first = 0; first < lanes; first += group) {
    std::vector<uintptr_t> words[32];
    for (int l = first; l < first + group; l++) {
      if (!(mask >> l & 1)) continue;
      for (uintptr_t word = address[l] / 4; word <= (address[l] + bytes - 1) / 4; word++) {
        auto& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      }
    }
    size_t most = 0, distinct = 0;
    for (auto& bank : words) most = std::max(most, bank.size()), distinct += bank.size();
    total += int(most), ideal += int((distinct + 31) / 32);
  }
  return total;
}

void count_shared(const uintptr_t* address, uint32_t mask, int bytes) {
  int ideal = 0;
  counters->shared_requests++;
  counters->shared_wavefronts += wavefronts(address, mask, bytes, ideal);
  counters->shared_ideal += ideal;
}

static void count_global(const Access& a) {
  std::vector<uintptr_t> sectors, units;  // of 32 bytes; of the request's own size
  const auto insert = [](std::vector<uintptr_t>& set, uintptr_t x) {
    if (std::find(set.begin(), set.end(), x) == set.end()) set.push_back(x);
  };
  for (int l = 0; l < lanes; l++) {
    if (!(a.mask >> l & 1)) continue;
    for (uintptr_t s = a.address[l] / 32; s <= (a.address[l] + a.bytes - 1) / 32; s++) insert(sectors, s);
    insert(units, a.address[l]);
  }
  counters->global_requests++;
  counters->global_sectors += int64_t(sectors.size());
  // what all lanes read is one piece
  const int64_t bytes = int64_t(units.size()) * a.bytes;
  counters->global_ideal += (bytes + 31) / 32, counters->global_bytes += bytes;
  if (a.bytes == 16) counters->global_bytes_16 += bytes;
}

void count_pending(Warp& warp) {
  for (auto& [pc, instruction] : warp.instructions)
    for (const Access& a : instruction.accesses)
      in_shared((void*)a.address[lowest(a.mask)]) ? count_shared(a.address, a.mask, a.bytes) : count_global(a);
  warp.instructions.clear();
}

void note(uintptr_t instruction, const void* address, int bytes, bool write) {
  const char* p = (const char*)address;
  // local memory, parameters and special registers are no traffic here
  const auto within = [p](const void* from, size_t size) { return size_t(p - (const char*)from) < size; };
  if (within(running->stack, stack_bytes) || within(host_frame, 64 << 10) || within(&place, sizeof place) ||
      within(&current, sizeof current) || within(&running->index, sizeof(dim3)))
    return;
  auto& entry = running->warp->instructions[instruction * 2 + in_shared(p)];
  const unsigned index = entry.seen[running->lane]++;
  if (entry.accesses.size() <= index) entry.accesses.resize(index + 1);
  Access& a = entry.accesses[index];
  a.mask |= 1u << running->lane, a.bytes = bytes, a.write = write, a.address[running->lane] = (uintptr_t)address;
}

}  // namespace gk::sim
