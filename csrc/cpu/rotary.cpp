// Rotary position embedding on the CPU. Formula, shapes and gradients: gpt_kernels/ops/rotary.py.
#ifndef GK_TARGET

#include "launch.h"
#include "../args/rotary.h"
#define GK_FILE "rotary.cpp"
#include "foreach_target.h"

namespace gk {

static void rotate(const RotaryArgs& s, const Tensor& y, const Tensor& x, const Tensor& cos, const Tensor& sin,
                   bool interleaved, bool transposed) {
  with_dtype(dtype_of(x), [&](auto x_tag) {
    using T = decltype(x_tag);
    auto run = [&](auto p_tag) {
      using P = decltype(p_tag);
      const auto row = interleaved ? GK_BEST(rotary_row<T, P, true>) : GK_BEST(rotary_row<T, P, false>);
      const T* xp = (const T*)x.const_data_ptr();
      const P *cp = (const P*)cos.const_data_ptr(), *sp = (const P*)sin.const_data_ptr();
      T* yp = (T*)y.mutable_data_ptr();
      // rows in the order in which they lie in memory
      const int64_t inner = s.heads_outside ? s.S : s.H, outer = s.heads_outside ? s.H : s.S;
      parallel_for(0, s.B * outer * inner, row_grain(s.D), [&](int64_t r0, int64_t r1) {
        int64_t b = r0 / (outer * inner), o = r0 / inner % outer, i = r0 % inner;
        for (int64_t r = r0; r < r1; r++) {
          const int64_t t = s.heads_outside ? i : o, h = s.heads_outside ? o : i;
          row(yp + b * s.y[0] + t * s.y[1] + h * s.y[2], xp + b * s.x[0] + t * s.x[1] + h * s.x[2],
              cp + b * s.cos[0] + t * s.cos[1], sp + b * s.sin[0] + t * s.sin[1], s.half, s.both, s.D, transposed);
          if (++i == inner) {
            i = 0;
            if (++o == outer) o = 0, b++;
          }
        }
      });
    };
    dtype_of(cos) != dtype_of(x) ? run(compute_t<T>{}) : run(T{});
  });
}

static Tensor rotary_fwd_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t rotary_dim, bool interleaved,
                             bool transposed) {
  RotaryArgs s = rotary_args("rotary_fwd", x, cos, sin, rotary_dim, interleaved);
  Tensor y = new_rotated(x, s);
  rotate(s, y, x, cos, sin, interleaved, transposed);
  return y;
}

static void rotary_fwd_out_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t rotary_dim, bool interleaved,
                               bool transposed, const Tensor& y) {
  const char* op = "rotary_fwd";
  RotaryArgs s = rotary_args(op, x, cos, sin, rotary_dim, interleaved);
  rotary_out_args(op, s, y, x);
  rotate(s, y, x, cos, sin, interleaved, transposed);
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) {
  m.impl("rotary_fwd", TORCH_BOX(&rotary_fwd_cpu));
  m.impl("rotary_fwd_out", TORCH_BOX(&rotary_fwd_out_cpu));
}

}  // namespace gk

#else  // kernel: T is storage, P that of cos and sin, C the arithmetic

#include "vec.h"

namespace GK_TARGET {

// (a0 a1 a2 ...) of two vectors that hold a0 b0 a1 b1 ..., the first of each pair in `first`; and back
template <class V> GK_INLINE void part(V v, V w, V& first, V& second) {
  decltype(v < v) even, odd;
  constexpr int n = sizeof v / sizeof v[0];
  for (int i = 0; i < n; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
  first = permute(v, w, even), second = permute(v, w, odd);
}
template <class V> GK_INLINE void join(V first, V second, V& v, V& w) {
  decltype(v < v) low, high;
  constexpr int n = sizeof v / sizeof v[0];
  for (int i = 0; i < n; i++) low[i] = i / 2 + i % 2 * n, high[i] = low[i] + n / 2;
  v = permute(first, second, low), w = permute(first, second, high);
}
// Pairs at p[0], p[1], p[2] ...: n of them, at most as many as a vector has lanes.
template <class T, class C = compute_t<T>> GK_INLINE void load_pairs(const T* p, int64_t n, vec<C>& first, vec<C>& second) {
  constexpr int64_t L = lanes<C>;
  if (n == L) return part(load(p), load(p + L), first, second);
  part(load_any(p, 2 * n < L ? 2 * n : L), 2 * n > L ? load_n(p + L, 2 * n - L) : vec<C>{}, first, second);
}
template <class T, class C = compute_t<T>> GK_INLINE void store_pairs(T* p, int64_t n, vec<C> first, vec<C> second) {
  constexpr int64_t L = lanes<C>;
  vec<C> v, w;
  join(first, second, v, w);
  if (n == L) return store(p, v), store(p + L, w);
  store_any(p, v, 2 * n < L ? 2 * n : L);
  if (2 * n > L) store_n(p + L, w, 2 * n - L);
}

// A head's row. y may be x: a pair is read before it is written. both: see RotaryArgs.
template <class T, class P, bool interleaved, class C = compute_t<T>>
GK_KERNEL void rotary_row(T* y, const T* x, const P* cos, const P* sin, int64_t half, int64_t both, int64_t D,
                          bool transposed) {
  for_vectors<C>(half, [&](int64_t i, int64_t n) {
    vec<C> x1, x2, cos1, cos2, sin1, sin2;
    if constexpr (interleaved) load_pairs(x + 2 * i, n, x1, x2);
    else x1 = load_any(x + i, n), x2 = load_any(x + half + i, n);
    if (!both) {
      cos1 = cos2 = load_any(cos + i, n), sin1 = sin2 = load_any(sin + i, n);
    } else if constexpr (interleaved) {
      load_pairs(cos + 2 * i, n, cos1, cos2), load_pairs(sin + 2 * i, n, sin1, sin2);
    } else {
      cos1 = load_any(cos + i, n), sin1 = load_any(sin + i, n);
      cos2 = load_any(cos + both + i, n), sin2 = load_any(sin + both + i, n);
    }
    if (transposed) {
      const vec<C> other = sin1;
      sin1 = -sin2, sin2 = -other;
    }
    const vec<C> y1 = x1 * cos1 - x2 * sin1, y2 = x2 * cos2 + x1 * sin2;
    if constexpr (interleaved) store_pairs(y + 2 * i, n, y1, y2);
    else store_any(y + i, y1, n), store_any(y + half + i, y2, n);
  });
  if (y != x && 2 * half < D) __builtin_memcpy(y + 2 * half, x + 2 * half, (D - 2 * half) * sizeof(T));
}

}  // namespace GK_TARGET
#endif
