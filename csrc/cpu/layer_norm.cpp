// layer_norm on the CPU. Formula, shapes and gradients: gpt_kernels/ops/layer_norm.py.
#ifndef GK_TARGET

#include "launch.h"
#include "../args/layer_norm.h"
#include "../launchers.h"
#define GK_FILE "layer_norm.cpp"
#include "foreach_target.h"

namespace gk {

void layer_norm_into(Tensor& y, Tensor& mean, Tensor& rstd, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                     Matrix of, double eps) {
  const int64_t M = of.M, N = of.N;
  with_dtype(dtype_of(x), [&](auto x_tag) {
    using T = decltype(x_tag);
    using C = compute_t<T>;
    auto run = [&](auto w_tag) {
      using P = decltype(w_tag);
      const auto row = GK_BEST(layer_norm_fwd_row<T, P>);
      const T* xp = (const T*)x.const_data_ptr();
      const P* wp = weight ? (const P*)weight->const_data_ptr() : nullptr;
      const P* bp = bias ? (const P*)bias->const_data_ptr() : nullptr;
      T* yp = (T*)y.mutable_data_ptr();
      C *mp = (C*)mean.mutable_data_ptr(), *rp = (C*)rstd.mutable_data_ptr();
      const bool streams = row_streams(y, N, 2);
      parallel_for(0, M, row_grain(N), [&](int64_t m0, int64_t m1) {
        for (int64_t m = m0; m < m1; m++) row(yp + m * N, mp + m, rp + m, xp + m * N, wp, bp, N, (C)eps, streams);
      });
    };
    parameter_dtype(x, weight, bias) != dtype_of(x) ? run(C{}) : run(T{});
  });
}

static std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd_cpu(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                                             double eps) {
  const Matrix of = layer_norm_fwd_args("layer_norm_fwd", x, weight, bias, eps);
  Tensor y = new_like(x), mean = new_tensor(x, {of.M}, stat_dtype(dtype_of(x))), rstd = new_like(mean);
  layer_norm_into(y, mean, rstd, x, weight, bias, of, eps);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_gradients(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                        const Tensor& mean, const Tensor& rstd, bool has_bias) {
  const char* op = "layer_norm_bwd";
  const Matrix of = layer_norm_bwd_args(op, dy, x, weight, mean, rstd);
  const int64_t M = of.M, N = of.N;
  const ScalarType param_dtype = parameter_dtype(x, weight);
  Tensor dx = new_like(x), dweight = new_tensor(x, {weight ? N : 0}, param_dtype),
         dbias = new_tensor(x, {has_bias ? N : 0}, param_dtype);
  const int64_t chunks = row_chunks(M);
  const bool params = weight || has_bias;
  // per chunk: N sums for dweight, then N for dbias
  Tensor partial = new_tensor(x, {params ? chunks : 0, 2, N}, stat_dtype(dtype_of(x)));

  with_dtype(dtype_of(x), [&](auto x_tag) {
    using T = decltype(x_tag);
    using C = compute_t<T>;
    auto run = [&](auto w_tag) {
      using P = decltype(w_tag);
      const auto rows = GK_BEST(layer_norm_bwd_rows<T, P>);
      const auto reduce = GK_BEST(sum_partials<P>);
      const T *xp = (const T*)x.const_data_ptr(), *dyp = (const T*)dy.const_data_ptr();
      const P* wp = weight ? (const P*)weight->const_data_ptr() : nullptr;
      const C *mp = (const C*)mean.const_data_ptr(), *rp = (const C*)rstd.const_data_ptr();
      T* dxp = (T*)dx.mutable_data_ptr();
      C* pp = (C*)partial.mutable_data_ptr();
      const bool streams = row_streams(dx, N, 3);
      parallel_for(0, chunks, chunk_grain(M, N, chunks), [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; c++) {
          const int64_t m0 = chunk_begin(c, chunks, M), m1 = chunk_begin(c + 1, chunks, M);
          rows(dxp + m0 * N, params ? pp + c * 2 * N : nullptr, dyp + m0 * N, xp + m0 * N, wp, mp + m0, rp + m0, m1 - m0, N,
               streams);
        }
      });
      if (weight) reduce((P*)dweight.mutable_data_ptr(), pp, chunks, 2 * N, N);
      if (has_bias) reduce((P*)dbias.mutable_data_ptr(), pp + N, chunks, 2 * N, N);
    };
    param_dtype != dtype_of(x) ? run(C{}) : run(T{});
  });
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd_cpu));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_gradients));
}

}  // namespace gk

#else  // kernels: T is x's storage, P the parameters', C the arithmetic

#include "vec.h"
#include "reduce.h"

namespace GK_TARGET {

// Mean and variance of a row by one pass over it: sums of x and x^2. Where the mean outweighs the deviation these cancel, and a
// second pass sums the centred row, whose own sum is what the first mean was off by: a mean far from 0 is right to the last bit.
template <bool shrink, class T, class C = compute_t<T>> GK_INLINE void moments(C* mean, C* var, const T* x, int64_t N) {
  const auto load_of = [&](int64_t i, int64_t n) { return shrink ? load_any(x + i, n) * shrunk<C> : load_any(x + i, n); };
  vec<C> sum[4] = {}, squares[4] = {};
  for_vectors_by_4<C>(N, [&](int64_t i, int64_t n, int k) {
    const vec<C> v = load_of(i, n);
    sum[k] += v;
    squares[k] += v * v;
  });
  const C rough = hsum4<C>(sum) / N;
  *mean = rough, *var = hsum4<C>(squares) / N - rough * rough;
  if (rough * rough <= *var) return;
  vec<C> rest[4] = {}, centred[4] = {};
  for_vectors_by_4<C>(N, [&](int64_t i, int64_t n, int k) {
    const vec<C> v = keep_first<C>(load_of(i, n) - rough, n);
    rest[k] += v;
    centred[k] += v * v;
  });
  const C off = hsum4<C>(rest) / N;
  *mean = rough + off, *var = hsum4<C>(centred) / N - off * off;
}

// y = (x - mean) rstd w + b, from L1, while the next row is on its way there
template <class T, class P, class C = compute_t<T>>
GK_KERNEL void layer_norm_fwd_row(T* y, C* mean, C* rstd, const T* x, const P* w, const P* b, int64_t N, C eps, bool streams) {
  C mu, var, unit = 1;
  moments<false>(&mu, &var, x, N);
  if (!is_finite(var)) moments<true>(&mu, &var, x, N), unit = shrunk<C>, mu /= unit;
  const C rs = unit / sqrt_of((var < 0 ? 0 : var) + eps * unit * unit);
  write_row(y, N, streams, [&](int64_t i, int64_t n) {
    prefetch(x + next_row<T>(N) + i);
    vec<C> v = (load_any(x + i, n) - mu) * rs;
    if (w) v *= load_any(w + i, n);
    if (b) v += load_any(b + i, n);
    return v;
  });
  *mean = mu;
  *rstd = rs;
}

// x_hat = (x - mean) rstd;  dx = (w dy - mean(w dy) - x_hat mean(w dy x_hat)) rstd;  dw += dy x_hat;  db += dy
template <class T, class P, class C = compute_t<T>>
GK_KERNEL void layer_norm_bwd_rows(T* dx, C* dw_db, const T* dy, const T* x, const P* w, const C* mean, const C* rstd,
                                   int64_t M, int64_t N, bool streams) {
  C *dw = dw_db, *db = dw_db + N;
  for (int64_t i = 0; dw_db && i < 2 * N; i++) dw_db[i] = 0;
  for (int64_t m = 0; m < M; m++, dx += N, dy += N, x += N) {
    const C mu = mean[m], rs = rstd[m];
    vec<C> sum_g[4] = {}, sum_gx[4] = {};
    for_vectors_by_4<C>(N, [&](int64_t i, int64_t n, int k) {
      const vec<C> d = load_any(dy + i, n), x_hat = (load_any(x + i, n) - mu) * rs;
      const vec<C> g = w ? d * load_any(w + i, n) : d;
      sum_g[k] += g;
      sum_gx[k] += g * x_hat;
      if (!dw_db) return;
      store_any(dw + i, load_any(dw + i, n) + d * x_hat, n);
      store_any(db + i, load_any(db + i, n) + d, n);
    });
    const C mean_g = hsum4<C>(sum_g) / N, slope = hsum4<C>(sum_gx) / N * rs;
    write_row(dx, N, streams, [&](int64_t i, int64_t n) {
      prefetch(dy + next_row<T>(N) + i), prefetch(x + next_row<T>(N) + i);
      const vec<C> d = load_any(dy + i, n), centred = load_any(x + i, n) - mu;
      const vec<C> g = w ? rounded(d * load_any(w + i, n)) : d;  // of N = 1 mean_g takes all of it
      return (g - mean_g - centred * slope) * rs;  // rs^2 may be too small for a float
    });
  }
}

}  // namespace GK_TARGET
#endif
