// attention's arguments, and what the launchers hand to the kernels: raw pointers, sizes, strides in elements, score-step options.
// Philox and philox_of are the backend's own, included before this. The op: gpt_kernels/ops/attention.py.
#pragma once
#include <utility>

#include "checks.h"

namespace gk {

constexpr int64_t max_head_dim = 256;

// (B, H, T, D) by stride, last dimension contiguous
struct View {
  void* data;
  int64_t batch, head, row;
  template <class T> GK_BOTH T* at(int64_t b, int64_t h, int64_t t) const { return (T*)data + b * batch + h * head + t * row; }
};

enum class Bias { none, boolean, same, stat };  // absent; visible where true; in q's dtype; in the statistics' dtype

struct AttentionArgs {
  int64_t B, H, Hk, Tq, Tk, D, Dv;
  View q, k, v, o;
  View dout, dq, dk, dv;  // backward only
  void* lse;  // (B, H, Tq) contiguous, statistics' dtype
  Bias bias_kind;
  View bias;  // strides are 0 along broadcast dimensions
  int64_t bias_column;  // stride between columns: 1 or 0, or anything
  const void* slopes;  // ALiBi, statistics' dtype, or null
  int64_t slopes_batch, slopes_head;
  double scale, softcap;
  Philox philox;
  int64_t diagonal, window_left, window_right;  // row i sees columns i + diagonal - left .. i + diagonal + right

  // the columns that rows [i0, i1) can see, clipped to [0, Tk): begin of the first row, end of the last
  GK_BOTH int64_t first_column(int64_t i) const {
    const int64_t j = window_left < 0 ? 0 : i + diagonal - window_left;
    return j < 0 ? 0 : j > Tk ? Tk : j;
  }
  GK_BOTH int64_t end_column(int64_t i) const {
    const int64_t j = window_right < 0 ? Tk : i + diagonal + window_right + 1;
    return j < 0 ? 0 : j > Tk ? Tk : j;
  }
};

// where the gradient of an additive bias goes: contiguous, in the bias's dtype and shape
struct BiasGradient {
  void* data;
  int64_t size[4];
};

// ---- checks ----

inline View view_of(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)}; }

// Fresh (B, H, T, D) memory laid out like t: heads inside tokens if t has it so (the reference's _empty_as), or if they must be.
inline Tensor new_heads(const Tensor& t, int64_t B, int64_t H, int64_t T, int64_t D, bool in_tokens = false) {
  if (t.stride(1) >= t.stride(2) && !in_tokens) return new_tensor(t, {B, H, T, D}, dtype_of(t));
  const int64_t head = std::max<int64_t>(D, 1), row = head * std::max<int64_t>(H, 1), batch = row * std::max<int64_t>(T, 1);
  return new_strided(t, {B, H, T, D}, {batch, head, row, 1}, dtype_of(t));
}

inline void check_heads(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  check_device(op, name, t), check_dtype(op, name, t, dtype);
  GK_CHECK(t.dim() == 4, op, ": ", name, " must be 4-dimensional (batch, heads, tokens, head_dim), got shape ", shape_text(t));
  // the strides of a tensor of no elements are anybody's: a sum's gradient has 0, and counts as contiguous
  GK_CHECK(t.stride(3) == 1 || t.size(3) <= 1 || t.numel() == 0, op, ": ", name,
           " must be contiguous in its last dimension, its stride there is ", t.stride(3));
  GK_CHECK(t.size(3) <= max_head_dim, op, ": ", name, " has head_dim ", t.size(3), ", the limit is ", max_head_dim);
}

inline AttentionArgs attention_args(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& bias,
                                    const OptTensor& slopes, const OptTensor& rng_state, double scale, double softcap,
                                    double dropout_p, int64_t causal_offset, int64_t window_left, int64_t window_right) {
  const ScalarType dtype = dtype_of(q);
  check_device(op, "q", q), check_float(op, "q", q), check_heads(op, "q", q, dtype), check_heads(op, "k", k, dtype),
      check_heads(op, "v", v, dtype);
  AttentionArgs s = {};
  s.B = q.size(0), s.H = q.size(1), s.Tq = q.size(2), s.D = q.size(3), s.Hk = k.size(1), s.Tk = k.size(2), s.Dv = v.size(3);
  GK_CHECK(k.size(0) == s.B && v.size(0) == s.B, op, ": q has batch ", s.B, ", k ", k.size(0), " and v ", v.size(0));
  GK_CHECK(k.size(3) == s.D, op, ": k must have q's head_dim ", s.D, ", got ", k.size(3));
  GK_CHECK(v.size(1) == s.Hk && v.size(2) == s.Tk, op, ": v must have k's heads and tokens (", s.Hk, ", ", s.Tk, "), got (",
           v.size(1), ", ", v.size(2), ")");
  GK_CHECK(s.H == 0 || (s.Hk > 0 && s.H % s.Hk == 0), op, ": q's ", s.H, " heads must be a multiple of k's ", s.Hk, " heads");
  // Philox counters hold rows, columns and batch * heads in 32 bits
  GK_CHECK(s.Tq < (int64_t{1} << 31) && s.Tk < (int64_t{1} << 31) && s.B * s.H < (int64_t{1} << 31), op,
           ": at most 2147483647 tokens and batch * heads, got q ", shape_text(q), ", k ", shape_text(k));
  GK_CHECK(std::isfinite(scale), op, ": scale must be finite, got ", scale);
  GK_CHECK(std::isfinite(softcap) && softcap >= 0, op, ": softcap must be finite and not negative, got ", softcap);
  s.q = view_of(q), s.k = view_of(k), s.v = view_of(v);
  s.scale = scale, s.softcap = softcap, s.diagonal = causal_offset;
  s.window_left = window_left < 0 ? -1 : window_left, s.window_right = window_right < 0 ? -1 : window_right;
  // clipped so that sums of row, diagonal and window stay far from overflow
  const int64_t far = int64_t{1} << 40;
  GK_CHECK(causal_offset > -far && causal_offset < far && window_left < far && window_right < far, op,
           ": causal_offset, window_left and window_right must be below 2^40, got ", causal_offset, ", ", window_left, ", ",
           window_right);

  if (bias) {
    check_device(op, "bias", *bias);
    const ScalarType b = dtype_of(*bias);
    GK_CHECK(b == ScalarType::Bool || b == dtype || b == stat_dtype(dtype), op, ": bias must be bool, ", dtype_name(dtype),
             " like q or ", dtype_name(stat_dtype(dtype)), ", got ", dtype_name(b));
    GK_CHECK(bias->dim() == 4, op, ": bias must be 4-dimensional (batch, heads, q tokens, k tokens), got shape ",
             shape_text(*bias));
    const int64_t full[4] = {s.B, s.H, s.Tq, s.Tk};
    int64_t stride[4];
    for (int d = 0; d < 4; d++) {
      GK_CHECK(bias->size(d) == full[d] || bias->size(d) == 1, op, ": bias of shape ", shape_text(*bias),
               " does not broadcast to (", s.B, ", ", s.H, ", ", s.Tq, ", ", s.Tk, ")");
      stride[d] = bias->size(d) == 1 ? 0 : bias->stride(d);
    }
    s.bias_kind = b == ScalarType::Bool ? Bias::boolean : b == dtype ? Bias::same : Bias::stat;
    s.bias = {const_cast<void*>(bias->const_data_ptr()), stride[0], stride[1], stride[2]};
    s.bias_column = stride[3];
  }
  if (slopes) {
    check_device(op, "alibi_slopes", *slopes), check_dtype(op, "alibi_slopes", *slopes, stat_dtype(dtype));
    const bool per_batch = slopes->dim() == 2;
    GK_CHECK((per_batch && slopes->size(0) == s.B && slopes->size(1) == s.H) || (slopes->dim() == 1 && slopes->size(0) == s.H),
             op, ": alibi_slopes must have shape (", s.H, ",) or (", s.B, ", ", s.H, "), got ", shape_text(*slopes));
    s.slopes = slopes->const_data_ptr();
    s.slopes_batch = per_batch ? slopes->stride(0) : 0;
    s.slopes_head = slopes->stride(per_batch ? 1 : 0);
  }
  s.philox = philox_of(op, rng_state, dropout_p);
  return s;
}

// Of the backward pass, into `s`: do, o and lse. The gradients' memory is the launcher's.
inline void attention_bwd_args(const char* op, AttentionArgs& s, const Tensor& dout, const Tensor& q, const Tensor& o,
                               const Tensor& lse, const OptTensor& bias, bool need_dbias) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"do", dout}, {"o", o}}) {
    check_heads(op, name, t, dtype_of(q));
    GK_CHECK(t.size(0) == s.B && t.size(1) == s.H && t.size(2) == s.Tq && t.size(3) == s.Dv, op, ": ", name,
             " must have shape (", s.B, ", ", s.H, ", ", s.Tq, ", ", s.Dv, "), got ", shape_text(t));
  }
  check_device(op, "lse", lse), check_dtype(op, "lse", lse, stat_dtype(dtype_of(q))), check_contiguous(op, "lse", lse);
  GK_CHECK(lse.numel() == s.B * s.H * s.Tq, op, ": lse must have shape (", s.B, ", ", s.H, ", ", s.Tq, "), got ",
           shape_text(lse));
  GK_CHECK(!need_dbias || (bias && dtype_of(*bias) != ScalarType::Bool), op, ": need_dbias without an additive bias");
  s.dout = view_of(dout), s.o = view_of(o), s.lse = const_cast<void*>(lse.const_data_ptr());
}

}  // namespace gk
