// cross_entropy's arguments. The op: gpt_kernels/ops/cross_entropy.py.
#pragma once
#include <utility>

#include "checks.h"

namespace gk {

struct CrossEntropyOptions {
  int64_t ignore_index, reduction;  // 0 none, 1 mean, 2 sum
  double smoothing, square_scale, softcap;
};

// Rows by stride, their elements contiguous. The targets' values are the backend's to look at.
inline Matrix cross_entropy_args(const char* op, const Tensor& logits, const Tensor& target, const CrossEntropyOptions& o) {
  check_device(op, "logits", logits), check_float(op, "logits", logits);
  GK_CHECK(logits.dim() >= 1, op, ": logits must have at least 1 dimension, got a scalar");
  const int64_t V = logits.size(logits.dim() - 1);
  GK_CHECK(V <= 1 || logits.stride(logits.dim() - 1) == 1, op,
           ": the last dimension of logits must be contiguous, its stride is ", logits.stride(logits.dim() - 1));
  check_same_device(op, "target", target, logits), check_dtype(op, "target", target, ScalarType::Long),
      check_contiguous(op, "target", target);
  bool same = target.dim() == logits.dim() - 1;
  for (int64_t i = 0; same && i < target.dim(); i++) same = target.size(i) == logits.size(i);
  GK_CHECK(same, op, ": target must have the shape of logits ", shape_text(logits), " without the last dimension, got ",
           shape_text(target));
  GK_CHECK(o.reduction >= 0 && o.reduction <= 2, op, ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", o.reduction);
  GK_CHECK(o.smoothing >= 0 && o.smoothing <= 1, op, ": label_smoothing must be between 0 and 1, got ", o.smoothing);
  GK_CHECK(o.square_scale >= 0 && std::isfinite(o.square_scale), op, ": lse_square_scale must be finite and not negative, got ",
           o.square_scale);
  GK_CHECK(o.softcap >= 0 && std::isfinite(o.softcap), op, ": logit_softcap must be finite and not negative (0: none), got ",
           o.softcap);
  return {target.numel(), V};
}

// Where the rows of (..., V) begin.
inline RowDims row_dims(const Tensor& t) {
  RowDims rows;
  for (int64_t d = t.dim() - 2; d >= 0; d--) rows.add(t.size(d), t.stride(d));
  return rows;
}
// May rows of V elements be written without touching one another?
inline bool disjoint(const RowDims& rows, int64_t V) {
  std::pair<int64_t, int64_t> dims[RowDims::most];
  for (int i = 0; i < rows.count; i++) dims[i] = {rows.stride[i], rows.size[i]};
  std::sort(dims, dims + rows.count);
  int64_t extent = V;
  for (int i = 0; i < rows.count; extent = dims[i].first * dims[i].second, i++)
    if (dims[i].first < extent) return false;
  return true;
}

// Of the backward pass, beside the forward's: dloss, lse and where the gradient goes.
inline void cross_entropy_bwd_args(const char* op, const Tensor& dloss, const Tensor& logits, const Tensor& lse,
                                   const Tensor& dlogits, const CrossEntropyOptions& o, const Matrix& m) {
  const ScalarType stat = stat_dtype(dtype_of(logits));
  check_same_device(op, "dloss", dloss, logits), check_dtype(op, "dloss", dloss, stat), check_contiguous(op, "dloss", dloss);
  const int64_t losses = o.reduction == 0 ? m.M : 1;
  GK_CHECK(dloss.numel() == losses, op, ": dloss must have ", losses, " elements, got ", dloss.numel());
  check_same_device(op, "lse", lse, logits), check_dtype(op, "lse", lse, stat), check_contiguous(op, "lse", lse);
  GK_CHECK(lse.dim() == 2 && lse.size(0) == 2 && lse.size(1) == m.M, op, ": lse must have shape (2, ", m.M, "), got ",
           shape_text(lse));
  check_same_device(op, "dlogits", dlogits, logits), check_dtype(op, "dlogits", dlogits, dtype_of(logits));
  check_same_shape(op, "dlogits", dlogits, "logits", logits);
  const bool contiguous = m.N == 1 || dlogits.stride(dlogits.dim() - 1) == 1;
  GK_CHECK(m.M * m.N == 0 || (contiguous && disjoint(row_dims(dlogits), m.N)), op,
           ": dlogits must have a contiguous last dimension and rows that do not overlap in memory");
}

// Contiguous, of the first `dims` sizes of like.
inline Tensor new_contiguous(const Tensor& like, int64_t dims, ScalarType dtype) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < dims; d++) shape.push_back(like.size(d));
  return new_tensor(like, {shape.data(), shape.size()}, dtype);
}

}  // namespace gk
