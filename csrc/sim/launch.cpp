// A launch block by block, and CUDA's runtime, which refuses what a driver refuses.
#include "model.h"

#include <chrono>
#include <thread>

namespace gk::sim {

static Dials read_dials() {
  Dials c;
  const auto from = [](const char* name, int64_t& value) {
    if (const char* text = std::getenv(name)) value = std::atoll(text);
  };
  from("GPT_KERNELS_SIM_SEED", c.seed), from("GPT_KERNELS_SIM_COUNT", c.count), from("GPT_KERNELS_SIM_ARCH", c.arch);
  from("GPT_KERNELS_SIM_PROCESSORS", c.processors), from("GPT_KERNELS_SIM_TRAP", c.trap);
  return c;
}
Dials dials = read_dials();

static std::map<const void*, Function> functions;

int arch() { return int(dials.arch); }
int processors() { return int(dials.processors); }
size_t shared_limit() {  // by the CUDA programming guide's table of compute capabilities
  switch (dials.arch) {
    case 80: return 163 << 10;
    case 90:
    case 100: return 227 << 10;
    default: return 99 << 10;
  }
}

static void run_block() {
  clear_shared();
  run_threads([] { body(body_args); });
  counters->blocks++;
  if (!report && done < threads) report = deadlock();
}

static void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*function)(void*), void* args) {
  char frame;
  host_frame = &frame;
  kernel_name = name, place = {{}, block, grid}, body = function, body_args = args;
  dynamic_bytes = dynamic_shared_bytes, threads = int(block.x * block.y * block.z), report.reset();
  seed_schedule();
  if (threads % lanes)
    throw std::runtime_error("simulator: blocks of whole warps only, got " + std::to_string(threads) + " threads");
  make_fibers(threads);
  counters = counters_of(name);
  counters->launches++;
  TSAN(tsan_host = __tsan_get_current_fiber();)
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  // hardware starts blocks in any order: here first to last, last to first, or from somewhere in the middle
  const int64_t first = dials.seed >= 4 && blocks ? random_below(uint32_t(std::min<int64_t>(blocks, ~0u))) : 0;
  for (int64_t i = 0; i < blocks && !report; i++) {
    const int64_t b = dials.seed == 1 ? blocks - 1 - i : (first + i) % blocks;
    place.index = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (int64_t(grid.x) * grid.y)));
    run_block();
  }
  TSAN(__tsan_acquire(&end_token);)
  if (report) throw std::runtime_error(report->text);
}

bool Function::asked() const { return most.count(dials.arch); }
size_t Function::limit() const { return asked() ? shared_limit() : 48 << 10; }

}  // namespace gk::sim

// ---- CUDA's runtime ----
using namespace gk::sim;

cudaError_t cudaGetDevice(int* device) { return *device = int(dials.arch), cudaSuccess; }
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
    f.most[dials.arch] = size_t(value);
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
  if (shared > (f.asked() ? f.most[dials.arch] : 48 << 10) || shared + f.declares > f.limit()) return cudaErrorInvalidValue;
  launched = &f;
  const Call& call = *static_cast<const Call*>(args[0]);
  launch(call.name, grid, block, shared, call.body, call.args);
  return cudaSuccess;
}
