// SiLU and GELU: what gelu.cu and glu.cu share.
#pragma once
#include "common.cuh"

namespace gk {

// All are v s(v). silu: s = 1 / (1 + e), e = e^-v. The tanh form of gelu: s = (1 + tanh u) / 2 = 1 / (1 + e), e = e^-2u, 2u = v (a
// + b v^2): one exponential, and no cancellation where tanh u is close to -1. The erf form: s is the normal distribution's.
constexpr float log2_e = 1.4426950408889634f, gelu_a = 1.5957691216057308f /* 2 sqrt(2/pi) */, gelu_b = gelu_a * 0.044715f;
template <Act act> GK_DEVICE float act_exp(float v) {  // e
  if constexpr (act == Act::silu) return ex2_approx(v * -log2_e);
  else return ex2_approx(v * (-gelu_a * log2_e - gelu_b * log2_e * v * v));
}
GK_DEVICE float normal_cdf(float v) { return 0.5f * erfcf(v * -0.70710678f); }

template <Act act> GK_DEVICE float act_value(float v) {
  if constexpr (act == Act::gelu) return v * normal_cdf(v);
  else return v * rcp_approx(1.f + act_exp<act>(v));
}

// s, and the derivative of v s
template <Act act> GK_DEVICE float act_slope(float v, float& s) {
  if constexpr (act == Act::gelu) {
    s = normal_cdf(v);
    return s + v * ex2_approx(-0.5f * log2_e * v * v) * 0.39894228f;  // 1 / sqrt(2 pi)
  } else {
    // p = s(|v|), q = 1 - p without the subtraction, which what follows would magnify; s(v) is one of them
    const float e = act_exp<act>(fabsf(v)), p = rcp_approx(1.f + e), q = e * p;
    s = v < 0.f ? q : p;
    if constexpr (act == Act::silu) return s + v * p * q;
    else return s + v * p * q * (gelu_a + 3.f * gelu_b * fminf(v * v, 1e30f));  // 0 times inf is none
  }
}

// f(constant)
template <class F> void with_act(int64_t act, const F& f) {
  switch (Act(act)) {
    case Act::silu: return f(std::integral_constant<Act, Act::silu>{});
    case Act::gelu_tanh: return f(std::integral_constant<Act, Act::gelu_tanh>{});
    default: return f(std::integral_constant<Act, Act::gelu>{});
  }
}

}  // namespace gk
