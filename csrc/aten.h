// This library's kernels in ATen's own slots. What Python sees of it, and why: gpt_kernels/accelerate.py.
//
// A slot is served by a function with ATen's schema. It asks first whether the call is one that our kernels compute as ATen's
// contract has it (shapes, dtypes and strides of every result, NaNs); if not, the kernel that stood in the slot has it: an op
// that Python defines over that kernel's handle, GK_ATEN_TORCH + name.
#pragma once
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "launchers.h"
#ifndef GK_CUDA
#include "cpu/attention_launch.h"
#endif

namespace gk {
namespace aten {

using Ints = std::vector<int64_t>;
using OptDouble = std::optional<double>;

// ---- what has been served: counts, and on request (`run --report`) each kind of call ----

enum Slot {
  layer_norm_fwd,
  layer_norm_bwd,
  rms_norm_fwd,
  rms_norm_bwd,
  softmax_fwd,
  softmax_bwd,
  gelu_fwd,
  gelu_bwd,
  attention_fwd,
  attention_bwd,
  dropout_fwd,
  dropout_bwd,
  slots
};
inline const char* const slot_names[slots] = {"native_layer_norm",
                                              "native_layer_norm_backward",
                                              "_fused_rms_norm",
                                              "_fused_rms_norm_backward",
                                              "_softmax",
                                              "_softmax_backward_data",
                                              "gelu",
                                              "gelu_backward",
                                              "_scaled_dot_product_flash_attention_for_cpu",
                                              "_scaled_dot_product_flash_attention_for_cpu_backward",
                                              "native_dropout",
                                              "native_dropout_backward"};

#ifdef GK_SIM  // ThreadSanitizer's instrumentation of atomics is no part of the model
template <class T> using Shared = T;
#else
template <class T> using Shared = std::atomic<T>;
#endif
struct Counts { Shared<int64_t> ours{0}, torchs{0}; };
inline Counts counts[slots];
inline Shared<bool> recording{false};
inline std::mutex record_mutex;
inline std::map<std::string, int64_t> record;  // "gelu float32 2x512x3072" -> calls

inline void shape_into(std::ostringstream& s, const Tensor& t) {
  s << ' ' << dtype_name(dtype_of(t)) << ' ';
  for (int64_t d = 0; d < t.dim(); d++) s << (d ? "x" : "") << t.size(d);
}
// The call is ours. What tells it from others of its slot: the tensors' dtypes and shapes, and `more`.
template <class... More> inline void served(Slot slot, std::initializer_list<const Tensor*> tensors, const More&... more) {
  counts[slot].ours++;
  if (!recording) return;
  std::ostringstream s;
  s << slot_names[slot];
  for (const Tensor* t : tensors) shape_into(s, *t);
  ((s << ' ' << more), ...);
  const std::lock_guard<std::mutex> lock(record_mutex);
  record[s.str()]++;
}

// ---- torch's own ----

// What Python heard torch say when the kernel that stood here refused the call.
inline thread_local std::string refusal;

inline StableIValue boxed(const std::vector<bool>& flags) {
  bool plain[8];
  std::copy(flags.begin(), flags.end(), plain);
  return torch::stable::detail::from(torch::headeronly::HeaderOnlyArrayRef<bool>(plain, flags.size()));
}
template <class T> inline StableIValue boxed(const T& t) { return torch::stable::detail::from(t); }

template <class... Out, size_t... i> inline std::tuple<Out...> unboxed(const StableIValue* stack, std::index_sequence<i...>) {
  return {torch::stable::detail::to<Out>(stack[i])...};
}
// The op's results, or nothing where it raised.
template <class... Out, class... In>
inline std::optional<std::tuple<Out...>> call(const char* op, const char* overload, const In&... in) {
  std::array<StableIValue, std::max(sizeof...(In), sizeof...(Out))> stack{boxed(in)...};
  if (torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION) != 0) return std::nullopt;
  return unboxed<Out...>(stack.data(), std::index_sequence_for<Out...>());
}
template <class... Out, class... In> inline std::tuple<Out...> torchs(Slot slot, const In&... in) {
  counts[slot].torchs++;
  refusal.clear();
  const auto results = call<Out...>((std::string(GK_ATEN_TORCH) + slot_names[slot]).c_str(), "", in...);
  GK_CHECK(refusal.empty(), refusal);
  GK_CHECK(results, slot_names[slot], ": torch's own kernel failed; what it says of it stands on stderr");
  return *results;
}

// ---- tensors ----

// torch's autograd says None by a tensor that is not there.
inline OptTensor present(const OptTensor& t) { return t && t->defined() ? t : OptTensor(); }

inline bool ours_dtype(ScalarType t) {
#ifdef GK_CUDA
  return is_float_dtype(t) && t != ScalarType::Double;
#else
  return is_float_dtype(t);
#endif
}

inline Tensor alias(const Tensor& t, Shape shape, Shape strides) {
  int64_t offset = 0;
  AtenTensorHandle handle = nullptr;
  GK_TORCH(aoti_torch_get_storage_offset(t.get(), &offset));
  GK_TORCH(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(shape.size()), shape.data(), strides.data(), offset,
                                          &handle));
  return Tensor(handle);
}
inline Tensor alias(const Tensor& packed, const Ints& shape) {
  Ints strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  return alias(packed, {shape.data(), shape.size()}, {strides.data(), strides.size()});
}
inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor no_tensor() {
  AtenTensorHandle handle = nullptr;
  GK_TORCH(aoti_torch_new_uninitialized_tensor(&handle));
  return Tensor(handle);
}

// Are the dimensions in memory in the order of their names? An elementwise function's result is then contiguous.
inline bool in_order(const Tensor& t) {
  int64_t before = std::numeric_limits<int64_t>::max();
  for (int64_t d = 0; d < t.dim(); d++) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) > before || t.stride(d) == 0) return false;
    before = t.stride(d);
  }
  return true;
}
// Is every element of its memory one of its elements, each once, in whatever order?
inline bool dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != extent) return false;
    extent *= size;
  }
  return true;
}
inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); d++)
    if (a.size(d) != b.size(d)) return false;
  return true;
}
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); d++)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}
inline bool together(const Tensor& a, const Tensor& x) {
#ifdef __CUDACC__
  return a.is_cuda() && a.get_device_index() == x.get_device_index();
#else
  (void)x;  // it is in a CPU's slot
  return a.is_cpu();
#endif
}

// from has the elements of to, of the statistics' dtype one of them, of a 16-bit dtype the other.
inline void convert(Tensor& to, const Tensor& from) { GK_TORCH(aoti_torch_copy_(to.get(), from.get(), 0)); }
inline Tensor converted(const Tensor& from, ScalarType dtype) {
  if (dtype_of(from) == dtype) return packed(from);
  Tensor to = new_tensor(from, from.sizes(), dtype);
  convert(to, from);
  return to;
}

// ---- norms ----

// x as rows of the normalized elements; no rows where it has none, or where the shapes do not fit.
inline Matrix rows_of(const Tensor& x, const Ints& shape) {
  const int64_t normalized = shape.size(), lead = x.dim() - normalized;
  if (normalized < 1 || lead < 0) return {0, 0};
  Matrix m = {1, 1};
  const Shape sizes = x.sizes();
  for (int64_t d = 0; d < lead + normalized; d++) {
    if (d >= lead && sizes[d] != shape[d - lead]) return {0, 0};
    (d < lead ? m.M : m.N) *= sizes[d];
  }
  return m;
}
inline bool column_fits(const OptTensor& t, const Ints& shape, const Tensor& x, ScalarType x_dtype) {
  if (!t) return true;
  const ScalarType dtype = dtype_of(*t);
  if ((dtype != x_dtype && dtype != stat_dtype(x_dtype)) || !t->is_contiguous() || !together(*t, x)) return false;
  const Shape sizes = t->sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}
// The same memory as rows and as columns, where several dimensions are normalized.
inline Tensor as_rows(const Tensor& x, const Matrix& m, const Ints& shape) {
  const Tensor rows = packed(x);
  return shape.size() == 1 ? rows : alias(rows, {m.M, m.N});
}
inline OptTensor as_column(const OptTensor& t, const Matrix& m, const Ints& shape) {
  return t && shape.size() != 1 ? alias(*t, {m.N}) : t;
}
inline Tensor as_shape(const Tensor& t, const Ints& shape) { return shape.size() == 1 ? t : alias(t, shape); }

// Of x's shape, the normalized dimensions 1
inline Tensor new_statistic(const Tensor& x, const Ints& shape) {
  int64_t of[most_dims];
  const Shape sizes = x.sizes();
  const size_t lead = sizes.size() - shape.size();
  for (size_t d = 0; d < sizes.size(); d++) of[d] = d < lead ? sizes[d] : 1;
  return new_tensor(x, {of, sizes.size()}, stat_dtype(dtype_of(x)));
}
// The dtype that ATen keeps mean and rstd in.
inline ScalarType kept_dtype(const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
#ifdef GK_CUDA
  (void)x, (void)weight, (void)bias;
  return ScalarType::Float;
#else
  const OptTensor& t = weight ? weight : bias;  // a CPU's are 16 bits wide, unless a parameter is float32
  return t ? dtype_of(*t) : dtype_of(x);
#endif
}

inline bool norm_fits(const Tensor& x, const Ints& shape, const OptTensor& weight, const OptTensor& bias, const Matrix& m) {
  const ScalarType dtype = dtype_of(x);
  return m.M * m.N > 0 && ours_dtype(dtype) && column_fits(weight, shape, x, dtype) && column_fits(bias, shape, x, dtype) &&
         (!weight || !bias || dtype_of(*weight) == dtype_of(*bias));
}

inline std::tuple<Tensor, Tensor, Tensor> native_layer_norm(const Tensor& x, Ints shape, const OptTensor& given_weight,
                                                            const OptTensor& given_bias, double eps) {
  const OptTensor weight = present(given_weight);
  const OptTensor bias = present(given_bias);
  const Matrix m = rows_of(x, shape);
  if (!norm_fits(x, shape, weight, bias, m) || !(eps >= 0 && std::isfinite(eps)))
    return torchs<Tensor, Tensor, Tensor>(layer_norm_fwd, x, shape, weight, bias, eps);
  const ScalarType stat = stat_dtype(dtype_of(x)), kept = kept_dtype(x, weight, bias);
  Tensor y = new_like(x), mean = new_statistic(x, shape), rstd = new_statistic(x, shape);
  layer_norm_into(y, mean, rstd, as_rows(x, m, shape), as_column(weight, m, shape), as_column(bias, m, shape), m, eps);
  served(layer_norm_fwd, {&x}, shape.size(), weight ? dtype_name(dtype_of(*weight)) : "-", bias ? "bias" : "-");
  return {y, kept == stat ? mean : converted(mean, kept), kept == stat ? rstd : converted(rstd, kept)};
}

inline std::tuple<Tensor, Tensor, Tensor> native_layer_norm_backward(const Tensor& dy, const Tensor& x, Ints shape,
                                                                     const Tensor& mean, const Tensor& rstd,
                                                                     const OptTensor& given_weight, const OptTensor& given_bias,
                                                                     std::vector<bool> wanted) {
  const OptTensor weight = present(given_weight);
  const OptTensor bias = present(given_bias);
  const Matrix m = rows_of(x, shape);
  if (!norm_fits(x, shape, weight, bias, m) || !same_shape(dy, x) || dtype_of(dy) != dtype_of(x) || !together(dy, x) ||
      mean.numel() != m.M || rstd.numel() != m.M || (wanted[1] && !weight) || (wanted[2] && !bias))
    return torchs<Tensor, Tensor, Tensor>(layer_norm_bwd, dy, x, shape, mean, rstd, weight, bias, wanted);
  const ScalarType stat = stat_dtype(dtype_of(x));
  // without a weight our gradient of the bias has x's dtype, so its own goes along
  auto [dx, dweight, dbias] = layer_norm_gradients(as_rows(dy, m, shape), as_rows(x, m, shape), as_column(weight, m, shape),
                                                   converted(mean, stat), converted(rstd, stat), wanted[2]);
  served(layer_norm_bwd, {&x}, shape.size(), weight ? dtype_name(dtype_of(*weight)) : "-", bias ? "bias" : "-");
  if (wanted[2] && dtype_of(dbias) != dtype_of(*bias)) dbias = converted(dbias, dtype_of(*bias));
  Ints sizes(x.sizes().begin(), x.sizes().end());
  return {wanted[0] ? (shape.size() == 1 ? dx : alias(dx, sizes)) : no_tensor(),
          wanted[1] ? as_shape(dweight, shape) : no_tensor(), wanted[2] ? as_shape(dbias, shape) : no_tensor()};
}

// torch composes it of elementwise functions, whose result lies in memory as x does, in the wider dtype of x and weight.
inline bool rms_norm_fits(const Tensor& x, const Ints& shape, const OptTensor& weight, const Matrix& m) {
  return norm_fits(x, shape, weight, OptTensor(), m) && in_order(x) && (!weight || dtype_of(*weight) == dtype_of(x));
}

inline std::tuple<Tensor, Tensor> fused_rms_norm(const Tensor& x, Ints shape, const OptTensor& given_weight, OptDouble eps) {
  const OptTensor weight = present(given_weight);
  const Matrix m = rows_of(x, shape);
  const bool wide = dtype_of(x) == ScalarType::Double;
  const double least = wide ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  const double added = eps.value_or(least);
  if (!rms_norm_fits(x, shape, weight, m) || !(added >= 0 && std::isfinite(added)))
    return torchs<Tensor, Tensor>(rms_norm_fwd, x, shape, weight, eps);
  Tensor y = new_like(x), rstd = new_statistic(x, shape);
  rms_norm_into(y, rstd, as_rows(x, m, shape), as_column(weight, m, shape), m, added);
  served(rms_norm_fwd, {&x}, shape.size(), weight ? dtype_name(dtype_of(*weight)) : "-");
  return {y, rstd};
}

inline std::tuple<Tensor, Tensor> fused_rms_norm_backward(const Tensor& dy, const Tensor& x, Ints shape, const Tensor& rstd,
                                                          const OptTensor& given_weight, std::vector<bool> wanted) {
  const OptTensor weight = present(given_weight);
  const Matrix m = rows_of(x, shape);
  if (!rms_norm_fits(x, shape, weight, m) || !same_shape(dy, x) || dtype_of(dy) != dtype_of(x) || !together(dy, x) ||
      rstd.numel() != m.M || (wanted[1] && !weight))
    return torchs<Tensor, Tensor>(rms_norm_bwd, dy, x, shape, rstd, weight, wanted);
  auto [dx, dweight] = rms_norm_gradients(as_rows(dy, m, shape), as_rows(x, m, shape), as_column(weight, m, shape),
                                          converted(rstd, stat_dtype(dtype_of(x))));
  served(rms_norm_bwd, {&x}, shape.size(), weight ? dtype_name(dtype_of(*weight)) : "-");
  Ints sizes(x.sizes().begin(), x.sizes().end());
  return {wanted[0] ? (shape.size() == 1 ? dx : alias(dx, sizes)) : no_tensor(),
          wanted[1] ? as_shape(dweight, shape) : no_tensor()};
}

// ---- softmax ----

inline bool last(const Tensor& x, int64_t dim) {
  return x.dim() > 0 && (dim == x.dim() - 1 || dim == -1) && x.numel() > 0 && ours_dtype(dtype_of(x));
}

inline Tensor softmax_(const Tensor& x, int64_t dim, bool half_to_float) {
  if (!last(x, dim) || half_to_float) return std::get<0>(torchs<Tensor>(softmax_fwd, x, dim, half_to_float));
  served(softmax_fwd, {&x});
  return softmax_of(packed(x), OptTensor(), 1, false, std::numeric_limits<double>::quiet_NaN());
}

inline Tensor softmax_backward_data(const Tensor& dy, const Tensor& y, int64_t dim, ScalarType input_dtype) {
  if (!last(y, dim) || input_dtype != dtype_of(y) || dtype_of(dy) != dtype_of(y) || !same_shape(dy, y) || !together(dy, y))
    return std::get<0>(torchs<Tensor>(softmax_bwd, dy, y, dim, input_dtype));
  served(softmax_bwd, {&y});
  return softmax_gradient(packed(dy), packed(y), 1, false);
}

// ---- gelu ----

inline Tensor flat(const Tensor& t) { return alias(t, {t.numel()}); }

inline Tensor gelu_(const Tensor& x, std::string approximate) {
  const bool tanh = approximate == "tanh", known = tanh || approximate == "none";
  if (known && x.numel() > 0 && ours_dtype(dtype_of(x))) {
    if (x.is_contiguous() || in_order(x)) {
      served(gelu_fwd, {&x}, approximate);
      return gelu_of(packed(x), OptTensor(), tanh);
    }
    if (dense(x)) {
      served(gelu_fwd, {&x}, approximate);
      return alias(gelu_of(flat(x), OptTensor(), tanh), x.sizes(), x.strides());
    }
  }
  return std::get<0>(torchs<Tensor>(gelu_fwd, x, approximate));
}

inline Tensor gelu_backward(const Tensor& dy, const Tensor& x, std::string approximate) {
  const bool tanh = approximate == "tanh", known = tanh || approximate == "none";
  if (known && x.numel() > 0 && ours_dtype(dtype_of(x)) && dtype_of(dy) == dtype_of(x) && same_shape(dy, x) &&
      together(dy, x)) {
    bool spread = true;  // one number for all, as a sum's gradient is
    for (int64_t d = 0; d < dy.dim(); d++) spread &= dy.size(d) == 1 || dy.stride(d) == 0;
    if ((x.is_contiguous() || in_order(x)) && (spread || dy.is_contiguous() || in_order(dy))) {
      served(gelu_bwd, {&x}, approximate);
      return std::get<0>(gelu_gradients(packed(dy), packed(x), OptTensor(), tanh));
    }
    if (dense(x) && same_strides(dy, x)) {
      served(gelu_bwd, {&x}, approximate);
      return alias(std::get<0>(gelu_gradients(flat(dy), flat(x), OptTensor(), tanh)), x.sizes(), x.strides());
    }
  }
  return std::get<0>(torchs<Tensor>(gelu_bwd, dy, x, approximate));
}

#ifndef GK_CUDA

// ---- attention ----

// As q lies in memory, with nothing between.
inline Tensor new_heads_like(const Tensor& q) {
  int64_t order[4] = {0, 1, 2, 3}, strides[4], stride = 1;
  std::stable_sort(order, order + 4, [&](int64_t a, int64_t b) { return q.stride(a) > q.stride(b); });
  for (int i = 4; i-- > 0; stride *= q.size(order[i])) strides[order[i]] = stride;
  return new_strided(q, q.sizes(), {strides, 4}, dtype_of(q));
}
inline bool attention_fits(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p, const OptTensor& mask) {
  for (const Tensor* t : {&q, &k, &v})
    if (t->dim() != 4 || dtype_of(*t) != dtype_of(q) || t->numel() == 0 || t->stride(3) != 1 || t->size(3) > 256 ||
        t->size(0) != q.size(0) || !together(*t, q))
      return false;
  for (int64_t d = 0; d < 3; d++)
    if (q.size(d) != 1 && q.stride(d) < q.size(3)) return false;  // the innermost dimension is another, or q overlaps itself
  if (!ours_dtype(dtype_of(q)) || dropout_p != 0 || k.size(3) != q.size(3) || v.size(3) != q.size(3) ||
      k.size(1) != v.size(1) || k.size(2) != v.size(2) || q.size(1) % k.size(1) != 0)
    return false;
  if (!mask) return true;
  const ScalarType dtype = dtype_of(*mask);
  if ((dtype != dtype_of(q) && dtype != stat_dtype(dtype_of(q))) || (mask->dim() != 2 && mask->dim() != 4)) return false;
  const int64_t full[4] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  for (int64_t d = 0; d < mask->dim(); d++) {
    const int64_t n = mask->size(d);
    if (n != 1 && n != full[d + 4 - mask->dim()]) return false;
  }
  return true;
}
inline OptTensor of_4_dims(const OptTensor& mask) {
  if (!mask || mask->dim() == 4) return mask;
  return alias(*mask, {1, 1, mask->size(0), mask->size(1)}, {0, 0, mask->stride(0), mask->stride(1)});
}
// (B, H, T) between our order and that of ATen, heads inside tokens.
template <class C>
inline void reorder(C* to, const C* from, int64_t B, int64_t H, int64_t T, Shape to_strides, Shape from_strides) {
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t t = 0; t < T; t++)
        to[b * to_strides[0] + h * to_strides[1] + t * to_strides[2]] =
            from[b * from_strides[0] + h * from_strides[1] + t * from_strides[2]];
}
inline Tensor reordered(const Tensor& lse, bool to_aten) {
  const int64_t B = lse.size(0), H = lse.size(1), T = lse.size(2);
  const ScalarType dtype = dtype_of(lse);
  Tensor to = new_strided(lse, {B, H, T}, to_aten ? Shape({H * T, 1, H}) : Shape({H * T, T, 1}), dtype);
  if (dtype == ScalarType::Double)
    reorder((double*)to.mutable_data_ptr(), (const double*)lse.const_data_ptr(), B, H, T, to.strides(), lse.strides());
  else reorder((float*)to.mutable_data_ptr(), (const float*)lse.const_data_ptr(), B, H, T, to.strides(), lse.strides());
  return to;
}
inline const char* mask_kind(const OptTensor& mask, bool causal) { return mask ? "mask" : causal ? "causal" : "-"; }

inline std::tuple<Tensor, Tensor> flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p,
                                                  bool causal, const OptTensor& given_mask, OptDouble scale) {
  const OptTensor mask = present(given_mask);
  if (!attention_fits(q, k, v, dropout_p, mask))
    return torchs<Tensor, Tensor>(attention_fwd, q, k, v, dropout_p, causal, mask, scale);
  served(attention_fwd, {&q, &k}, mask_kind(mask, causal));
  const double factor = scale.value_or(1 / std::sqrt(double(q.size(3))));
  const AttentionArgs args =
      attention_args("attention", q, k, v, of_4_dims(mask), OptTensor(), OptTensor(), factor, 0, 0, 0, -1, causal ? 0 : -1);
  Tensor o = new_heads_like(q), lse = new_tensor(q, {args.B, args.H, args.Tq}, stat_dtype(dtype_of(q)));
  attention_into(o, lse, args, q);
  return {o, reordered(lse, true)};
}

inline std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                                   const Tensor& v, const Tensor& o, const Tensor& lse,
                                                                   double dropout_p, bool causal, const OptTensor& given_mask,
                                                                   OptDouble scale) {
  const OptTensor mask = present(given_mask);
  if (!attention_fits(q, k, v, dropout_p, mask) || !same_shape(dout, q) || !same_shape(o, q) || dtype_of(dout) != dtype_of(q) ||
      dtype_of(o) != dtype_of(q) || o.stride(3) != 1 || lse.dim() != 3 || lse.size(0) != q.size(0) ||
      lse.size(1) != q.size(1) || lse.size(2) != q.size(2) || dtype_of(lse) != stat_dtype(dtype_of(q)))
    return torchs<Tensor, Tensor, Tensor>(attention_bwd, dout, q, k, v, o, lse, dropout_p, causal, mask, scale);
  served(attention_bwd, {&q, &k}, mask_kind(mask, causal));
  const double factor = scale.value_or(1 / std::sqrt(double(q.size(3))));
  auto [dq, dk, dv, dbias] =
      attention_gradients(dout.stride(3) == 1 ? dout : packed(dout), q, k, v, o, reordered(lse, false), of_4_dims(mask),
                          OptTensor(), OptTensor(), factor, 0, 0, 0, -1, causal ? 0 : -1, false, true);
  return {dq, dk, dv};
}

// ---- dropout with a stored mask, for what is small ----

inline bool masked_fits(const Tensor& x, const Tensor& mask) {
  return x.numel() > 0 && ours_dtype(dtype_of(x)) && x.is_contiguous() && mask.is_contiguous() && same_shape(x, mask) &&
         dtype_of(mask) == ScalarType::Bool && together(mask, x);
}

inline std::tuple<Tensor, Tensor> native_dropout(const Tensor& x, double p, std::optional<bool> train) {
  if (train.value_or(true) && p > 0 && p < 1 && x.numel() > 0 && ours_dtype(dtype_of(x)) && x.is_contiguous()) {
    Tensor y = new_like(x), mask = new_tensor(x, x.sizes(), ScalarType::Bool);
    const auto drawn = call<Tensor>("aten::bernoulli_", "float", mask, 1 - p, std::optional<Tensor>());  // torch's generator
    if (drawn) {
      masked_into(y, x, mask, 1 / (1 - p));
      return served(dropout_fwd, {&x}, p), std::tuple<Tensor, Tensor>{y, mask};
    }
  }
  return torchs<Tensor, Tensor>(dropout_fwd, x, p, train);
}

inline Tensor native_dropout_backward(const Tensor& dy, const Tensor& mask, double scale) {
  if (!masked_fits(dy, mask)) return std::get<0>(torchs<Tensor>(dropout_bwd, dy, mask, scale));
  Tensor dx = new_like(dy);
  masked_into(dx, dy, mask, scale);
  return served(dropout_bwd, {&dy}), dx;
}

#endif  // GK_CUDA

// ---- in and out of the slots ----

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
struct Entry {
  Entry(Boxed function = nullptr) : function(function) {}
  const Boxed function;
  std::unique_ptr<torch::stable::detail::StableLibrary> standing;
};
inline Entry* entry(const std::string& name) {
  static Entry table[slots] = {
      TORCH_BOX(&native_layer_norm),
      TORCH_BOX(&native_layer_norm_backward),
      TORCH_BOX(&fused_rms_norm),
      TORCH_BOX(&fused_rms_norm_backward),
      TORCH_BOX(&softmax_),
      TORCH_BOX(&softmax_backward_data),
      TORCH_BOX(&gelu_),
      TORCH_BOX(&gelu_backward),
#ifndef GK_CUDA
      TORCH_BOX(&flash_attention),
      TORCH_BOX(&flash_attention_backward),
      TORCH_BOX(&native_dropout),
      TORCH_BOX(&native_dropout_backward),

#endif
  };
  for (int i = 0; i < slots; i++)
    if (name == slot_names[i] && table[i].function) return &table[i];
  return nullptr;
}

// Ours into the slot, or out of it, where what stood there before stands again. Not from two threads at once.
inline bool stand(const char* name, bool in) {
  Entry* e = entry(name);
  if (!e) return false;
  if (!in) e->standing.reset();
  if (!in || e->standing) return true;
  using Library = torch::stable::detail::StableLibrary;
  e->standing = std::make_unique<Library>(Library::Kind::IMPL, "aten", GK_ATEN_KEY, "gpt_kernels", 0);
  e->standing->impl(name, e->function);
  return true;
}

}  // namespace aten
}  // namespace gk

#define GK_EXPORT extern "C" __attribute__((visibility("default")))
GK_EXPORT int gpt_kernels_aten(const char* name, int in) { return gk::aten::stand(name, in != 0); }
// How many calls of a slot were ours, or torch's.
GK_EXPORT int64_t gpt_kernels_aten_count(const char* name, int ours) {
  for (int i = 0; i < gk::aten::slots; i++)
    if (!std::strcmp(name, gk::aten::slot_names[i])) return ours ? gk::aten::counts[i].ours : gk::aten::counts[i].torchs;
  return -1;
}
GK_EXPORT void gpt_kernels_aten_refused(const char* words) { gk::aten::refusal = *words ? words : "torch refused the call"; }
GK_EXPORT void gpt_kernels_aten_record(int on) { gk::aten::recording = on != 0; }
// The kinds of calls since the last time it was asked, one per line: the number of calls, the slot, what tells the kind.
GK_EXPORT const char* gpt_kernels_aten_recorded() {
  static std::string lines;
  const std::lock_guard<std::mutex> lock(gk::aten::record_mutex);
  lines.clear();
  for (const auto& [kind, calls] : gk::aten::record) lines += std::to_string(calls) + " " + kind + "\n";
  gk::aten::record.clear();
  return lines.c_str();
}
