// Philox4x32-7 (Salmon et al. 2011), per target, after vec.h. One call gives four 32-bit words, that is eight 16-bit
// values, to eight neighbouring columns; the mask is a function of (seed, offset) and the element's place alone, the
// same on every backend. The specification: gpt_kernels/ops/philox.py.

namespace GK_TARGET {
namespace {

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

// v where its 16-bit word is not below `limit`, 0 elsewhere
GK_INLINE vf keep_from(vf v, vh words, uint16_t limit) {
#if GK_X86_TARGETS && GK_BYTES == 64
  return (vf)_mm512_maskz_mov_ps(_mm256_cmpge_epu16_mask((__m256i)words, _mm256_set1_epi16(limit)), (__m512)v);
#else
  return __builtin_convertvector(words, vi) >= limit ? v : vf{};
#endif
}

GK_INLINE vu lane_index() {
  vu lane;
  for (int i = 0; i < lanes<float>; i++) lane[i] = i;
  return lane;
}

// The values of one vector of column groups, eight to each lane, in order: out[8 * lanes], of which only the first `groups`
// groups are written. Counter: (group, row, plane, offset), key: seed.
//
// Products of 32-bit words are 64 bits wide: the lanes are worked on in two halves, a word in the low part of each 64 bits,
// what is left of a product above it. Which lane stands where is chosen such that the words come together in order at the end.
GK_INLINE void philox_groups(uint16_t* out, int64_t groups, vu group, vu row, uint32_t plane, const gk::Philox& philox) {
  constexpr int W = lanes<float>;
  uint64_t words[2 * W];
  for (int half = 0; half < 2; half++) {
    vu place;
    for (int i = 0; i < W; i++) place[i] = half * (W / 2) + i / 2 % 2 * (W / 4) + i / 4;
    vq c0 = bits_as<vq>(permute(group, place)), c1 = bits_as<vq>(permute(row, place)), c2 = vq{} + plane,
       c3 = vq{} + philox.offset;
    uint32_t k0 = philox.seed[0], k1 = philox.seed[1];
    for (int round = 0; round < 7; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const vq p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
      c0 = exclusive_or(p1 >> 32, c1, vq{} + k0), c1 = p1, c2 = exclusive_or(p0 >> 32, c3, vq{} + k1), c3 = p0;
    }
    const vq first = (c0 & 0xffffffffu) | c1 << 32, second = (c2 & 0xffffffffu) | c3 << 32;
    vq low, high;
    for (int i = 0; i < W / 2; i++) low[i] = i / 2 * 2 + i % 2 * (W / 2), high[i] = low[i] + 1;
    const vq even = permute(first, second, low), odd = permute(first, second, high);
    __builtin_memcpy(words + half * W, &even, sizeof even);
    __builtin_memcpy(words + half * W + W / 2, &odd, sizeof odd);
  }
  if (groups >= W) __builtin_memcpy(out, words, sizeof words);
  else __builtin_memcpy(out, words, groups * 16);
}

// v where its random value is kept, 0 where dropped
GK_INLINE vf drop(vf v, const uint16_t* random, const gk::Philox& philox) {
  vh h;
  __builtin_memcpy(&h, random, sizeof h);
  return keep_from(v, h, (uint16_t)philox.drop_below);
}
GK_INLINE vd drop(vd v, const uint16_t* random, const gk::Philox& philox) {
  for (int i = 0; i < lanes<double>; i++) v[i] = random[i] >= philox.drop_below ? v[i] : 0;
  return v;
}

}  // namespace
}  // namespace GK_TARGET
