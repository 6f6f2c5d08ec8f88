// cube on NVIDIA GPUs. The op: gpt_kernels/ops/cube.py.
#include "../args/cube.h"
#include "common.cuh"

namespace gk {

template <class T> __global__ void cube_kernel(T* y, const T* dy, const T* x, int64_t n) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n) return;
  const float v = to_float(x[at]);
  y[at] = from_float<T>(dy ? 3.f * (v * to_float(dy[at])) * v : v * v * v);
}

static Tensor run(const Tensor& x, const OptTensor& dy) {
  const Gpu gpu(x);
  Tensor y = new_like(x);
  with_dtype(dtype_of(x), [&](auto t) {
    using T = decltype(t);
    launch(GK_KERNEL(cube_kernel<T>), unsigned(cdiv(x.numel(), 256)), 256, 0, gpu.stream, out<T>(y), data<T>(dy), data<T>(x),
           x.numel());
  });
  return y;
}

static Tensor cube_fwd_cuda(const Tensor& x) {
  check_input("cube_fwd", "x", x);
  return run(x, {});
}

static Tensor cube_bwd_cuda(const Tensor& dy, const Tensor& x) {
  cube_bwd_args("cube_bwd", dy, x);
  return run(x, dy);
}

GK_REGISTER(m) {
  m.impl("cube_fwd", TORCH_BOX(&cube_fwd_cuda));
  m.impl("cube_bwd", TORCH_BOX(&cube_bwd_cuda));
}

}  // namespace gk
