// rotary's arguments, and what the launchers hand to the kernels. The op: gpt_kernels/ops/rotary.py.
#pragma once
#include "checks.h"

namespace gk {

struct RotaryArgs {
  int64_t B, S, H, D, half;  // half the dimensions that are turned
  int64_t x[3], y[3];  // strides of batch, position and head; 0 where there is one
  int64_t cos[2], sin[2];  // of batch and position; 0 where one serves all
  int64_t both;  // where the second of a pair has its own cos and sin, how far behind the first's; 0 where it has not
  bool heads_outside;  // in memory positions go by before heads do, as in a contiguous (B, H, S, D)
};

inline int64_t moving_stride(const Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); }

inline void check_rotary_tensor(const char* op, const char* name, const Tensor& t) {
  GK_CHECK(t.dim() == 4, op, ": ", name, " must have 4 dimensions (batch, positions, heads, head_dim), got shape ",
           shape_text(t));
  GK_CHECK(t.stride(3) == 1 || t.size(3) <= 1 || t.numel() == 0, op, ": ", name,
           " must be contiguous in its last dimension, its stride there is ", t.stride(3));
}

inline RotaryArgs rotary_args(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t rotary_dim,
                              bool interleaved) {
  check_device(op, "x", x), check_float(op, "x", x), check_rotary_tensor(op, "x", x);
  RotaryArgs s = {};
  s.B = x.size(0), s.S = x.size(1), s.H = x.size(2), s.D = x.size(3), s.half = rotary_dim / 2;
  s.heads_outside = x.stride(2) > x.stride(1);
  for (int d = 0; d < 3; d++) s.x[d] = moving_stride(x, d);
  GK_CHECK(rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= s.D, op, ": rotary_dim must be even and at most ", s.D,
           ", x's last dimension, got ", rotary_dim);
  const ScalarType dtype = dtype_of(x), stat = stat_dtype(dtype);
  const auto table = [&](const char* name, const Tensor& t, int64_t (&stride)[2]) {
    check_same_device(op, name, t, x);
    GK_CHECK(dtype_of(t) == dtype || dtype_of(t) == stat, op, ": ", name, " must be ", dtype_name(dtype), " like x or ",
             dtype_name(stat), ", got ", dtype_name(dtype_of(t)));
    GK_CHECK(t.dim() == 3 && (t.size(0) == s.B || t.size(0) == 1) && t.size(1) == s.S &&
                 (t.size(2) == rotary_dim || t.size(2) == s.half),
             op, ": ", name, " must have shape (", s.B, " or 1, ", s.S, ", ", rotary_dim, " or ", s.half, "), got ",
             shape_text(t));
    GK_CHECK(t.stride(2) == 1 || t.size(2) <= 1 || t.numel() == 0, op, ": ", name,
             " must be contiguous in its last dimension, its stride there is ", t.stride(2));
    stride[0] = moving_stride(t, 0), stride[1] = moving_stride(t, 1);
  };
  table("cos", cos, s.cos), table("sin", sin, s.sin);
  check_dtype(op, "sin", sin, dtype_of(cos));
  GK_CHECK(cos.size(2) == sin.size(2), op, ": sin must have as many columns as cos, ", cos.size(2), ", got ", sin.size(2));
  s.both = cos.size(2) == s.half ? 0 : interleaved ? 1 : s.half;
  return s;
}

// Fresh memory for y, as the reference has it: contiguous, or with x's heads outside its positions.
inline Tensor new_rotated(const Tensor& x, RotaryArgs& s) {
  const auto at_least_1 = [](int64_t n) { return std::max<int64_t>(n, 1); };
  const int64_t D = at_least_1(s.D), inner = at_least_1(s.heads_outside ? s.S : s.H) * D;
  s.y[0] = inner * at_least_1(s.heads_outside ? s.H : s.S);
  s.y[1] = s.heads_outside ? D : inner, s.y[2] = s.heads_outside ? inner : D;
  return new_strided(x, {s.B, s.S, s.H, s.D}, {s.y[0], s.y[1], s.y[2], 1}, dtype_of(x));
}

// Or y as it is, which may be x.
inline void rotary_out_args(const char* op, RotaryArgs& s, const Tensor& y, const Tensor& x) {
  check_same_device(op, "y", y, x), check_dtype(op, "y", y, dtype_of(x)), check_rotary_tensor(op, "y", y);
  check_same_shape(op, "y", y, "x", x);
  for (int d = 0; d < 3; d++) s.y[d] = moving_stride(y, d);
}

}  // namespace gk
