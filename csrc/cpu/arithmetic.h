// Arithmetic on vectors: reductions, exp, tanh, the normal distribution. Per target, after vec.h and rows.h.
namespace GK_TARGET {
namespace {

// A product with its own rounding, where a difference must come out as 0: the compiler would fuse the two. (GCC's
// __builtin_assoc_barrier does the same, one element after another.)
template <class V> GK_INLINE V rounded(V product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// A NaN in b survives. One instruction of the kind; GCC makes a comparison and a masked move of the expression.
template <class V> GK_INLINE V vmax(V a, V b) { return a > b ? a : b; }
template <class V> GK_INLINE V vmin(V a, V b) { return a < b ? a : b; }
#if GK_X86_TARGETS && GK_BYTES == 64
GK_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
GK_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif GK_X86_TARGETS && GK_BYTES == 32
GK_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
GK_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#endif
GK_INLINE vf vabs(vf x) { return bits_as<vf>(bits_as<vi>(x) & 0x7fffffff); }
GK_INLINE vd vabs(vd x) { return x < 0 ? -x : x; }

// Sums and maxima over lanes, as a tree of fixed shape. By shuffles: halves stored and read back at another place make the
// processor wait for its own stores, which costs more than all the rest of a row of a thousand elements.
template <int apart, class V, class Join> GK_INLINE V join_lanes(V v, const Join& join) {
  if constexpr (apart > 0) {
    decltype(v < v) other;
    for (int i = 0; i < (int)(sizeof v / sizeof v[0]); i++) other[i] = i ^ apart;
    return join_lanes<apart / 2>(join(v, permute(v, other)), join);
  }
  return v;
}
struct Sum {
  template <class V> GK_INLINE V operator()(V a, V b) const { return a + b; }
};
struct Max {
  template <class V> GK_INLINE V operator()(V a, V b) const { return vmax(a, b); }
};
template <class C> GK_INLINE C hsum(vec<C> v) { return join_lanes<lanes<C> / 2>(v, Sum())[0]; }
template <class C> GK_INLINE C hsum4(const vec<C>* v) { return hsum<C>((v[0] + v[1]) + (v[2] + v[3])); }
template <class V> GK_INLINE V max_of_4(const V* v) { return vmax(vmax(v[0], v[1]), vmax(v[2], v[3])); }
template <class C> GK_INLINE C hmax(vec<C> v) { return join_lanes<lanes<C> / 2>(v, Max())[0]; }

// 2^x and e^x: n + r = x or x log2(e) with n an integer and 0 <= r <= 1 (LOG L105), then 2^r as a polynomial times 2^n. The
// polynomial is 1 at 0; of degree 6 it is off by 2e-9 of the result, of 5 by 8e-8, of 4, for what is stored in 16 bits, by
// 3e-6, of 3 by 9e-5. Results run from the subnormals to inf; NaN stays NaN.
template <class T> constexpr int exp_degree = sizeof(T) == 2 ? 4 : 6;
GK_INLINE vf floor_of(vf x) {
#if GK_X86_TARGETS && GK_BYTES == 64
  return (vf)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, 9);
#elif GK_X86_TARGETS && GK_BYTES == 32
  return (vf)_mm256_floor_ps((__m256)x);
#else
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: its last bit is worth 1
  return (x - 0.5f + magic) - magic;   // of an integer it may be the one below: r is then 1
#endif
}
template <int degree> GK_INLINE vf exp2_fraction(vf r) {
  constexpr float c[4][6] = {{6.95116787e-1f, 2.27644991e-1f, 7.70670425e-2f},
                             {6.93044845e-1f, 2.41280206e-1f, 5.22424715e-2f, 1.34266856e-2f},
                             {6.93151312e-1f, 2.40164446e-1f, 5.57999222e-2f, 9.01702204e-3f, 1.86713273e-3f},
                             {6.93147045e-1f, 2.40229299e-1f, 5.54853056e-2f, 9.67541439e-3f, 1.24680486e-3f, 2.16126801e-4f}};
  vf y = splat(c[degree - 3][degree - 1]);
  for (int i = degree - 1; i > 0; i--) y = y * r + c[degree - 3][i - 1];
  return y * r + 1.f;
}
template <int degree> GK_INLINE vf exp2_of_parts(vf n, vf r) {
  const vf y = exp2_fraction<degree>(r);
#if GK_X86_TARGETS && GK_BYTES == 64
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)n);  // 2^floor(n)
#else
  // two factors, since 2^n itself may be below the smallest or above the largest float
  const vi k = __builtin_convertvector(n == n ? n : splat(0.f), vi), half = k >> 1;
  return y * bits_as<vf>((half + 127) << 23) * bits_as<vf>((k - half + 127) << 23);
#endif
}
template <class T = float, int degree = exp_degree<T>> GK_INLINE vf exp2(vf x) {
#if GK_X86_TARGETS && GK_BYTES == 64
  return exp2_of_parts<degree>(x, (vf)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 9));  // r = x - floor(x), 0 of an infinity
#else
  x = vmin(splat(130.f), vmax(splat(-152.f), x));
  const vf n = floor_of(x);
  return exp2_of_parts<degree>(n, x - n);
#endif
}
GK_INLINE vf exp(vf x) {
  // r = (x - n ln2) log2(e), ln2 in two parts: x log2(e) - n alone would lose the last bits of a large x
  x = vmin(splat(90.f), vmax(splat(-105.f), x));
  const vf n = floor_of(x * 1.44269504f);
  return exp2_of_parts<6>(n, ((x - n * 0.693359375f) + n * 2.12194440e-4f) * 1.44269504f);
}
#if GK_X86_TARGETS && GK_BYTES == 64
// 2^(j/32), its bits less j << 18: with j + 32 n, shifted by 18, added, they are those of 2^(n + j/32)
alignas(64) constexpr uint32_t exp2_32nds[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
#endif
// e^x for x <= 80 as softmax needs it, a maximum taken off: without exp2's care for results beyond the range, n is added to the
// exponent, and what is below e^-87 becomes 0 (of a 16-bit T it may stay). From degree 5 on, with 512 bits: x log2(e) is n +
// j/32 + r/32 with -0.5 <= r <= 0.5, 2^(j/32) a permutation of two registers, and two terms in r are left (off by 5e-8; LOG
// L128). Multiplications and comparisons share two of a Zen 4's four vector units; permutations have others.
template <class T = float, int degree = exp_degree<T>> GK_INLINE vf exp_limited(vf x) {
#if GK_X86_TARGETS && GK_BYTES == 64
  if constexpr (degree < 5) return exp2<T, degree>(x * 1.44269504f);
  const vf magic = splat(12582912.f);  // its last bit is worth 1: n and j, as a float and as an integer
  const vf shifted = x * (32 * 1.44269504f) + magic, r = x * (32 * 1.44269504f) - (shifted - magic);
  const vi table =
      (vi)_mm512_permutex2var_epi32(_mm512_load_si512(exp2_32nds), (__m512i)shifted, _mm512_load_si512(exp2_32nds + 16));
  const vf y = bits_as<vf>(table + (bits_as<vi>(shifted) << 18));
  const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.f), _CMP_NLE_UQ);  // NaN, too
  return (vf)_mm512_maskz_fmadd_ps(seen, (__m512)y, (__m512)(r * (r * 0.000234596184f + 0.0216611661f)), (__m512)y);
#else
  const vf n = floor_of(x * 1.44269504f);
  const vi power = __builtin_convertvector(n, vi) << 23;
  const vf y = exp2_fraction<degree>(x * 1.44269504f - n);
  return x <= -87.3365f ? vf{} : bits_as<vf>(bits_as<vi>(y) + power);  // NaN stays
#endif
}
// A sum of e^(x - origin) with the first few elements' maximum for origin keeps float's accuracy up to this far below the true
// maximum, so that maximum and sum take one pass.
template <class C> constexpr C far_above = 8;
// 1 / x; to 6e-5 for a result that is stored as bf16
template <class T = float> GK_INLINE vf reciprocal(vf x) {
#if GK_X86_TARGETS && GK_BYTES == 64
  if constexpr (__is_same(T, bf16)) return (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
#endif
  return 1.f / x;
}
// tanh: an odd polynomial below 0.625 (keeps relative accuracy near 0), 1 - 2 / (e^2|x| + 1) above
GK_INLINE vf tanh(vf x) {
  const vf a = vabs(x), s = x * x;
  vf p = splat(-5.65713518437e-3f);
  p = p * s + 2.05881914546e-2f;
  p = p * s - 5.37201076566e-2f;
  p = p * s + 1.33311140557e-1f;
  p = p * s - 3.33332598629e-1f;
  p = p * s * x + x;
  const vf t = 1.f - 2.f / (exp(2.f * a) + 1.f);
  const vf large = bits_as<vf>(bits_as<vi>(t) | (bits_as<vi>(x) & (int32_t)0x80000000));
  return a < 0.625f ? p : large;
}

// The standard normal distribution's tail beyond |x|, given gauss = exp(-x^2 / 2), which the derivative needs as well: erfc(|x|
// / sqrt 2) / 2 = gauss t P(t), t = 1 / (1 + c |x|) (Abramowitz and Stegun 7.1.26 is of this form), P fitted to an absolute
// error of 3e-8, for a result that is stored as bf16 to a relative one of 5e-5.
template <class T = float> GK_INLINE vf normal_tail(vf x, vf gauss) {
  vf p, t;
  if constexpr (__is_same(T, bf16)) {
    t = reciprocal<T>(1.f + 0.255f * vabs(x));
    p = splat(2.044265922e-1f);
    p = p * t - 4.613928200e-2f;
    p = p * t + 1.475232786e-1f;
    p = p * t + 9.177932461e-2f;
    p = p * t + 1.024337114e-1f;
  } else {
    t = reciprocal<T>(1.f + 0.5f * vabs(x));
    p = splat(-4.795330753e-2f);
    p = p * t + 2.306086126e-1f;
    p = p * t - 3.939418775e-1f;
    p = p * t + 1.838505251e-1f;
    p = p * t + 1.293441268e-1f;
    p = p * t + 1.980829209e-1f;
    p = p * t + 2.000089698e-1f;
  }
  return p * t * gauss;
}
template <class T = double> GK_INLINE vd normal_tail(vd x, vd) {
  for (int i = 0; i < lanes<double>; i++) x[i] = 0.5 * __builtin_erfc(__builtin_fabs(x[i]) * 0.70710678118654752440);
  return x;
}

// float64 serves gradient checks, not speed: lane by lane through libm
#define GK_LANEWISE(name, function)                                \
  GK_INLINE vd name(vd x) {                                        \
    for (int i = 0; i < lanes<double>; i++) x[i] = function(x[i]); \
    return x;                                                      \
  }
template <class T = double, int = 6> GK_LANEWISE(exp2, __builtin_exp2)
GK_LANEWISE(exp, __builtin_exp)
GK_LANEWISE(tanh, __builtin_tanh)
#undef GK_LANEWISE
template <class T = double, int = 6> GK_INLINE vd exp_limited(vd x) { return exp(x); }
template <class T = double> GK_INLINE vd reciprocal(vd x) { return 1 / x; }

GK_INLINE float sqrt_of(float x) { return __builtin_sqrtf(x); }
GK_INLINE double sqrt_of(double x) { return __builtin_sqrt(x); }
GK_INLINE float log_of(float x) { return __builtin_logf(x); }
GK_INLINE double log_of(double x) { return __builtin_log(x); }

}  // namespace
}  // namespace GK_TARGET
