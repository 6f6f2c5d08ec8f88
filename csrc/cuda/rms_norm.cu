// rms_norm on NVIDIA GPUs. Formula, shapes and gradients: gpt_kernels/ops/rms_norm.py; kernels: norm.cuh.
#include "../args/rms_norm.h"
#include "../launchers.h"
#include "norm.cuh"

namespace gk {

void rms_norm_into(Tensor& y, Tensor& rstd, const Tensor& x, const OptTensor& weight, Matrix of, double eps) {
  const Gpu gpu(x);
  with_dtypes(dtype_of(x), parameter_dtype(x, weight), [&](auto t, auto p) {
    launch_norm_fwd<decltype(t), decltype(p), false>(gpu, y, nullptr, rstd, x, weight, OptTensor(), of.M, of.N, eps);
  });
}

static std::tuple<Tensor, Tensor> rms_norm_fwd_cuda(const Tensor& x, const OptTensor& weight, double eps) {
  const Matrix of = rms_norm_fwd_args("rms_norm_fwd", x, weight, eps);
  Tensor y = new_like(x), rstd = new_tensor(x, {of.M}, ScalarType::Float);
  rms_norm_into(y, rstd, x, weight, of, eps);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_gradients(const Tensor& dy, const Tensor& x, const OptTensor& weight, const Tensor& rstd) {
  const Matrix of = rms_norm_bwd_args("rms_norm_bwd", dy, x, weight, rstd);
  const int64_t M = of.M, N = of.N;
  const Gpu gpu(x);
  const ScalarType param_dtype = parameter_dtype(x, weight);
  Tensor dx = new_like(x), dweight = new_tensor(x, {weight ? N : 0}, param_dtype);
  with_dtypes(dtype_of(x), param_dtype, [&](auto t, auto p) {
    launch_norm_bwd<decltype(t), decltype(p), false>(gpu, dx, dweight, nullptr, dy, x, weight, nullptr, rstd, M, N);
  });
  return {dx, dweight};
}

GK_REGISTER(m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd_cuda));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_gradients));
}

}  // namespace gk
