// softmax's arguments. The op: gpt_kernels/ops/softmax.py.
#pragma once
#include "checks.h"

namespace gk {

inline Matrix softmax_rows(const char* op, const char* name, const Tensor& x, bool causal) {
  check_input(op, name, x);
  const Matrix m = matrix_of(op, "x", x);
  GK_CHECK(!causal || x.dim() >= 2, op, ": causal needs x with at least 2 dimensions (rows, columns), got ", shape_text(x));
  return m;
}

inline Matrix softmax_fwd_args(const char* op, const Tensor& x, const OptTensor& mask, double scale, bool causal) {
  const Matrix m = softmax_rows(op, "x", x, causal);
  GK_CHECK(std::isfinite(scale), op, ": scale must be finite, got ", scale);
  if (mask) {
    const ScalarType dtype = dtype_of(*mask), stat = stat_dtype(dtype_of(x));
    check_same_device(op, "mask", *mask, x);
    GK_CHECK(dtype == ScalarType::Bool || dtype == dtype_of(x) || dtype == stat, op, ": mask must be bool, ",
             dtype_name(dtype_of(x)), " like x or ", dtype_name(stat), ", got ", dtype_name(dtype));
  }
  return m;
}

inline Matrix softmax_bwd_args(const char* op, const Tensor& dy, const Tensor& y, bool causal) {
  const Matrix m = softmax_rows(op, "y", y, causal);
  check_like(op, "dy", dy, "y", y);
  return m;
}

// Where a broadcast mask's rows begin, as x's rows go: strides of x's leading dimensions, 0 where the mask has size 1.
struct MaskDims {
  static constexpr int most = 16;  // dimensions of x
  RowDims rows;
  int64_t step = 0;  // of the last dimension: 1, or 0 when one element serves the whole row

  MaskDims(const char* op, const Tensor& mask, const Tensor& x) {
    GK_CHECK(x.dim() <= most, op, ": x must have at most ", int64_t{most}, " dimensions with a mask, got ", x.dim());
    bool fits = mask.dim() <= x.dim();
    for (int64_t d = x.dim() - 1, e = mask.dim() - 1; fits && e >= 0; d--, e--)
      fits = mask.size(e) == 1 || mask.size(e) == x.size(d);
    GK_CHECK(fits, op, ": mask must broadcast to x ", shape_text(x), ", got ", shape_text(mask));
    const int64_t shift = x.dim() - mask.dim();
    const auto stride_of = [&](int64_t d) { return d < shift || mask.size(d - shift) == 1 ? 0 : mask.stride(d - shift); };
    step = stride_of(x.dim() - 1);
    GK_CHECK(step == 0 || step == 1, op, ": mask must be contiguous in its last dimension, got stride ", step);
    for (int64_t d = x.dim() - 2; d >= 0; d--) rows.add(x.size(d), stride_of(d));
  }
};

}  // namespace gk
