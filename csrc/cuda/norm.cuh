// Layer norm and RMS norm, forward and backward: they differ in the mean, which `centred` says. Formulas:
// gpt_kernels/ops/layer_norm.py and rms_norm.py; launchers: layer_norm.cu, rms_norm.cu.
//
// A guide to the template parameters:
//   T        x's, dy's and the output's elements: float, Half or BFloat16; arithmetic is in float
//   P        the weight's and bias's: T, or float beside 16 bits
//   centred  true: layer norm; false: RMS norm, without mean and bias
//   block    false: a warp has a row, four of them a block; true: a block of up to 512 threads shares one
//   kept     16-byte chunks of a row that a thread keeps in registers between the passes; 0: it reads the row again, from cache
//   aligned  every row begins on 16 bytes, so that a chunk is one load; otherwise it is read by elements (and kept is 0)
// norm_shape() chooses block, kept and the threads from the sizes; with_kept() and with_unkept() make constants of them.
#pragma once
#include "reduce.cuh"

namespace gk {

// ---- how a shape is cut, in one place ----
// A warp takes a row of up to 1024 columns, a block a longer one. `kept` chunks of 16 bytes per thread stay in registers
// between the passes over a row; 0: the row is read again, from cache (rows off the 16-byte boundaries, or too long).
struct NormShape {
  bool block;  // does a block share a row, or a warp?
  int kept;  // chunks per thread in registers
  int threads;  // per block
  int64_t rows_per_block() const { return block ? 1 : threads / 32; }
};
constexpr int64_t warp_columns = 1024;
constexpr int warp_step = 256;  // `kept` is in steps of this many columns of a warp, from 512 on
template <class T> NormShape norm_shape(int64_t N, bool aligned, int kept_by_block) {
  const int V = per_16<T>;
  const int64_t chunks = cdiv(N, V);
  const int steps = int(std::max<int64_t>(2, cdiv(N, warp_step)));
  if (N <= warp_columns) return {false, aligned ? steps * warp_step / (32 * V) : 0, 128};
  const int64_t threads = cdiv(chunks, int64_t(kept_by_block) * 32) * 32;
  if (!aligned || threads > 512) return {true, 0, 512};
  return {true, kept_by_block, int(std::max<int64_t>(threads, 128))};
}
// Backward: one wave of blocks that loop over rows, each with its own sums for the weight gradients. So many warps of a
// processor, for all architectures (65536 registers, of which the sums take most): two rows each in flight are at least
// 32 KB at 768 and 1024 columns, what an H100's memory latency asks for.
constexpr int norm_bwd_warps(bool block, int kept, int V) {
  return block || kept * 32 * V <= 512 ? 16 : kept * V >= 32 ? 8 : 12;
}

// ---- kernels ----

// The row in chunks: f(chunk, v) for each of this thread's, from `raw` registers or, with kept = 0, from memory.
template <int kept, class T, bool aligned, class F>
GK_DEVICE void each_chunk(const Row<T, aligned>& row, const uint4 (&raw)[kept ? kept : 1], const T* x, int me, int peers,
                          const F& f) {
  float v[per_16<T>];
  if constexpr (kept > 0) {
#pragma unroll
    for (int j = 0; j < kept; j++) unpack<T>(raw[j], v), f(int64_t(me + j * peers), v);
  } else {
    for (int64_t chunk = me; chunk < row.chunks(); chunk += peers) unpack<T>(row.load(x, chunk), v), f(chunk, v);
  }
}

// y = (x - mean) rstd w + b. The variance is that of the centred row, so that nothing cancels; the sum of the centred row is
// what the first mean was off by, and makes a mean far from 0 right to the last bit.
template <class T, class P, bool centred, bool block, int kept, bool aligned>
__global__ void __launch_bounds__(block ? 512 : 128, block      ? 1
                                                     : kept < 6 ? 6
                                                                : 5)  // at 6 such blocks sm_120 spills
    norm_fwd(T* __restrict__ y, float* mean, float* rstd, const T* __restrict__ x, const P* __restrict__ w,
             const P* __restrict__ b, int64_t M, int64_t N, float eps) {
  constexpr int V = per_16<T>;
  const int peers = block ? blockDim.x : 32, me = threadIdx.x % peers, rows = blockDim.x / peers;
  const int64_t m = int64_t(blockIdx.x) * rows + threadIdx.x / peers;
  if (m >= M) return;  // a whole warp, or no one
  x += m * N, y += m * N;
  const Row<T, aligned> row(N);
  uint4 raw[kept ? kept : 1];
#pragma unroll
  for (int j = 0; j < kept; j++) raw[j] = row.load(x, me + j * peers);

  float mu = 0;
  if constexpr (centred) {
    float sum[1] = {};
    each_chunk<kept>(row, raw, x, me, peers, [&](int64_t, const float (&v)[V]) {
#pragma unroll
      for (int k = 0; k < V; k++) sum[0] += v[k];
    });
    row_sum<block>(sum);
    mu = sum[0] / float(N);
  }
  // of the centred row, of its squares, and of those an exact factor smaller: from elements of 1e19 on squares are infinite
  constexpr float shrunk = 0x1p-80f;
  float sums[3] = {};
  each_chunk<kept>(row, raw, x, me, peers, [&](int64_t chunk, const float (&v)[V]) {
#pragma unroll
    for (int k = 0; k < V; k++) {
      const float d = row.inside(chunk, k) ? v[k] - mu : 0.f;
      if constexpr (centred) sums[0] += d;
      sums[1] += d * d, sums[2] += d * shrunk * (d * shrunk);
    }
  });
  if constexpr (centred) row_sum<block>(sums);
  else row_sum<block>(*reinterpret_cast<float (*)[2]>(sums + 1));
  const float off = sums[0] / float(N), variance = sums[1] / float(N) - off * off;
  const bool infinite = !(variance < INFINITY);
  const float finite = sums[2] / float(N) - off * shrunk * (off * shrunk);
  const float rs = (infinite ? shrunk : 1.f) / sqrtf(infinite ? finite : (variance < 0.f ? 0.f : variance) + eps);
  mu += off;
  each_chunk<kept>(row, raw, x, me, peers, [&](int64_t chunk, const float (&v)[V]) {
    const int64_t column = row.column(chunk);
    if (column >= N) return;
    float out[V], scale[V], shift[V];
    if (w) load_columns<aligned>(w, column, N, scale);
    if (b) load_columns<aligned>(b, column, N, shift);
#pragma unroll
    for (int k = 0; k < V; k++) out[k] = (v[k] - mu) * rs * (w ? scale[k] : 1.f) + (b ? shift[k] : 0.f);
    row.store(y, chunk, out);
  });
  if (me != 0) return;
  if constexpr (centred) mean[m] = mu;
  rstd[m] = rs;
}

// x_hat = (x - mean) rstd;  g = w dy;  dx = (g - mean(g) - x_hat mean(g x_hat)) rstd;  dw += dy x_hat;  db += dy
// Rows of whole chunks in registers: dx, and this block's dw and db in partial[block][2][N].
template <class T, class P, bool centred, bool block, int kept>
__global__ void __launch_bounds__(block ? 512 : 128, block ? 1 : norm_bwd_warps(block, kept, per_16<T>) / 4)
    norm_bwd(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ dy, const T* __restrict__ x,
             const P* __restrict__ w, const float* __restrict__ mean, const float* __restrict__ rstd, int64_t M, int64_t N) {
  constexpr int V = per_16<T>;
  const int peers = block ? blockDim.x : 32, me = threadIdx.x % peers, rows = blockDim.x / peers, group = threadIdx.x / peers;
  const Row<T, true> row(N);
  float dw[kept][V] = {}, db[kept][V] = {};
  const auto weighted = [&](int j, const float (&d)[V], float (&g)[V]) {  // g = w dy
    float scale[V];
    const int64_t column = row.column(me + j * peers);
    const bool scales = w && column < N;
    if (scales) load_columns<true>(w, column, N, scale);
#pragma unroll
    for (int k = 0; k < V; k++) g[k] = scales ? d[k] * scale[k] : d[k];
  };
  // block by block a run of rows, so that the loop is as long for all of them
  for (int64_t m = int64_t(blockIdx.x) * rows + group; m < M; m += int64_t(gridDim.x) * rows) {
    const T *x_row = x + m * N, *dy_row = dy + m * N;
    uint4 raw_x[kept], raw_dy[kept];
#pragma unroll
    for (int j = 0; j < kept; j++) raw_x[j] = row.load(x_row, me + j * peers), raw_dy[j] = row.load(dy_row, me + j * peers);
    const float mu = centred ? mean[m] : 0.f, rs = rstd[m];
    float sums[2] = {};  // of g, of g x_hat
#pragma unroll
    for (int j = 0; j < kept; j++) {
      float v[V], d[V], g[V];
      unpack<T>(raw_x[j], v), unpack<T>(raw_dy[j], d);
      weighted(j, d, g);
#pragma unroll
      for (int k = 0; k < V; k++) {
        const float x_hat = (v[k] - mu) * rs;
        if constexpr (centred) sums[0] += g[k], db[j][k] += d[k];
        sums[1] += g[k] * x_hat;
        dw[j][k] += d[k] * x_hat;
      }
    }
    row_sum<block>(sums);
    const float shift = centred ? sums[0] / float(N) : 0.f, slope = sums[1] / float(N) * rs;
#pragma unroll
    for (int j = 0; j < kept; j++) {
      float v[V], d[V], out[V];
      unpack<T>(raw_x[j], v), unpack<T>(raw_dy[j], d);
      weighted(j, d, d);
#pragma unroll
      for (int k = 0; k < V; k++) out[k] = (d[k] - shift - (v[k] - mu) * slope) * rs;  // rs^2 may be too small for a float
      row.store(dx + m * N, me + j * peers, out);
    }
  }
  if (!partial) return;
  partial += int64_t(blockIdx.x) * 2 * N;
  const auto each_16 = [&](const auto& f) {  // f(plane, column, four sums)
#pragma unroll
    for (int j = 0; j < kept; j++) {
#pragma unroll
      for (int k = 0; k < V; k += 4) {
        const int64_t column = row.column(me + j * peers) + k;
        if (column >= N) continue;
        f(0, column, *reinterpret_cast<float (*)[4]>(dw[j] + k));
        if constexpr (centred) f(1, column, *reinterpret_cast<float (*)[4]>(db[j] + k));
      }
    }
  };
  if constexpr (block) {
    each_16([&](int plane, int64_t column, const float (&v)[4]) { store_16(partial + plane * N + column, pack<float>(v)); });
  } else {
    // the warps of a block one after the other, so that the order of the sum is fixed
    GK_SHARED(float, sums, [2][warp_columns]);
    for (int turn = 0; turn < rows; turn++) {
      if (turn == group)
        each_16([&](int plane, int64_t column, float (&v)[4]) {
          float before[4] = {};
          if (turn) unpack<float>(load_16(&sums[plane][column]), before);
#pragma unroll
          for (int k = 0; k < 4; k++) v[k] += before[k];
          store_16(turn < rows - 1 ? &sums[plane][column] : partial + plane * N + column, pack<float>(v));
        });
      __syncthreads();
    }
  }
}

// Rows that do not fit: dx alone, the row read twice.
template <class T, class P, bool centred, bool block, bool aligned>
__global__ void __launch_bounds__(block ? 512 : 128, block ? 1 : 6)
    norm_bwd_row(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ x, const P* __restrict__ w,
                 const float* __restrict__ mean, const float* __restrict__ rstd, int64_t M, int64_t N) {
  constexpr int V = per_16<T>;
  const int peers = block ? blockDim.x : 32, me = threadIdx.x % peers, rows = blockDim.x / peers;
  const int64_t m = int64_t(blockIdx.x) * rows + threadIdx.x / peers;
  if (m >= M) return;
  x += m * N, dy += m * N, dx += m * N;
  const Row<T, aligned> row(N);
  const float mu = centred ? mean[m] : 0.f, rs = rstd[m];
  // f(chunk, g, x_hat); elements outside the row have g = 0
  const auto each = [&](const auto& f) {
    for (int64_t chunk = me; chunk < row.chunks(); chunk += peers) {
      float v[V], g[V], scale[V];
      const int64_t column = row.column(chunk);
      unpack<T>(row.load(x, chunk), v), unpack<T>(row.load(dy, chunk), g);
      if (w) load_columns<aligned>(w, column, N, scale);
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = (v[k] - mu) * rs, g[k] *= w ? scale[k] : 1.f;
      f(chunk, g, v);
    }
  };
  float sums[2] = {};
  each([&](int64_t, const float (&g)[V], const float (&x_hat)[V]) {
#pragma unroll
    for (int k = 0; k < V; k++) sums[0] += g[k], sums[1] += g[k] * x_hat[k];
  });
  row_sum<block>(sums);
  const float mean_g = centred ? sums[0] / float(N) : 0.f, mean_gx = sums[1] / float(N);
  each([&](int64_t chunk, const float (&g)[V], const float (&x_hat)[V]) {
    float out[V];
#pragma unroll
    for (int k = 0; k < V; k++) out[k] = (g[k] - mean_g - x_hat[k] * mean_gx) * rs;
    row.store(dx, chunk, out);
  });
}

// And their dw and db: each thread one column of a run of rows.
template <class T, bool centred>
__global__ void __launch_bounds__(256)
    norm_bwd_columns(float* __restrict__ partial, const T* __restrict__ dy, const T* __restrict__ x,
                     const float* __restrict__ mean, const float* __restrict__ rstd, int64_t M, int64_t N) {
  const int64_t column = int64_t(blockIdx.x) * 256 + threadIdx.x, rows = (M + gridDim.y - 1) / gridDim.y;
  if (column >= N) return;
  float dw = 0, db = 0;
#pragma unroll 4
  for (int64_t m = blockIdx.y * rows; m < min(M, (blockIdx.y + 1) * rows); m++) {
    const float d = to_float(dy[m * N + column]);
    dw += d * (to_float(x[m * N + column]) - (centred ? mean[m] : 0.f)) * rstd[m];
    db += d;
  }
  partial += int64_t(blockIdx.y) * 2 * N + column;
  partial[0] = dw;
  if constexpr (centred) partial[N] = db;
}

// ---- launchers ----

// f(kept) with the counts that norm_shape gives a warp as constants
template <class T, class F> void with_kept(const NormShape& shape, const F& f) {
  constexpr int step = warp_step / (32 * per_16<T>);
  const auto is = [&](auto kept) { return shape.kept == kept ? (f(kept), true) : false; };
  is(std::integral_constant<int, 2 * step>{}) || is(std::integral_constant<int, 3 * step>{}) ||
      is(std::integral_constant<int, 4 * step>{});
}

// f(block, aligned) as constants, where no row is kept: the rows of a warp are then off the 16-byte boundaries
template <class F> void with_unkept(const NormShape& shape, bool aligned, const F& f) {
  if (!shape.block) f(std::false_type{}, std::false_type{});
  else with_bool(aligned, [&](auto on_16) { f(std::true_type{}, on_16); });
}

// Chunks that a thread of a block keeps; of two tensors and with their sums backward.
constexpr int norm_fwd_kept = 4, norm_bwd_kept = 2;

template <class T, class P, bool centred>
void launch_norm_fwd(const Gpu& gpu, Tensor& y, float* mean, Tensor& rstd, const Tensor& x, const OptTensor& w,
                     const OptTensor& b, int64_t M, int64_t N, double eps) {
  const bool aligned = N % per_16<T> == 0 && N % per_16<P> == 0 && stands_on_16(x) && stands_on_16(w) && stands_on_16(b);
  const NormShape shape = norm_shape<T>(N, aligned, norm_fwd_kept);
  const auto run = [&](const auto& kernel) {
    launch(kernel, unsigned(cdiv(M, shape.rows_per_block())), shape.threads, 0, gpu.stream, out<T>(y), mean, out<float>(rstd),
           data<T>(x), data<P>(w), data<P>(b), M, N, float(eps));
  };
  if (shape.kept == 0) {
    with_unkept(shape, aligned, [&](auto block, auto on_16) { run(GK_KERNEL(norm_fwd<T, P, centred, block, 0, on_16>)); });
  } else if (shape.block) {
    run(GK_KERNEL(norm_fwd<T, P, centred, true, norm_fwd_kept, true>));
  } else {
    with_kept<T>(shape, [&](auto kept) { run(GK_KERNEL(norm_fwd<T, P, centred, false, kept, true>)); });
  }
}

// partial: (blocks, 2, N), made here where a parameter wants its gradient
template <class T, class P, bool centred>
void launch_norm_bwd(const Gpu& gpu, Tensor& dx, Tensor& dweight, Tensor* dbias, const Tensor& dy, const Tensor& x,
                     const OptTensor& w, const float* mean, const Tensor& rstd, int64_t M, int64_t N) {
  const bool aligned = N % per_16<T> == 0 && N % per_16<P> == 0 && stands_on_16(x) && stands_on_16(dy) && stands_on_16(w);
  const NormShape shape = norm_shape<T>(N, aligned, norm_bwd_kept);
  const bool has_bias = dbias && dbias->numel(), params = w || has_bias;
  const int warps = norm_bwd_warps(shape.block, shape.kept, per_16<T>);
  const int64_t wave = int64_t(gpu.processors()) * std::max(1, warps * 32 / shape.threads);
  int64_t blocks = std::min(cdiv(M, shape.rows_per_block()), wave);
  if (shape.kept == 0) blocks = std::min<int64_t>(cdiv(M, 32), 1024);  // runs of rows for norm_bwd_columns
  Tensor partial = new_tensor(x, {params ? blocks : 0, 2, N}, ScalarType::Float);
  float* sums = params ? out<float>(partial) : nullptr;
  if (shape.kept == 0) {
    with_unkept(shape, aligned, [&](auto block, auto on_16) {
      launch(GK_KERNEL(norm_bwd_row<T, P, centred, block, on_16>), unsigned(cdiv(M, shape.rows_per_block())), shape.threads, 0,
             gpu.stream, out<T>(dx), data<T>(dy), data<T>(x), data<P>(w), mean, data<float>(rstd), M, N);
    });
    if (params)
      launch(GK_KERNEL(norm_bwd_columns<T, centred>), dim3(unsigned(cdiv(N, 256)), unsigned(blocks)), 256, 0, gpu.stream, sums,
             data<T>(dy), data<T>(x), mean, data<float>(rstd), M, N);
  } else {
    const auto run = [&](const auto& kernel) {
      launch(kernel, unsigned(blocks), shape.threads, 0, gpu.stream, out<T>(dx), sums, data<T>(dy), data<T>(x), data<P>(w),
             mean, data<float>(rstd), M, N);
    };
    if (shape.block) run(GK_KERNEL(norm_bwd<T, P, centred, true, norm_bwd_kept>));
    else with_kept<T>(shape, [&](auto kept) { run(GK_KERNEL(norm_bwd<T, P, centred, false, kept>)); });
  }
  if (params) launch_sum_partials<P>(gpu, w ? out<P>(dweight) : nullptr, has_bias ? out<P>(*dbias) : nullptr, partial, N);
}

}  // namespace gk
