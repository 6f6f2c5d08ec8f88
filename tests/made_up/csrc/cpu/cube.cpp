// cube on the CPU. The op: gpt_kernels/ops/cube.py.
#ifndef GK_TARGET

#include "launch.h"
#include "../args/cube.h"
#define GK_FILE "cube.cpp"
#include "foreach_target.h"

namespace gk {

static Tensor cube_fwd_cpu(const Tensor& x) {
  check_input("cube_fwd", "x", x);
  Tensor y = new_like(x);
  with_dtype(dtype_of(x), [&](auto tag) {
    using T = decltype(tag);
    GK_BEST(cube_row<T>)((T*)y.mutable_data_ptr(), nullptr, (const T*)x.const_data_ptr(), x.numel());
  });
  return y;
}

static Tensor cube_bwd_cpu(const Tensor& dy, const Tensor& x) {
  cube_bwd_args("cube_bwd", dy, x);
  Tensor dx = new_like(x);
  with_dtype(dtype_of(x), [&](auto tag) {
    using T = decltype(tag);
    GK_BEST(cube_row<T>)
    ((T*)dx.mutable_data_ptr(), (const T*)dy.const_data_ptr(), (const T*)x.const_data_ptr(), x.numel());
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) {
  m.impl("cube_fwd", TORCH_BOX(&cube_fwd_cpu));
  m.impl("cube_bwd", TORCH_BOX(&cube_bwd_cpu));
}

}  // namespace gk

#else  // kernel

#include "vec.h"

namespace GK_TARGET {

template <class T> GK_KERNEL void cube_row(T* y, const T* dy, const T* x, int64_t n) {
  typedef compute_t<T> C;
  write_row(y, n, false, [&](int64_t j, int64_t m) {
    vec<C> v = load_any(x + j, m);
    return dy ? v * load_any(dy + j, m) * (C)3 * v : v * v * v;
  });
}

}  // namespace GK_TARGET
#endif
