// What the kernels and their launchers share: 16-bit storage, 16-byte access, reductions of a warp and a block, Philox, and
// the one way to launch. Kernels stand above the launchers in each file; both are the same code on a GPU and in csrc/sim.
#pragma once
#include "launch.cuh"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../types.h"
#include "../args/checks.h"
#ifndef GK_SIM
#include <torch/csrc/stable/accelerator.h>
#endif

namespace gk {

// ---- storage and arithmetic: 16-bit values are converted on load and store, everything between is float ----
GK_DEVICE float to_float(float x) { return x; }
GK_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
GK_DEVICE float to_float(f16 x) { return cvt_f32_f16(x.bits); }

template <class T> GK_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else if constexpr (std::is_same_v<T, bf16>) return {uint16_t(cvt_bf16x2(x, 0))};
  else return {uint16_t(cvt_f16x2(x, 0))};
}
// Two values in the register of a matrix operand, the first in the lower half.
template <class T> GK_DEVICE uint32_t pack_2(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) return cvt_bf16x2(low, high);
  else return cvt_f16x2(low, high);
}
template <class T> GK_DEVICE void unpack_2(uint32_t bits, float& low, float& high) {
  if constexpr (std::is_same_v<T, bf16>) low = __uint_as_float(bits << 16), high = __uint_as_float(bits & 0xFFFF0000u);
  else low = cvt_f32_f16(uint16_t(bits)), high = cvt_f32_f16(uint16_t(bits >> 16));
}
template <class T> GK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) mma_m16n8k16_bf16(d, a, b);
  else mma_m16n8k16_f16(d, a, b);
}

// ---- 16 bytes at a time ----
template <class T> constexpr int per_16 = 16 / int(sizeof(T));

template <class T> GK_DEVICE void unpack(uint4 bits, float (&v)[per_16<T>]) {
  if constexpr (std::is_same_v<T, float>) {
    v[0] = __uint_as_float(bits.x), v[1] = __uint_as_float(bits.y), v[2] = __uint_as_float(bits.z),
    v[3] = __uint_as_float(bits.w);
  } else {
    unpack_2<T>(bits.x, v[0], v[1]), unpack_2<T>(bits.y, v[2], v[3]), unpack_2<T>(bits.z, v[4], v[5]),
        unpack_2<T>(bits.w, v[6], v[7]);
  }
}
template <class T> GK_DEVICE uint4 pack(const float (&v)[per_16<T>]) {
  if constexpr (std::is_same_v<T, float>)
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  else return make_uint4(pack_2<T>(v[0], v[1]), pack_2<T>(v[2], v[3]), pack_2<T>(v[4], v[5]), pack_2<T>(v[6], v[7]));
}

// V neighbouring columns of a parameter: by 16 bytes where `aligned` says that they stand so.
template <bool aligned, int V, class P>
GK_DEVICE void load_columns(const P* p, int64_t column, int64_t columns, float (&v)[V]) {
  if constexpr (aligned && V % per_16<P> == 0) {
#pragma unroll
    for (int k = 0; k < V; k += per_16<P>) unpack<P>(load_16(p + column + k), *reinterpret_cast<float (*)[per_16<P>]>(v + k));
  } else {
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = column + k < columns ? to_float(p[column + k]) : 0.f;
  }
}

// The 16 bytes at p, which stands on any element, out of the two 16-byte blocks that hold them.
template <class T> GK_DEVICE uint4 load_16_across(const T* p) {
  const int bytes = int(reinterpret_cast<uintptr_t>(p) % 16);
  const char* block = reinterpret_cast<const char*>(p) - bytes;
  const uint4 low = load_16(block), high = load_16(block + 16);
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; i++) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; i++) w[i] = bytes & 4 ? w[i + 1] : w[i];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = bytes & 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// A row of N elements in chunks of 16 bytes, chunk c beginning at column c V whatever the row's address: the order of a sum,
// and with it its bits, does not depend on where a row lies. `aligned`: every row begins and ends on a 16-byte boundary.
template <class T, bool aligned> struct Row {
  static constexpr int V = per_16<T>;
  int64_t N;
  GK_DEVICE explicit Row(int64_t N) : N(N) {}
  GK_DEVICE int64_t chunks() const { return (N + V - 1) / V; }
  GK_DEVICE int64_t column(int64_t chunk) const { return chunk * V; }
  GK_DEVICE bool inside(int64_t chunk, int k) const { return chunk * V + k < N; }
  // raw bits, so that a kept row takes no more registers than memory; columns past the row's end read as 0
  GK_DEVICE uint4 load(const T* row, int64_t chunk) const {
    const T* p = row + chunk * V;
    if constexpr (aligned) {
      return chunk * V < N ? load_16(p) : make_uint4(0, 0, 0, 0);
    } else {
      const int before = int(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
      if (before == 0 && (chunk + 1) * V <= N) return load_16(p);
      if (before && chunk * V >= before && (chunk + 2) * V - before <= N) return load_16_across(p);
      float v[V];
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = inside(chunk, k) ? to_float(p[k]) : 0.f;
      return pack<T>(v);  // exact: they come from T
    }
  }
  GK_DEVICE void store(T* row, int64_t chunk, const float (&v)[V]) const {
    T* p = row + chunk * V;
    if (aligned ? chunk * V < N : reinterpret_cast<uintptr_t>(p) % 16 == 0 && (chunk + 1) * V <= N) {
      store_16(p, pack<T>(v));
    } else if constexpr (!aligned) {
#pragma unroll
      for (int k = 0; k < V; k++)
        if (inside(chunk, k)) p[k] = from_float<T>(v[k]);
    }
  }
};

// ---- reductions, in the same order every time ----
GK_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) v += shfl_xor(v, distance);
  return v;
}
GK_DEVICE float warp_max(float v) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) v = fmaxf(v, shfl_xor(v, distance));
  return v;
}
// Sums of `count` values over all threads of a block, for each of them. Begins with a barrier: it may follow itself.
template <int count> GK_DEVICE void block_sum(float (&v)[count]) {
  GK_SHARED(float, partial, [count][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; i++) {
    v[i] = warp_sum(v[i]);
    if (lane == 0) partial[i][warp] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; i++) v[i] = warp_sum(lane < warps ? partial[i][lane] : 0.f);
}
GK_DEVICE float block_max(float v) {
  GK_SHARED(float, partial, [32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  __syncthreads();
  v = warp_max(v);
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  return warp_max(partial[lane < warps ? lane : 0]);
}
// Over the threads that share a row: a warp, or the block.
template <bool block, int count> GK_DEVICE void row_sum(float (&v)[count]) {
  if constexpr (block) {
    block_sum(v);
  } else {
#pragma unroll
    for (int i = 0; i < count; i++) v[i] = warp_sum(v[i]);
  }
}

// ---- Philox4x32-7 (gpt_kernels/ops/philox.py): the same bits on every backend ----
struct Philox {
  const int64_t* state;  // (seed, offset), read by the kernel: the launcher never waits for the GPU
  uint32_t drop_below;   // a 16-bit value below it is dropped
  float keep_scale;      // 1 / (1 - p)
};
// Eight 16-bit values for the columns 8 group .. 8 group + 7, two to a word, the even column in its lower half.
GK_DEVICE uint4 philox_8(uint64_t seed, uint32_t offset, uint32_t group, uint32_t row, uint32_t plane) {
  uint4 c = make_uint4(group, row, plane, offset);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t(c.x) * 0xD2511F53u, p1 = uint64_t(c.z) * 0xCD9E8D57u;
    c = make_uint4(uint32_t(p1 >> 32) ^ c.y ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w ^ k1, uint32_t(p0));
  }
  return c;
}

// ==== host: launchers ====

constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(T{}, P{}): x's type, and that of its parameters: the same, or float.
template <class F> void with_dtypes(ScalarType x, ScalarType parameter, const F& f) {
  with_dtype(x, [&](auto t) { parameter == x ? f(t, t) : f(t, float{}); });
}
template <class F> void with_bool(bool value, const F& f) { value ? f(std::true_type{}) : f(std::false_type{}); }

inline bool stands_on_16(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }
inline bool stands_on_16(const OptTensor& t) { return !t || stands_on_16(*t); }
template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> T* out(Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }
template <class T> const T* data(const OptTensor& t) { return t ? data<T>(*t) : nullptr; }

// torch.backends.cuda.matmul asks for TF32 in products of float32 (runtime.cu).
bool tf32_wanted();

inline Philox philox_of(const char* op, const OptTensor& rng_state, double dropout_p) {
  const DropoutRate rate = check_dropout(op, rng_state, dropout_p);
  if (!rate.drop_below) return {nullptr, 0, 1};  // all is kept, as it is
  check_contiguous(op, "rng_state", *rng_state);
  return {data<int64_t>(rng_state), rate.drop_below, float(rate.keep_scale)};
}

// The GPU that a launcher's tensors are on, current until the launcher returns, with its stream.
class Gpu {
 public:
#ifdef GK_SIM
  explicit Gpu(const Tensor&) {}
  int arch() const { return sim::arch(); }
  int processors() const { return sim::processors(); }
  int64_t shared_per_block() const { return int64_t(sim::shared_limit()); }
  const cudaStream_t stream = nullptr;
#else
  explicit Gpu(const Tensor& t) : index(t.get_device_index()), guard(index), stream(stream_of(index)) {}
  int arch() const { return attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor); }
  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int64_t shared_per_block() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

 private:
  int attribute(cudaDeviceAttr which) const;
  static cudaStream_t stream_of(int index);
  const int index;
  const torch::stable::accelerator::DeviceGuard guard;

 public:
  const cudaStream_t stream;
#endif
};

// Registers launchers at the end of a file: in the CUDA slots, or as the simulator's ops for CPU tensors.
#ifdef GK_SIM
#define GK_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(gpt_kernels_cuda_sim, CPU, m)
#else
#define GK_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CUDA, m)
#endif

}  // namespace gk
