// layer_norm's arguments. The op: gpt_kernels/ops/layer_norm.py.
#pragma once
#include "checks.h"

namespace gk {

inline void check_eps(const char* op, double eps) {
  GK_CHECK(eps >= 0 && std::isfinite(eps), op, ": eps must be finite and not negative, got ", eps);
}

// The parameters' dtype, which both have: x's, or the statistics'.
inline ScalarType parameter_dtype(const Tensor& x, const OptTensor& weight, const OptTensor& bias = OptTensor()) {
  return weight ? dtype_of(*weight) : bias ? dtype_of(*bias) : dtype_of(x);
}

inline Matrix layer_norm_fwd_args(const char* op, const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps) {
  check_input(op, "x", x);
  const Matrix m = matrix_of(op, "x", x);
  check_eps(op, eps);
  check_column(op, "weight", weight, m.N, x), check_column(op, "bias", bias, m.N, x);
  GK_CHECK(!weight || !bias || dtype_of(*weight) == dtype_of(*bias), op, ": bias must be ",
           dtype_name(parameter_dtype(x, weight)), " like weight, got ", dtype_name(parameter_dtype(x, bias)));
  return m;
}

inline Matrix layer_norm_bwd_args(const char* op, const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                  const Tensor& mean, const Tensor& rstd) {
  check_input(op, "x", x), check_like(op, "dy", dy, "x", x);
  const Matrix m = matrix_of(op, "x", x);
  check_column(op, "weight", weight, m.N, x);
  check_row_statistic(op, "mean", mean, m.M, x), check_row_statistic(op, "rstd", rstd, m.M, x);
  return m;
}

}  // namespace gk
