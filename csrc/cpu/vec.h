// Vectors of float or double, GK_BYTES wide: load, store, 16-bit conversion; rows.h walks over rows of them, arithmetic.h has
// exp, tanh, reductions. Included once per target, inside no namespace, after GK_TARGET is set. Intrinsics appear in these and
// nowhere else; everything else is GCC's vector extension, so the same source serves SSE2, AVX2, AVX-512 and other
// architectures.

#if GK_X86_TARGETS
#include <immintrin.h>
#endif

namespace GK_TARGET {
namespace {

using gk::bf16;
using gk::compute_t;
using gk::f16;

#define GK_INLINE inline __attribute__((always_inline))
// before a kernel: a body given to for_vectors below is called from several places, and becomes one function with its vectors
// in memory where it is not inlined into each
#define GK_KERNEL __attribute__((flatten)) static

typedef float vf __attribute__((vector_size(GK_BYTES)));
typedef double vd __attribute__((vector_size(GK_BYTES)));
typedef int32_t vi __attribute__((vector_size(GK_BYTES)));
typedef uint32_t vu __attribute__((vector_size(GK_BYTES)));
typedef uint16_t vh __attribute__((vector_size(GK_BYTES / 2)));  // the storage of one vf in 16 bits
typedef uint8_t vb __attribute__((vector_size(GK_BYTES / 4)));  // one byte for each lane of a vf

template <class C> struct vec_of { typedef vf type; };
template <> struct vec_of<double> { typedef vd type; };
template <class C> using vec = typename vec_of<C>::type;
template <class C> constexpr int lanes = GK_BYTES / sizeof(C);

template <class C> GK_INLINE vec<C> splat(C x) { return x - vec<C>{}; }
template <class To, class From> GK_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

// v's lanes, or those of a and then b, in the order that `from` tells
#ifdef __clang__  // has no such builtin, and makes one instruction of the loop
template <class V, class I> GK_INLINE V permute(V a, V b, I from) {
  constexpr int n = sizeof a / sizeof a[0];
  V to;
  for (int i = 0; i < n; i++) to[i] = (int)from[i] < n ? a[from[i]] : b[from[i] - n];
  return to;
}
template <class V, class I> GK_INLINE V permute(V v, I from) { return permute(v, v, from); }
#else
template <class V, class I> GK_INLINE V permute(V v, I from) { return __builtin_shuffle(v, from); }
template <class V, class I> GK_INLINE V permute(V a, V b, I from) { return __builtin_shuffle(a, b, from); }
#endif

// ---- load and store: T in memory, compute_t<T> in registers ----

GK_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
GK_INLINE vd load(const double* p) {
  vd v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
GK_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
GK_INLINE void store(double* p, vd v) { __builtin_memcpy(p, &v, sizeof v); }

// a 16-bit word to the upper half of a 32-bit one: by a permutation one instruction, not a conversion and a shift
#if GK_X86_TARGETS && GK_BYTES == 64
GK_INLINE vf widen(vh h) {
  const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3,
                                         3, 2, 2, 1, 1, 0, 0);
  return (vf)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, twice, _mm512_castsi256_si512((__m256i)h));
}
#else
GK_INLINE vf widen(vh h) { return bits_as<vf>(__builtin_convertvector(h, vu) << 16); }
#endif
#ifdef GK_BF16
GK_INLINE vh narrow(vf v) { return (vh)_mm512_cvtneps_pbh((__m512)v); }  // what is below 2^-126 becomes 0
// two float vectors to 32 bf16 in order
GK_INLINE vi narrow_pair(vf first, vf second) { return (vi)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
#else
GK_INLINE vh narrow(vf v) {  // round to nearest, ties to even; NaN stays a NaN
  const vu u = bits_as<vu>(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (u >> 16) | 0x40, vh);
}
#endif
GK_INLINE vf load(const bf16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}
GK_INLINE void store(bf16* p, vf v) {
  const vh h = narrow(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// maskz with all lanes kept: without it GCC 12 warns of an uninitialised value in its own header
#if GK_X86_TARGETS && GK_BYTES == 64
GK_INLINE vf load(const f16* p) { return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)); }
GK_INLINE void store(f16* p, vf v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif GK_X86_TARGETS && GK_BYTES == 32
GK_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
GK_INLINE void store(f16* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
// by integers: not every compiler has a type of 16 bits, and denormals count whatever the processor is told of them
GK_INLINE vf load(const f16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  const vu u = __builtin_convertvector(h, vu), sign = (u & 0x8000) << 16, exponent = u & 0x7c00, rest = (u & 0x7fff) << 13;
  const vf small = __builtin_convertvector(bits_as<vi>(u & 0x3ff), vf) * 0x1p-24f;
  const vu quiet = (u & 0x7fff) > 0x7c00 ? vu{} + 0x400000 : vu{};
  const vu large = (exponent == 0x7c00 ? rest + (224u << 23) : rest + (112u << 23)) | quiet;
  return bits_as<vf>((exponent == 0 ? bits_as<vu>(small) : large) | sign);
}
GK_INLINE void store(f16* p, vf v) {  // to nearest, ties to even; NaN stays a NaN
  const vu u = bits_as<vu>(v), a = u & 0x7fffffff;
  const vu small = bits_as<vu>(bits_as<vf>(a) + 0.5f) - 0x3f000000;  // 0.5 has the step of float16's denormals
  const vu usual = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  const vu large = a > 0x7f800000 ? 0x7e00 | ((a >> 13) & 0x3ff) : vu{} + 0x7c00;
  const vu all = a >= 0x47800000 ? large : a >= 0x38800000 ? usual : small;
  const vh h = __builtin_convertvector(all | ((u >> 16) & 0x8000), vh);
  __builtin_memcpy(p, &h, sizeof h);
}
#endif

// four vectors of neighbouring elements, in the order that costs least: for sums and maxima
template <class T> GK_INLINE void load_4(vec<compute_t<T>> (&v)[4], const T* p) {
#if GK_X86_TARGETS && GK_BYTES == 64
  if constexpr (__is_same(T, bf16)) {
    for (int k = 0; k < 4; k += 2) {
      vu two;
      __builtin_memcpy(&two, p + k * lanes<float>, sizeof two);
      v[k] = bits_as<vf>(two << 16), v[k + 1] = bits_as<vf>(two & 0xffff0000u);
    }
    return;
  }
#endif
  for (int k = 0; k < 4; k++) v[k] = load(p + k * lanes<compute_t<T>>);
}

// the first n lanes only (0 <= n < lanes); nothing beyond p[n-1] is touched, the other lanes become `fill`
template <class T> GK_INLINE vec<compute_t<T>> load_n(const T* p, int64_t n, compute_t<T> fill = 0) {
  typedef compute_t<T> C;
  T buffer[lanes<C>] = {};
  for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
  const vec<C> v = load(buffer);
  if (fill == 0) return v;
  C out[lanes<C>];
  store(out, v);
  for (int64_t i = n; i < lanes<C>; i++) out[i] = fill;
  return load(out);
}
template <class T> GK_INLINE void store_n(T* p, vec<compute_t<T>> v, int64_t n) {
  T buffer[lanes<compute_t<T>>];
  store(buffer, v);
  for (int64_t i = 0; i < n; i++) p[i] = buffer[i];
}
#if GK_X86_TARGETS && GK_BYTES == 64
GK_INLINE __mmask16 first(int64_t n) { return (__mmask16)((1u << n) - 1); }
GK_INLINE vf load_n(const float* p, int64_t n, float fill = 0) {
  return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p);
}
GK_INLINE void store_n(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
GK_INLINE vf load_n(const bf16* p, int64_t n, float fill = 0) {
  const vf v = widen((vh)_mm256_maskz_loadu_epi16(first(n), p));
  return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), (__m512)v);
}
GK_INLINE void store_n(bf16* p, vf v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), (__m256i)narrow(v)); }
GK_INLINE vf load_n(const f16* p, int64_t n, float fill = 0) {
  const __m512 v = _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(first(n), p));
  return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), v);
}
GK_INLINE void store_n(f16* p, vf v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph((__m512)v, 0)); }
#elif GK_X86_TARGETS && GK_BYTES == 32
GK_INLINE vi first(int64_t n) { return (vi){0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)n; }
GK_INLINE vf load_n(const float* p, int64_t n, float fill = 0) {
  return first(n) ? (vf)_mm256_maskload_ps(p, (__m256i)first(n)) : splat(fill);
}
GK_INLINE void store_n(float* p, vf v, int64_t n) { _mm256_maskstore_ps(p, (__m256i)first(n), (__m256)v); }
#endif

GK_INLINE float load_one(const float* p) { return *p; }
GK_INLINE double load_one(const double* p) { return *p; }
GK_INLINE float load_one(const bf16* p) { return bits_as<float>((uint32_t)p->bits << 16); }
#if GK_X86_TARGETS && GK_BYTES >= 32
GK_INLINE float load_one(const f16* p) { return _cvtsh_ss(p->bits); }
#else
GK_INLINE float load_one(const f16* p) {
  f16 lane[lanes<float>] = {*p};
  return load(lane)[0];
}
#endif

// (a0 b0 a1 b1 ...) in two vectors
GK_INLINE void interleave(vu a, vu b, vu& first, vu& second) {
  vu low, high;
  for (int i = 0; i < lanes<float>; i++) {
    low[i] = i / 2 + (i % 2) * lanes<float>;
    high[i] = low[i] + lanes<float> / 2;
  }
  first = permute(a, b, low);
  second = permute(a, b, high);
}
// A square of 32-bit words, one row to a vector, to its transpose: each round interleaves row i with row i + half, and after
// log2(lanes) rounds every word has come to its place.
GK_INLINE void transpose(vu (&square)[lanes<float>]) {
  constexpr int n = lanes<float>;
  for (int round = 1; round < n; round *= 2) {
    vu next[n];
    for (int i = 0; i < n / 2; i++) interleave(square[i], square[i + n / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < n; i++) square[i] = next[i];
  }
}

#ifdef GK_BF16
// acc + a.low * b.low + a.high * b.high over pairs of bf16
GK_INLINE vf dot_pairs(vf acc, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
// one float vector to bf16, each in the low half of 32 bits
GK_INLINE vu bf16_bits(vf v) { return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#endif

}  // namespace
}  // namespace GK_TARGET

#include "rows.h"
#include "arithmetic.h"
