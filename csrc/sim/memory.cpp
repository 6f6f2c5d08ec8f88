// A block's shared memory, and asynchronous copies, which land as late as is legal.
#include "model.h"

#include <sys/mman.h>

namespace gk::sim {

struct Declared {
  const void* key;
  size_t offset;
};
static Declared declared[64];

void clear_shared() {
  declarations = 0, shared_bytes = (dynamic_bytes + 15) / 16 * 16;
  // no order between blocks but through atomics: shared memory is new to ThreadSanitizer each time
  TSAN(mmap(arena, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);)
  std::memset(arena, 0xFF, shared_limit());  // NaN in every float type
}

void* static_shared(const void* key, size_t bytes) {
  for (int i = 0; i < declarations; i++)
    if (declared[i].key == key) return arena + declared[i].offset;
  if (declarations == int(sizeof declared / sizeof *declared)) stop("more shared arrays than the model holds");
  const size_t offset = shared_bytes;
  shared_bytes = (shared_bytes + bytes + 15) / 16 * 16;
  Function& f = *launched;
  f.declares = std::max(f.declares, shared_bytes - (dynamic_bytes + 15) / 16 * 16);
  if (shared_bytes > f.limit())
    stop("the block needs ", shared_bytes, " bytes of shared memory, sm_", dials.arch, " has ", f.limit(),
         f.asked() ? "" : " unless asked for more");
  declared[declarations++] = {key, offset};
  return arena + offset;
}

unsigned char* dynamic_shared() { return (unsigned char*)arena; }

void read(void* to, const void* address, int bytes) {
  check_access(address, bytes);
  TSAN(__tsan_read_range((void*)address, bytes);)
  if (dials.count) note((uintptr_t)__builtin_return_address(0), address, bytes, false);
  std::memcpy(to, address, bytes);
}

void write(void* address, const void* from, int bytes) {
  check_access(address, bytes);
  TSAN(__tsan_write_range(address, bytes);)
  if (dials.count) note((uintptr_t)__builtin_return_address(0), address, bytes, true);
  std::memcpy(address, from, bytes);
}

void synchronise(const void* address, bool acquire, bool release) {
  (void)address, (void)acquire, (void)release;
  TSAN(if (acquire) __tsan_acquire((void*)address); if (release) __tsan_release((void*)address);)
}

// ---- asynchronous copies ----

// Byte by byte, past ThreadSanitizer's memcpy and memset: it is told apart who writes when.
static void fill(char* to, char value, int bytes) {
  for (int i = 0; i < bytes; i++) ((volatile char*)to)[i] = value;
}

void cp_async(void* shared, const void* global, int bytes, int valid) {
  if (valid < 0 || valid > bytes) stop("cp.async: ", valid, " valid bytes of ", bytes);
  if (!in_shared(shared)) stop("cp.async: the destination ", shared, " is not in shared memory");
  if (in_shared(global)) stop("cp.async: the source ", global, " is in shared memory");
  check_access(shared, bytes);
  if ((uintptr_t)global % bytes) stop("cp.async: misaligned source ", global, " for ", bytes, " bytes");
  counters->cp_async++;
  if (dials.count) {
    const uintptr_t here = (uintptr_t)__builtin_return_address(0);
    note(here, shared, bytes, true);
    if (valid) note(here, global, bytes, false);
  }
  Fiber& f = *running;
  if (f.end_copy - f.first_copy == Fiber::max_copies) stop("cp.async: more than ", Fiber::max_copies, " copies in flight");
  Copy& copy = f.copies[f.end_copy++ % Fiber::max_copies];
  copy = {(char*)shared, (const char*)global, bytes, valid, f.open_group};
  TSAN(__tsan_release(&copy);)
  fill((char*)shared, char(0xFF), bytes);
}

void cp_async_commit() { running->open_group++; }

// The copies of all but the youngest `pending` committed groups land now, at the last moment they may.
void cp_async_wait(int pending) {
  Fiber& f = *running;
  for (; f.first_copy != f.end_copy; f.first_copy++) {
    Copy& c = f.copies[f.first_copy % Fiber::max_copies];
    if (c.group >= f.open_group - pending) break;
    TSAN(__tsan_switch_to_fiber(f.tsan_agent, 1); __tsan_acquire(&c); __tsan_func_entry((void*)cp_async);
         __tsan_read_range((void*)c.from, c.valid); __tsan_write_range(c.to, c.bytes);)
    for (int i = 0; i < c.valid; i++) ((volatile char*)c.to)[i] = c.from[i];
    fill(c.to + c.valid, 0, c.bytes - c.valid);
    TSAN(__tsan_func_exit(); __tsan_release(&c); __tsan_switch_to_fiber(f.tsan, 1); __tsan_acquire(&c);)
  }
}

void check_copies_done() {
  for (unsigned c = running->first_copy; c != running->end_copy; c++)
    if (running->copies[c % Fiber::max_copies].bytes) stop("exits while a cp.async of its own is in flight: wait for it first");
}

}  // namespace gk::sim
