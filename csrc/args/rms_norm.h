// rms_norm's arguments. The op: gpt_kernels/ops/rms_norm.py.
#pragma once
#include "layer_norm.h"

namespace gk {

inline Matrix rms_norm_fwd_args(const char* op, const Tensor& x, const OptTensor& weight, double eps) {
  return layer_norm_fwd_args(op, x, weight, OptTensor(), eps);
}

inline Matrix rms_norm_bwd_args(const char* op, const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                const Tensor& rstd) {
  check_input(op, "x", x), check_like(op, "dy", dy, "x", x);
  const Matrix m = matrix_of(op, "x", x);
  check_column(op, "weight", weight, m.N, x), check_row_statistic(op, "rstd", rstd, m.M, x);
  return m;
}

}  // namespace gk
