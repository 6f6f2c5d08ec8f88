// softmax on the CPU. Formula, shapes and gradients: gpt_kernels/ops/softmax.py.
#ifndef GK_TARGET

#include "launch.h"
#include "../args/softmax.h"
#include "../launchers.h"
namespace gk {
struct NoMask {};
}

#define GK_FILE "softmax.cpp"
#include "foreach_target.h"

namespace gk {

namespace {

// Where a broadcast mask's row begins for row m of x.
struct MaskRows : MaskDims {
  using MaskDims::MaskDims;
  int64_t begin(int64_t m) const {
    int64_t offset = 0;
    for (int i = 0; i < rows.count; i++) offset += m % rows.size[i] * rows.stride[i], m /= rows.size[i];
    return offset;
  }
};

// Bottom-right causal: of a (T, S) matrix, row t sees columns 0 ... t + S - T.
inline int64_t visible_columns(int64_t m, int64_t T, int64_t S) { return std::clamp<int64_t>(m % T + S - T + 1, 0, S); }

}  // namespace

Tensor softmax_of(const Tensor& x, const OptTensor& mask, double scale, bool causal, double hidden) {
  const char* op = "softmax_fwd";
  const Matrix of = softmax_fwd_args(op, x, mask, scale, causal);
  const ScalarType x_dtype = dtype_of(x), mask_dtype = mask ? dtype_of(*mask) : x_dtype;
  const std::optional<MaskRows> mask_rows = mask ? std::optional<MaskRows>(MaskRows(op, *mask, x)) : std::nullopt;
  const int64_t M = of.M, N = of.N, T_rows = causal ? x.size(x.dim() - 2) : 1;
  Tensor y = new_like(x);
  const bool streams = row_streams(y, N, 2);

  with_dtype(x_dtype, [&](auto x_tag) {
    using T = decltype(x_tag);
    auto run = [&](auto mask_tag) {
      using K = decltype(mask_tag);
      const auto row = GK_BEST(softmax_fwd_row<T, K>);
      const T* xp = (const T*)x.const_data_ptr();
      const K* kp = mask ? (const K*)mask->const_data_ptr() : nullptr;
      T* yp = (T*)y.mutable_data_ptr();
      parallel_for(0, M, row_grain(N), [&](int64_t m0, int64_t m1) {
        for (int64_t m = m0; m < m1; m++)
          row(yp + m * N, xp + m * N, kp ? kp + mask_rows->begin(m) : nullptr, kp ? mask_rows->step : 0,
              causal ? visible_columns(m, T_rows, N) : N, N, (compute_t<T>)scale, (compute_t<T>)hidden, streams);
      });
    };
    !mask                            ? run(NoMask{})
    : mask_dtype == ScalarType::Bool ? run(bool{})
    : mask_dtype == x_dtype          ? run(T{})
                                     : run(compute_t<T>{});
  });
  return y;
}
static Tensor softmax_fwd_cpu(const Tensor& x, const OptTensor& mask, double scale, bool causal) {
  return softmax_of(x, mask, scale, causal, 0);
}

Tensor softmax_gradient(const Tensor& dy, const Tensor& y, double scale, bool causal) {
  const Matrix of = softmax_bwd_args("softmax_bwd", dy, y, causal);
  const int64_t M = of.M, N = of.N, T_rows = causal ? y.size(y.dim() - 2) : 1;
  Tensor dx = new_like(y);
  const bool streams = row_streams(dx, N, 3);

  with_dtype(dtype_of(y), [&](auto y_tag) {
    using T = decltype(y_tag);
    const auto row = GK_BEST(softmax_bwd_row<T>);
    const T *yp = (const T*)y.const_data_ptr(), *dyp = (const T*)dy.const_data_ptr();
    T* dxp = (T*)dx.mutable_data_ptr();
    parallel_for(0, M, row_grain(N), [&](int64_t m0, int64_t m1) {
      for (int64_t m = m0; m < m1; m++)
        row(dxp + m * N, dyp + m * N, yp + m * N, causal ? visible_columns(m, T_rows, N) : N, N, (compute_t<T>)scale, streams);
    });
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd_cpu));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_gradient));
}

}  // namespace gk

#else  // kernels: T is x's storage, K the mask's (bool, added, or NoMask), C the arithmetic

#include "vec.h"

namespace GK_TARGET {

// The columns from `visible` on: the rest of its line as the line was begun, then whole lines.
template <class T> GK_INLINE void write_zeros(T* y, int64_t visible, int64_t N, bool streams) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t next = (visible + line - 1) / line * line, begin = next < N ? next : N;
  for (int64_t i = visible; i < begin; i++) y[i] = T{};
  write_row(y + begin, N - begin, streams, [&](int64_t, int64_t) { return vec<compute_t<T>>{}; });
}

// z = scale x + mask on `visible` columns;  y = exp(z - max z) / sum exp(z - max z), 0 beyond, `hidden` where nothing is visible
template <class T, class K, class C = compute_t<T>>
GK_KERNEL void softmax_fwd_row(T* y, const T* x, const K* mask, int64_t step, int64_t visible, int64_t N, C scale, C hidden,
                               bool streams) {
  constexpr C minus_inf = -__builtin_inff();
  const auto z = [&](int64_t i, int64_t n) {
    const vec<C> v = load_any(x + i, n) * scale;
    if constexpr (__is_same(K, gk::NoMask)) {
      return v;
    } else if constexpr (__is_same(K, bool)) {
      const vec<C> keep = step ? load_bools<C>(mask + i, n) : splat<C>(*mask);
      return keep != 0 ? v : splat(minus_inf);
    } else {
      return v + (step ? load_any(mask + i, n) : splat<C>(load_one(mask)));
    }
  };
  // e waits in y where y has its precision, else in a buffer; a long 16-bit row computes it twice
  constexpr bool own = sizeof(T) == sizeof(C);
  constexpr int64_t capacity = own ? 1 : 4096;
  C buffer[capacity];
  const bool kept = own || visible <= capacity;
  streams = streams && !own;  // a line that e waits in is in the cache

  // One pass finds the maximum and sums e, measured from the maximum of the row's first elements. That serves as well, unless
  // the true one lies far above it: then once more.
  constexpr int64_t some = 4 * lanes<C>;
  vec<C> top[4] = {splat(minus_inf), splat(minus_inf), splat(minus_inf), splat(minus_inf)};
  const auto look = [&](vec<C> v, int64_t n, int k) { top[k] = vmax(top[k], keep_first<C>(v, n, minus_inf)); };
  for_vectors_by_4<C>(visible < some ? visible : some, [&](int64_t i, int64_t n, int k) { look(z(i, n), n, k); });
  C origin = hmax<C>(max_of_4(top)), max, inverse;
  const auto e = [&](int64_t i, int64_t n) { return exp_limited<T>(z(i, n) - origin); };
  for (;; origin = max) {
    vec<C> sum[4] = {};
    for_vectors_by_4<C>(visible, [&](int64_t i, int64_t n, int k) {
      const vec<C> v = z(i, n), p = exp_limited<T>(v - origin);
      look(v, n, k);
      sum[k] += keep_first<C>(p, n);
      if constexpr (own) store_any(y + i, p, n);
      else if (kept) store_any(buffer + i, p, n);
    });
    max = hmax<C>(max_of_4(top)), inverse = 1 / hsum4<C>(sum);
    if (!(max - origin > far_above<C>)) break;  // not for a NaN either
  }
  if (max == minus_inf && hidden != hidden) return write_row(y, N, streams, [&](int64_t, int64_t) { return splat(hidden); });
  if (max == minus_inf) visible = 0;
  write_row(y, visible, streams, [&](int64_t i, int64_t n) {
    prefetch(x + next_row<T>(N) + i);
    if constexpr (own) return load_any(y + i, n) * inverse;
    else return (kept ? load_any(buffer + i, n) : e(i, n)) * inverse;
  });
  write_zeros(y, visible, N, streams);
}

// dx = scale y (dy - sum(dy y));  a row without a visible column has y = 0, so dx = 0
template <class T, class C = compute_t<T>>
GK_KERNEL void softmax_bwd_row(T* dx, const T* dy, const T* y, int64_t visible, int64_t N, C scale, bool streams) {
  vec<C> sum[4] = {};
  for_vectors_by_4<C>(visible, [&](int64_t i, int64_t n, int k) { sum[k] += load_any(dy + i, n) * load_any(y + i, n); });
  const C dot = hsum4<C>(sum);
  write_row(dx, visible, streams, [&](int64_t i, int64_t n) {
    prefetch(dy + next_row<T>(N) + i), prefetch(y + next_row<T>(N) + i);
    return load_any(y + i, n) * (load_any(dy + i, n) - dot) * scale;
  });
  write_zeros(dx, visible, N, streams);
}

}  // namespace GK_TARGET
#endif
