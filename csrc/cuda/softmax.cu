// softmax on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/softmax.py.
#include "../args/softmax.h"
#include "../launchers.h"
#include "row.cuh"

namespace gk {

// Where a broadcast mask's row begins for row m of x: strides of x's leading dimensions, 0 where the mask has size 1.
struct MaskRows {
  static constexpr int max_dims = 16;
  int dims = 0;
  unsigned size[max_dims];    // innermost first
  int64_t stride[max_dims];
  int64_t step = 0;  // of the last dimension: 1, or 0 when one element serves the whole row
  GK_DEVICE int64_t begin(unsigned row) const {
    int64_t offset = 0;
    for (int i = 0; i < dims; i++) offset += row % size[i] * stride[i], row /= size[i];
    return offset;
  }
};

// ---- kernels ----

// Bottom-right causal: of a (T, N) matrix, row t sees columns 0 ... t + N - T; here counted from a part's beginning.
GK_DEVICE int visible_columns(unsigned row, unsigned T, int64_t N, int64_t begin, int n) {
  return T ? int(min(max(row % T + N - T + 1 - begin, int64_t(0)), int64_t(n))) : n;
}

constexpr int softmax_fwd_few = 4, softmax_bwd_few = 2;
// Blocks of a processor for which registers are left: as many as go without a spill.
constexpr int softmax_fwd_blocks(bool block, bool masked, bool wide) {
  return block ? (masked ? 1 : 2) : masked ? 4 : wide ? 6 : 8;
}
constexpr int softmax_bwd_blocks(bool block, bool wide) { return block ? 2 : wide ? 4 : 5; }

// z = scale x + mask on visible columns, -inf on others, element by element from what is kept: the bits of x or, with a mask,
// z itself.
template <class T, bool masked, int kept> struct Scores {
  static constexpr int V = per_16<T>;
  KeptRow<T, kept> row;
  float z[masked ? kept : 1][V];

  GK_DEVICE explicit Scores(int64_t N) : row(N) {}
  template <class K> GK_DEVICE void load(const RowSource<T>& source, const K* mask, int64_t step, float scale) {
    row.load(source);
    if constexpr (masked) {
#pragma unroll
      for (int j = 0; j < kept; j++) {
        row.get(j, z[j]);
#pragma unroll
        for (int k = 0; k < V; k++) {
          const int column = source.chunks.column(j) + k;
          const bool seen = column >= 0 && column < source.end;
          // a hidden score is not looked at: it may be nan
          if constexpr (std::is_same_v<K, bool>) z[j][k] = seen && mask[column * step] ? z[j][k] * scale : minus_inf;
          else z[j][k] = seen ? z[j][k] * scale + to_float(mask[column * step]) : minus_inf;
        }
      }
    }
  }
  GK_DEVICE void get(const RowSource<T>& source, int j, float scale, float (&v)[V]) const {
    if constexpr (masked) {
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = z[j][k];
    } else {
      row.get(j, v);
#pragma unroll
      for (int k = 0; k < V; k++) v[k] *= scale;
      source.chunks.fill(j, source.end, v, minus_inf);
    }
  }
  GK_DEVICE void forget(int64_t below_2_62) {
    if constexpr (!masked) row.forget(below_2_62);
  }
};

// y = exp(z - max z) / sum exp(z - max z); partial[row][part] = (max, sum) of a part
template <class T, class K, bool masked, bool block, int kept, Pass pass>
__global__ void __launch_bounds__(row_threads<block>, softmax_fwd_blocks(block, masked, sizeof(T) == 4))
    softmax_fwd(T* __restrict__ y, const T* __restrict__ x, const K* __restrict__ mask, float2* __restrict__ partial,
                const __grid_constant__ MaskRows mask_rows, int64_t M, int64_t N, unsigned T_rows, float scale, float hidden,
                int64_t span, int parts) {
  constexpr int V = per_16<T>;
  const RowPlace<block, kept> at(N, span, pass == Pass::whole ? 1 : parts);
  unsigned m = at.row;
  if (m >= M) return;  // a whole warp, or no one
  if constexpr (masked) mask += mask_rows.begin(m) + at.begin * mask_rows.step;
  const auto row_of = [&](unsigned m) -> RowSource<T> {
    const int64_t begin = m * N + at.begin;
    return {Chunks<T>(y + begin, at.n, at.me, at.peers), x + begin, m < M ? visible_columns(m, T_rows, N, at.begin, at.n) : 0};
  };
  Scores<T, masked, kept> scores(N);
  RowSource<T> row = row_of(m);
  scores.row.fetch(row);
  do {
    scores.load(row, mask, mask_rows.step, scale);
    float top = minus_inf, sum = 0;
    if constexpr (pass != Pass::write) {
      scores.row.each(row, [&](int j) {
        float v[V];
        scores.get(row, j, scale, v);
#pragma unroll
        for (int k = 0; k < V; k++) top = fmaxf(top, v[k]);
      });
      top = row_max<block>(top);
      scores.forget(N);
      float sums[V] = {};
      scores.row.each(row, [&](int j) {
        float v[V];
        scores.get(row, j, scale, v);
#pragma unroll
        for (int k = 0; k < V; k++) sums[k] += ex2_approx((v[k] - origin_of(top)) * log2_e);
      });
      sum = row.chunks.template sum<block>(sums);
      scores.forget(N);
    }
    if constexpr (pass == Pass::read) {
      if (at.me == 0) partial[int64_t(m) * parts + at.part] = make_float2(top, sum);
    } else {
      if constexpr (pass == Pass::write) {
        const float2* of = partial + int64_t(m) * parts;
        top = max_of_parts(parts, [&](int s) { return of[s].x; });
        sum = sum_of_parts(parts, [&](int s) { return of[s].y * ex2_approx((origin_of(of[s].x) - origin_of(top)) * log2_e); });
      }
      const float inverse = sum == 0.f ? hidden : 1.f / sum, origin = origin_of(top);  // 0 or, as in ATen, NaN
      const RowSource<T> next = row_of(m + gridDim.x);
      scores.row.write(y + m * N + at.begin, row, [&](int j, float (&v)[V]) {
        scores.get(row, j, scale, v);
#pragma unroll
        for (int k = 0; k < V; k++) v[k] = ex2_approx((v[k] - origin) * log2_e) * inverse;
      }, [&](int j) { scores.row.fetch(next, j); });
      row = next;
    }
  } while (kept == 0 && (m += gridDim.x) < M);
}

// dx = scale y (dy - sum(dy y));  a row without a visible column has y = 0, so dx = 0. partial[row][part] = a part's sum
template <class T, bool block, int kept, Pass pass>
__global__ void __launch_bounds__(row_threads<block>, softmax_bwd_blocks(block, sizeof(T) == 4))
    softmax_bwd(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ y, float* __restrict__ partial, int64_t M,
                int64_t N, unsigned T_rows, float scale, int64_t span, int parts) {
  constexpr int V = per_16<T>;
  const RowPlace<block, kept> at(N, span, pass == Pass::whole ? 1 : parts);
  unsigned m = at.row;
  if (m >= M) return;
  const auto row_of = [&](const T* tensor, unsigned m) -> RowSource<T> {
    const int64_t begin = m * N + at.begin;
    return {Chunks<T>(dx + begin, at.n, at.me, at.peers), tensor + begin,
            m < M ? visible_columns(m, T_rows, N, at.begin, at.n) : 0};
  };
  KeptRow<T, kept> kept_y(N), kept_dy(N, 1);
  RowSource<T> y_row = row_of(y, m), dy_row = row_of(dy, m);
  kept_y.fetch(y_row), kept_dy.fetch(dy_row);
  do {
    kept_y.load(y_row), kept_dy.load(dy_row);
    const auto get = [&](int j, float (&p)[V], float (&d)[V]) {
      kept_y.get(j, p), kept_dy.get(j, d);
      // dy may be nan where nothing is visible
      y_row.chunks.fill(j, y_row.end, p, 0.f), y_row.chunks.fill(j, y_row.end, d, 0.f);
    };
    float dot = 0;
    if constexpr (pass != Pass::write) {
      float sums[V] = {};
      kept_y.each(y_row, [&](int j) {
        float p[V], d[V];
        get(j, p, d);
#pragma unroll
        for (int k = 0; k < V; k++) sums[k] += d[k] * p[k];
      });
      dot = y_row.chunks.template sum<block>(sums);
      kept_y.forget(N), kept_dy.forget(N);
    }
    if constexpr (pass == Pass::read) {
      if (at.me == 0) partial[int64_t(m) * parts + at.part] = dot;
    } else {
      if constexpr (pass == Pass::write) dot = sum_of_parts(parts, [&](int s) { return partial[int64_t(m) * parts + s]; });
      const RowSource<T> next_y = row_of(y, m + gridDim.x), next_dy = row_of(dy, m + gridDim.x);
      kept_y.write(dx + m * N + at.begin, y_row, [&](int j, float (&d)[V]) {
        float p[V];
        get(j, p, d);
#pragma unroll
        for (int k = 0; k < V; k++) d[k] = p[k] * (d[k] - dot) * scale;
      }, [&](int j) { kept_y.fetch(next_y, j), kept_dy.fetch(next_dy, j); });
      y_row = next_y, dy_row = next_dy;
    }
  } while (kept == 0 && (m += gridDim.x) < M);
}

// ---- launchers ----

static MaskRows mask_rows_of(const char* op, const Tensor& mask, const Tensor& x) {
  const MaskDims dims(op, mask, x);
  MaskRows rows;
  rows.dims = dims.rows.count, rows.step = dims.step;
  std::copy_n(dims.rows.size, rows.dims, rows.size), std::copy_n(dims.rows.stride, rows.dims, rows.stride);
  return rows;
}

Tensor softmax_of(const Tensor& x, const OptTensor& mask, double scale, bool causal, double hidden) {
  const char* op = "softmax_fwd";
  const Matrix of = softmax_fwd_args(op, x, mask, scale, causal);
  const ScalarType x_dtype = dtype_of(x), mask_dtype = mask ? dtype_of(*mask) : x_dtype;
  const MaskRows mask_rows = mask ? mask_rows_of(op, *mask, x) : MaskRows{};
  const int64_t M = of.M, N = of.N;
  const unsigned T_rows = causal ? unsigned(x.size(x.dim() - 2)) : 0;
  check_row_count(op, M);
  const Gpu gpu(x);
  Tensor y = new_like(x);
  with_dtype(x_dtype, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto k, auto masked) {
      using K = decltype(k);
      constexpr int few = softmax_fwd_few;
      const RowShape s = row_shape<T, few>(M, N, gpu, masked ? 0 : 1);
      Tensor partial = new_tensor(x, {s.parts > 1 ? M : 0, s.parts, 2}, ScalarType::Float);
      with_row_shape<T, few, !masked>(s, [&](auto block, auto kept, auto pass) {
        launch(GK_KERNEL(softmax_fwd<T, K, masked, block, kept, pass>), s.blocks(M), s.threads, s.shared, gpu.stream, out<T>(y),
               data<T>(x), data<K>(mask), out<float2>(partial), mask_rows, M, N, T_rows, float(scale), float(hidden), s.span,
               s.parts);
      });
    };
    if (!mask) run(t, std::false_type{});
    else if (mask_dtype == ScalarType::Bool) run(bool{}, std::true_type{});
    else if (mask_dtype == x_dtype) run(t, std::true_type{});
    else run(float{}, std::true_type{});
  });
  return y;
}
static Tensor softmax_fwd_cuda(const Tensor& x, const OptTensor& mask, double scale, bool causal) {
  return softmax_of(x, mask, scale, causal, 0);
}

Tensor softmax_gradient(const Tensor& dy, const Tensor& y, double scale, bool causal) {
  const char* op = "softmax_bwd";
  const Matrix of = softmax_bwd_args(op, dy, y, causal);
  const int64_t M = of.M, N = of.N;
  const unsigned T_rows = causal ? unsigned(y.size(y.dim() - 2)) : 0;
  check_row_count(op, M);
  const Gpu gpu(y);
  Tensor dx = new_like(y);
  with_dtype(dtype_of(y), [&](auto t) {
    using T = decltype(t);
    constexpr int few = softmax_bwd_few;
    const RowShape s = row_shape<T, few>(M, N, gpu, 2);
    Tensor partial = new_tensor(y, {s.parts > 1 ? M : 0, s.parts}, ScalarType::Float);
    with_row_shape<T, few, true>(s, [&](auto block, auto kept, auto pass) {
      launch(GK_KERNEL(softmax_bwd<T, block, kept, pass>), s.blocks(M), s.threads, s.shared, gpu.stream, out<T>(dx),
             data<T>(dy), data<T>(y), out<float>(partial), M, N, T_rows, float(scale), s.span, s.parts);
    });
  });
  return dx;
}

GK_REGISTER(m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd_cuda));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_gradient));
}

}  // namespace gk
