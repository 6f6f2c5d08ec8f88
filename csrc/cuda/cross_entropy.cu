// cross_entropy on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/cross_entropy.py.
//
// Nothing is read on the host: a target out of range, where the CPU backend raises, makes the loss and the gradient of its row
// NaN and is never used as an address.
#include "../args/cross_entropy.h"
#include "row.cuh"

#include <climits>
#include <vector>

namespace gk {

// Where row m of (..., V) begins: leading dimensions joined where their strides allow, so that mostly one is left.
struct RowOffsets {
  static constexpr int max_dims = 16;
  int dims = 0;
  unsigned size[max_dims];  // innermost first
  int64_t stride[max_dims];
  GK_DEVICE int64_t operator()(unsigned row) const {
    if (dims == 1) return row * stride[0];
    int64_t offset = 0;
    for (int i = 0; i < dims; i++) offset += row % size[i] * stride[i], row /= size[i];
    return offset;
  }
};

struct CrossEntropy {
  int64_t ignore_index;
  float smoothing, square_scale, softcap;
  explicit CrossEntropy(const CrossEntropyOptions& o)
      : ignore_index(o.ignore_index), smoothing(float(o.smoothing)), square_scale(float(o.square_scale)),
        softcap(float(o.softcap)) {}
};

// ---- kernels ----

GK_DEVICE float capped(float v, float softcap) { return softcap * tanhf(v * (1.f / softcap)); }

struct Target {
  int64_t index;      // the class, or -1 where it is none
  bool counted, bad;  // not ignored; out of range
  GK_DEVICE Target(const int64_t* target, unsigned row, int64_t ignore_index, int64_t V) {
    index = target[row];
    counted = index != ignore_index, bad = counted && (index < 0 || index >= V);
    if (!counted || bad) index = -1;
  }
  // counted from a part's beginning, or far from any of its columns
  GK_DEVICE int within(int64_t begin, int n) const {
    return index >= begin && index < begin + n ? int(index - begin) : INT_MIN / 2;
  }
};

// What a row's gradient is made of: (exp(x_v - lse) (1 + slope) - e / V - (1 - e) [v == target]) scale. The target's p - 1 is
// an expm1, or a well-predicted row would lose its digits.
template <bool plain> struct Gradient {
  float top, log_sum, slope, uniform, scale, softcap, at_target;
  GK_DEVICE Gradient(const CrossEntropy& o, int64_t V, float top, float log_sum, float x_target, float scale)
      : top(top), log_sum(log_sum), slope(2 * o.square_scale * (top + log_sum)), uniform(o.smoothing / float(V)), scale(scale),
        softcap(o.softcap) {
    at_target = uncapped((expm1f(x_target - top - log_sum) * (1 + slope) + slope + (o.smoothing - uniform)) * scale, x_target);
  }
  GK_DEVICE float uncapped(float d, float v) const {
    return plain || softcap == 0.f ? d : d * (1 - (v * (1.f / softcap)) * (v * (1.f / softcap)));
  }
  GK_DEVICE float operator()(float v) const {
    return uncapped((ex2_approx((v - top - log_sum) * log2_e) * (1 + slope) - uniform) * scale, v);
  }
  // over the chunk at `column`, in place; `target` counts as the columns do
  template <int V> GK_DEVICE void apply(float (&v)[V], int column, int target) const {
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = (*this)(v[k]);
    if (unsigned(target - column) >= unsigned(V)) return;
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = column + k == target ? at_target : v[k];
  }
};

// loss, z_loss and lse of a row; where dx is given, its gradient for dloss = 1 while the row is there, over *count of a mean.
// partial[row][part] = (maximum, sum of exp(x - maximum), sum of x - maximum) of a part. plain: no smoothing, no cap
constexpr int cross_entropy_fwd_few = 4;
constexpr int cross_entropy_fwd_blocks(bool plain) { return plain ? 2 : 1; }  // of a processor, without a spill

template <class T, bool plain, bool block, int kept, Pass pass>
__global__ void __launch_bounds__(row_threads<block>, block   ? cross_entropy_fwd_blocks(plain)
                                                      : plain ? 4
                                                              : 3)
    cross_entropy_fwd(float* __restrict__ loss, float* __restrict__ z_loss, float* __restrict__ lse, T* __restrict__ dx,
                      const T* __restrict__ x, const int64_t* __restrict__ target, const float* __restrict__ count,
                      float* __restrict__ partial, const __grid_constant__ RowOffsets x_rows, CrossEntropy o, int64_t M,
                      int64_t N, int64_t span, int parts) {
  constexpr int V = per_16<T>;
  if constexpr (plain) o.smoothing = o.softcap = 0;
  const RowPlace<block, kept> at(N, span, pass == Pass::whole ? 1 : parts);
  unsigned m = at.row;
  if (m >= M) return;  // a whole warp, or no one
  const auto row_of = [&](unsigned m) -> RowSource<T> {
    const T* part = x + (m < M ? x_rows(m) : 0) + at.begin;
    // an ignored row is 0, and so is its gradient
    const bool wanted = m < M && target[m] != o.ignore_index && (dx || pass != Pass::write);
    return {Chunks<T>(dx ? dx + m * N + at.begin : part, at.n, at.me, at.peers), part, wanted ? at.n : 0};
  };
  const auto cap = [&](float v) { return plain || o.softcap == 0.f ? v : capped(v, o.softcap); };
  KeptRow<T, kept> row(N);
  const auto get = [&](int j, float (&v)[V]) {
    row.get(j, v);
    if constexpr (!plain) {
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = cap(v[k]);
    }
  };
  RowSource<T> source = row_of(m);
  row.fetch(source);
  do {
    row.load(source);
    const Target t(target, m, o.ignore_index, N);
    const float x_target = t.index < 0 ? 0.f : cap(to_float(x[x_rows(m) + t.index]));
    float top = minus_inf, sum = 0, distance = 0;
    if constexpr (pass != Pass::write) {
      row.each(source, [&](int j) {
        float v[V];
        row.get(j, v), source.chunks.fill(j, at.n, v, minus_inf);
#pragma unroll
        for (int k = 0; k < V; k++) top = fmaxf(top, v[k]);
      });
      top = cap(row_max<block>(top));  // the cap grows with x
      row.forget(N);
      float sums[V] = {}, distances[V] = {};
      const float origin = origin_of(top);
      row.each(source, [&](int j) {
        float v[V];
        get(j, v), source.chunks.fill(j, at.n, v, minus_inf);
#pragma unroll
        for (int k = 0; k < V; k++) sums[k] += ex2_approx((v[k] - origin) * log2_e);
        if constexpr (!plain) {
          source.chunks.fill(j, at.n, v, origin);
#pragma unroll
          for (int k = 0; k < V; k++) distances[k] += v[k] - origin;
        }
      });
      sum = source.chunks.template sum<block>(sums);
      if constexpr (!plain) distance = source.chunks.template sum<block>(distances);
      row.forget(N);
    }
    if constexpr (pass == Pass::read) {
      if (at.me != 0) return;
      float* mine = partial + (int64_t(m) * parts + at.part) * 3;
      mine[0] = top, mine[1] = sum, mine[2] = distance;
    } else {
      if constexpr (pass == Pass::write) {
        const float* of = partial + int64_t(m) * parts * 3;
        top = max_of_parts(parts, [&](int s) { return of[3 * s]; });
        const float origin = origin_of(top);
        const auto shift = [&](int s) { return origin_of(of[3 * s]) - origin; };
        sum = sum_of_parts(parts, [&](int s) { return of[3 * s + 1] * ex2_approx(shift(s) * log2_e); });
        if constexpr (!plain)
          distance = sum_of_parts(parts, [&](int s) { return of[3 * s + 2] + shift(s) * float(min(span, N - s * span)); });
      }
      const float log_sum = logf(sum);
      if (at.me == 0 && at.part == 0) {
        const float z = o.square_scale * (top + log_sum) * (top + log_sum), nan = __uint_as_float(0x7FC00000u);
        float value = (1 - o.smoothing) * (top - x_target + log_sum) + z;
        if constexpr (!plain) value += o.smoothing != 0.f ? o.smoothing * (log_sum - distance / float(N)) : 0.f;
        loss[m] = !t.counted ? 0.f : t.bad ? nan : value;
        z_loss[m] = !t.counted ? 0.f : t.bad ? nan : z;
        lse[m] = t.counted ? top : 0.f, lse[M + m] = t.counted ? log_sum : 0.f;
      }
      const RowSource<T> next = row_of(m + gridDim.x);
      if (dx) {
        const float scale = t.bad ? __uint_as_float(0x7FC00000u) : count ? 1.f / *count : 1.f;
        const Gradient<plain> gradient(o, N, top, log_sum, x_target, scale);
        const int here = t.within(at.begin, at.n);
        row.write(dx + m * N + at.begin, source, [&](int j, float (&v)[V]) {
          get(j, v);
          if (t.counted) gradient.apply(v, source.chunks.column(j), here);
        }, [&](int j) { row.fetch(next, j); });
      } else {
        row.fetch(next);
      }
      source = next;
    }
  } while (kept == 0 && (m += gridDim.x) < M);
}

// dx from lse; dx may be x. Every part of a row by itself.
constexpr int cross_entropy_bwd_kept = 4, cross_entropy_bwd_threads = 256;

template <class T, bool plain, bool block, int kept>
__global__ void __launch_bounds__(block ? cross_entropy_bwd_threads : 128)
    cross_entropy_bwd(T* dx, const float* __restrict__ dloss, const T* x, const int64_t* __restrict__ target,
                      const float* __restrict__ lse, const float* __restrict__ count,
                      const __grid_constant__ RowOffsets dx_rows, const __grid_constant__ RowOffsets x_rows,
                      const CrossEntropy o, bool each, bool made, int64_t M, int64_t N, int64_t span, int parts) {
  if (made && *dloss == 1.f) return;  // dx is the gradient already
  constexpr int V = per_16<T>;
  const RowPlace<block, kept> at(N, span, parts);
  if (at.row >= M) return;
  const Target t(target, at.row, o.ignore_index, N);
  dx += dx_rows(at.row) + at.begin, x += x_rows(at.row) + at.begin;
  const Chunks<T> chunks(dx, at.n, at.me, at.peers);
  uint4 raw[kept];
  chunks.load(raw, x, t.counted ? at.n : 0);
  const auto cap = [&](float v) { return plain || o.softcap == 0.f ? v : capped(v, o.softcap); };
  const int here = t.within(at.begin, at.n);
  const float x_target = here >= 0 ? cap(to_float(x[here])) : 0.f;
  // nobody overwrites the target's logit before everybody has it
  if constexpr (block) __syncthreads();
  else warp_sync();
  if (t.counted) {
    const float scale = t.bad ? __uint_as_float(0x7FC00000u) : dloss[each ? at.row : 0] / (count ? *count : 1.f);
    const Gradient<plain> gradient(o, N, lse[at.row], lse[M + at.row], x_target, scale);
#pragma unroll
    for (int j = 0; j < kept; j++) {
      float v[V];
      unpack<T>(raw[j], v);
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = cap(v[k]);
      gradient.apply(v, chunks.column(j), here);
      raw[j] = pack<T>(v);
    }
  }
  chunks.store(dx, raw);
}

// ---- sums over rows, by one block in fixed order ----

constexpr int reduce_threads = 1024;

GK_DEVICE float count_rows(const int64_t* target, int64_t M, int64_t ignore_index) {
  int kept = 0;
#pragma unroll 4
  for (int64_t m = threadIdx.x; m < M; m += reduce_threads) kept += target[m] != ignore_index;
  float total[1] = {float(kept)};
  block_sum(total);
  return total[0];
}
__global__ void __launch_bounds__(reduce_threads)
    cross_entropy_count(float* count, const int64_t* target, int64_t M, int64_t ignore_index) {
  const float rows = count_rows(target, M, ignore_index);
  if (threadIdx.x == 0) *count = rows;
}
// loss and z_loss are sums over rows or, with `mean`, over the number of rows that are not ignored: nan of none, as in torch
__global__ void __launch_bounds__(reduce_threads)
    cross_entropy_reduce(float* loss, float* z_loss, const float* losses, const float* z_losses, const int64_t* target,
                         bool mean, int64_t M, int64_t ignore_index) {
  const int me = threadIdx.x;
  GK_SHARED(double, sums, [2][reduce_threads]);  // double: the bits of the float do not depend on where rows are ignored
  double sum = 0, z_sum = 0;
#pragma unroll 4
  for (int64_t m = me; m < M; m += reduce_threads) sum += losses[m], z_sum += z_losses[m];
  sums[0][me] = sum, sums[1][me] = z_sum;
  for (int half = reduce_threads / 2; half; half /= 2) {
    __syncthreads();
    if (me < half) sums[0][me] += sums[0][me + half], sums[1][me] += sums[1][me + half];
  }
  const double rows = mean ? count_rows(target, M, ignore_index) : 1;
  if (me == 0) *loss = float(sums[0][0] / rows), *z_loss = float(sums[1][0] / rows);
}

// ---- launchers ----

static RowOffsets rows_of(const char* op, const Tensor& t) {
  const RowDims dims = row_dims(t);
  RowOffsets rows;
  GK_CHECK(dims.count <= rows.max_dims, op, ": logits must have at most ", int64_t{rows.max_dims}, " leading dimensions, got ",
           t.dim() - 1);
  rows.dims = dims.count;
  std::copy_n(dims.size, rows.dims, rows.size), std::copy_n(dims.stride, rows.dims, rows.stride);
  return rows;
}

// The number of rows that are not ignored, on the GPU; empty unless it is asked for.
static Tensor count_of(const Gpu& gpu, const Tensor& logits, const Tensor& target, int64_t ignore_index, bool wanted) {
  Tensor count = new_tensor(logits, {wanted ? 1 : 0}, ScalarType::Float);
  if (wanted)
    launch(GK_KERNEL(cross_entropy_count), 1, reduce_threads, 0, gpu.stream, out<float>(count), data<int64_t>(target),
           target.numel(), ignore_index);
  return count;
}

// dlogits is that of dloss = 1, empty unless asked for and reduction is not "none".
static std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd_cuda(const Tensor& logits, const Tensor& target,
                                                                         int64_t ignore_index, int64_t reduction,
                                                                         double label_smoothing, double lse_square_scale,
                                                                         double logit_softcap, bool with_grad) {
  const char* op = "cross_entropy_fwd";
  const CrossEntropyOptions options = {ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap};
  const Matrix of = cross_entropy_args(op, logits, target, options);
  check_row_count(op, of.M);
  const CrossEntropy o(options);
  const int64_t M = of.M, V = of.N;
  const Gpu gpu(logits);
  const RowOffsets rows = rows_of(op, logits);
  with_grad = with_grad && reduction != 0;
  Tensor losses = new_contiguous(logits, logits.dim() - 1, ScalarType::Float), z_losses = new_like(losses);
  Tensor lse = new_tensor(logits, {2, M}, ScalarType::Float);
  Tensor count = count_of(gpu, logits, target, ignore_index, with_grad && reduction == 1);
  const ScalarType dtype = dtype_of(logits);
  Tensor dlogits = with_grad ? new_contiguous(logits, logits.dim(), dtype) : new_tensor(logits, {0}, dtype);
  with_dtype(dtype_of(logits), [&](auto t) {
    with_bool(label_smoothing == 0 && logit_softcap == 0, [&](auto plain) {
      using T = decltype(t);
      constexpr int few = cross_entropy_fwd_few;
      const RowShape s = row_shape<T, few>(M, V, gpu, 1, cross_entropy_fwd_blocks(plain));
      Tensor partial = new_tensor(logits, {s.parts > 1 ? M : 0, s.parts, 3}, ScalarType::Float);
      with_row_shape<T, few, true>(s, [&](auto block, auto kept, auto pass) {
        launch(GK_KERNEL(cross_entropy_fwd<T, plain, block, kept, pass>), s.blocks(M), s.threads, s.shared, gpu.stream,
               out<float>(losses), out<float>(z_losses), out<float>(lse), with_grad ? out<T>(dlogits) : nullptr,
               data<T>(logits), data<int64_t>(target), count.numel() ? data<float>(count) : nullptr, out<float>(partial), rows,
               o, M, V, s.span, s.parts);
      });
    });
  });
  if (reduction == 0) return {losses, z_losses, lse, dlogits};
  Tensor loss = new_contiguous(logits, 0, ScalarType::Float), z_loss = new_like(loss);
  launch(GK_KERNEL(cross_entropy_reduce), 1, reduce_threads, 0, gpu.stream, out<float>(loss), out<float>(z_loss),
         data<float>(losses), data<float>(z_losses), data<int64_t>(target), reduction == 1, M, ignore_index);
  return {loss, z_loss, lse, dlogits};
}

// dlogits may be logits itself
static void cross_entropy_bwd_out_cuda(const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& lse,
                                       int64_t ignore_index, int64_t reduction, double label_smoothing, double lse_square_scale,
                                       double logit_softcap, bool made, Tensor dlogits) {
  const char* op = "cross_entropy_bwd";
  const CrossEntropyOptions options = {ignore_index, reduction, label_smoothing, lse_square_scale, logit_softcap};
  const Matrix of = cross_entropy_args(op, logits, target, options);
  check_row_count(op, of.M);
  cross_entropy_bwd_args(op, dloss, logits, lse, dlogits, options, of);
  const CrossEntropy o(options);
  const int64_t M = of.M, V = of.N;
  const RowOffsets from = rows_of(op, logits), to = rows_of(op, dlogits);
  if (M * V == 0) return;
  const Gpu gpu(logits);
  const Tensor count = count_of(gpu, logits, target, ignore_index, reduction == 1);
  with_dtype(dtype_of(logits), [&](auto t) {
    with_bool(logit_softcap == 0, [&](auto plain) {
      using T = decltype(t);
      const auto run = [&](auto block, auto kept, const RowShape& s) {
        launch(GK_KERNEL(cross_entropy_bwd<T, plain, block, kept>), s.blocks(M), s.threads, 0, gpu.stream, out<T>(dlogits),
               data<float>(dloss), data<T>(logits), data<int64_t>(target), data<float>(lse),
               count.numel() ? data<float>(count) : nullptr, to, from, o, reduction == 0, made && reduction != 0, M, V, s.span,
               s.parts);
      };
      constexpr int64_t span = (cross_entropy_bwd_kept * cross_entropy_bwd_threads - 1) * per_16<T> / 64 * 64;
      if (V > row_warp_columns)
        run(std::true_type{}, KeptIs<cross_entropy_bwd_kept>{},
            {true, cross_entropy_bwd_kept, cross_entropy_bwd_threads, int(cdiv(V, span)), span});
      else run(std::false_type{}, KeptIs<row_warp_many<T>>{}, row_shape<T, cross_entropy_bwd_kept>(M, V, gpu));
    });
  });
}

static Tensor cross_entropy_bwd_cuda(const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& lse,
                                     int64_t ignore_index, int64_t reduction, double label_smoothing, double lse_square_scale,
                                     double logit_softcap) {
  check_device("cross_entropy_bwd", "logits", logits);
  Tensor dlogits = new_contiguous(logits, logits.dim(), dtype_of(logits));
  cross_entropy_bwd_out_cuda(dloss, logits, target, lse, ignore_index, reduction, label_smoothing, lse_square_scale,
                             logit_softcap, false, dlogits);
  return dlogits;
}

GK_REGISTER(m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd_cuda));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd_cuda));
  m.impl("cross_entropy_bwd_out", TORCH_BOX(&cross_entropy_bwd_out_cuda));
}

}  // namespace gk
