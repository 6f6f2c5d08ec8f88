// layer_norm on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/layer_norm.py; kernels: norm.cuh.
#include "../args/layer_norm.h"
#include "../launchers.h"
#include "norm.cuh"

namespace gk {

void layer_norm_into(Tensor& y, Tensor& mean, Tensor& rstd, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                     Matrix of, double eps) {
  const Gpu gpu(x);
  const ScalarType param_dtype = parameter_dtype(x, weight, bias);
  with_dtypes(dtype_of(x), param_dtype, [&](auto t, auto p) {
    launch_norm_fwd<decltype(t), decltype(p), true>(gpu, y, out<float>(mean), rstd, x, weight, bias, of.M, of.N, eps);
  });
}

static std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd_cuda(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                                              double eps) {
  const Matrix of = layer_norm_fwd_args("layer_norm_fwd", x, weight, bias, eps);
  Tensor y = new_like(x), mean = new_tensor(x, {of.M}, ScalarType::Float), rstd = new_like(mean);
  layer_norm_into(y, mean, rstd, x, weight, bias, of, eps);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_gradients(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                        const Tensor& mean, const Tensor& rstd, bool has_bias) {
  const Matrix of = layer_norm_bwd_args("layer_norm_bwd", dy, x, weight, mean, rstd);
  const int64_t M = of.M, N = of.N;
  const Gpu gpu(x);
  const ScalarType param_dtype = parameter_dtype(x, weight);
  Tensor dx = new_like(x), dweight = new_tensor(x, {weight ? N : 0}, param_dtype);
  Tensor dbias = new_tensor(x, {has_bias ? N : 0}, param_dtype);
  with_dtypes(dtype_of(x), param_dtype, [&](auto t, auto p) {
    launch_norm_bwd<decltype(t), decltype(p), true>(gpu, dx, dweight, &dbias, dy, x, weight, data<float>(mean), rstd, M, N);
  });
  return {dx, dweight, dbias};
}

GK_REGISTER(m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd_cuda));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_gradients));
}

}  // namespace gk
