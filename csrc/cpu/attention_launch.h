// What the forward and backward launchers of attention share: checks, AttentionArgs from tensors, per-thread scratch.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>

#include "attention_args.h"
#include "launch.h"

namespace gk {

inline View view_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// Fresh (B, H, T, D) memory laid out like t: heads inside tokens if t has it so (the reference's _empty_as).
inline Tensor new_heads(const Tensor& t, int64_t B, int64_t H, int64_t T, int64_t D) {
  if (t.stride(1) < t.stride(2)) return torch::stable::transpose(new_tensor(t, {B, T, H, D}, t.scalar_type()), 1, 2);
  return new_tensor(t, {B, H, T, D}, t.scalar_type());
}

inline void check_heads(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  check_cpu(op, name, t), check_dtype(op, name, t, dtype);
  GK_CHECK(t.dim() == 4, op, ": ", name, " must be 4-dimensional (batch, heads, tokens, head_dim), got shape ", shape_text(t));
  GK_CHECK(t.stride(3) == 1 || t.size(3) <= 1, op, ": ", name, " must be contiguous in its last dimension, its stride there is ",
           t.stride(3));
  GK_CHECK(t.size(3) <= max_head_dim, op, ": ", name, " has head_dim ", t.size(3), ", the limit is ", max_head_dim);
}

inline AttentionArgs attention_args(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& bias,
                                    const OptTensor& slopes, const OptTensor& rng_state, double scale, double softcap,
                                    double dropout_p, int64_t causal_offset, int64_t window_left, int64_t window_right) {
  const ScalarType dtype = q.scalar_type();
  check_float(op, "q", q), check_heads(op, "q", q, dtype), check_heads(op, "k", k, dtype), check_heads(op, "v", v, dtype);
  AttentionArgs s = {};
  s.B = q.size(0), s.H = q.size(1), s.Tq = q.size(2), s.D = q.size(3), s.Hk = k.size(1), s.Tk = k.size(2), s.Dv = v.size(3);
  GK_CHECK(k.size(0) == s.B && v.size(0) == s.B, op, ": q has batch ", s.B, ", k ", k.size(0), " and v ", v.size(0));
  GK_CHECK(k.size(3) == s.D, op, ": k must have q's head_dim ", s.D, ", got ", k.size(3));
  GK_CHECK(v.size(1) == s.Hk && v.size(2) == s.Tk, op, ": v must have k's heads and tokens (", s.Hk, ", ", s.Tk, "), got (", v.size(1),
           ", ", v.size(2), ")");
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
           ": causal_offset, window_left and window_right must be below 2^40, got ", causal_offset, ", ", window_left, ", ", window_right);

  if (bias) {
    check_cpu(op, "bias", *bias);
    const ScalarType b = bias->scalar_type();
    GK_CHECK(b == ScalarType::Bool || b == dtype || b == stat_dtype(dtype), op, ": bias must be bool, ", dtype_name(dtype), " like q or ",
             dtype_name(stat_dtype(dtype)), ", got ", dtype_name(b));
    GK_CHECK(bias->dim() == 4, op, ": bias must be 4-dimensional (batch, heads, q tokens, k tokens), got shape ", shape_text(*bias));
    const int64_t full[4] = {s.B, s.H, s.Tq, s.Tk};
    int64_t stride[4];
    for (int d = 0; d < 4; d++) {
      GK_CHECK(bias->size(d) == full[d] || bias->size(d) == 1, op, ": bias of shape ", shape_text(*bias), " does not broadcast to (", s.B,
               ", ", s.H, ", ", s.Tq, ", ", s.Tk, ")");
      stride[d] = bias->size(d) == 1 ? 0 : bias->stride(d);
    }
    s.bias_kind = b == ScalarType::Bool ? Bias::boolean : b == dtype ? Bias::same : Bias::stat;
    s.bias = {const_cast<void*>(bias->const_data_ptr()), stride[0], stride[1], stride[2]};
    s.bias_column = stride[3];
  }
  if (slopes) {
    check_cpu(op, "alibi_slopes", *slopes), check_dtype(op, "alibi_slopes", *slopes, stat_dtype(dtype));
    const bool per_batch = slopes->dim() == 2;
    GK_CHECK((per_batch && slopes->size(0) == s.B && slopes->size(1) == s.H) || (slopes->dim() == 1 && slopes->size(0) == s.H), op,
             ": alibi_slopes must have shape (", s.H, ",) or (", s.B, ", ", s.H, "), got ", shape_text(*slopes));
    s.slopes = slopes->const_data_ptr();
    s.slopes_batch = per_batch ? slopes->stride(0) : 0;
    s.slopes_head = slopes->stride(per_batch ? 1 : 0);
  }
  s.philox = philox_of(op, rng_state, dropout_p);
  return s;
}

// run(first, last, scratch) over [0, tasks) in parallel, each thread with `bytes` of memory aligned to a cache line.
template <class Run> inline void run_with_scratch(const char* op, int64_t tasks, int64_t bytes, const Run& run) {
  std::atomic<bool> out_of_memory{false};  // nothing may be thrown on another thread
  parallel_for(0, tasks, 1, [&](int64_t t0, int64_t t1) {
    const std::unique_ptr<char, void (*)(void*)> scratch((char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
    if (scratch) run(t0, t1, scratch.get());
    else out_of_memory = true;
  });
  GK_CHECK(!out_of_memory, op, ": out of memory, ", bytes, " bytes of scratch per thread were asked for");
}

}  // namespace gk
