// What the launchers need of a GPU and of torch beyond its stable interface, and what the library says about its own build.
#include "common.cuh"

// torch's own setting, which its stable interface does not have: weak, so that under a torch without it float32 stays float32.
#define GK_WEAK __attribute__((weak, visibility("default")))
namespace at {
enum class Float32Backend { GENERIC, CUDA };
enum class Float32Op { ALL, CONV, RNN, MATMUL };
enum class Float32Precision { NONE, IEEE, TF32 };
struct Context { GK_WEAK Float32Precision float32Precision(Float32Backend, Float32Op) const; };
GK_WEAK Context& globalContext();
}  // namespace at

namespace gk {

bool tf32_wanted() {
  auto precision = &at::Context::float32Precision;
  return precision && at::globalContext &&
         (at::globalContext().*precision)(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
}

}  // namespace gk

#ifndef GK_SIM  // which has a GPU of its own (csrc/sim)

#include <dlfcn.h>

// Only a torch with CUDA has it; under another one the library loads all the same, and no launcher is ever reached.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace gk {

static void check_runtime(cudaError_t error, const char* what) {
  GK_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
}

cudaStream_t Gpu::stream_of(int index) {
  GK_CHECK(aoti_torch_get_current_cuda_stream, "the CUDA kernels need a torch with CUDA, this one has none");
  void* stream = nullptr;
  GK_TORCH(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<cudaStream_t>(stream);
}

int Gpu::attribute(cudaDeviceAttr which) const {
  int value = 0;
  check_runtime(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace gk

#define GK_EXPORT extern "C" __attribute__((visibility("default")))

// "sm_80 sm_86 ... compute_80": machine code for, and PTX for every other GPU since
GK_EXPORT const char* gpt_kernels_cuda_archs() { return GK_CUDA_ARCHS; }
GK_EXPORT int64_t gpt_kernels_cuda_version() { return CUDART_VERSION; }
// the file that torch's streams come from; null under a torch without CUDA
GK_EXPORT const char* gpt_kernels_cuda_streams() {
  Dl_info its;
  const void* symbol = reinterpret_cast<const void*>(&aoti_torch_get_current_cuda_stream);
  return symbol && dladdr(symbol, &its) ? its.dli_fname : nullptr;
}
#endif
