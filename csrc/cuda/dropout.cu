// dropout, with an optional residual added, on NVIDIA GPUs. The op: gpt_kernels/ops/dropout.py.
#include "common.cuh"

namespace gk {

// y = x / (1 - p) where kept, 0 where dropped, + residual. A thread has eight columns of a row, one draw of Philox.
constexpr int dropout_threads = 256, dropout_columns = 8;

// Eight columns from p on, by 16 bytes where they stand so.
template <class T> GK_DEVICE void load_8(const T* p, bool whole, int64_t left, float (&v)[8]) {
  if (whole) return load_columns<true>(p, 0, left, v);
#pragma unroll
  for (int k = 0; k < 8; k++) v[k] = k < left ? to_float(p[k]) : 0.f;
}

template <class T>
__global__ void __launch_bounds__(dropout_threads)
    dropout_fwd(T* __restrict__ y, const T* __restrict__ x, const T* __restrict__ residual, const Philox philox, bool aligned,
                int64_t M, int64_t N) {
  constexpr int V = per_16<T>;
  const uint64_t seed = philox.drop_below ? philox.state[0] : 0;
  const uint32_t offset = philox.drop_below ? uint32_t(philox.state[1]) : 0;
  const int64_t groups = (N + dropout_columns - 1) / dropout_columns, total = M * groups;
#pragma unroll 2
  for (int64_t i = int64_t(blockIdx.x) * dropout_threads + threadIdx.x; i < total; i += int64_t(gridDim.x) * dropout_threads) {
    const int64_t row = i / groups, group = i - row * groups, at = row * N + group * dropout_columns, left = N - group * dropout_columns;
    float v[8], r[8];
    load_8(x + at, aligned, left, v);
    if (residual) load_8(residual + at, aligned, left, r);
    const uint4 bits = philox_8(seed, offset, uint32_t(group), uint32_t(row), 0);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const uint32_t random = k % 2 ? words[k / 2] >> 16 : words[k / 2] & 0xFFFF;
      v[k] = (random < philox.drop_below ? 0.f : v[k] * philox.keep_scale) + (residual ? r[k] : 0.f);
    }
    if (aligned) {
#pragma unroll
      for (int k = 0; k < 8; k += V) store_16(y + at + k, pack<T>(*reinterpret_cast<float (*)[V]>(v + k)));
    } else {
#pragma unroll
      for (int k = 0; k < 8; k++)
        if (k < left) y[at + k] = from_float<T>(v[k]);
    }
  }
}

static Philox philox_of(const char* op, const Tensor& rng_state, double dropout_p, const Tensor& x) {
  GK_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), got ", dropout_p);
  check_same_device(op, "rng_state", rng_state, x), check_dtype(op, "rng_state", rng_state, ScalarType::Long);
  GK_CHECK(rng_state.dim() == 1 && rng_state.size(0) == 2, op, ": rng_state must have shape (2,), got ", shape_text(rng_state));
  check_contiguous(op, "rng_state", rng_state);
  const uint32_t drop_below = uint32_t(std::min<int64_t>(int64_t(dropout_p * 65536 + 0.5), 65535));
  return {data<int64_t>(rng_state), drop_below, float(1 / (1 - drop_below / 65536.0))};
}

static Tensor dropout_fwd_cuda(const Tensor& x, const OptTensor& residual, const Tensor& rng_state, double dropout_p) {
  const char* op = "dropout_fwd";
  check_input(op, "x", x);
  GK_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension, got a scalar");
  if (residual) {
    check_same_device(op, "residual", *residual, x), check_dtype(op, "residual", *residual, x.scalar_type());
    check_contiguous(op, "residual", *residual), check_same_shape(op, "residual", *residual, "x", x);
  }
  const Philox philox = philox_of(op, rng_state, dropout_p, x);
  const int64_t N = x.size(x.dim() - 1), M = N ? x.numel() / N : 0;
  GK_CHECK(M < (int64_t{1} << 32) && N < (int64_t{1} << 32), op, ": at most 4294967295 rows and columns, got ", M, " and ", N);
  const Gpu gpu(x);
  Tensor y = new_like(x);
  const bool aligned = N % dropout_columns == 0 && stands_on_16(x) && stands_on_16(y) && stands_on_16(residual);
  // a wave of blocks that go through all elements; 2048 threads of a processor, 16 bytes or more of each in flight
  const int64_t blocks = std::min<int64_t>(cdiv(M * cdiv(N, dropout_columns), dropout_threads), int64_t(gpu.processors()) * 8);
  with_dtype(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch(GK_KERNEL(dropout_fwd<T>), unsigned(blocks), dropout_threads, 0, gpu.stream, out<T>(y), data<T>(x), data<T>(residual), philox,
           aligned, M, N);
  });
  return y;
}

GK_REGISTER(m) { m.impl("dropout_fwd", TORCH_BOX(&dropout_fwd_cuda)); }

}  // namespace gk
