// rms_norm on the CPU. Formula, shapes and gradients: gpt_kernels/ops/rms_norm.py.
#ifndef GK_TARGET

#include "launch.h"
#include "../args/rms_norm.h"
#include "../launchers.h"
#define GK_FILE "rms_norm.cpp"
#include "foreach_target.h"

namespace gk {

void rms_norm_into(Tensor& y, Tensor& rstd, const Tensor& x, const OptTensor& weight, Matrix of, double eps) {
  const int64_t M = of.M, N = of.N;
  with_dtype(dtype_of(x), [&](auto x_tag) {
    using T = decltype(x_tag);
    using C = compute_t<T>;
    auto run = [&](auto w_tag) {
      using P = decltype(w_tag);
      const auto row = GK_BEST(rms_norm_fwd_row<T, P>);
      const T* xp = (const T*)x.const_data_ptr();
      const P* wp = weight ? (const P*)weight->const_data_ptr() : nullptr;
      T* yp = (T*)y.mutable_data_ptr();
      C* rp = (C*)rstd.mutable_data_ptr();
      const bool streams = row_streams(y, N, 2);
      parallel_for(0, M, row_grain(N), [&](int64_t m0, int64_t m1) {
        for (int64_t m = m0; m < m1; m++) row(yp + m * N, rp + m, xp + m * N, wp, N, (C)eps, streams);
      });
    };
    parameter_dtype(x, weight) != dtype_of(x) ? run(C{}) : run(T{});
  });
}

static std::tuple<Tensor, Tensor> rms_norm_fwd_cpu(const Tensor& x, const OptTensor& weight, double eps) {
  const Matrix of = rms_norm_fwd_args("rms_norm_fwd", x, weight, eps);
  Tensor y = new_like(x), rstd = new_tensor(x, {of.M}, stat_dtype(dtype_of(x)));
  rms_norm_into(y, rstd, x, weight, of, eps);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_gradients(const Tensor& dy, const Tensor& x, const OptTensor& weight, const Tensor& rstd) {
  const char* op = "rms_norm_bwd";
  const Matrix of = rms_norm_bwd_args(op, dy, x, weight, rstd);
  const int64_t M = of.M, N = of.N;
  const ScalarType param_dtype = parameter_dtype(x, weight);
  const int64_t chunks = row_chunks(M);
  Tensor dx = new_like(x), dweight = new_tensor(x, {weight ? N : 0}, param_dtype);
  Tensor partial = new_tensor(x, {weight ? chunks : 0, N}, stat_dtype(dtype_of(x)));

  with_dtype(dtype_of(x), [&](auto x_tag) {
    using T = decltype(x_tag);
    using C = compute_t<T>;
    auto run = [&](auto w_tag) {
      using P = decltype(w_tag);
      const auto rows = GK_BEST(rms_norm_bwd_rows<T, P>);
      const T *xp = (const T*)x.const_data_ptr(), *dyp = (const T*)dy.const_data_ptr();
      const P* wp = weight ? (const P*)weight->const_data_ptr() : nullptr;
      const C* rp = (const C*)rstd.const_data_ptr();
      T* dxp = (T*)dx.mutable_data_ptr();
      C* pp = (C*)partial.mutable_data_ptr();
      const bool streams = row_streams(dx, N, 3);
      parallel_for(0, chunks, chunk_grain(M, N, chunks), [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; c++) {
          const int64_t m0 = chunk_begin(c, chunks, M), m1 = chunk_begin(c + 1, chunks, M);
          rows(dxp + m0 * N, weight ? pp + c * N : nullptr, dyp + m0 * N, xp + m0 * N, wp, rp + m0, m1 - m0, N, streams);
        }
      });
      if (weight) GK_BEST(sum_partials<P>)((P*)dweight.mutable_data_ptr(), pp, chunks, N, N);
    };
    param_dtype != dtype_of(x) ? run(C{}) : run(T{});
  });
  return {dx, dweight};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd_cpu));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_gradients));
}

}  // namespace gk

#else  // kernels: T is x's storage, P the weight's, C the arithmetic

#include "vec.h"
#include "reduce.h"

namespace GK_TARGET {

template <bool shrink, class T, class C = compute_t<T>> GK_INLINE C mean_square(const T* x, int64_t N) {
  vec<C> squares[4] = {};
  for_vectors_by_4<C>(N, [&](int64_t i, int64_t n, int k) {
    const vec<C> v = shrink ? load_any(x + i, n) * shrunk<C> : load_any(x + i, n);
    squares[k] += v * v;
  });
  return hsum4<C>(squares) / N;
}

// y = x rstd w,  rstd = 1 / sqrt(mean(x^2) + eps)
template <class T, class P, class C = compute_t<T>>
GK_KERNEL void rms_norm_fwd_row(T* y, C* rstd, const T* x, const P* w, int64_t N, C eps, bool streams) {
  C unit = 1, square = mean_square<false>(x, N);
  if (!is_finite(square)) unit = shrunk<C>, square = mean_square<true>(x, N);
  const C rs = unit / sqrt_of(square + eps * unit * unit);
  write_row(y, N, streams, [&](int64_t i, int64_t n) {
    prefetch(x + next_row<T>(N) + i);
    const vec<C> v = load_any(x + i, n) * rs;
    return w ? v * load_any(w + i, n) : v;
  });
  *rstd = rs;
}

// x_hat = x rstd;  dx = (w dy - x_hat mean(w dy x_hat)) rstd;  dw += dy x_hat
template <class T, class P, class C = compute_t<T>>
GK_KERNEL void rms_norm_bwd_rows(T* dx, C* dw, const T* dy, const T* x, const P* w, const C* rstd, int64_t M, int64_t N,
                                 bool streams) {
  for (int64_t i = 0; dw && i < N; i++) dw[i] = 0;
  for (int64_t m = 0; m < M; m++, dx += N, dy += N, x += N) {
    const C rs = rstd[m];
    vec<C> sum_gx[4] = {};
    for_vectors_by_4<C>(N, [&](int64_t i, int64_t n, int k) {
      const vec<C> d = load_any(dy + i, n), dx_hat = d * (load_any(x + i, n) * rs);
      sum_gx[k] += w ? dx_hat * load_any(w + i, n) : dx_hat;
      if (dw) store_any(dw + i, load_any(dw + i, n) + dx_hat, n);
    });
    const C slope = hsum4<C>(sum_gx) / N * rs;
    write_row(dx, N, streams, [&](int64_t i, int64_t n) {
      prefetch(dy + next_row<T>(N) + i), prefetch(x + next_row<T>(N) + i);
      const vec<C> d = load_any(dy + i, n), g = w ? d * load_any(w + i, n) : d;
      return (g - load_any(x + i, n) * slope) * rs;  // rs^2 may be too small for a float
    });
  }
}

}  // namespace GK_TARGET
#endif
