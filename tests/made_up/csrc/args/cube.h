// cube's arguments. The op: gpt_kernels/ops/cube.py.
#pragma once
#include "checks.h"

namespace gk {

inline void cube_bwd_args(const char* op, const Tensor& dy, const Tensor& x) {
  check_input(op, "x", x), check_like(op, "dy", dy, "x", x);
}

}  // namespace gk
