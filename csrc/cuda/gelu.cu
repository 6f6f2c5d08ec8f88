// gelu on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/gelu.py.
#include "../args/gelu.h"
#include "../launchers.h"
#include "activation.cuh"
#include "reduce.cuh"

namespace gk {

// ---- kernels ----

// A thread owns one chunk of columns and goes down the rows, so that the bias is read once and its gradient stays in
// registers. Without a bias all elements are one row.
constexpr int gelu_lanes = 32, gelu_rows = 8;  // a block: chunks side by side, rows at a time

template <class T, class P, bool tanh, bool aligned>
__global__ void __launch_bounds__(gelu_lanes* gelu_rows, 4)
    gelu_fwd(T* __restrict__ y, const T* __restrict__ x, const P* __restrict__ bias, int64_t M, int64_t N) {
  constexpr int V = per_16<T>;
  const Row<T, aligned> row(N);
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (chunk >= row.chunks()) return;
  float b[V] = {};
  if (bias) load_columns<aligned>(bias, row.column(chunk), N, b);
#pragma unroll 4
  for (int64_t m = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; m < M; m += int64_t(gridDim.y) * blockDim.y) {
    float v[V];
    unpack<T>(row.load(x + m * N, chunk), v);
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = act_value<tanh ? Act::gelu_tanh : Act::gelu>(v[k] + b[k]);
    row.store(y + m * N, chunk, v);
  }
}

// dx = dy slope(x + b); this block's sum of dx over its rows in partial[blockIdx.y][N]
template <class T, class P, bool tanh, bool aligned>
__global__ void __launch_bounds__(gelu_lanes* gelu_rows, 3)
    gelu_bwd(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ dy, const T* __restrict__ x,
             const P* __restrict__ bias, int64_t M, int64_t N) {
  constexpr int V = per_16<T>;
  const Row<T, aligned> row(N);
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool mine = chunk < row.chunks();
  float b[V] = {}, sums[V] = {};
  if (bias && mine) load_columns<aligned>(bias, row.column(chunk), N, b);
  if (mine) {
#pragma unroll 2
    for (int64_t m = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; m < M; m += int64_t(gridDim.y) * blockDim.y) {
      float v[V], d[V];
      unpack<T>(row.load(x + m * N, chunk), v), unpack<T>(row.load(dy + m * N, chunk), d);
#pragma unroll
      for (int k = 0; k < V; k++) {
        float s;
        d[k] *= act_slope<tanh ? Act::gelu_tanh : Act::gelu>(v[k] + b[k], s), sums[k] += d[k];
      }
      row.store(dx + m * N, chunk, d);
    }
  }
  if (!partial) return;
  GK_SHARED(float, rows, [gelu_rows][V][gelu_lanes]);
#pragma unroll
  for (int k = 0; k < V; k++) rows[threadIdx.y][k][threadIdx.x] = sums[k];
  __syncthreads();
  // a warp for each of the chunk's columns adds the rows in order
  for (int k = threadIdx.y; k < V; k += gelu_rows) {
    if (!mine || !row.inside(chunk, k)) continue;
    float sum = 0;
#pragma unroll
    for (int r = 0; r < gelu_rows; r++) sum += rows[r][k][threadIdx.x];
    partial[blockIdx.y * N + row.column(chunk) + k] = sum;
  }
}

// ---- launchers ----

struct GeluShape {
  int64_t M, N;
  dim3 grid, block;
  bool aligned;
};
// Rows for each thread: a few, so that the bias is read and its sums are written seldom; grid.y blocks of them.
constexpr int64_t gelu_rows_per_thread = 8;
static GeluShape gelu_shape(const Tensor& x, const OptTensor& bias, bool all_on_16) {
  const int V = int(16 / element_size(dtype_of(x))), per_parameter = bias ? int(16 / element_size(dtype_of(*bias))) : 1;
  const int64_t total = x.numel(), N = bias ? x.size(x.dim() - 1) : total, M = N ? total / N : 0;
  const dim3 block = bias ? dim3(gelu_lanes, gelu_rows) : dim3(gelu_lanes * gelu_rows);
  const int64_t rows = std::min<int64_t>(cdiv(M, block.y * gelu_rows_per_thread), 65535);
  return {M, N, dim3(unsigned(cdiv(cdiv(N, V), block.x)), unsigned(rows)), block,
          all_on_16 && N % V == 0 && N % per_parameter == 0};
}

// f(x's type, the bias's, form, alignment)
template <class F> static void with_gelu(const Tensor& x, const OptTensor& bias, bool tanh, bool aligned, const F& f) {
  with_dtypes(dtype_of(x), bias ? dtype_of(*bias) : dtype_of(x), [&](auto t, auto p) {
    with_bool(tanh, [&](auto form) { with_bool(aligned, [&](auto on_16) { f(t, p, form, on_16); }); });
  });
}

Tensor gelu_of(const Tensor& x, const OptTensor& bias, bool tanh) {
  gelu_fwd_args("gelu_fwd", x, bias);
  const Gpu gpu(x);
  Tensor y = new_like(x);
  const GeluShape s = gelu_shape(x, bias, stands_on_16(x) && stands_on_16(bias));
  with_gelu(x, bias, tanh, s.aligned, [&](auto t, auto p, auto form, auto on_16) {
    using T = decltype(t);
    using P = decltype(p);
    launch(GK_KERNEL(gelu_fwd<T, P, form, on_16>), s.grid, s.block, 0, gpu.stream, out<T>(y), data<T>(x), data<P>(bias), s.M,
           s.N);
  });
  return y;
}

std::tuple<Tensor, Tensor> gelu_gradients(const Tensor& dy, const Tensor& x, const OptTensor& bias, bool tanh) {
  gelu_bwd_args("gelu_bwd", dy, x, bias);
  const Gpu gpu(x);
  const GeluShape s = gelu_shape(x, bias, stands_on_16(x) && stands_on_16(dy) && stands_on_16(bias));
  Tensor dx = new_like(x), dbias = new_tensor(x, {bias ? s.N : 0}, bias ? dtype_of(*bias) : dtype_of(x));
  Tensor partial = new_tensor(x, {bias ? int64_t(s.grid.y) : 0, 1, s.N}, ScalarType::Float);
  with_gelu(x, bias, tanh, s.aligned, [&](auto t, auto p, auto form, auto on_16) {
    using T = decltype(t);
    using P = decltype(p);
    launch(GK_KERNEL(gelu_bwd<T, P, form, on_16>), s.grid, s.block, 0, gpu.stream, out<T>(dx),
           bias ? out<float>(partial) : nullptr, data<T>(dy), data<T>(x), data<P>(bias), s.M, s.N);
    if (bias) launch_sum_partials<P>(gpu, out<P>(dbias), static_cast<P*>(nullptr), partial, s.N);
  });
  return {dx, dbias};
}

GK_REGISTER(m) {
  m.impl("gelu_fwd", TORCH_BOX(&gelu_of));
  m.impl("gelu_bwd", TORCH_BOX(&gelu_gradients));
}

}  // namespace gk
