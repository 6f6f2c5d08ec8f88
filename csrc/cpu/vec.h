// Vectors of float or double, GK_BYTES wide: load, store, 16-bit conversion, exp, tanh, reductions. Included once per
// target, inside no namespace, after GK_TARGET is set. Intrinsics appear here and nowhere else; everything else is
// GCC's vector extension, so the same source serves SSE2, AVX2, AVX-512 and other architectures.

#if GK_X86_TARGETS
#include <immintrin.h>
#endif

namespace GK_TARGET {
namespace {

using gk::bf16;
using gk::compute_t;
using gk::f16;

#define GK_INLINE inline __attribute__((always_inline))
// before a kernel: a body given to for_vectors below is called from several places, and becomes one function with its vectors in
// memory where it is not inlined into each
#define GK_KERNEL __attribute__((flatten)) static

typedef float vf __attribute__((vector_size(GK_BYTES)));
typedef double vd __attribute__((vector_size(GK_BYTES)));
typedef int32_t vi __attribute__((vector_size(GK_BYTES)));
typedef uint32_t vu __attribute__((vector_size(GK_BYTES)));
typedef uint16_t vh __attribute__((vector_size(GK_BYTES / 2)));  // the storage of one vf in 16 bits
typedef uint8_t vb __attribute__((vector_size(GK_BYTES / 4)));   // one byte for each lane of a vf

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

// Walks a row of n elements in vectors: body(i, count) with count == lanes<C>, then once with the rest.
// load_any and store_any take that count, so a loop body is written once for full and partial vectors.
template <class T> GK_INLINE vec<compute_t<T>> load_any(const T* p, int64_t count, compute_t<T> fill = 0) {
  return count == lanes<compute_t<T>> ? load(p) : load_n(p, count, fill);
}
template <class T> GK_INLINE void store_any(T* p, vec<compute_t<T>> v, int64_t count) {
  if (count == lanes<compute_t<T>>) store(p, v);
  else store_n(p, v, count);
}
// A load of what a loop will need in a while: the next row into L2, from the last pass over a row, which runs from L1 while the
// memory would be idle; and where a core alone does not ask for enough at a time, 4 KB from here at least. Any address will do.
GK_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
template <class T> constexpr int64_t far_ahead = 4096 / sizeof(T);
template <class T> GK_INLINE int64_t next_row(int64_t N) { return N > far_ahead<T> ? N : far_ahead<T>; }
// A line of the output, 64 bytes of one vector or, in 16 bits, of two (of fewer bytes with shorter vectors): past the cache, if it
// `streams` (launch.h: row_streams), so that the line is not read before it is written. p is then on a boundary of 64 bytes.
template <class T> GK_INLINE void put(T* p, vec<compute_t<T>> v, [[maybe_unused]] bool streams) {
#if GK_X86_TARGETS && GK_BYTES == 64
  if (streams) return _mm512_stream_ps((float*)p, (__m512)v);
#endif
  store(p, v);
}
template <class T> GK_INLINE void put(T* p, vf first, vf second, [[maybe_unused]] bool streams) {
#ifdef GK_BF16
  if constexpr (__is_same(T, bf16)) {
    const vi both = narrow_pair(first, second);
    return streams ? _mm512_stream_si512((__m512i*)p, (__m512i)both) : _mm512_storeu_si512(p, (__m512i)both);
  }
#endif
#if GK_X86_TARGETS && GK_BYTES == 64
  if (streams) {
    T half[lanes<float>];
    store(half, first), _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((__m256i*)half));
    store(half, second), _mm256_stream_si256((__m256i*)p + 1, _mm256_loadu_si256((__m256i*)half));
    return;
  }
#endif
  store(p, first), store(p + lanes<float>, second);
}

template <class C, class Body> GK_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) body(i, (int64_t)lanes<C>);
  if (i < n) body(i, n - i);
}
// the same in turns of 4, body(i, count, k) with k = 0 1 2 3 known to the compiler: four accumulators hide the latency of
// adding to one
template <class C, class Body> GK_INLINE void for_vectors_by_4(int64_t n, const Body& body) {
  constexpr int64_t L = lanes<C>;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) body(i, L, 0), body(i + L, L, 1), body(i + 2 * L, L, 2), body(i + 3 * L, L, 3);
  for (; i + L <= n; i += L) body(i, L, 0);
  if (i < n) body(i, n - i, 1);
}
// The last pass over a row of n elements: y[i] ... = body(i, count). 16-bit elements by two vectors, which are narrowed together.
template <class T, class Body> GK_INLINE void write_row(T* y, int64_t n, bool streams, const Body& body) {
  constexpr int64_t L = lanes<compute_t<T>>;
  int64_t i = 0;
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * L <= n; i += 2 * L) {
      const vf first = body(i, L);
      put(y + i, first, body(i + L, L), streams);
    }
  else
    for (; i + L <= n; i += L) put(y + i, body(i, L), streams);
  for (; i < n; i += L) {  // what is less than a line, not past the cache, where it would be half a line
    const int64_t count = n - i < L ? n - i : L;
    store_any(y + i, body(i, count), count);
  }
}
// `fill` in the lanes from `count` on: for sums and maxima whose terms are not neutral for a zero input
template <class C> GK_INLINE vec<C> keep_first(vec<C> v, int64_t count, C fill = 0) {
  if (count == lanes<C>) return v;
  C out[lanes<C>];
  store(out, v);
  for (int64_t i = count; i < lanes<C>; i++) out[i] = fill;
  return load(out);
}
// bool elements as 0 or 1
template <class C> GK_INLINE vec<C> load_bools(const bool* p, int64_t count) {
  C out[lanes<C>] = {};
  for (int64_t i = 0; i < count; i++) out[i] = p[i];
  return load(out);
}
template <> GK_INLINE vf load_bools<float>(const bool* p, int64_t count) {
  vb b = {};
  if (count == lanes<float>) __builtin_memcpy(&b, p, sizeof b);
  else __builtin_memcpy(&b, p, count);
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
}

// ---- arithmetic ----

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

// 2^x and e^x: n + r = x or x log2(e) with n an integer and 0 <= r <= 1, then 2^r as a polynomial times 2^n. The polynomial is 1
// at 0; of degree 6 it is off by 2e-9 of the result, of 5 by 8e-8, of 4, for what is stored in 16 bits, by 3e-6, of 3 by 9e-5.
// Results run from the subnormals to inf; NaN stays NaN.
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
// exponent, and what is below e^-87 becomes 0 (of a 16-bit T it may stay). From degree 5 on, with 512 bits: x log2(e) is n + j/32 +
// r/32 with -0.5 <= r <= 0.5, 2^(j/32) a permutation of two registers, and two terms in r are left (off by 5e-8). Multiplications
// and comparisons share two of a Zen 4's four vector units; permutations have others.
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

// The standard normal distribution's tail beyond |x|, given gauss = exp(-x^2 / 2), which the derivative needs as well:
// erfc(|x| / sqrt 2) / 2 = gauss t P(t), t = 1 / (1 + c |x|) (Abramowitz and Stegun 7.1.26 is of this form), P fitted to an absolute
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

// ---- 32-bit integers: what Philox needs ----

typedef uint64_t vq __attribute__((vector_size(GK_BYTES)));

// the 64-bit products of m and the low halves of 64-bit lanes, whatever stands in the high ones
GK_INLINE vq multiply_low(vq a, uint32_t m) {
#if GK_X86_TARGETS && GK_BYTES == 64
  return (vq)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(m));
#elif GK_X86_TARGETS && GK_BYTES == 32
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * m;
#endif
}
GK_INLINE vq exclusive_or(vq a, vq b, vq c) {
#if GK_X86_TARGETS && GK_BYTES == 64
  return (vq)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}
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

// v where its 16-bit word is not below `limit`, 0 elsewhere
GK_INLINE vf keep_from(vf v, vh words, uint16_t limit) {
#if GK_X86_TARGETS && GK_BYTES == 64
  return (vf)_mm512_maskz_mov_ps(_mm256_cmpge_epu16_mask((__m256i)words, _mm256_set1_epi16(limit)), (__m512)v);
#else
  return __builtin_convertvector(words, vi) >= limit ? v : vf{};
#endif
}

#ifdef GK_BF16
// acc + a.low * b.low + a.high * b.high over pairs of bf16
GK_INLINE vf dot_pairs(vf acc, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
// one float vector to bf16, each in the low half of 32 bits
GK_INLINE vu bf16_bits(vf v) { return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#endif

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
