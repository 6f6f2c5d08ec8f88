// rms_norm on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/rms_norm.py; kernels: norm.cuh.
#include "norm.cuh"

namespace gk {

static std::tuple<Tensor, Tensor> rms_norm_fwd_cuda(const Tensor& x, const OptTensor& weight, double eps) {
  const char* op = "rms_norm_fwd";
  check_input(op, "x", x);
  GK_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension, got a scalar");
  GK_CHECK(eps >= 0 && std::isfinite(eps), op, ": eps must be finite and not negative, got ", eps);
  const int64_t N = x.size(x.dim() - 1), M = N ? x.numel() / N : 0;
  check_parameter(op, "weight", weight, N, x);
  const Gpu gpu(x);
  Tensor y = new_like(x), rstd = new_tensor(x, {M}, ScalarType::Float);
  with_dtypes(x.scalar_type(), weight ? weight->scalar_type() : x.scalar_type(), [&](auto t, auto p) {
    launch_norm_fwd<decltype(t), decltype(p), false>(gpu, y, nullptr, rstd, x, weight, OptTensor(), M, N, eps);
  });
  return {y, rstd};
}

static std::tuple<Tensor, Tensor> rms_norm_bwd_cuda(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                    const Tensor& rstd) {
  const char* op = "rms_norm_bwd";
  check_input(op, "x", x), check_gradient(op, "dy", dy, x);
  GK_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension, got a scalar");
  const int64_t N = x.size(x.dim() - 1), M = N ? x.numel() / N : 0;
  check_parameter(op, "weight", weight, N, x), check_row_statistic(op, "rstd", rstd, M, x);
  const Gpu gpu(x);
  const ScalarType param_dtype = weight ? weight->scalar_type() : x.scalar_type();
  Tensor dx = new_like(x), dweight = new_tensor(x, {weight ? N : 0}, param_dtype);
  with_dtypes(x.scalar_type(), param_dtype, [&](auto t, auto p) {
    launch_norm_bwd<decltype(t), decltype(p), false>(gpu, dx, dweight, nullptr, dy, x, weight, nullptr, rstd, M, N);
  });
  return {dx, dweight};
}

GK_REGISTER(m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd_cuda));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd_cuda));
}

}  // namespace gk
