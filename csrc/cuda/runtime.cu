// What the launchers need of CUDA's runtime and of torch's streams, and what the library says about its own build.
// The simulator has its own (csrc/sim).
#ifndef GK_SIM
#include "common.cuh"

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

void launch_raw(const char* name, const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                void** args) {
  cudaError_t error = cudaSuccess;
  // more than 48 KB must be asked for
  if (shared > (48 << 10)) error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess) error = cudaLaunchKernel(function, grid, block, args, shared, stream);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next launch shall not find it
  fail("launch of ", name, " refused: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), "); grid (", grid.x, ", ",
       grid.y, ", ", grid.z, "), block (", block.x, ", ", block.y, ", ", block.z, "), ", shared,
       " bytes of dynamic shared memory");
}

}  // namespace gk

#define GK_EXPORT extern "C" __attribute__((visibility("default")))

// "sm_80 sm_86 ... compute_80": machine code for, and PTX for every other GPU since
GK_EXPORT const char* gpt_kernels_cuda_archs() { return GK_CUDA_ARCHS; }
GK_EXPORT int64_t gpt_kernels_cuda_version() { return CUDART_VERSION; }
#endif
