// cross_entropy on the CPU. Formula, shapes and gradients: gpt_kernels/ops/cross_entropy.py.
//
// A row is cut into segments of 4096 classes, each read once for its maximum and its sum of exponentials; the segments' results
// are joined in order. Threads share out rows or, where these are few, segments, so that one row of a large vocabulary keeps
// every thread busy; either way the bits depend on nothing but the shape.
#ifndef GK_TARGET

#include <memory>
#include <vector>

#include "launch.h"
#include "../args/cross_entropy.h"

namespace gk {
constexpr int64_t SEGMENT = 4096;
constexpr int64_t PART = 4;  // what is kept of a segment: maximum, origin, sum, distance
}  // namespace gk

#define GK_FILE "cross_entropy.cpp"
#include "foreach_target.h"

namespace gk {

// Where row m of (..., V) begins; mostly one dimension is left.
struct RowOffsets : RowDims {
  explicit RowOffsets(const Tensor& t) : RowDims(row_dims(t)) {}
  int64_t operator()(int64_t m) const {
    int64_t offset = 0;
    for (int d = 0; d < count - 1; m /= size[d++]) offset += m % size[d] * stride[d];
    return count ? offset + m * stride[count - 1] : 0;
  }
};

// The number of rows that are not ignored. Raises where a target is neither a class nor ignore_index: after it each is a valid index.
static int64_t count_kept(const char* op, const Tensor& target, int64_t V, const CrossEntropyOptions& o) {
  const int64_t* t = (const int64_t*)target.const_data_ptr();
  int64_t kept = 0;
  for (int64_t m = 0, M = target.numel(); m < M; m++) {
    if (t[m] == o.ignore_index) continue;
    GK_CHECK(t[m] >= 0 && t[m] < V, op, ": target ", t[m], " of row ", m, " is out of range, expected 0 to ", V - 1,
             " or ignore_index ", o.ignore_index);
    kept++;
  }
  return kept;
}

static int64_t segments_of(int64_t V) { return std::max<int64_t>(1, (V + SEGMENT - 1) / SEGMENT); }

// dlogits is that of dloss = 1, empty unless asked for and reduction is not "none": a row's second use comes from cache.
static std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd_cpu(const Tensor& logits, const Tensor& target,
                                                                        int64_t ignore_index, int64_t reduction,
                                                                        double label_smoothing, double lse_square_scale,
                                                                        double logit_softcap, bool with_grad) {
  const CrossEntropyOptions o = {ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap};
  const char* op = "cross_entropy_fwd";
  const Matrix of = cross_entropy_args(op, logits, target, o);
  const int64_t M = of.M, V = of.N, segments = segments_of(V), kept = count_kept(op, target, V, o);
  const ScalarType stat = stat_dtype(dtype_of(logits));
  with_grad = with_grad && reduction != 0;
  Tensor loss = new_contiguous(target, reduction == 0 ? target.dim() : 0, stat), z_loss = new_like(loss);
  Tensor lse = new_tensor(logits, {2, M}, stat);
  Tensor dlogits =
      with_grad ? new_contiguous(logits, logits.dim(), dtype_of(logits)) : new_tensor(logits, {0}, dtype_of(logits));

  with_dtype(dtype_of(logits), [&](auto tag) {
    using T = decltype(tag);
    using C = compute_t<T>;
    const auto segment = GK_BEST(cross_entropy_segment<T>);
    const auto join = GK_BEST(cross_entropy_join<T>);
    const auto grad = GK_BEST(cross_entropy_grad<T>);
    const RowOffsets offset(logits);
    // per segment its part; then, for a reduction, each row's loss and z-loss
    const std::unique_ptr<C[]> scratch(new C[M * segments * PART + 2 * M]);
    const bool each = reduction == 0;
    C *parts = scratch.get(), *rows = each ? (C*)loss.mutable_data_ptr() : parts + M * segments * PART;
    C *z_rows = each ? (C*)z_loss.mutable_data_ptr() : rows + M, *row_max = (C*)lse.mutable_data_ptr(), *log_sum = row_max + M;
    const T* x = (const T*)logits.const_data_ptr();
    T* dx = (T*)dlogits.mutable_data_ptr();
    const int64_t* t = (const int64_t*)target.const_data_ptr();
    const C g = reduction == 1 ? (C)1 / kept : 1;
    const bool streams = with_grad && output_streams(dlogits, 2);

    const auto read = [&](int64_t m, int64_t s) {
      const int64_t begin = s * SEGMENT;
      if (t[m] != ignore_index)
        segment(parts + (m * segments + s) * PART, x + offset(m) + begin, std::min(V - begin, SEGMENT), (C)o.softcap,
                o.smoothing != 0);
    };
    const auto finish = [&](int64_t m) {
      if (t[m] == ignore_index) rows[m] = z_rows[m] = row_max[m] = log_sum[m] = 0;
      else
        join(rows + m, z_rows + m, row_max + m, log_sum + m, parts + m * segments * PART, x + offset(m) + t[m], segments, V, o);
    };
    const auto write = [&](int64_t m, int64_t s) {
      const int64_t begin = s * SEGMENT, n = std::min(V - begin, SEGMENT);
      if (t[m] == ignore_index) std::memset(dx + m * V + begin, 0, n * sizeof(T));
      else grad(dx + m * V + begin, x + offset(m) + begin, n, t[m] - begin, row_max[m], log_sum[m], g, V, o, streams);
    };
    // the same arithmetic whichever way the work is cut, and so the same bits
    if (M >= 4 * get_num_threads()) {
      parallel_for(0, M, row_grain(V), [&](int64_t m0, int64_t m1) {
        for (int64_t m = m0; m < m1; m++) {
          for (int64_t s = 0; s < segments; s++) read(m, s);
          finish(m);
          for (int64_t s = 0; s < segments && with_grad; s++) write(m, s);
        }
      });
    } else {
      const auto each_segment = [&](const auto& body) {
        parallel_for(0, M * segments, row_grain(std::min(V, SEGMENT)), [&](int64_t i0, int64_t i1) {
          for (int64_t i = i0; i < i1; i++) body(i / segments, i % segments);
        });
      };
      each_segment(read);
      for (int64_t m = 0; m < M; m++) finish(m);
      if (with_grad) each_segment(write);
    }
    if (each) return;
    double sum = 0, z_sum = 0;
    for (int64_t m = 0; m < M; m++) sum += rows[m], z_sum += z_rows[m];
    const double count = reduction == 1 ? kept : 1;  // the mean of nothing is nan, as in torch
    *(C*)loss.mutable_data_ptr() = sum / count, *(C*)z_loss.mutable_data_ptr() = z_sum / count;
  });
  return {loss, z_loss, lse, dlogits};
}

// dlogits may be logits itself. made: it holds the gradient for dloss = 1 already.
static void cross_entropy_bwd_out_cpu(const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& lse,
                                      int64_t ignore_index, int64_t reduction, double label_smoothing, double lse_square_scale,
                                      double logit_softcap, bool made, const Tensor& dlogits) {
  const char* op = "cross_entropy_bwd";
  const CrossEntropyOptions o = {ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap};
  const Matrix of = cross_entropy_args(op, logits, target, o);
  const int64_t M = of.M, V = of.N, segments = segments_of(V), kept = count_kept(op, target, V, o);
  cross_entropy_bwd_args(op, dloss, logits, lse, dlogits, o, of);
  const RowOffsets from(logits), to(dlogits);

  with_dtype(dtype_of(logits), [&](auto tag) {
    using T = decltype(tag);
    using C = compute_t<T>;
    const auto grad = GK_BEST(cross_entropy_grad<T>);
    const T* x = (const T*)logits.const_data_ptr();
    T* dx = (T*)dlogits.mutable_data_ptr();
    const int64_t* t = (const int64_t*)target.const_data_ptr();
    const C *row_max = (const C*)lse.const_data_ptr(), *log_sum = row_max + M, *g = (const C*)dloss.const_data_ptr();
    if (made && reduction != 0 && g[0] == 1) return;
    const bool streams = dx != x && output_streams(dlogits, 2);  // in place a line is in the cache already
    parallel_for(0, M * segments, row_grain(std::min(V, SEGMENT)), [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; i++) {
        const int64_t m = i / segments, begin = i % segments * SEGMENT, n = std::min(V - begin, SEGMENT);
        T* out = dx + to(m) + begin;
        const C scale = reduction == 0 ? g[m] : reduction == 1 ? g[0] / kept : g[0];
        if (t[m] == ignore_index) std::memset(out, 0, n * sizeof(T));
        else grad(out, x + from(m) + begin, n, t[m] - begin, row_max[m], log_sum[m], scale, V, o, streams);
      }
    });
  });
}

static Tensor cross_entropy_bwd_cpu(const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& lse,
                                    int64_t ignore_index, int64_t reduction, double label_smoothing, double lse_square_scale,
                                    double logit_softcap) {
  check_device("cross_entropy_bwd", "logits", logits);
  Tensor dlogits = new_contiguous(logits, logits.dim(), dtype_of(logits));
  cross_entropy_bwd_out_cpu(dloss, logits, target, lse, ignore_index, reduction, label_smoothing, lse_square_scale,
                            logit_softcap, false, dlogits);
  return dlogits;
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd_cpu));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd_cpu));
  m.impl("cross_entropy_bwd_out", TORCH_BOX(&cross_entropy_bwd_out_cpu));
}

}  // namespace gk

#else  // kernels: T is the logits' storage, C the arithmetic

#include "vec.h"

namespace GK_TARGET {

template <class C> GK_INLINE vec<C> cap_of(vec<C> x, C softcap) { return softcap ? tanh(x * (1 / softcap)) * softcap : x; }
// A maximum of -inf (all classes masked so far) is no origin to measure from: -inf - -inf is nan.
template <class C> GK_INLINE C origin_of(C top) { return top == -(C)__builtin_inf() ? 0 : top; }

// Calls body(vector, k, count) for n elements of x, with k = 0 1 2 3 in turn, so that no sum waits for the one before it; what is
// beyond count is `fill`.
template <class T, class C = compute_t<T>, class Body>
GK_INLINE void for_groups(const T* x, int64_t n, C fill, const Body& body) {
  constexpr int64_t L = lanes<C>;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    prefetch(x + i + far_ahead<T>), prefetch(x + i + 2 * L + far_ahead<T>);
    vec<C> v[4];
    load_4(v, x + i);
    for (int k = 0; k < 4; k++) body(v[k], k, L);
  }
  for (int k = 0; i < n; i += L, k++) body(load_any(x + i, n - i < L ? n - i : L, fill), k, n - i < L ? n - i : L);
}

// out = (max, origin, sum of exp(x - origin), sum of x - origin where there is smoothing) over n classes. One pass: the origin is
// the maximum of the first elements, unless that of all is far above it; then once more.
template <bool capped, bool smoothed, class T, class C = compute_t<T>>
GK_KERNEL void segment_of(C* out, const T* x, int64_t n, C softcap) {
  const C low = -(C)__builtin_inf();
  // the cap grows with x, so the largest logit is also the largest after it
  const auto max_of = [&](vec<C> v) { return capped ? cap_of<C>(splat(hmax<C>(v)), softcap)[0] : hmax<C>(v); };
  constexpr int64_t some = 4 * lanes<C>;
  vec<C> top4[4] = {splat(low), splat(low), splat(low), splat(low)};
  for_groups(x, n < some ? n : some, low, [&](vec<C> v, int k, int64_t) { top4[k] = v; });
  for (C start = max_of(max_of_4(top4)), top;; start = top) {
    const C origin = origin_of(start);
    vec<C> sum[4] = {}, distance[4] = {};
    for_groups(x, n, low, [&](vec<C> v, int k, int64_t count) {
      top4[k] = vmax(top4[k], v);
      v = (capped ? cap_of<C>(v, softcap) : v) - origin;
      sum[k] += keep_first<C>(exp_limited<T, 5>(v), count);  // lse is float32 for 16-bit logits too
      if constexpr (smoothed) distance[k] += keep_first<C>(v, count);
    });
    top = max_of(max_of_4(top4));
    if (top - start > far_above<C>) continue;
    out[0] = top, out[1] = start, out[2] = hsum4<C>(sum), out[3] = hsum4<C>(distance);
    return;
  }
}
template <class T, class C = compute_t<T>>
GK_KERNEL void cross_entropy_segment(C* out, const T* x, int64_t n, C softcap, bool smoothed) {
  const auto of = softcap ? (smoothed ? segment_of<true, true, T> : segment_of<true, false, T>)
                          : (smoothed ? segment_of<false, true, T> : segment_of<false, false, T>);
  of(out, x, n, softcap);
}

// The row's loss and lse from its segments' parts; scalar work, in double.
template <class T, class C = compute_t<T>>
GK_KERNEL void cross_entropy_join(C* loss, C* z_loss, C* row_max, C* row_log_sum, const C* parts, const T* x_target,
                                  int64_t segments, int64_t V, const gk::CrossEntropyOptions& o) {
  C top = parts[0];
  for (int64_t s = 1; s < segments; s++) top = parts[s * gk::PART] > top ? parts[s * gk::PART] : top;
  const C origin = origin_of(top);
  double sum = 0, distance = 0;
  for (int64_t s = 0; s < segments; s++) {
    const C* part = parts + s * gk::PART;
    sum += part[2] * __builtin_exp((double)part[1] - origin);
    distance += part[3] + ((double)origin_of(part[1]) - origin) * (s + 1 < segments ? gk::SEGMENT : V - s * gk::SEGMENT);
  }
  const double log_sum = __builtin_log(sum), lse = top + log_sum, z = o.square_scale * lse * lse;
  const double to_target = (double)top - cap_of<C>(splat(load_one(x_target)), (C)o.softcap)[0];
  *loss = (1 - o.smoothing) * (to_target + log_sum) + (o.smoothing ? o.smoothing * (log_sum - distance / V) : 0) + z;
  *z_loss = z;
  *row_max = top, *row_log_sum = log_sum;
}

// dx_v = (exp(x_v - lse) (1 + 2 z lse) - e / V - (1 - e) [v == target]) g (1 - (x_v / softcap)^2), n classes of a row;
// `target` counts from x and may lie outside. dx may be x.
template <class T, class C = compute_t<T>>
GK_KERNEL void cross_entropy_grad(T* dx, const T* x, int64_t n, int64_t target, C top, C log_sum, C g, int64_t V,
                                  const gk::CrossEntropyOptions& o, bool streams) {
  const double z_slope = 2 * o.square_scale * ((double)top + log_sum);
  const C softcap = o.softcap, slope = g * (C)(1 + z_slope), wanted = g * (C)(o.smoothing / V);
  const auto uncap = [&](vec<C> d, vec<C> v) { return softcap ? d * (1 - (v * (1 / softcap)) * (v * (1 / softcap))) : d; };
  // the target's element: p - 1 as expm1, or a well-predicted row would lose its digits. Read before it may be overwritten.
  const bool inside = target >= 0 && target < n;
  vec<C> at_target = {};
  if (inside) {
    const vec<C> v = cap_of<C>(splat(load_one(x + target)), softcap);
    const double p_minus_1 = __builtin_expm1((double)v[0] - top - log_sum);
    at_target = uncap(splat((C)(g * (p_minus_1 * (1 + z_slope) + z_slope + o.smoothing - o.smoothing / V))), v);
  }
  const auto grad = [&](int64_t i, int64_t count) {
    prefetch(x + i + far_ahead<T>);
    const vec<C> v = cap_of<C>(load_any(x + i, count), softcap);
    return uncap(exp_limited<T>(v - top - log_sum) * slope - wanted, v);
  };
  // rows of 50257 begin anywhere: first up to where a line begins
  int64_t begin = streams ? -(int64_t)((uintptr_t)dx / sizeof(T)) & (64 / sizeof(T) - 1) : 0;
  if (begin > n) begin = n;
  write_row(dx, begin, false, grad);
  write_row(dx + begin, n - begin, streams, [&](int64_t i, int64_t count) { return grad(begin + i, count); });
  if (inside) store_n(dx + target, at_target, 1);
}

}  // namespace GK_TARGET
#endif
