// The CPU model of a GPU: a block's threads are fibers, warp operations are rendezvous of 32 of them, asynchronous copies
// land as late as is legal, shared memory starts as NaN, and whatever a GPU would not forgive ends the launch with a report.
// Never compiled with -fsanitize=thread: kernels are, and either meet ThreadSanitizer's runtime (GK_SIM_TSAN) or the hooks
// at the end of this file, which see every load and store of a kernel.
#include "sim.h"

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include <sys/mman.h>
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

Thread* current;
Place place;

namespace {

constexpr int lanes = 32, max_warps = 32, max_threads = lanes * max_warps, max_barriers = 16;
constexpr size_t stack_bytes = 256 << 10, arena_bytes = 256 << 10, page = 4096;

// ---- state: one launch at a time, on whichever OS thread asked for it ----
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
struct Counters {
  int64_t launches, blocks, mma, ldmatrix, cp_async, shared_requests, shared_wavefronts, shared_ideal, global_requests,
      global_sectors, global_ideal, global_bytes, global_bytes_16;
};
struct Config { int64_t seed = 0, count = 0, arch = 80, processors = 3, trap = 0; };

Fiber* fibers[max_threads];
Fiber* running;  // `current`, with what kernels need not see
Warp warps[max_warps];
Barrier barriers[max_barriers];
uint32_t ready_warps;
int threads, done, made;
char* arena;
size_t dynamic_bytes, shared_bytes;
struct Declared {
  const void* key;
  size_t offset;
};
Declared declared[64];
int declarations;
void (*body)(void*);
void* body_args;
std::string error;
const char* kernel_name;
const char* host_frame;
uint64_t rng;
std::map<std::string, Counters> counted;
Counters* counters;
// A kernel to the runtime: bytes that its launches have declared, and those of dynamic memory that it may have, by GPU.
struct Function {
  size_t declares = 0;
  std::map<int64_t, size_t> most;
  bool asked() const;
  size_t limit() const;  // of a block, declared and dynamic
};
std::map<const void*, Function> functions;
Function* launched;
std::mutex one_launch;
TSAN(void* tsan_host; char launch_token, end_token;)
#if defined(__x86_64__)
void* host_sp;
#else
ucontext_t host_context;
#endif

Config read_config() {
  Config c;
  const auto from = [](const char* name, int64_t& value) {
    if (const char* text = std::getenv(name)) value = std::atoll(text);
  };
  from("GPT_KERNELS_SIM_SEED", c.seed), from("GPT_KERNELS_SIM_COUNT", c.count), from("GPT_KERNELS_SIM_ARCH", c.arch);
  from("GPT_KERNELS_SIM_PROCESSORS", c.processors), from("GPT_KERNELS_SIM_TRAP", c.trap);
  return c;
}
Config config = read_config();

uint32_t random_below(uint32_t n) {  // xorshift64*
  rng ^= rng >> 12, rng ^= rng << 25, rng ^= rng >> 27;
  return uint32_t(((rng * 0x2545F4914F6CDD1Dull) >> 32) * n >> 32);
}

// ---- fibers ----
#if defined(__x86_64__)
extern "C" void gk_sim_switch(void** from, void* to);
asm(R"(
.text
.type gk_sim_switch, @function
gk_sim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi); movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size gk_sim_switch, .-gk_sim_switch
)");
#endif

void leave_to_host() {
  TSAN(__tsan_switch_to_fiber(tsan_host, 1);)
  ASAN(__sanitizer_start_switch_fiber(&running->fake_stack, nullptr, 0);)
#if defined(__x86_64__)
  gk_sim_switch(&running->sp, host_sp);
#else
  swapcontext(&running->context, &host_context);
#endif
  ASAN(__sanitizer_finish_switch_fiber(running->fake_stack, nullptr, nullptr);)
}

void switch_to(Fiber* next) {
  Fiber* self = running;
  current = running = next;
  TSAN(__tsan_switch_to_fiber(next->tsan, 1);)
  ASAN(__sanitizer_start_switch_fiber(&self->fake_stack, next->stack, stack_bytes);)
#if defined(__x86_64__)
  gk_sim_switch(&self->sp, next->sp);
#else
  swapcontext(&self->context, &next->context);
#endif
  ASAN(__sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);)
}

// ---- schedules ----
// seed 0: warps and lanes in order, each as far as it gets. 1: both reversed. 2, 3: the first, the last warp runs ahead of
// all others. From 4 on: any warp and lane, also where the running warp could go on.
int lowest(uint32_t mask) { return __builtin_ctz(mask); }
int highest(uint32_t mask) { return 31 - __builtin_clz(mask); }
int any_of(uint32_t mask) {
  const int rotate = int(random_below(32));
  const uint32_t rotated = mask >> rotate | mask << (32 - rotate) % 32;
  return (lowest(rotated) + rotate) % 32;
}

Fiber* pick() {
  if (!ready_warps) return nullptr;
  const int last = threads / lanes - 1, here = int(running->warp - warps);
  const bool stay = ready_warps >> here & 1;
  int warp, lane;
  switch (config.seed) {
    case 0: warp = stay ? here : lowest(ready_warps); break;
    case 1: warp = stay ? here : highest(ready_warps); break;
    case 2: warp = ready_warps & 1 ? 0 : stay ? here : lowest(ready_warps); break;
    case 3: warp = ready_warps >> last & 1 ? last : stay ? here : lowest(ready_warps); break;
    default: warp = stay && random_below(4) ? here : any_of(ready_warps);
  }
  const uint32_t ready = warps[warp].ready;
  lane = config.seed == 1 ? highest(ready) : config.seed < 4 ? lowest(ready) : any_of(ready);
  return fibers[warp * lanes + lane];
}

void schedule() {
  Fiber* next = pick();
  if (!next) leave_to_host();
  else if (next != running) switch_to(next);
}

void make_ready(Fiber* f) {
  f->state = State::ready;
  f->warp->ready |= 1u << f->lane;
  ready_warps |= 1u << (f->warp - warps);
}

void block_at(State state, const char* waits_for) {
  running->state = state, running->waits_for = waits_for;
  running->warp->ready &= ~(1u << running->lane);
  if (!running->warp->ready) ready_warps &= ~(1u << (running->warp - warps));
}

// ---- reports ----
std::string where() {
  std::ostringstream s;
  s << "simulator: kernel " << kernel_name << ", block (" << place.index.x << ", " << place.index.y << ", " << place.index.z
    << ")";
  return s.str();
}

template <class... Args> [[noreturn]] void stop(const Args&... args) {
  if (config.trap) raise(SIGTRAP);
  std::ostringstream s;
  s << where() << ", warp " << running->number / lanes << ", lane " << running->lane << ": ";
  (s << ... << args);
  error = s.str();
  leave_to_host();
  std::abort();
}

std::string lane_list(uint32_t mask) {
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

std::string deadlock() {
  std::ostringstream s;
  s << where() << ": deadlock";
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
    for (const auto& [what, mask] : groups) s << "\n  warp " << w << ": lanes " << lane_list(mask) << ' ' << what;
  }
  return s.str();
}

// ---- shared memory and the counters ----
bool in_shared(const void* p) { return size_t((const char*)p - arena) < arena_bytes; }

// Byte by byte, past ThreadSanitizer's memcpy and memset: it is told apart who writes when.
void fill(char* to, char value, int bytes) {
  for (int i = 0; i < bytes; i++) ((volatile char*)to)[i] = value;
}

void check_access(const void* address, int bytes, bool aligned = true) {
  if (aligned && (uintptr_t)address % bytes) stop("misaligned access of ", bytes, " bytes at ", address);
  if (!in_shared(address)) return;
  const size_t offset = (const char*)address - arena;
  if (offset + bytes > shared_bytes)
    stop("access of ", bytes, " bytes at shared offset ", offset, ", past the ", shared_bytes, " bytes of the block");
}

// Wavefronts of one request to shared memory: 32 banks of 4 bytes; 8-byte requests go by half, 16-byte ones by quarter
// warps; lanes that read one word share it.
int wavefronts(const uintptr_t* address, uint32_t mask, int bytes, int& ideal) {
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

void count_global(const Access& a) {
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

// ---- the rendezvous of a warp: the last lane to come does the work for all ----
template <class Operation> void rendezvous(const char* operation, void* mine, const Operation& work, uint32_t mask = ~0u) {
  Warp& warp = *running->warp;
  if (mask != ~0u) stop(operation, ": mask ", mask, " is not the whole warp's, which is all that the model knows");
  if (warp.arrived && std::strcmp(warp.operation, operation) != 0)
    stop("is at ", operation, " while other lanes of its warp are at ", warp.operation);
  warp.operation = operation;
  warp.posted[running->lane] = mine;
  if (++warp.arrived < lanes) {
    block_at(State::at_warp, operation);
    schedule();
    return;
  }
  warp.arrived = 0;
  if (config.count) count_pending(warp);
  work(warp.posted);
  for (int l = 0; l < lanes; l++) make_ready(fibers[running->number / lanes * lanes + l]);
  if (config.seed >= 2) schedule();  // another warp may come first
}

void run_fiber() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);)
  TSAN(__tsan_func_entry((void*)run_fiber); __tsan_acquire(&launch_token);)
  body(body_args);
  TSAN(__tsan_release(&end_token); __tsan_func_exit();)
  for (unsigned c = running->first_copy; c != running->end_copy; c++)
    if (running->copies[c % Fiber::max_copies].bytes) stop("exits while a cp.async of its own is in flight: wait for it first");
  done++;
  block_at(State::done, "");
  schedule();
  std::abort();
}

void prepare(Fiber& f, int number) {
  f.number = number, f.lane = number % lanes, f.warp = &warps[number / lanes];
  f.index = dim3(number % place.extent.x, number / place.extent.x % place.extent.y, number / (place.extent.x * place.extent.y));
  f.oldest_group = f.open_group = 0, f.first_copy = f.end_copy = 0;
  ASAN(__asan_unpoison_memory_region(f.stack, stack_bytes); f.fake_stack = nullptr;)
#if defined(__x86_64__)
  void** sp = (void**)(f.stack + stack_bytes - 64);
  *--sp = nullptr;  // where run_fiber would return to: a debugger's backtrace ends here
  *--sp = (void*)run_fiber;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  f.sp = sp;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = stack_bytes, f.context.uc_link = nullptr;
  makecontext(&f.context, run_fiber, 0);
#endif
  make_ready(&f);
}

char* map_memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("simulator: no memory for the threads of a block");
  return (char*)p;
}

void make_fibers(int count) {
  if (!arena) {
    // guard pages on both sides; the start on a boundary of 1024 bytes, as dynamic shared memory has it
    char* region = map_memory(arena_bytes + 2 * page);
    mprotect(region, page, PROT_NONE), mprotect(region + page + arena_bytes, page, PROT_NONE);
    arena = region + page;
  }
  for (; made < count; made++) {
    fibers[made] = new (map_memory(sizeof(Fiber))) Fiber();
    char* region = map_memory(stack_bytes + page);
    mprotect(region, page, PROT_NONE);  // a stack that overflows faults
    fibers[made]->stack = region + page;
    TSAN(fibers[made]->tsan = __tsan_create_fiber(0); fibers[made]->tsan_agent = __tsan_create_fiber(0);)
  }
}

void run_block() {
  ready_warps = 0, done = 0, declarations = 0, shared_bytes = (dynamic_bytes + 15) / 16 * 16;
  for (auto& b : barriers) b = {};
  for (int w = 0; w < threads / lanes; w++) warps[w].ready = 0, warps[w].arrived = 0;
  // no order between blocks but through atomics: shared memory is new to ThreadSanitizer each time
  TSAN(mmap(arena, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);)
  std::memset(arena, 0xFF, shared_limit());  // NaN in every float type
  TSAN(__tsan_release(&launch_token);)
  for (int t = 0; t < threads; t++) prepare(*fibers[t], t);
  running = fibers[0];
  Fiber* first = pick();
  current = running = first;
  ASAN(void* fake_stack; __sanitizer_start_switch_fiber(&fake_stack, first->stack, stack_bytes);)
  TSAN(__tsan_switch_to_fiber(first->tsan, 1);)
#if defined(__x86_64__)
  gk_sim_switch(&host_sp, first->sp);
#else
  swapcontext(&host_context, &first->context);
#endif
  ASAN(__sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);)
  if (config.count)
    for (int w = 0; w < threads / lanes; w++) count_pending(warps[w]);
  current = running = nullptr;
  counters->blocks++;
  if (error.empty() && done < threads) error = deadlock();
}

}  // namespace

// ---- what kernels and launchers see ----

int arch() { return int(config.arch); }
int processors() { return int(config.processors); }
size_t shared_limit() {  // by the CUDA programming guide's table of compute capabilities
  switch (config.arch) {
    case 80: return 163 << 10;
    case 90:
    case 100: return 227 << 10;
    default: return 99 << 10;
  }
}

static void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*function)(void*), void* args) {
  char frame;
  host_frame = &frame;
  kernel_name = name, place = {{}, block, grid}, body = function, body_args = args;
  dynamic_bytes = dynamic_shared_bytes, threads = int(block.x * block.y * block.z), error.clear();
  rng = (uint64_t(config.seed) + 1) * 0x9E3779B97F4A7C15ull;
  if (threads % lanes)
    throw std::runtime_error("simulator: blocks of whole warps only, got " + std::to_string(threads) + " threads");
  make_fibers(threads);
  counters = &counted[name];
  counters->launches++;
  TSAN(tsan_host = __tsan_get_current_fiber();)
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  // hardware starts blocks in any order: here first to last, last to first, or from somewhere in the middle
  const int64_t first = config.seed >= 4 && blocks ? random_below(uint32_t(std::min<int64_t>(blocks, ~0u))) : 0;
  for (int64_t i = 0; i < blocks && error.empty(); i++) {
    const int64_t b = config.seed == 1 ? blocks - 1 - i : (first + i) % blocks;
    place.index = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (int64_t(grid.x) * grid.y)));
    run_block();
  }
  TSAN(__tsan_acquire(&end_token);)
  if (!error.empty()) throw std::runtime_error(error);
}

bool Function::asked() const { return most.count(config.arch); }
size_t Function::limit() const { return asked() ? shared_limit() : 48 << 10; }

void trap() { stop("__trap()"); }

void* static_shared(const void* key, size_t bytes) {
  for (int i = 0; i < declarations; i++)
    if (declared[i].key == key) return arena + declared[i].offset;
  if (declarations == int(sizeof declared / sizeof *declared)) stop("more shared arrays than the model holds");
  const size_t offset = shared_bytes;
  shared_bytes = (shared_bytes + bytes + 15) / 16 * 16;
  Function& f = *launched;
  f.declares = std::max(f.declares, shared_bytes - (dynamic_bytes + 15) / 16 * 16);
  if (shared_bytes > f.limit())
    stop("the block needs ", shared_bytes, " bytes of shared memory, sm_", config.arch, " has ", f.limit(),
         f.asked() ? "" : " unless asked for more");
  declared[declarations++] = {key, offset};
  return arena + offset;
}

unsigned char* dynamic_shared() { return (unsigned char*)arena; }

void yield() {
  if (config.seed >= 2) schedule();
}

void read(void* to, const void* address, int bytes) {
  check_access(address, bytes);
  TSAN(__tsan_read_range((void*)address, bytes);)
  if (config.count) note((uintptr_t)__builtin_return_address(0), address, bytes, false);
  std::memcpy(to, address, bytes);
}

void write(void* address, const void* from, int bytes) {
  check_access(address, bytes);
  TSAN(__tsan_write_range(address, bytes);)
  if (config.count) note((uintptr_t)__builtin_return_address(0), address, bytes, true);
  std::memcpy(address, from, bytes);
}

void synchronise(const void* address, bool acquire, bool release) {
  (void)address, (void)acquire, (void)release;
  TSAN(if (acquire) __tsan_acquire((void*)address); if (release) __tsan_release((void*)address);)
}

// Of all warp operations only this one orders memory (PTX ISA, bar.warp.sync).
void sync_warp(uint32_t mask) {
  TSAN(__tsan_release(running->warp);)
  rendezvous("__syncwarp", nullptr, [](void**) {}, mask);
  TSAN(__tsan_acquire(running->warp);)
}

static Barrier& arrive(unsigned id, unsigned expected) {
  if (id >= max_barriers) stop("barrier ", id, ": there are ", max_barriers);
  if (expected == 0 || expected % lanes || int(expected) > threads)
    stop("barrier ", id, ": ", expected, " threads, of a block of ", threads, " in whole warps");
  Barrier& b = barriers[id];
  if (b.arrived && b.expected != expected)
    stop("barrier ", id, ": for ", expected, " threads here, ", b.expected, " elsewhere");
  b.expected = expected;
  TSAN(__tsan_release(&b);)
  if (++b.arrived == expected) {
    b.arrived = 0, b.generation++;
    for (int t = 0; t < threads; t++)
      if (fibers[t]->state == State::at_barrier && fibers[t]->barrier == int(id)) make_ready(fibers[t]);
  }
  return b;
}

void barrier_arrive(unsigned id, unsigned expected) { arrive(id, expected); }

void barrier_sync(unsigned id, unsigned expected) {
  const uint64_t generation = id < max_barriers ? barriers[id].generation : 0;
  Barrier& b = arrive(id, expected);
  if (b.generation == generation) {
    running->barrier = int(id);
    block_at(State::at_barrier, "barrier");
    schedule();
  } else if (config.seed) {
    schedule();
  }
  TSAN(__tsan_acquire(&b);)
}

uint32_t shuffle(Shuffle how, uint32_t value, int operand, uint32_t mask) {
  struct Lane {
    uint32_t in, out;
    int operand;
    Shuffle how;
  } mine{value, 0, operand, how};
  const char* const names[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.bfly"};
  rendezvous(names[int(how)], &mine, [](void** posted) {
    for (int l = 0; l < lanes; l++) {
      Lane& lane = *(Lane*)posted[l];
      int from = lane.how == Shuffle::index  ? lane.operand
                 : lane.how == Shuffle::xor_ ? l ^ lane.operand
                 : lane.how == Shuffle::up   ? l - lane.operand
                                             : l + lane.operand;
      if (lane.how == Shuffle::index) from &= lanes - 1;
      lane.out = ((Lane*)posted[from >= 0 && from < lanes ? from : l])->in;
    }
  }, mask);
  return mine.out;
}

uint32_t ballot(bool predicate, uint32_t mask) {
  struct Lane {
    bool in;
    uint32_t out;
  } mine{predicate, 0};
  rendezvous("vote", &mine, [](void** posted) {
    uint32_t bits = 0;
    for (int l = 0; l < lanes; l++) bits |= uint32_t(((Lane*)posted[l])->in) << l;
    for (int l = 0; l < lanes; l++) ((Lane*)posted[l])->out = bits;
  }, mask);
  return mine.out;
}

// Lane l gives the address of row l % 8 of matrix l / 8. Lane l gets from matrix m its row l / 4, elements 2 (l % 4) and
// the next; transposed, its column l / 4.
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed) {
  struct Lane {
    uint32_t* out;
    const uint16_t* row;
    int matrices;
    bool transposed;
  };
  Lane mine{registers, (const uint16_t*)row, matrices, transposed};
  if (running->lane < matrices * 8) {
    if (!in_shared(row)) stop("ldmatrix: ", row, " is not in shared memory");
    check_access(row, 16);
    TSAN(__tsan_read_range((void*)row, 16);)
  }
  const char* const names[] = {"", "ldmatrix.x1", "ldmatrix.x2", "", "ldmatrix.x4"};
  rendezvous(names[matrices], &mine, [](void** posted) {
    const int count = ((Lane*)posted[0])->matrices;
    counters->ldmatrix++;
    uint32_t out[4][lanes];
    for (int m = 0; m < count; m++) {
      const auto row_of = [&](int r) { return ((Lane*)posted[m * 8 + r])->row; };
      for (int l = 0; l < lanes; l++) {
        const int r = l / 4, c = l % 4 * 2;
        out[m][l] = ((Lane*)posted[l])->transposed ? row_of(c)[r] | uint32_t(row_of(c + 1)[r]) << 16
                                                   : row_of(r)[c] | uint32_t(row_of(r)[c + 1]) << 16;
      }
      if (config.count) {
        uintptr_t address[lanes] = {};
        for (int r = 0; r < 8; r++) address[r] = (uintptr_t)row_of(r);
        count_shared(address, 0xFF, 16);
      }
    }
    for (int l = 0; l < lanes; l++)
      for (int m = 0; m < count; m++) ((Lane*)posted[l])->out[m] = out[m][l];
  });
}

// by hand: not every compiler has the type
float from_f16(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023, sign = uint32_t(bits >> 15) << 31;
  float value = exponent ? std::ldexp(1024.f + mantissa, int(exponent) - 25) : std::ldexp(float(mantissa), -24);
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (exponent == 31) word = 0x7F800000 | (mantissa ? 0x400000 | mantissa << 13 : 0);
  word |= sign;
  std::memcpy(&value, &word, 4);
  return value;
}
uint16_t to_f16(float value) {  // to nearest, ties to even
  uint32_t word, small;
  std::memcpy(&word, &value, 4);
  const uint32_t sign = word >> 16 & 0x8000, a = word & 0x7FFFFFFF;
  if (a > 0x7F800000) return uint16_t(sign | 0x7E00 | (a >> 13 & 0x3FF));
  if (a >= 0x47800000) return uint16_t(sign | 0x7C00);
  if (a >= 0x38800000) return uint16_t(sign | (a - (112u << 23) + 0xFFF + (a >> 13 & 1)) >> 13);
  const float shifted = std::fabs(value) + 0.5f;  // the step of float16's denormals
  std::memcpy(&small, &shifted, 4);
  return uint16_t(sign | (small - 0x3F000000));
}

static const float* f16_table() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; i++) t[i] = from_f16(uint16_t(i));
    return t;
  }();
  return table.data();
}

// Fragments of the PTX ISA: with group g = lane / 4 and t = lane % 4, register r of A holds row g + 8 (r % 2) and of B
// column g, at k = 2 t + 8 (r / 2) or 2 t + 8 r and the next (16 bits), k = t + 4 (r / 2) or t + 4 r (tf32);
// element e of C and D is at row g + 8 (e / 2), column 2 t + e % 2.
void mma(Mma type, float* d, const uint32_t* a, const uint32_t* b) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
    Mma type;
  } mine{d, a, b, type};
  const char* const names[] = {"mma.m16n8k16.bf16", "mma.m16n8k16.f16", "mma.m16n8k8.tf32"};
  rendezvous(names[int(type)], &mine, [](void** posted) {
    counters->mma++;
    const Mma type = ((Lane*)posted[0])->type;
    const int K = type == Mma::tf32 ? 8 : 16;
    const float* half = type == Mma::f16 ? f16_table() : nullptr;
    float A[16][16], B[16][8], D[16][8];
    const auto put = [&](uint32_t bits, float& low, float& high) {
      low = half ? half[bits & 0xFFFF] : __uint_as_float(bits << 16);
      high = half ? half[bits >> 16] : __uint_as_float(bits & 0xFFFF0000);
    };
    const auto tf32 = [](uint32_t bits) { return __uint_as_float(bits & 0xFFFFE000); };  // the unit reads no further
    for (int l = 0; l < lanes; l++) {
      const Lane& lane = *(Lane*)posted[l];
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; r++) {
        float* row = A[g + r % 2 * 8];
        if (K == 16) put(lane.a[r], row[2 * t + r / 2 * 8], row[2 * t + r / 2 * 8 + 1]);
        else row[t + r / 2 * 4] = tf32(lane.a[r]);
      }
      for (int r = 0; r < 2; r++) {
        if (K == 16) put(lane.b[r], B[2 * t + r * 8][g], B[2 * t + r * 8 + 1][g]);
        else B[t + r * 4][g] = tf32(lane.b[r]);
      }
      for (int e = 0; e < 4; e++) D[g + e / 2 * 8][2 * t + e % 2] = lane.d[e];
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < K; k++)
        for (int j = 0; j < 8; j++) D[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < lanes; l++)
      for (int e = 0; e < 4; e++) ((Lane*)posted[l])->d[e] = D[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
  });
}

void cp_async(void* shared, const void* global, int bytes, int valid) {
  if (valid < 0 || valid > bytes) stop("cp.async: ", valid, " valid bytes of ", bytes);
  if (!in_shared(shared)) stop("cp.async: the destination ", shared, " is not in shared memory");
  if (in_shared(global)) stop("cp.async: the source ", global, " is in shared memory");
  check_access(shared, bytes);
  if ((uintptr_t)global % bytes) stop("cp.async: misaligned source ", global, " for ", bytes, " bytes");
  counters->cp_async++;
  if (config.count) {
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

}  // namespace gk::sim

// ---- CUDA's runtime ----
using namespace gk::sim;

cudaError_t cudaGetDevice(int* device) { return *device = int(config.arch), cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = int(shared_limit()), cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess             ? "cudaSuccess"
         : error == cudaErrorInvalidValue ? "cudaErrorInvalidValue"
                                          : "cudaErrorInvalidConfiguration";
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* its, const void* function) {
  std::lock_guard<std::mutex> lock(one_launch);
  return its->sharedSizeBytes = functions[function].declares, cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  {
    std::lock_guard<std::mutex> lock(one_launch);
    Function& f = functions[function];
    if (value < 0 || value + f.declares > shared_limit()) return cudaErrorInvalidValue;
    f.most[config.arch] = size_t(value);
  }
  std::this_thread::sleep_for(std::chrono::microseconds(200));  // before it launches another thread's turn may come
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  std::lock_guard<std::mutex> lock(one_launch);
  Function& f = functions[function];
  if (!grid.x || grid.x > 0x7FFFFFFFu || !grid.y || grid.y > 65535 || !grid.z || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (uint64_t(block.x) * block.y * block.z > max_threads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (shared > (f.asked() ? f.most[config.arch] : 48 << 10) || shared + f.declares > f.limit()) return cudaErrorInvalidValue;
  launched = &f;
  const Call& call = *static_cast<const Call*>(args[0]);
  launch(call.name, grid, block, shared, call.body, call.args);
  return cudaSuccess;
}

// ---- C entry points, for ctypes ----
#define GK_EXPORT extern "C" __attribute__((visibility("default")))

// 0 on success, 1 for an unknown name
GK_EXPORT int gpt_kernels_sim_configure(const char* name, int64_t value) {
  using gk::sim::config;
  const std::pair<const char*, int64_t*> names[] = {{"seed", &config.seed},
                                                    {"count", &config.count},
                                                    {"arch", &config.arch},
                                                    {"processors", &config.processors},
                                                    {"trap", &config.trap}};
  for (auto& [known, field] : names)
    if (std::strcmp(name, known) == 0) return *field = value, 0;
  return 1;
}

// What was counted since the last call, as JSON: kernel -> counters.
GK_EXPORT const char* gpt_kernels_sim_counters() {
  static std::string text;
  std::lock_guard<std::mutex> lock(gk::sim::one_launch);
  std::ostringstream s;
  s << '{';
  for (auto& [name, c] : gk::sim::counted) {
    s << (s.tellp() > 1 ? ", " : "") << '"' << name << "\": {";
    const std::pair<const char*, int64_t> fields[] = {{"launches", c.launches},
                                                      {"blocks", c.blocks},
                                                      {"mma", c.mma},
                                                      {"ldmatrix", c.ldmatrix},
                                                      {"cp_async", c.cp_async},
                                                      {"shared_requests", c.shared_requests},
                                                      {"shared_wavefronts", c.shared_wavefronts},
                                                      {"shared_ideal", c.shared_ideal},
                                                      {"global_requests", c.global_requests},
                                                      {"global_sectors", c.global_sectors},
                                                      {"global_ideal", c.global_ideal},
                                                      {"global_bytes", c.global_bytes},
                                                      {"global_bytes_16", c.global_bytes_16}};
    for (auto& [field, value] : fields) s << (field == fields[0].first ? "" : ", ") << '"' << field << "\": " << value;
    s << '}';
  }
  s << '}';
  gk::sim::counted.clear();
  return (text = s.str()).c_str();
}

// ---- ThreadSanitizer's instrumentation, served by the model ----
// Kernels are compiled with -fsanitize=thread in the plain build too: every load and store comes by here.
#if !defined(GK_SIM_TSAN) && !defined(__SANITIZE_ADDRESS__)
namespace gk::sim {
static inline void see(uintptr_t pc, const void* address, int bytes, bool write, bool aligned) {
  if (!running) return;  // a launcher's own
  check_access(address, bytes, aligned);
  if (config.count) note(pc, address, bytes, write);
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
