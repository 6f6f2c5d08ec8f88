// What attention's launchers share, forward and backward. The op: gpt_kernels/ops/attention.py; kernels: scores.cuh on
// product.cuh on tile.cuh.
#pragma once
#include "scores.cuh"

namespace gk {

// The head dim that a kernel of no exact one is made for.
inline int padded_head_dim(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }
// f(integral_constant) of a padded head dim
template <int... dims, class F> void with_dim(int D, const F& f) {
  ((D == dims ? (f(std::integral_constant<int, dims>()), 0) : 0), ...);
}

// bytes of shared memory that a block may have
inline int most_shared(int arch) {
  return (arch == 86 || arch == 89 || arch >= 120 ? 99 : arch == 80 || arch == 87 ? 163 : 227) << 10;
}

inline bool whole_chunks(const Tensor& t) {
  const int64_t size = element_size(dtype_of(t));
  bool whole = stands_on_16(t) && t.size(3) * size % 16 == 0;
  for (int d = 0; d < 3; d++) whole = whole && (t.size(d) <= 1 || t.stride(d) * size % 16 == 0);
  return whole;
}

// The kernels for plain scores are those that are tuned: 16 bits, the head dims of GPT models; `fits`: the GPU can run them.
inline Scores scores_of(const AttentionArgs& s, bool aligned, int64_t size, bool fits) {
  const bool tuned = size == 2 && s.D == s.Dv && (s.D == 64 || s.D == 80 || s.D == 96 || s.D == 128) && aligned && fits;
  const bool plain = tuned && s.softcap == 0 && !s.slopes && s.bias_kind == Bias::none && !s.philox.drop_below && s.scale > 0;
  const auto near = [](int64_t x) { return int(std::clamp<int64_t>(x, -far, far)); };
  const int low = s.window_left < 0 ? -far : near(s.diagonal - s.window_left);
  const int high = s.window_right < 0 ? far : near(s.diagonal + s.window_right);
  const float rate = float((plain ? s.scale : 1) * double(log2_e));
  return {plain, aligned,         size == 4 && tf32_wanted(), float(s.scale), float(s.softcap), rate, int(s.Tq), int(s.Tk), low,
          high,  near(s.diagonal)};
}

// Everything that AttentionArgs does not check for a GPU.
inline void check_gpu(const char* op, const AttentionArgs& s, const Tensor& q, std::initializer_list<const Tensor*> more,
                      std::initializer_list<const OptTensor*> optional) {
  GK_CHECK(dtype_of(q) != ScalarType::Double, op, ": q must be float32, bfloat16 or float16, got float64 (CUDA kernels)");
  constexpr int64_t most = far - 1024;
  GK_CHECK(s.Tq <= most && s.Tk <= most, op, ": at most ", most, " tokens, got q ", s.Tq, ", k ", s.Tk, " (CUDA kernels)");
  for (const Tensor* t : more) check_same_device(op, "every argument", *t, q);
  for (const OptTensor* t : optional)
    if (*t) check_same_device(op, "every argument", **t, q);
}

}  // namespace gk
