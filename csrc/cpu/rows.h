// Walks over rows in vectors: whole ones, then what is left of the row. Per target, after vec.h.
namespace GK_TARGET {
namespace {

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
// A line of the output, 64 bytes of one vector or, in 16 bits, of two (of fewer bytes with shorter vectors): past the cache, if
// it `streams` (launch.h: row_streams), so that the line is not read before it is written. p is then on a boundary of 64 bytes.
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
// The last pass over a row of n elements: y[i] ... = body(i, count). 16-bit elements by two vectors, which are narrowed
// together.
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
// The same of two rows at once: body(i, count, first, second).
template <class T, class Body> GK_INLINE void write_two_rows(T* y, T* z, int64_t n, bool streams, const Body& body) {
  constexpr int64_t L = lanes<compute_t<T>>;
  int64_t i = 0;
  vec<compute_t<T>> a, b;
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * L <= n; i += 2 * L) {
      vf a2, b2;
      body(i, L, a, b), body(i + L, L, a2, b2);
      put(y + i, a, a2, streams), put(z + i, b, b2, streams);
    }
  else
    for (; i + L <= n; i += L) body(i, L, a, b), put(y + i, a, streams), put(z + i, b, streams);
  for (; i < n; i += L) {
    const int64_t count = n - i < L ? n - i : L;
    body(i, count, a, b);
    store_any(y + i, a, count), store_any(z + i, b, count);
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

}  // namespace
}  // namespace GK_TARGET
