// Dropout's random state, read from the op's arguments. The generator itself: philox.h.
#pragma once
#include "launch.h"

namespace gk {

struct Philox {
  uint32_t drop_below = 0;  // a 16-bit value below it is dropped; 0: no dropout
  double keep_scale = 1;    // 1 / (1 - p), p a multiple of 1 / 65536
  uint32_t seed[2] = {}, offset = 0;
};

inline Philox philox_of(const char* op, const OptTensor& rng_state, double dropout_p) {
  Philox philox;
  GK_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), got ", dropout_p);
  if (dropout_p == 0) return philox;
  GK_CHECK(rng_state, op, ": dropout_p = ", dropout_p, " needs rng_state, an int64 tensor (seed, offset)");
  check_cpu(op, "rng_state", *rng_state), check_dtype(op, "rng_state", *rng_state, ScalarType::Long);
  GK_CHECK(rng_state->dim() == 1 && rng_state->size(0) == 2, op, ": rng_state must have shape (2,), got ",
           shape_text(*rng_state));
  const int64_t* state = (const int64_t*)rng_state->const_data_ptr();
  const uint64_t seed = state[0], offset = state[rng_state->stride(0)];
  philox.seed[0] = (uint32_t)seed, philox.seed[1] = (uint32_t)(seed >> 32), philox.offset = (uint32_t)offset;
  philox.drop_below = (uint32_t)std::min<int64_t>((int64_t)(dropout_p * 65536 + 0.5), 65535);
  philox.keep_scale = 1 / (1 - philox.drop_below / 65536.0);
  return philox;
}

}  // namespace gk
