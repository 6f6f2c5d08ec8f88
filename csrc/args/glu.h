// glu's arguments. The op: gpt_kernels/ops/glu.py.
#pragma once
#include "checks.h"

namespace gk {

// gate and up as M rows of N elements, rows at these strides, both from what their tensor begins with; `flat` where both are
// contiguous, and rows mean nothing.
struct GluRows {
  int64_t M, N, gate_stride, up_stride;
  int64_t gate_from = 0, up_from = 0;
  bool flat = false;
};

inline GluRows glu_fwd_args(const char* op, const Tensor& gate, const OptTensor& up, int64_t act, bool up_first) {
  check_device(op, "gate", gate), check_float(op, "gate", gate);
  GK_CHECK(act >= 0 && act <= int64_t(Act::gelu), op, ": act must be 0 (silu), 1 (gelu, tanh form) or 2 (gelu), got ", act);
  if (!up) {
    const Matrix m = matrix_of(op, "gate", gate);
    GK_CHECK(m.N % 2 == 0, op, ": gate without an up must have an even last dimension, got shape ", shape_text(gate));
    const int64_t stride = row_stride(op, "gate", gate), N = m.N / 2;
    return {m.M, N, stride, stride, up_first ? N : 0, up_first ? 0 : N, false};
  }
  GK_CHECK(!up_first, op, ": up_first is of a gate that holds both, got an up beside it");
  check_same_device(op, "up", *up, gate), check_dtype(op, "up", *up, dtype_of(gate));
  check_same_shape(op, "up", *up, "gate", gate);
  if (gate.is_contiguous() && up->is_contiguous()) return {1, gate.numel(), gate.numel(), gate.numel(), 0, 0, true};
  const Matrix m = matrix_of(op, "gate", gate);
  return {m.M, m.N, row_stride(op, "gate", gate), row_stride(op, "up", *up)};
}

inline GluRows glu_bwd_args(const char* op, const Tensor& dy, const Tensor& gate, const OptTensor& up, int64_t act,
                            bool up_first) {
  const GluRows rows = glu_fwd_args(op, gate, up, act, up_first);
  check_same_device(op, "dy", dy, gate), check_dtype(op, "dy", dy, dtype_of(gate)), check_contiguous(op, "dy", dy);
  if (up) {
    check_same_shape(op, "dy", dy, "gate", gate);
  } else {
    bool same = dy.dim() == gate.dim() && dy.size(dy.dim() - 1) == rows.N;
    for (int64_t d = 0; same && d + 1 < dy.dim(); d++) same = dy.size(d) == gate.size(d);
    GK_CHECK(same, op, ": dy must have the shape of gate ", shape_text(gate), " with half the columns, got ", shape_text(dy));
  }
  return rows;
}

// Fresh (..., N) for a gate of (..., N) or (..., 2N).
inline Tensor new_glu(const Tensor& gate, int64_t N, bool packed) {
  if (!packed) return new_like(gate);
  std::vector<int64_t> shape(gate.sizes().begin(), gate.sizes().end());
  shape.back() = N;
  return new_tensor(gate, {shape.data(), shape.size()}, dtype_of(gate));
}

}  // namespace gk
