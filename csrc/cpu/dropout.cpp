// dropout (with an optional residual added) on the CPU. The op: gpt_kernels/ops/dropout.py.
#ifndef GK_TARGET

#include "launch.h"
#include "philox_launch.h"
#include "../args/dropout.h"
#include "../launchers.h"
#define GK_FILE "dropout.cpp"
#include "foreach_target.h"

namespace gk {

static Tensor dropout_fwd_cpu(const Tensor& x, const OptTensor& residual, const Tensor& rng_state, double dropout_p) {
  const char* op = "dropout_fwd";
  const Matrix of = dropout_args(op, x, residual);
  const int64_t M = of.M, N = of.N;
  const Philox philox = philox_of(op, rng_state, dropout_p);
  Tensor y = new_like(x);
  with_dtype(dtype_of(x), [&](auto tag) {
    using T = decltype(tag);
    const auto row = GK_BEST(dropout_row<T>);
    const T *xp = (const T*)x.const_data_ptr(), *rp = residual ? (const T*)residual->const_data_ptr() : nullptr;
    T* yp = (T*)y.mutable_data_ptr();
    const bool streams = row_streams(y, N, residual ? 3 : 2);
    parallel_for(0, M, row_grain(N), [&](int64_t m0, int64_t m1) {
      for (int64_t m = m0; m < m1; m++) row(yp + m * N, xp + m * N, rp ? rp + m * N : nullptr, m, N, philox, streams);
    });
  });
  return y;
}

void masked_into(Tensor& y, const Tensor& x, const Tensor& mask, double scale) {
  const int64_t n = x.numel();
  with_dtype(dtype_of(x), [&](auto tag) {
    using T = decltype(tag);
    const auto run = GK_BEST(masked<T>);
    const T* xp = (const T*)x.const_data_ptr();
    const bool* mp = (const bool*)mask.const_data_ptr();
    T* yp = (T*)y.mutable_data_ptr();
    parallel_for(0, n, row_grain(1), [&](int64_t i0, int64_t i1) { run(yp + i0, xp + i0, mp + i0, i1 - i0, scale); });
  });
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) { m.impl("dropout_fwd", TORCH_BOX(&dropout_fwd_cpu)); }

}  // namespace gk

#else  // kernel

#include "vec.h"
#include "philox.h"

namespace GK_TARGET {

// y = x mask scale
template <class T> GK_KERNEL void masked(T* y, const T* x, const bool* mask, int64_t N, double scale) {
  typedef compute_t<T> C;
  write_row(y, N, false, [&](int64_t i, int64_t n) {
    return load_any(x + i, n) * (load_bools<C>(mask + i, n) != 0 ? splat<C>(1) : vec<C>{}) * (C)scale;
  });
}

// y = x / (1 - p) where kept, 0 where dropped, + residual
template <class T>
GK_KERNEL void dropout_row(T* y, const T* x, const T* residual, int64_t row, int64_t N, const gk::Philox& of_call,
                           bool streams) {
  typedef compute_t<T> C;
  constexpr int64_t block = 8 * lanes<float>;
  const gk::Philox philox = of_call;  // a copy, which for all the compiler knows no store to y changes
  const C keep = philox.keep_scale;
  uint16_t random[block];
  for (int64_t j0 = 0; j0 < N; j0 += block) {
    if (philox.drop_below)
      philox_groups(random, lanes<float>, lane_index() + (uint32_t)(j0 / 8), vu{} + (uint32_t)row, 0, philox);
    write_row(y + j0, N - j0 < block ? N - j0 : block, streams, [&](int64_t j, int64_t n) {
      prefetch(x + j0 + j + far_ahead<T>);
      if (residual) prefetch(residual + j0 + j + far_ahead<T>);
      vec<C> v = load_any(x + j0 + j, n) * keep;
      if (philox.drop_below) v = drop(v, random + j, philox);
      return residual ? v + load_any(residual + j0 + j, n) : v;
    });
  }
}

}  // namespace GK_TARGET
#endif
