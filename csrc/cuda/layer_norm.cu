// layer_norm on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/layer_norm.py; kernels: norm.cuh.
#include "../args/layer_norm.h"
#include "norm.cuh"

namespace gk {

static std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd_cuda(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                                              double eps) {
  const Matrix of = layer_norm_fwd_args("layer_norm_fwd", x, weight, bias, eps);
  const int64_t M = of.M, N = of.N;
  const Gpu gpu(x);
  Tensor y = new_like(x), mean = new_tensor(x, {M}, ScalarType::Float), rstd = new_like(mean);
  const ScalarType param_dtype = parameter_dtype(x, weight, bias);
  with_dtypes(x.scalar_type(), param_dtype, [&](auto t, auto p) {
    launch_norm_fwd<decltype(t), decltype(p), true>(gpu, y, out<float>(mean), rstd, x, weight, bias, M, N, eps);
  });
  return {y, mean, rstd};
}

static std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd_cuda(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                              const Tensor& mean, const Tensor& rstd, bool has_bias) {
  const Matrix of = layer_norm_bwd_args("layer_norm_bwd", dy, x, weight, mean, rstd);
  const int64_t M = of.M, N = of.N;
  const Gpu gpu(x);
  const ScalarType param_dtype = parameter_dtype(x, weight);
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
