// What the CPU's and the GPU's launchers have in common beside torch: storage types, the switch from a dtype to a C++ type, the
// numbers of dropout.
#pragma once
#include "torch.h"

#ifdef __CUDACC__
#define GK_BOTH __host__ __device__
#else
#define GK_BOTH
#endif

namespace gk {

// 16-bit storage; arithmetic is float: kernels convert on load and store.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// f(T{}) with the C++ type of a dtype that check_input() has accepted.
template <class F> inline void with_dtype(ScalarType t, const F& f) {
  switch (t) {
    case ScalarType::Float: return f(float{});
#ifndef GK_CUDA
    case ScalarType::Double: return f(double{});
#endif
    case ScalarType::BFloat16: return f(bf16{});
    default: return f(f16{});
  }
}

// The activations that kernels have, by the numbers that ops give them (gpt_kernels/ops/glu.py).
enum class Act { silu, gelu_tanh, gelu };

// A 16-bit random value below drop_below is dropped, so that p is a multiple of 1 / 65536; what is kept is scaled.
struct DropoutRate {
  uint32_t drop_below = 0;  // 0: no dropout
  double keep_scale = 1;  // 1 / (1 - p)
  DropoutRate(double dropout_p = 0)
      : drop_below(uint32_t(std::min<int64_t>(int64_t(dropout_p * 65536 + 0.5), 65535))),
        keep_scale(1 / (1 - drop_below / 65536.0)) {}
};

}  // namespace gk
