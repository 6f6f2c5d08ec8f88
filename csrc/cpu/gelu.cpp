// gelu on the CPU. Formula, shapes and gradients: gpt_kernels/ops/gelu.py.
#ifndef GK_TARGET

#include "launch.h"
#include "../args/gelu.h"
#include "../launchers.h"
#define GK_FILE "gelu.cpp"
#include "foreach_target.h"

namespace gk {

// Without a bias rows mean nothing to gelu: x is cut into rows of this many elements, the last one shorter.
static constexpr int64_t flat_columns = 4096;

Tensor gelu_of(const Tensor& x, const OptTensor& bias, bool tanh) {
  gelu_fwd_args("gelu_fwd", x, bias);
  const int64_t total = x.numel(), N = bias ? x.size(x.dim() - 1) : flat_columns, M = N ? (total + N - 1) / N : 0;
  Tensor y = new_like(x);

  with_dtype(dtype_of(x), [&](auto x_tag) {
    using T = decltype(x_tag);
    auto run = [&](auto b_tag) {
      using P = decltype(b_tag);
      const auto row = tanh ? GK_BEST(gelu_fwd_row<T, P, Act::gelu_tanh>) : GK_BEST(gelu_fwd_row<T, P, Act::gelu>);
      const T* xp = (const T*)x.const_data_ptr();
      const P* bp = bias ? (const P*)bias->const_data_ptr() : nullptr;
      T* yp = (T*)y.mutable_data_ptr();
      const bool streams = row_streams(y, N, 2);
      parallel_for(0, M, row_grain(N), [&](int64_t m0, int64_t m1) {
        for (int64_t m = m0; m < m1; m++) row(yp + m * N, xp + m * N, bp, std::min(N, total - m * N), streams);
      });
    };
    bias&& dtype_of(*bias) != dtype_of(x) ? run(compute_t<T>{}) : run(T{});
  });
  return y;
}

std::tuple<Tensor, Tensor> gelu_gradients(const Tensor& dy, const Tensor& x, const OptTensor& bias, bool tanh) {
  gelu_bwd_args("gelu_bwd", dy, x, bias);
  const int64_t total = x.numel(), N = bias ? x.size(x.dim() - 1) : flat_columns, M = N ? (total + N - 1) / N : 0;
  const ScalarType bias_dtype = bias ? dtype_of(*bias) : dtype_of(x);
  const int64_t chunks = row_chunks(M);
  Tensor dx = new_like(x), dbias = new_tensor(x, {bias ? N : 0}, bias_dtype);
  Tensor partial = new_tensor(x, {bias ? chunks : 0, N}, stat_dtype(dtype_of(x)));

  with_dtype(dtype_of(x), [&](auto x_tag) {
    using T = decltype(x_tag);
    using C = compute_t<T>;
    auto run = [&](auto b_tag) {
      using P = decltype(b_tag);
      const auto row = tanh ? GK_BEST(gelu_bwd_row<T, P, Act::gelu_tanh>) : GK_BEST(gelu_bwd_row<T, P, Act::gelu>);
      const T *xp = (const T*)x.const_data_ptr(), *dyp = (const T*)dy.const_data_ptr();
      const P* bp = bias ? (const P*)bias->const_data_ptr() : nullptr;
      T* dxp = (T*)dx.mutable_data_ptr();
      C* pp = bias ? (C*)partial.mutable_data_ptr() : nullptr;
      const bool streams = row_streams(dx, N, 3);
      parallel_for(0, chunks, chunk_grain(M, N, chunks), [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; c++) {
          C* db = pp ? pp + c * N : nullptr;
          if (db) std::memset(db, 0, N * sizeof(C));
          for (int64_t m = chunk_begin(c, chunks, M); m < chunk_begin(c + 1, chunks, M); m++)
            row(dxp + m * N, db, dyp + m * N, xp + m * N, bp, std::min(N, total - m * N), streams);
        }
      });
      if (bias) GK_BEST(sum_partials<P>)((P*)dbias.mutable_data_ptr(), pp, chunks, N, N);
    };
    bias_dtype != dtype_of(x) ? run(C{}) : run(T{});
  });
  return {dx, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&gelu_of));
  m.impl("gelu_bwd", TORCH_BOX(&gelu_gradients));
}

}  // namespace gk

#else  // kernels: T is x's storage, P the bias's, C the arithmetic

#include "vec.h"
#include "reduce.h"
#include "activation.h"

namespace GK_TARGET {

// v = x + b;  y = act(v)
template <class T, class P, Act act, class C = compute_t<T>>
GK_KERNEL void gelu_fwd_row(T* y, const T* x, const P* b, int64_t N, bool streams) {
  write_row(y, N, streams, [&](int64_t i, int64_t n) {
    prefetch(x + far_ahead<T> + i);
    vec<C> v = load_any(x + i, n);
    if (b) v += load_any(b + i, n);
    return v * act_factor<T, act>(v);
  });
}

// dx = dy act'(v);  db += dx
template <class T, class P, Act act, class C = compute_t<T>>
GK_KERNEL void gelu_bwd_row(T* dx, C* db, const T* dy, const T* x, const P* b, int64_t N, bool streams) {
  write_row(dx, N, streams, [&](int64_t i, int64_t n) {
    prefetch(x + far_ahead<T> + i), prefetch(dy + far_ahead<T> + i);
    vec<C> v = load_any(x + i, n), s;
    if (b) v += load_any(b + i, n);
    const vec<C> d = load_any(dy + i, n) * act_slope<T, act>(v, s);
    if (db) store_any(db + i, load_any(db + i, n) + d, n);
    return d;
  });
}

}  // namespace GK_TARGET
#endif
