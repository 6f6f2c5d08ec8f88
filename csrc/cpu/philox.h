// Philox4x32-10 (Salmon et al. 2011), per target, after vec.h. One call gives four 32-bit words, that is eight 16-bit
// values, to eight neighbouring columns; the mask is a function of (seed, offset) and the element's place alone, the
// same on every backend. The specification: gpt_kernels/ops/philox.py.

namespace GK_TARGET {
namespace {

GK_INLINE vu lane_index() {
  vu lane;
  for (int i = 0; i < lanes<float>; i++) lane[i] = i;
  return lane;
}

// The values of one vector of column groups, eight to each lane, in order: out[8 * lanes], of which only the first
// `groups` groups are written. Counter: (group, row, plane, offset), key: seed.
GK_INLINE void philox_groups(uint16_t* out, int64_t groups, vu group, vu row, uint32_t plane, const gk::Philox& philox) {
  vu c0 = group, c1 = row, c2 = vu{} + plane, c3 = vu{} + philox.offset;
  uint32_t k0 = philox.seed[0], k1 = philox.seed[1];
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    vu high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
  }
  // a group's four words side by side in memory: two rounds of interleaving
  vu a0, a1, b0, b1, words[4];
  interleave(c0, c2, a0, a1), interleave(c1, c3, b0, b1);
  interleave(a0, b0, words[0], words[1]), interleave(a1, b1, words[2], words[3]);
  if (groups >= lanes<float>) __builtin_memcpy(out, words, sizeof words);
  else __builtin_memcpy(out, words, groups * 16);
}

// v where its random value is kept, 0 where dropped
GK_INLINE vf drop(vf v, const uint16_t* random, const gk::Philox& philox) {
  vh h;
  __builtin_memcpy(&h, random, sizeof h);
  return __builtin_convertvector(h, vi) >= (int32_t)philox.drop_below ? v : vf{};
}
GK_INLINE vd drop(vd v, const uint16_t* random, const gk::Philox& philox) {
  for (int i = 0; i < lanes<double>; i++) v[i] = random[i] >= philox.drop_below ? v[i] : 0;
  return v;
}

}  // namespace
}  // namespace GK_TARGET
