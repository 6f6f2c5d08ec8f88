// gelu's arguments. The op: gpt_kernels/ops/gelu.py.
#pragma once
#include "checks.h"

namespace gk {

inline void gelu_fwd_args(const char* op, const Tensor& x, const OptTensor& bias) {
  check_input(op, "x", x);
  GK_CHECK(!bias || x.dim() >= 1, op, ": x must have at least 1 dimension to add a bias, got a scalar");
  check_column(op, "bias", bias, bias ? x.size(x.dim() - 1) : 0, x);
}

inline void gelu_bwd_args(const char* op, const Tensor& dy, const Tensor& x, const OptTensor& bias) {
  gelu_fwd_args(op, x, bias), check_like(op, "dy", dy, "x", x);
}

}  // namespace gk
