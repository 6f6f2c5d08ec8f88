// The one place that launches, by CUDA's runtime or, in csrc/sim, by the model's, which refuses what a driver refuses.
#include "launch.cuh"

#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace gk {

// Without asking, a kernel has 48 KB, of which what it declares is a part. So all that there is is asked for, once per kernel
// and GPU: the attribute is the kernel's, and a launch that asked for its own size would take back what another thread's has
// asked for.
static cudaError_t ask_for_shared(const void* function) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> asked;
  int device = 0, limit = 0;
  cudaFuncAttributes its;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error != cudaSuccess || asked.count({function, device})) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&its, function);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit - int(its.sharedSizeBytes));
  if (error == cudaSuccess) asked.insert({function, device});
  return error;
}

void launch_raw(const char* name, const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                void** args) {
  cudaError_t error = shared ? ask_for_shared(function) : cudaSuccess;
  if (error == cudaSuccess) error = cudaLaunchKernel(function, grid, block, args, shared, stream);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next launch shall not find it
  std::ostringstream message;
  message << "launch of " << name << " refused: " << cudaGetErrorString(error) << " (" << cudaGetErrorName(error) << "); grid ("
          << grid.x << ", " << grid.y << ", " << grid.z << "), block (" << block.x << ", " << block.y << ", " << block.z
          << "), " << shared
          << " bytes of dynamic shared memory. Or a fault of an earlier kernel, which a launch is the first to be told "
          << "of: CUDA_LAUNCH_BLOCKING=1 finds its launch";
  throw std::runtime_error(message.str());
}

}  // namespace gk
