// dropout, with an optional residual added, on NVIDIA GPUs. The op: gpt_kernels/ops/dropout.py.
#include "../args/dropout.h"
#include "common.cuh"

namespace gk {

// y = x / (1 - p) where kept, 0 where dropped, + residual. A thread has eight columns of a row, one draw of Philox.
constexpr int dropout_threads = 256, dropout_columns = 8;
template <class T> constexpr int dropout_blocks = sizeof(T) == 4 ? 4 : 6;  // of a processor: as many as go without a spill

template <class T, bool aligned>
__global__ void __launch_bounds__(dropout_threads, dropout_blocks<T>)
    dropout_fwd(T* __restrict__ y, const T* __restrict__ x, const T* __restrict__ residual, const Philox philox, int64_t M,
                int64_t N) {
  constexpr int V = per_16<T>, chunks = dropout_columns / V;
  const Row<T, aligned> row(N);
  const uint64_t seed = philox.drop_below ? philox.state[0] : 0;
  const uint32_t offset = philox.drop_below ? uint32_t(philox.state[1]) : 0;
  int low = int(seed), high = int(seed >> 32);
  const int64_t first = int64_t(blockIdx.x) * dropout_threads + threadIdx.x, step = int64_t(gridDim.x) * dropout_threads;
  const int64_t groups = (N + dropout_columns - 1) / dropout_columns, step_rows = step / groups;
  const int step_groups = int(step - step_rows * groups);
  int64_t m = first / groups;
  int group = int(first - m * groups);
  while (m < M) {
    uint4 raw[chunks], added[chunks] = {};
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      raw[c] = row.load(x + m * N, group * chunks + c);
      if (residual) added[c] = row.load(residual + m * N, group * chunks + c);
    }
    opaque(low), opaque(high);  // or the keys of all rounds, the same for every draw, are held in registers between the draws
    const uint4 bits = philox_8(uint64_t(uint32_t(high)) << 32 | uint32_t(low), offset, uint32_t(group), uint32_t(m), 0);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int c = 0; c < chunks; c++) {
      float v[V], r[V];
      unpack<T>(raw[c], v), unpack<T>(added[c], r);
#pragma unroll
      for (int k = 0; k < V; k++) {
        const uint32_t word = words[(c * V + k) / 2], random = k % 2 ? word >> 16 : word & 0xFFFF;
        v[k] = (random < philox.drop_below ? 0.f : v[k] * philox.keep_scale) + (residual ? r[k] : 0.f);
      }
      row.store(y + m * N, group * chunks + c, v);
    }
    m += step_rows, group += step_groups;  // on without a division
    if (group >= groups) group -= int(groups), m++;
  }
}

static Tensor dropout_fwd_cuda(const Tensor& x, const OptTensor& residual, const Tensor& rng_state, double dropout_p) {
  const char* op = "dropout_fwd";
  const Matrix of = dropout_args(op, x, residual);
  const int64_t M = of.M, N = of.N;
  const Philox philox = philox_of(op, rng_state, dropout_p);
  check_same_device(op, "rng_state", rng_state, x);
  const Gpu gpu(x);
  Tensor y = new_like(x);
  const bool aligned = N % dropout_columns == 0 && stands_on_16(x) && stands_on_16(y) && stands_on_16(residual);
  with_dtype(dtype_of(x), [&](auto t) {
    with_bool(aligned, [&](auto on_16) {
      using T = decltype(t);
      // a wave of blocks that go through all elements
      const int64_t wave = int64_t(gpu.processors()) * dropout_blocks<T>;
      const int64_t blocks = std::min(cdiv(M * cdiv(N, dropout_columns), dropout_threads), wave);
      launch(GK_KERNEL(dropout_fwd<T, on_16>), unsigned(blocks), dropout_threads, 0, gpu.stream, out<T>(y), data<T>(x),
             data<T>(residual), philox, M, N);
    });
  });
  return y;
}

GK_REGISTER(m) { m.impl("dropout_fwd", TORCH_BOX(&dropout_fwd_cuda)); }

}  // namespace gk
