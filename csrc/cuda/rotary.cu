// Rotary position embedding on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/rotary.py.
#include "../args/rotary.h"
#include "common.cuh"

namespace gk {

// ---- kernel ----

// V numbers at p, of which the first n are there: by 16 bytes where `aligned` says that all stand so.
template <bool aligned, int V, class T> GK_DEVICE void load_v(const T* p, int64_t n, float (&v)[V]) {
  load_columns<aligned>(p, 0, n, v);
}
template <bool aligned, class T> GK_DEVICE void store_v(T* p, int64_t n, const float (&v)[per_16<T>]) {
  if constexpr (aligned) {
    store_16(p, pack<T>(v));
  } else {
#pragma unroll
    for (int k = 0; k < per_16<T>; k++)
      if (k < n) p[k] = from_float<T>(v[k]);
  }
}

// The first and the second of V pairs, `half` apart or neighbours; n of them are there.
template <bool aligned, bool interleaved, int V, class T>
GK_DEVICE void load_pairs(const T* p, int64_t i, int64_t half, int64_t n, float (&first)[V], float (&second)[V]) {
  if constexpr (interleaved) {
    float v[2 * V];
    load_v<aligned>(p + 2 * i, 2 * n, v);
#pragma unroll
    for (int k = 0; k < V; k++) first[k] = v[2 * k], second[k] = v[2 * k + 1];
  } else {
    load_v<aligned>(p + i, n, first), load_v<aligned>(p + half + i, n, second);
  }
}

// A thread has V pairs of a position, whose cos and sin it keeps, or V of the elements that are not turned, and goes through
// heads. y may be x: what a thread writes it alone has read, and before. A block: pairs of positions side by side, heads at a
// time.
constexpr int rotary_threads = 256;

template <class T, class P, bool interleaved, bool aligned>
__global__ void __launch_bounds__(rotary_threads, 3)
    rotary(T* y, const T* x, const P* __restrict__ cos, const P* __restrict__ sin, const RotaryArgs s, bool transposed) {
  constexpr int V = per_16<T>;
  const int units = int((s.half + V - 1) / V), more = int((s.D - 2 * s.half + V - 1) / V);
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = index / (units + more);
  const int unit = int(index - row * (units + more));
  if (row >= s.B * s.S) return;
  const int64_t b = row / s.S, t = row - b * s.S;
  x += b * s.x[0] + t * s.x[1], y += b * s.y[0] + t * s.y[1];
  const int64_t first = int64_t(blockIdx.y) * blockDim.y + threadIdx.y, step = int64_t(gridDim.y) * blockDim.y;
  if (unit >= units) {
    const int64_t i = 2 * s.half + int64_t(unit - units) * V, n = s.D - i;
#pragma unroll 1
    for (int64_t h = first; h < s.H && y != x; h += step) {
      const T* from = x + h * s.x[2] + i;
      T* to = y + h * s.y[2] + i;
      if constexpr (aligned) {
        store_16(to, load_16(from));
      } else {
        for (int64_t k = 0; k < V && k < n; k++) to[k] = from[k];
      }
    }
    return;
  }
  const int64_t i = int64_t(unit) * V, n = s.half - i;
  float cos1[V], cos2[V], sin1[V], sin2[V];
  cos += b * s.cos[0] + t * s.cos[1], sin += b * s.sin[0] + t * s.sin[1];
  if (s.both) {
    load_pairs<aligned, interleaved>(cos, i, s.half, n, cos1, cos2),
        load_pairs<aligned, interleaved>(sin, i, s.half, n, sin1, sin2);
  } else {
    load_v<aligned>(cos + i, n, cos1), load_v<aligned>(sin + i, n, sin1);
#pragma unroll
    for (int k = 0; k < V; k++) cos2[k] = cos1[k], sin2[k] = sin1[k];
  }
  if (transposed) {
#pragma unroll
    for (int k = 0; k < V; k++) {
      const float other = sin1[k];
      sin1[k] = -sin2[k], sin2[k] = -other;
    }
  }
  for (int64_t h = first; h < s.H; h += step) {
    float x1[V], x2[V], y1[V], y2[V];
    load_pairs<aligned, interleaved>(x + h * s.x[2], i, s.half, n, x1, x2);
#pragma unroll
    for (int k = 0; k < V; k++) y1[k] = x1[k] * cos1[k] - x2[k] * sin1[k], y2[k] = x2[k] * cos2[k] + x1[k] * sin2[k];
    T* to = y + h * s.y[2];
    if constexpr (interleaved) {
      float low[V], high[V];
#pragma unroll
      for (int k = 0; k < V / 2; k++) {
        low[2 * k] = y1[k], low[2 * k + 1] = y2[k];
        high[2 * k] = y1[V / 2 + k], high[2 * k + 1] = y2[V / 2 + k];
      }
      store_v<aligned>(to + 2 * i, 2 * n, low), store_v<aligned>(to + 2 * i + V, 2 * n - V, high);
    } else {
      store_v<aligned>(to + i, n, y1), store_v<aligned>(to + s.half + i, n, y2);
    }
  }
}

// ---- launchers ----

constexpr int64_t rotary_heads_per_thread = 4;

static void rotate(const Gpu& gpu, const RotaryArgs& s, const Tensor& y, const Tensor& x, const Tensor& cos, const Tensor& sin,
                   bool interleaved, bool transposed) {
  const int V = int(16 / element_size(dtype_of(x))), in_table = int(16 / element_size(dtype_of(cos)));
  bool aligned =
      stands_on_16(x) && stands_on_16(y) && stands_on_16(cos) && stands_on_16(sin) && s.half % V == 0 && s.D % V == 0;
  for (int d = 0; d < 3; d++) aligned = aligned && s.x[d] % V == 0 && s.y[d] % V == 0;
  for (int d = 0; d < 2; d++) aligned = aligned && s.cos[d] % in_table == 0 && s.sin[d] % in_table == 0;
  const int heads = s.H >= 8 ? 8 : s.H >= 4 ? 4 : s.H >= 2 ? 2 : 1;
  const dim3 block(rotary_threads / heads, heads);
  const int64_t units = cdiv(s.half, V) + cdiv(s.D - 2 * s.half, V), blocks = cdiv(s.B * s.S * units, block.x);
  GK_CHECK(blocks < int64_t{1} << 31, "rotary_fwd: at most 2147483647 blocks of positions, got ", blocks);
  const dim3 grid(unsigned(blocks), unsigned(std::min<int64_t>(cdiv(s.H, heads * rotary_heads_per_thread), 65535)));
  with_dtypes(dtype_of(x), dtype_of(cos), [&](auto t, auto p) {
    with_bool(interleaved, [&](auto neighbours) {
      with_bool(aligned, [&](auto on_16) {
        using T = decltype(t);
        using P = decltype(p);
        launch(GK_KERNEL(rotary<T, P, neighbours, on_16>), grid, block, 0, gpu.stream, static_cast<T*>(y.mutable_data_ptr()),
               data<T>(x), data<P>(cos), data<P>(sin), s, transposed);
      });
    });
  });
}

static Tensor rotary_fwd_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t rotary_dim, bool interleaved,
                              bool transposed) {
  RotaryArgs s = rotary_args("rotary_fwd", x, cos, sin, rotary_dim, interleaved);
  const Gpu gpu(x);
  Tensor y = new_rotated(x, s);
  rotate(gpu, s, y, x, cos, sin, interleaved, transposed);
  return y;
}

static void rotary_fwd_out_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t rotary_dim, bool interleaved,
                                bool transposed, const Tensor& y) {
  const char* op = "rotary_fwd";
  RotaryArgs s = rotary_args(op, x, cos, sin, rotary_dim, interleaved);
  rotary_out_args(op, s, y, x);
  const Gpu gpu(x);
  rotate(gpu, s, y, x, cos, sin, interleaved, transposed);
}

GK_REGISTER(m) {
  m.impl("rotary_fwd", TORCH_BOX(&rotary_fwd_cuda));
  m.impl("rotary_fwd_out", TORCH_BOX(&rotary_fwd_out_cuda));
}

}  // namespace gk
