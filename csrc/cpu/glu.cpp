// swiglu and geglu on the CPU. Formula, shapes and gradients: gpt_kernels/ops/glu.py.
#ifndef GK_TARGET

#include "launch.h"
#include "../args/glu.h"
#define GK_FILE "glu.cpp"
#include "foreach_target.h"

namespace gk {

// Where rows mean nothing the tensors are cut into rows of this many elements, the last one shorter.
static constexpr int64_t flat_columns = 4096;

// f(m0, m1, N of all rows but the last, total) over rows, in parallel
template <class F> static void for_glu_rows(const GluRows& rows, const F& f) {
  const int64_t N = rows.flat ? flat_columns : rows.N, M = rows.flat ? (rows.N + N - 1) / N : rows.M;
  parallel_for(0, M, row_grain(N), [&](int64_t m0, int64_t m1) { f(m0, m1, N); });
}

static Tensor glu_fwd_cpu(const Tensor& gate, const OptTensor& up, int64_t act, bool up_first) {
  const GluRows r = glu_fwd_args("glu_fwd", gate, up, act, up_first);
  Tensor y = new_glu(gate, r.N, !up);

  with_dtype(dtype_of(gate), [&](auto tag) {
    using T = decltype(tag);
    const auto row = Act(act) == Act::silu        ? GK_BEST(glu_fwd_row<T, Act::silu>)
                     : Act(act) == Act::gelu_tanh ? GK_BEST(glu_fwd_row<T, Act::gelu_tanh>)
                                                  : GK_BEST(glu_fwd_row<T, Act::gelu>);
    const T* gp = (const T*)gate.const_data_ptr() + r.gate_from;
    const T* up_ = (const T*)(up ? *up : gate).const_data_ptr() + r.up_from;
    T* yp = (T*)y.mutable_data_ptr();
    const bool streams = row_streams(y, r.flat ? flat_columns : r.N, 3);
    for_glu_rows(r, [&](int64_t m0, int64_t m1, int64_t N) {
      const int64_t gs = r.flat ? N : r.gate_stride, us = r.flat ? N : r.up_stride;
      for (int64_t m = m0; m < m1; m++)
        row(yp + m * N, gp + m * gs, up_ + m * us, r.flat ? std::min(N, r.N - m * N) : N, streams);
    });
  });
  return y;
}

static std::tuple<Tensor, Tensor> glu_bwd_cpu(const Tensor& dy, const Tensor& gate, const OptTensor& up, int64_t act,
                                              bool up_first) {
  const GluRows r = glu_bwd_args("glu_bwd", dy, gate, up, act, up_first);
  Tensor dgate = new_like(gate), dup = up ? new_like(gate) : new_tensor(gate, {0}, dtype_of(gate));

  with_dtype(dtype_of(gate), [&](auto tag) {
    using T = decltype(tag);
    const auto row = Act(act) == Act::silu        ? GK_BEST(glu_bwd_row<T, Act::silu>)
                     : Act(act) == Act::gelu_tanh ? GK_BEST(glu_bwd_row<T, Act::gelu_tanh>)
                                                  : GK_BEST(glu_bwd_row<T, Act::gelu>);
    const T *dyp = (const T*)dy.const_data_ptr(), *gp = (const T*)gate.const_data_ptr() + r.gate_from;
    const T* up_ = (const T*)(up ? *up : gate).const_data_ptr() + r.up_from;
    // of a gate that holds both, the halves of one row
    T *dgp = (T*)dgate.mutable_data_ptr() + r.gate_from, *dup_ = (T*)(up ? dup : dgate).mutable_data_ptr() + r.up_from;
    const int64_t out_columns = up ? 1 : 2;
    const bool streams =
        row_streams(dgate, r.flat ? flat_columns : r.N, up ? 5 : 3) && reinterpret_cast<uintptr_t>(dup_) % 64 == 0;
    for_glu_rows(r, [&](int64_t m0, int64_t m1, int64_t N) {
      const int64_t gs = r.flat ? N : r.gate_stride, us = r.flat ? N : r.up_stride, os = out_columns * N;
      for (int64_t m = m0; m < m1; m++)
        row(dgp + m * os, dup_ + m * os, dyp + m * N, gp + m * gs, up_ + m * us, r.flat ? std::min(N, r.N - m * N) : N,
            streams);
    });
  });
  return {dgate, dup};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) {
  m.impl("glu_fwd", TORCH_BOX(&glu_fwd_cpu));
  m.impl("glu_bwd", TORCH_BOX(&glu_bwd_cpu));
}

}  // namespace gk

#else  // kernels: T is storage, C the arithmetic

#include "vec.h"
#include "activation.h"

namespace GK_TARGET {

template <class T, Act act, class C = compute_t<T>>
GK_KERNEL void glu_fwd_row(T* y, const T* gate, const T* up, int64_t N, bool streams) {
  write_row(y, N, streams, [&](int64_t i, int64_t n) {
    prefetch(gate + far_ahead<T> + i), prefetch(up + far_ahead<T> + i);
    const vec<C> v = load_any(gate + i, n);
    return v * act_factor<T, act>(v) * load_any(up + i, n);
  });
}

// dgate = dy up act'(gate);  dup = dy act(gate)
template <class T, Act act, class C = compute_t<T>>
GK_KERNEL void glu_bwd_row(T* dgate, T* dup, const T* dy, const T* gate, const T* up, int64_t N, bool streams) {
  write_two_rows(dgate, dup, N, streams, [&](int64_t i, int64_t n, vec<C>& dg, vec<C>& du) {
    prefetch(gate + far_ahead<T> + i), prefetch(up + far_ahead<T> + i), prefetch(dy + far_ahead<T> + i);
    const vec<C> v = load_any(gate + i, n), d = load_any(dy + i, n);
    vec<C> s;
    dg = d * load_any(up + i, n) * act_slope<T, act>(v, s);
    du = d * (v * s);
  });
}

}  // namespace GK_TARGET
#endif
