// The second stage of every sum over rows: partials, one per chunk, added in chunk order. Per target, after vec.h.
namespace GK_TARGET {

// Squares of a row with elements from 1e19 on are infinite in float. Statistics of such a row are taken of it times this, an
// exact factor, after the first attempt: of everything else nothing is asked but a comparison.
template <class C> constexpr C shrunk = sizeof(C) == 4 ? (C)0x1p-80 : (C)0x1p-600;
template <class C> GK_INLINE bool is_finite(C x) { return x - x == 0; }

// out[i] = sum over c of partial[c * stride + i], i < N
template <class P, class C = compute_t<P>>
GK_KERNEL void sum_partials(P* out, const C* partial, int64_t chunks, int64_t stride, int64_t N) {
  for_vectors<C>(N, [&](int64_t i, int64_t n) {
    vec<C> sum = {};
    for (int64_t c = 0; c < chunks; c++) sum += load_any(partial + c * stride + i, n);
    store_any(out + i, sum, n);
  });
}

}  // namespace GK_TARGET
