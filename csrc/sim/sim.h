// The CPU model of the GPU, as a kernel sees it: what csrc/cuda/*.cu are compiled against as plain C++ when GK_SIM is
// defined. The model itself: model.h and what it names. What it models and what it does not: README.md beside this file.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

// ---- CUDA's words ----
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
typedef struct CUstream_st* cudaStream_t;

// ---- the part of CUDA's runtime that launches: it refuses what a driver refuses; each architecture that is played is a GPU ----
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes { size_t sharedSizeBytes; };
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
// what the kernel's launches so far have declared: the model knows no more before the first
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* its, const void* function);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value);
// args: a gk::sim::Call. Throws std::runtime_error with a report for whatever the kernel itself does wrong.
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);

namespace gk::sim {

// ---- threads ----
struct Thread { dim3 index; };
extern Thread* current;
struct Place { dim3 index, extent, grid; };  // blockIdx, blockDim, gridDim
extern Place place;

// What cudaLaunchKernel takes for a kernel's arguments here: body(args) is one thread's run.
struct Call {
  const char* name;
  void (*body)(void*);
  void* args;
};
int arch();        // compute capability that is played, as 80
int processors();  // streaming multiprocessors that are played: few, so that small tests loop
size_t shared_limit();  // bytes of shared memory of a block of that architecture

[[noreturn]] void trap();

// ---- shared memory: a block's own, found by the declaration's key ----
void* static_shared(const void* key, size_t bytes);
unsigned char* dynamic_shared();
template <class Array> Array& shared_array(const void* key) { return *static_cast<Array*>(static_shared(key, sizeof(Array))); }

// ---- what ptx.cuh's wrappers do here ----
void sync_warp(uint32_t mask);
void barrier_sync(unsigned id, unsigned threads);
void barrier_arrive(unsigned id, unsigned threads);
enum class Shuffle { index, up, down, xor_ };
uint32_t shuffle(Shuffle how, uint32_t value, int operand, uint32_t mask);
uint32_t ballot(bool predicate, uint32_t mask);
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed);
enum class Mma { bf16, f16, tf32 };
void mma(Mma type, float* d, const uint32_t* a, const uint32_t* b);
void cp_async(void* shared, const void* global, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int pending);
void synchronise(const void* address, bool acquire, bool release);
void yield();

float from_f16(uint16_t bits);
uint16_t to_f16(float value);

// loads and stores of the wrappers, seen as one access like a kernel's own
void read(void* to, const void* address, int bytes);
void write(void* address, const void* from, int bytes);
template <class T> __forceinline__ T load(const void* address) {
  T value;
  read(&value, address, sizeof(T));
  return value;
}
template <class T> __forceinline__ void store(void* address, T value) { write(address, &value, sizeof(T)); }
template <class T> T atomic_add(T* address, T value) {
  yield();
  synchronise(address, true, true);
  const T before = *address;
  *address = before + value;
  return before;
}

}  // namespace gk::sim

#define threadIdx (::gk::sim::current->index)
#define blockIdx (::gk::sim::place.index)
#define blockDim (::gk::sim::place.extent)
#define gridDim (::gk::sim::place.grid)
#define __syncthreads() ::gk::sim::barrier_sync(0, (blockDim.x) * blockDim.y * blockDim.z)
#define __trap() ::gk::sim::trap()

// ---- CUDA's device functions that kernels use ----
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class T> inline T __ldg(const T* p) { return *p; }
using std::max;
using std::min;
