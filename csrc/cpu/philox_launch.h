// Dropout's random state, read from the op's arguments. The generator itself: philox.h.
#pragma once
#include "../args/checks.h"

namespace gk {

struct Philox : DropoutRate { uint32_t seed[2] = {}, offset = 0; };

inline Philox philox_of(const char* op, const OptTensor& rng_state, double dropout_p) {
  Philox philox = {check_dropout(op, rng_state, dropout_p)};
  if (!philox.drop_below) return philox;
  const int64_t* state = (const int64_t*)rng_state->const_data_ptr();
  const uint64_t seed = state[0], offset = state[rng_state->stride(0)];
  philox.seed[0] = (uint32_t)seed, philox.seed[1] = (uint32_t)(seed >> 32), philox.offset = (uint32_t)offset;
  return philox;
}

}  // namespace gk
