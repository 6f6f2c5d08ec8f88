// What a warp and a block do together: barriers, and operations of all lanes, which the last lane to come does for all.
#include "model.h"

#include <cmath>
#include <vector>

namespace gk::sim {

// ---- the rendezvous of a warp: the last lane to come does the work for all ----
template <class Operation>
static void rendezvous(const char* operation, void* mine, const Operation& work, uint32_t mask = ~0u) {
  Warp& warp = *running->warp;
  if (mask != ~0u) stop(operation, ": mask ", mask, " is not the whole warp's, which is all that the model knows");
  if (warp.arrived && std::strcmp(warp.operation, operation) != 0)
    stop("is at ", operation, " while other lanes of its warp are at ", warp.operation);
  warp.operation = operation;
  warp.posted[running->lane] = mine;
  if (++warp.arrived < lanes) {
    block_at(State::at_warp, operation);
    schedule();
    return;
  }
  warp.arrived = 0;
  if (dials.count) count_pending(warp);
  work(warp.posted);
  for (int l = 0; l < lanes; l++) make_ready(fibers[running->number / lanes * lanes + l]);
  if (dials.seed >= 2) schedule();  // another warp may come first
}

void yield() {
  if (dials.seed >= 2) schedule();
}

// Of all warp operations only this one orders memory (PTX ISA, bar.warp.sync).
void sync_warp(uint32_t mask) {
  TSAN(__tsan_release(running->warp);)
  rendezvous("__syncwarp", nullptr, [](void**) {}, mask);
  TSAN(__tsan_acquire(running->warp);)
}

static Barrier& arrive(unsigned id, unsigned expected) {
  if (id >= max_barriers) stop("barrier ", id, ": there are ", max_barriers);
  if (expected == 0 || expected % lanes || int(expected) > threads)
    stop("barrier ", id, ": ", expected, " threads, of a block of ", threads, " in whole warps");
  Barrier& b = barriers[id];
  if (b.arrived && b.expected != expected)
    stop("barrier ", id, ": for ", expected, " threads here, ", b.expected, " elsewhere");
  b.expected = expected;
  TSAN(__tsan_release(&b);)
  if (++b.arrived == expected) {
    b.arrived = 0, b.generation++;
    for (int t = 0; t < threads; t++)
      if (fibers[t]->state == State::at_barrier && fibers[t]->barrier == int(id)) make_ready(fibers[t]);
  }
  return b;
}

void barrier_arrive(unsigned id, unsigned expected) { arrive(id, expected); }

void barrier_sync(unsigned id, unsigned expected) {
  const uint64_t generation = id < max_barriers ? barriers[id].generation : 0;
  Barrier& b = arrive(id, expected);
  if (b.generation == generation) {
    running->barrier = int(id);
    block_at(State::at_barrier, "barrier");
    schedule();
  } else if (dials.seed) {
    schedule();
  }
  TSAN(__tsan_acquire(&b);)
}

uint32_t shuffle(Shuffle how, uint32_t value, int operand, uint32_t mask) {
  struct Lane {
    uint32_t in, out;
    int operand;
    Shuffle how;
  } mine{value, 0, operand, how};
  const char* const names[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.bfly"};
  rendezvous(names[int(how)], &mine, [](void** posted) {
    for (int l = 0; l < lanes; l++) {
      Lane& lane = *(Lane*)posted[l];
      int from = lane.how == Shuffle::index  ? lane.operand
                 : lane.how == Shuffle::xor_ ? l ^ lane.operand
                 : lane.how == Shuffle::up   ? l - lane.operand
                                             : l + lane.operand;
      if (lane.how == Shuffle::index) from &= lanes - 1;
      lane.out = ((Lane*)posted[from >= 0 && from < lanes ? from : l])->in;
    }
  }, mask);
  return mine.out;
}

uint32_t ballot(bool predicate, uint32_t mask) {
  struct Lane {
    bool in;
    uint32_t out;
  } mine{predicate, 0};
  rendezvous("vote", &mine, [](void** posted) {
    uint32_t bits = 0;
    for (int l = 0; l < lanes; l++) bits |= uint32_t(((Lane*)posted[l])->in) << l;
    for (int l = 0; l < lanes; l++) ((Lane*)posted[l])->out = bits;
  }, mask);
  return mine.out;
}

// Lane l gives the address of row l % 8 of matrix l / 8. Lane l gets from matrix m its row l / 4, elements 2 (l % 4) and
// the next; transposed, its column l / 4.
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed) {
  struct Lane {
    uint32_t* out;
    const uint16_t* row;
    int matrices;
    bool transposed;
  };
  Lane mine{registers, (const uint16_t*)row, matrices, transposed};
  if (running->lane < matrices * 8) {
    if (!in_shared(row)) stop("ldmatrix: ", row, " is not in shared memory");
    check_access(row, 16);
    TSAN(__tsan_read_range((void*)row, 16);)
  }
  const char* const names[] = {"", "ldmatrix.x1", "ldmatrix.x2", "", "ldmatrix.x4"};
  rendezvous(names[matrices], &mine, [](void** posted) {
    const int count = ((Lane*)posted[0])->matrices;
    counters->ldmatrix++;
    uint32_t out[4][lanes];
    for (int m = 0; m < count; m++) {
      const auto row_of = [&](int r) { return ((Lane*)posted[m * 8 + r])->row; };
      for (int l = 0; l < lanes; l++) {
        const int r = l / 4, c = l % 4 * 2;
        out[m][l] = ((Lane*)posted[l])->transposed ? row_of(c)[r] | uint32_t(row_of(c + 1)[r]) << 16
                                                   : row_of(r)[c] | uint32_t(row_of(r)[c + 1]) << 16;
      }
      if (dials.count) {
        uintptr_t address[lanes] = {};
        for (int r = 0; r < 8; r++) address[r] = (uintptr_t)row_of(r);
        count_shared(address, 0xFF, 16);
      }
    }
    for (int l = 0; l < lanes; l++)
      for (int m = 0; m < count; m++) ((Lane*)posted[l])->out[m] = out[m][l];
  });
}

// ---- matrix products ----

// by hand: not every compiler has the type
float from_f16(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023, sign = uint32_t(bits >> 15) << 31;
  float value = exponent ? std::ldexp(1024.f + mantissa, int(exponent) - 25) : std::ldexp(float(mantissa), -24);
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (exponent == 31) word = 0x7F800000 | (mantissa ? 0x400000 | mantissa << 13 : 0);
  word |= sign;
  std::memcpy(&value, &word, 4);
  return value;
}
uint16_t to_f16(float value) {  // to nearest, ties to even
  uint32_t word, small;
  std::memcpy(&word, &value, 4);
  const uint32_t sign = word >> 16 & 0x8000, a = word & 0x7FFFFFFF;
  if (a > 0x7F800000) return uint16_t(sign | 0x7E00 | (a >> 13 & 0x3FF));
  if (a >= 0x47800000) return uint16_t(sign | 0x7C00);
  if (a >= 0x38800000) return uint16_t(sign | (a - (112u << 23) + 0xFFF + (a >> 13 & 1)) >> 13);
  const float shifted = std::fabs(value) + 0.5f;  // the step of float16's denormals
  std::memcpy(&small, &shifted, 4);
  return uint16_t(sign | (small - 0x3F000000));
}

static const float* f16_table() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; i++) t[i] = from_f16(uint16_t(i));
    return t;
  }();
  return table.data();
}

// Fragments of the PTX ISA: with group g = lane / 4 and t = lane % 4, register r of A holds row g + 8 (r % 2) and of B
// column g, at k = 2 t + 8 (r / 2) or 2 t + 8 r and the next (16 bits), k = t + 4 (r / 2) or t + 4 r (tf32);
// element e of C and D is at row g + 8 (e / 2), column 2 t + e % 2.
void mma(Mma type, float* d, const uint32_t* a, const uint32_t* b) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
    Mma type;
  } mine{d, a, b, type};
  const char* const names[] = {"mma.m16n8k16.bf16", "mma.m16n8k16.f16", "mma.m16n8k8.tf32"};
  rendezvous(names[int(type)], &mine, [](void** posted) {
    counters->mma++;
    const Mma type = ((Lane*)posted[0])->type;
    const int K = type == Mma::tf32 ? 8 : 16;
    const float* half = type == Mma::f16 ? f16_table() : nullptr;
    float A[16][16], B[16][8], D[16][8];
    const auto put = [&](uint32_t bits, float& low, float& high) {
      low = half ? half[bits & 0xFFFF] : __uint_as_float(bits << 16);
      high = half ? half[bits >> 16] : __uint_as_float(bits & 0xFFFF0000);
    };
    const auto tf32 = [](uint32_t bits) { return __uint_as_float(bits & 0xFFFFE000); };  // the unit reads no further
    for (int l = 0; l < lanes; l++) {
      const Lane& lane = *(Lane*)posted[l];
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; r++) {
        float* row = A[g + r % 2 * 8];
        if (K == 16) put(lane.a[r], row[2 * t + r / 2 * 8], row[2 * t + r / 2 * 8 + 1]);
        else row[t + r / 2 * 4] = tf32(lane.a[r]);
      }
      for (int r = 0; r < 2; r++) {
        if (K == 16) put(lane.b[r], B[2 * t + r * 8][g], B[2 * t + r * 8 + 1][g]);
        else B[t + r * 4][g] = tf32(lane.b[r]);
      }
      for (int e = 0; e < 4; e++) D[g + e / 2 * 8][2 * t + e % 2] = lane.d[e];
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < K; k++)
        for (int j = 0; j < 8; j++) D[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < lanes; l++)
      for (int e = 0; e < 4; e++) ((Lane*)posted[l])->d[e] = D[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
  });
}

}  // namespace gk::sim
