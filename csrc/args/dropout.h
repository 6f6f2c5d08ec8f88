// dropout's arguments. The op: gpt_kernels/ops/dropout.py.
#pragma once
#include "checks.h"

namespace gk {

// The random state is the backend's to read: philox_of.
inline Matrix dropout_args(const char* op, const Tensor& x, const OptTensor& residual) {
  check_input(op, "x", x);
  const Matrix m = matrix_of(op, "x", x);
  if (residual) check_like(op, "residual", *residual, "x", x);
  GK_CHECK(m.M < (int64_t{1} << 32) && m.N < (int64_t{1} << 32), op, ": at most 4294967295 rows and columns, got ", m.M,
           " and ", m.N);
  return m;
}

}  // namespace gk
