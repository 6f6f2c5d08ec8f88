// A block's threads as fibers, and the schedule: which of them goes on.
#include "model.h"

#include <sys/mman.h>

namespace gk::sim {

Thread* current;
Place place;

namespace {

int made;  // fibers
void (*thread_of_block)();
uint64_t rng;

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

}  // namespace

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

static void switch_to(Fiber* next) {
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
uint32_t random_below(uint32_t n) {  // xorshift64*
  rng ^= rng >> 12, rng ^= rng << 25, rng ^= rng >> 27;
  return uint32_t(((rng * 0x2545F4914F6CDD1Dull) >> 32) * n >> 32);
}
void seed_schedule() { rng = (uint64_t(dials.seed) + 1) * 0x9E3779B97F4A7C15ull; }

// seed 0: warps and lanes in order, each as far as it gets. 1: both reversed. 2, 3: the first, the last warp runs ahead of
// all others. From 4 on: any warp and lane, also where the running warp could go on.
static int any_of(uint32_t mask) {
  const int rotate = int(random_below(32));
  const uint32_t rotated = mask >> rotate | mask << (32 - rotate) % 32;
  return (lowest(rotated) + rotate) % 32;
}

static Fiber* pick() {
  if (!ready_warps) return nullptr;
  const int last = threads / lanes - 1, here = int(running->warp - warps);
  const bool stay = ready_warps >> here & 1;
  int warp, lane;
  switch (dials.seed) {
    case 0: warp = stay ? here : lowest(ready_warps); break;
    case 1: warp = stay ? here : highest(ready_warps); break;
    case 2: warp = ready_warps & 1 ? 0 : stay ? here : lowest(ready_warps); break;
    case 3: warp = ready_warps >> last & 1 ? last : stay ? here : lowest(ready_warps); break;
    default: warp = stay && random_below(4) ? here : any_of(ready_warps);
  }
  const uint32_t ready = warps[warp].ready;
  lane = dials.seed == 1 ? highest(ready) : dials.seed < 4 ? lowest(ready) : any_of(ready);
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

// ---- a block ----
static void run_fiber() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);)
  TSAN(__tsan_func_entry((void*)run_fiber); __tsan_acquire(&launch_token);)
  thread_of_block();
  TSAN(__tsan_release(&end_token); __tsan_func_exit();)
  check_copies_done();
  done++;
  block_at(State::done, "");
  schedule();
  std::abort();
}

static void prepare(Fiber& f, int number) {
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

static char* map_memory(size_t bytes) {
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

void run_threads(void (*thread)()) {
  thread_of_block = thread;
  ready_warps = 0, done = 0;
  for (auto& b : barriers) b = {};
  for (int w = 0; w < threads / lanes; w++) warps[w].ready = 0, warps[w].arrived = 0;
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
  if (dials.count)
    for (int w = 0; w < threads / lanes; w++) count_pending(warps[w]);
  current = running = nullptr;
}

}  // namespace gk::sim
