// What every op's arguments must be: the checks that the launchers for the CPU and those for GPUs share, each written once. A
// message names op, argument, value and limit.
#pragma once
#include <cmath>

#include "../types.h"

namespace gk {

// On the device that this library's kernels serve: the CPU (its model of a GPU included) or, compiled by nvcc, a GPU.
inline void check_device(const char* op, const char* name, const Tensor& t) {
#ifdef __CUDACC__
  GK_CHECK(t.is_cuda(), op, ": ", name, " must be on a GPU like the other arguments, it is on another device");
#else
  GK_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU like the other arguments, it is on another device");
#endif
}
// And on the same one of several GPUs.
inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_device(op, name, t);
  GK_CHECK(t.get_device_index() == x.get_device_index(), op, ": ", name, " must be on GPU ", x.get_device_index(),
           " like the other arguments, it is on GPU ", t.get_device_index());
}
inline void check_float(const char* op, const char* name, const Tensor& t) {
#ifdef GK_CUDA
  GK_CHECK(is_float_dtype(dtype_of(t)) && dtype_of(t) != ScalarType::Double, op, ": ", name,
           " must be float32, bfloat16 or float16, got ", dtype_name(dtype_of(t)), " (CUDA kernels)");
#else
  GK_CHECK(is_float_dtype(dtype_of(t)), op, ": ", name, " must be float32, float64, bfloat16 or float16, got ",
           dtype_name(dtype_of(t)));
#endif
}
inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  GK_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous, got shape ", shape_text(t), " with other strides");
}
inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want) {
  GK_CHECK(dtype_of(t) == want, op, ": ", name, " must be ", dtype_name(want), ", got ", dtype_name(dtype_of(t)));
}
inline void check_same_shape(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); i++) same = t.size(i) == like.size(i);
  GK_CHECK(same, op, ": ", name, " must have the shape of ", like_name, " ", shape_text(like), ", got ", shape_text(t));
}

// Floating, contiguous, on the kernels' device: what a first argument is.
inline void check_input(const char* op, const char* name, const Tensor& t) {
  check_device(op, name, t), check_float(op, name, t), check_contiguous(op, name, t);
}
// A gradient, or what else has everything as x has it.
inline void check_like(const char* op, const char* name, const Tensor& t, const char* x_name, const Tensor& x) {
  check_same_device(op, name, t, x), check_dtype(op, name, t, dtype_of(x)), check_contiguous(op, name, t);
  check_same_shape(op, name, t, x_name, x);
}

// (..., N) as M rows of N columns; no rows where there are no columns.
struct Matrix { int64_t M, N; };
inline Matrix matrix_of(const char* op, const char* name, const Tensor& x) {
  GK_CHECK(x.dim() >= 1, op, ": ", name, " must have at least 1 dimension, got a scalar");
  const int64_t N = x.size(x.dim() - 1);
  return {N ? x.numel() / N : 0, N};
}

// A per-column parameter: weight or bias of N elements, in x's dtype or in float32 beside a 16-bit x (autocast).
inline void check_column(const char* op, const char* name, const OptTensor& t, int64_t N, const Tensor& x) {
  if (!t) return;
  const ScalarType dtype = dtype_of(x), stat = stat_dtype(dtype);
  check_same_device(op, name, *t, x);
  GK_CHECK(t->dim() == 1 && t->size(0) == N, op, ": ", name, " must have shape (", N, ",), got ", shape_text(*t));
  GK_CHECK(dtype_of(*t) == dtype || dtype_of(*t) == stat, op, ": ", name, " must be ", dtype_name(dtype), " like x or ",
           dtype_name(stat), ", got ", dtype_name(dtype_of(*t)));
  check_contiguous(op, name, *t);
}
// One number of the statistics' dtype per row of x.
inline void check_row_statistic(const char* op, const char* name, const Tensor& t, int64_t rows, const Tensor& x) {
  check_same_device(op, name, t, x), check_dtype(op, name, t, stat_dtype(dtype_of(x))), check_contiguous(op, name, t);
  GK_CHECK(t.numel() == rows, op, ": ", name, " must have ", rows, " elements, one per row of x, got ", t.numel());
}

// Where dropout's random state is, an int64 tensor (seed, offset); nothing of it is read without dropout.
inline DropoutRate check_dropout(const char* op, const OptTensor& rng_state, double dropout_p) {
  GK_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), got ", dropout_p);
  if (dropout_p == 0) return DropoutRate();
  GK_CHECK(rng_state, op, ": dropout_p = ", dropout_p, " needs rng_state, an int64 tensor (seed, offset)");
  check_device(op, "rng_state", *rng_state), check_dtype(op, "rng_state", *rng_state, ScalarType::Long);
  GK_CHECK(rng_state->dim() == 1 && rng_state->size(0) == 2, op, ": rng_state must have shape (2,), got ",
           shape_text(*rng_state));
  return DropoutRate(dropout_p);
}

// The dimensions that say where a row begins, innermost first, joined where one stride serves two; those of size 1 move nothing.
struct RowDims {
  static constexpr int most = 64;  // torch's own limit
  int count = 0;
  int64_t size[most], stride[most];
  void add(int64_t n, int64_t s) {
    if (n == 1) return;
    if (count && s == stride[count - 1] * size[count - 1]) size[count - 1] *= n;
    else size[count] = n, stride[count++] = s;
  }
};

// What separates the rows of x, (..., N), each contiguous, where it is the same for all of them.
inline int64_t row_stride(const char* op, const char* name, const Tensor& x) {
  const int64_t last = x.dim() - 1, N = x.size(last);
  if (x.is_contiguous()) return N;
  RowDims rows;
  for (int64_t d = last - 1; d >= 0; d--) rows.add(x.size(d), x.stride(d));
  GK_CHECK((x.stride(last) == 1 || N == 1) && rows.count <= 1, op, ": ", name,
           " must have contiguous rows at one stride, got shape ", shape_text(x), " with others");
  return rows.count ? rows.stride[0] : N;
}

}  // namespace gk
