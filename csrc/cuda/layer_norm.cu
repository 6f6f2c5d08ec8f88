// layer_norm on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/layer_norm.py; kernels: norm.cuh.
#include "norm.cuh"

namespace gk {

static std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd_cuda(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                                              double eps) {
  const char* op = "layer_norm_fwd";
  check_input(op, "x", x);
  GK_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension, got a scalar");
  GK_CHECK(eps >= 0 && std::isfinite(eps), op, ": eps must be finite and not negative, got ", eps);
  const int64_t N = x.size(x.dim() - 1), M = N ? x.numel() / N : 0;
  check_parameter(op, "weight", weight, N, x), check_parameter(op, "bias", bias, N, x);
  GK_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(), op, ": bias must be ",
           dtype_name(weight ? weight->scalar_type() : x.scalar_type()), " like weight, got ",
           dtype_name(bias ? bias->scalar_type() : x.scalar_type()));
  const Gpu gpu(x);
  Tensor y = new_like(x), mean = new_tensor(x, {M}, ScalarType::Float), rstd = new_like(mean);
  const ScalarType param_dtype = weight ? weight->scalar_type() : bias ? bias->scalar_type() : x.scalar_type();
  with_dtypes(x.scalar_type(), param_dtype, [&](auto t, auto p) {
    launch_norm_fwd<decltype(t), decltype(p), true>(gpu, y, out<float>(mean), rstd, x, weight, bias, M, N, eps);
  });
  return {y, mean, rstd};
}

static std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd_cuda(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                              const Tensor& mean, const Tensor& rstd, bool has_bias) {
  const char* op = "layer_norm_bwd";
  check_input(op, "x", x), check_gradient(op, "dy", dy, x);
  GK_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension, got a scalar");
  const int64_t N = x.size(x.dim() - 1), M = N ? x.numel() / N : 0;
  check_parameter(op, "weight", weight, N, x);
  check_row_statistic(op, "mean", mean, M, x), check_row_statistic(op, "rstd", rstd, M, x);
  const Gpu gpu(x);
  const ScalarType param_dtype = weight ? weight->scalar_type() : x.scalar_type();
  Tensor dx = new_like(x), dweight = new_tensor(x, {weight ? N : 0}, param_dtype);
  Tensor dbias = new_tensor(x, {has_bias ? N : 0}, param_dtype);
  with_dtypes(x.scalar_type(), param_dtype, [&](auto t, auto p) {
    launch_norm_bwd<decltype(t), decltype(p), true>(gpu, dx, dweight, &dbias, dy, x, weight, data<float>(mean), rstd, M, N);
  });
  return {dx, dweight, dbias};
}

GK_REGISTER(m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd_cuda));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd_cuda));
}

}  // namespace gk
