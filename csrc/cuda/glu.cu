// swiglu and geglu on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/glu.py.
#include "../args/glu.h"
#include "activation.cuh"

namespace gk {

// ---- kernels ----

// A thread has a chunk of columns and goes down the rows; flat tensors are one row.
constexpr int glu_lanes = 32, glu_rows = 8;  // a block: chunks side by side, rows at a time

template <class T, Act act, bool aligned>
__global__ void __launch_bounds__(glu_lanes* glu_rows, 4)
    glu_fwd(T* __restrict__ y, const T* __restrict__ gate, const T* __restrict__ up, int64_t M, int64_t N, int64_t gate_stride,
            int64_t up_stride) {
  constexpr int V = per_16<T>;
  const Row<T, aligned> row(N);
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (chunk >= row.chunks()) return;
#pragma unroll 2
  for (int64_t m = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; m < M; m += int64_t(gridDim.y) * blockDim.y) {
    float v[V], u[V];
    unpack<T>(row.load(gate + m * gate_stride, chunk), v), unpack<T>(row.load(up + m * up_stride, chunk), u);
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = act_value<act>(v[k]) * u[k];
    row.store(y + m * N, chunk, v);
  }
}

// dgate = dy up act'(gate);  dup = dy act(gate)
template <class T, Act act, bool aligned>
__global__ void __launch_bounds__(glu_lanes* glu_rows, 3)
    glu_bwd(T* __restrict__ dgate, T* __restrict__ dup, const T* __restrict__ dy, const T* __restrict__ gate,
            const T* __restrict__ up, int64_t M, int64_t N, int64_t gate_stride, int64_t up_stride, int64_t out_stride) {
  constexpr int V = per_16<T>;
  const Row<T, aligned> row(N);
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (chunk >= row.chunks()) return;
#pragma unroll 1
  for (int64_t m = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; m < M; m += int64_t(gridDim.y) * blockDim.y) {
    float v[V], u[V], d[V];
    unpack<T>(row.load(gate + m * gate_stride, chunk), v), unpack<T>(row.load(up + m * up_stride, chunk), u);
    unpack<T>(row.load(dy + m * N, chunk), d);
#pragma unroll
    for (int k = 0; k < V; k++) {
      float s;
      const float slope = act_slope<act>(v[k], s);
      u[k] = d[k] * u[k] * slope, v[k] = d[k] * (v[k] * s);
    }
    row.store(dgate + m * out_stride, chunk, u), row.store(dup + m * out_stride, chunk, v);
  }
}

// ---- launchers ----

constexpr int64_t glu_rows_per_thread = 2;
struct GluShape {
  dim3 grid, block;
  bool aligned;
};
static GluShape glu_shape(const GluRows& r, ScalarType dtype, bool all_on_16) {
  const int V = int(16 / element_size(dtype));
  const dim3 block = r.flat ? dim3(glu_lanes * glu_rows) : dim3(glu_lanes, glu_rows);
  const int64_t rows = std::min<int64_t>(cdiv(r.M, block.y * glu_rows_per_thread), 65535);
  const bool whole = r.flat || (r.gate_stride % V == 0 && r.up_stride % V == 0);
  return {dim3(unsigned(cdiv(cdiv(r.N, V), block.x)), unsigned(rows)), block, all_on_16 && whole && r.N % V == 0};
}

// f(the dtype's type, activation, alignment)
template <class F> static void with_glu(ScalarType dtype, int64_t act, bool aligned, const F& f) {
  with_dtype(dtype, [&](auto t) { with_act(act, [&](auto a) { with_bool(aligned, [&](auto on_16) { f(t, a, on_16); }); }); });
}

static Tensor glu_fwd_cuda(const Tensor& gate, const OptTensor& up, int64_t act, bool up_first) {
  const GluRows r = glu_fwd_args("glu_fwd", gate, up, act, up_first);
  const Gpu gpu(gate);
  Tensor y = new_glu(gate, r.N, !up);
  const GluShape s = glu_shape(r, dtype_of(gate), stands_on_16(gate) && stands_on_16(up));
  with_glu(dtype_of(gate), act, s.aligned, [&](auto t, auto a, auto on_16) {
    using T = decltype(t);
    launch(GK_KERNEL(glu_fwd<T, a, on_16>), s.grid, s.block, 0, gpu.stream, out<T>(y), data<T>(gate) + r.gate_from,
           data<T>(up ? *up : gate) + r.up_from, r.M, r.N, r.gate_stride, r.up_stride);
  });
  return y;
}

static std::tuple<Tensor, Tensor> glu_bwd_cuda(const Tensor& dy, const Tensor& gate, const OptTensor& up, int64_t act,
                                               bool up_first) {
  const GluRows r = glu_bwd_args("glu_bwd", dy, gate, up, act, up_first);
  const Gpu gpu(gate);
  Tensor dgate = new_like(gate), dup = up ? new_like(gate) : new_tensor(gate, {0}, dtype_of(gate));
  const GluShape s = glu_shape(r, dtype_of(gate), stands_on_16(gate) && stands_on_16(up) && stands_on_16(dy));
  with_glu(dtype_of(gate), act, s.aligned, [&](auto t, auto a, auto on_16) {
    using T = decltype(t);
    // of a gate that holds both, the halves of one row
    launch(GK_KERNEL(glu_bwd<T, a, on_16>), s.grid, s.block, 0, gpu.stream, out<T>(dgate) + r.gate_from,
           out<T>(up ? dup : dgate) + r.up_from, data<T>(dy), data<T>(gate) + r.gate_from, data<T>(up ? *up : gate) + r.up_from,
           r.M, r.N, r.gate_stride, r.up_stride, up ? r.N : 2 * r.N);
  });
  return {dgate, dup};
}

GK_REGISTER(m) {
  m.impl("glu_fwd", TORCH_BOX(&glu_fwd_cuda));
  m.impl("glu_bwd", TORCH_BOX(&glu_bwd_cuda));
}

}  // namespace gk
