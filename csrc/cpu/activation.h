// SiLU and GELU on vectors: what gelu and glu share. Per target, after vec.h; T is the storage, C the arithmetic.
namespace GK_TARGET {
namespace {

using gk::Act;

// All are y = v s(v). silu: s = 1 / (1 + e), e = e^-v. The tanh form of gelu: s = (1 + tanh u) / 2 = 1 / (1 + e), e = e^-2u, 2u =
// v (a + b v^2): one exponential, and no cancellation where tanh u is close to -1. The erf form: s is the normal distribution's.
template <class C> constexpr C gelu_a = (C)1.5957691216057307117597842397375;  // 2 sqrt(2/pi)
template <class C> constexpr C gelu_b = gelu_a<C> * (C)0.044715;
// of v^2, so that v^3 times a factor that is 0 there stays 0 for every finite v
template <class C> constexpr C gelu_far = (C)1e30;
// 9e-5 is a 23rd of what rounding to bf16 may cost
template <class T> constexpr int act_degree = __is_same(T, bf16) ? 3 : exp_degree<T>;
template <class C> constexpr C log2_e = (C)1.4426950408889634073599246810019;
template <class T, Act act, class C, class V> GK_INLINE V act_exp(V v) {  // e
  if constexpr (act == Act::silu) return exp2<T, act_degree<T>>(v * -log2_e<C>);
  else return exp2<T, act_degree<T>>(v * (-gelu_a<C> * log2_e<C> - gelu_b<C> * log2_e<C> * (v * v)));
}
template <class T, class C, class V> GK_INLINE V gelu_gauss(V v) { return exp2<T, act_degree<T>>((C)-0.5 * log2_e<C> * v * v); }
template <class T, class C, class V> GK_INLINE V normal_cdf(V v, V gauss) {
  const V tail = normal_tail<T>(v, gauss);
  return v < 0 ? tail : 1 - tail;
}

template <class T, Act act, class C = compute_t<T>> GK_INLINE vec<C> act_factor(vec<C> v) {  // s
  if constexpr (act == Act::gelu) return normal_cdf<T, C>(v, gelu_gauss<T, C>(v));
  else return reciprocal<T>((C)1 + act_exp<T, act, C>(v));
}

// s, and y's derivative: s + s (1 - s) v for silu, s + s (1 - s) v (a + 3 b v^2), s + v e^(-v^2/2) / sqrt(2 pi)
template <class T, Act act, class C = compute_t<T>> GK_INLINE vec<C> act_slope(vec<C> v, vec<C>& s) {
  if constexpr (act == Act::gelu) {
    const vec<C> gauss = gelu_gauss<T, C>(v);
    s = normal_cdf<T, C>(v, gauss);
    return s + v * gauss * (C)0.39894228040143267793994605993438;  // 1 / sqrt(2 pi)
  } else {
    // q = 1 - s as e s, without the subtraction, which what follows would magnify; 1 where that is inf * 0, a NaN
    const vec<C> e = act_exp<T, act, C>(v);
    s = reciprocal<T>((C)1 + e);
    const vec<C> q = vmin(e * s, splat<C>(1));
    if constexpr (act == Act::silu) return s + s * q * v;
    else return s + s * q * v * (gelu_a<C> + 3 * gelu_b<C> * vmin(v * v, splat<C>(gelu_far<C>)));
  }
}

}  // namespace
}  // namespace GK_TARGET
