// Every PTX instruction that the kernels use, one wrapper each, after the PTX ISA 9.0, whose sections are named; no inline
// assembly elsewhere. Compiled by nvcc they are that instruction; compiled as C++ with GK_SIM, what csrc/sim does.
#pragma once
#include <cstdint>

#ifdef GK_SIM
#include "../sim/sim.h"
#define GK_PTX(simulated, ...) simulated
#define GK_PURE(simulated, ...) simulated
// Shared memory of a block: GK_SHARED(float, tile, [4][32]) declares `tile`; dynamic memory is bytes at 16-byte alignment
// (a multiple of 128).
#define GK_SHARED(type, name, extents)                                     \
  auto& name = ::gk::sim::shared_array<type extents>([]() -> const void* { \
    static char key;                                                       \
    return &key;                                                           \
  }())
#define GK_DYNAMIC_SHARED(name) unsigned char* const name = ::gk::sim::dynamic_shared()
#else
#define GK_PTX(simulated, ...) asm volatile(__VA_ARGS__)
#define GK_PURE(simulated, ...) asm(__VA_ARGS__)  // its outputs follow from its inputs: the compiler may move or drop it
#define GK_SHARED(type, name, extents) __shared__ __align__(16) type name extents
#define GK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif
#define GK_DEVICE __device__ __forceinline__

namespace gk {

constexpr unsigned full_mask = 0xFFFFFFFFu;

#ifndef GK_SIM
GK_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#endif

// No instruction, but afterwards the compiler does not know where the value comes from. It is for loops. Without it ptxas and
// nvcc's optimiser see that everything derived from the value (the address of each row, of each chunk) is the same or evenly
// spaced in every iteration, compute all of it once before the loop and hold it in registers throughout: dozens of them, in
// kernels that have none left, so that accumulators are spilled. And a pointer that advances by one addition is turned back
// into base + row * stride, a 64-bit multiplication for each row. After opaque(x) all of that is computed where it is used.
template <class T> GK_DEVICE void opaque(T*& p) { GK_PURE((void)p, "" : "+l"(p)); }
GK_DEVICE void opaque(int64_t& x) { GK_PTX((void)x, "" : "+l"(x)); }
GK_DEVICE void opaque(int& x) { GK_PTX((void)x, "" : "+r"(x)); }

// ---- 16 bytes of global or shared memory, where the pointer stands on a multiple of 16 ----
#ifdef GK_SIM
GK_DEVICE uint4 load_16(const void* p) { return sim::load<uint4>(p); }
GK_DEVICE void store_16(void* p, uint4 v) { sim::store(p, v); }
#else
GK_DEVICE uint4 load_16(const void* p) { return *static_cast<const uint4*>(p); }
GK_DEVICE void store_16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
#endif
// global memory, with a word on caching ("Data Movement and Conversion: ld", "st")
// read by nobody else: past L1. Not ld.global.nc, which is undefined where the same launch writes, as a gradient in place does.
GK_DEVICE uint4 load_16_once(const void* p) {
  uint4 v;
  GK_PTX(v = sim::load<uint4>(p), "ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z),
         "=r"(v.w) : "l"(p));
  return v;
}

// ---- asynchronous copies to shared memory ("Non-bulk copy: cp.async", ".commit_group", ".wait_group") ----
// `valid` bytes are read, the rest of the destination becomes zero; with valid = 0 nothing is read.
GK_DEVICE void cp_async_4(void* shared, const void* global, int valid = 4) {
  GK_PTX(sim::cp_async(shared, global, 4, valid), "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
         "l"(global), "r"(valid) : "memory");
}
GK_DEVICE void cp_async_8(void* shared, const void* global, int valid = 8) {
  GK_PTX(sim::cp_async(shared, global, 8, valid), "cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
         "l"(global), "r"(valid) : "memory");
}
GK_DEVICE void cp_async_16(void* shared, const void* global) {
  GK_PTX(sim::cp_async(shared, global, 16, 16),
         "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
GK_DEVICE void cp_async_16(void* shared, const void* global, int valid) {
  GK_PTX(sim::cp_async(shared, global, 16, valid),
         "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
         "r"(valid) : "memory");
}
GK_DEVICE void cp_async_commit() { GK_PTX(sim::cp_async_commit(), "cp.async.commit_group;" :: : "memory"); }
// All but the youngest `pending` groups of this thread have landed, for this thread: others need a barrier after it.
template <int pending> GK_DEVICE void cp_async_wait() {
  GK_PTX(sim::cp_async_wait(pending), "cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- matrices ("Warp-level matrix load: ldmatrix", "Multiply-and-accumulate: mma", "Matrix fragments for mma.m16n8k16",
// "... mma.m16n8k8") ----
// Lane l gives the address of row l % 8 of 8x8 matrix l / 8 and gets row l / 4, elements 2 (l % 4) and the next, of each;
// with _trans, column l / 4. Rows are 16 bytes at 16-byte alignment.
GK_DEVICE void ldmatrix_x1(uint32_t& r0, const void* row) {
  GK_PTX(sim::ldmatrix(&r0, row, 1, false),
         "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r0) : "r"(shared_address(row)) : "memory");
}
GK_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  GK_PTX(sim::ldmatrix(r, row, 2, false), "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
         "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
GK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  GK_PTX(sim::ldmatrix(r, row, 4, false), "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
         "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
GK_DEVICE void ldmatrix_x1_trans(uint32_t& r0, const void* row) {
  GK_PTX(sim::ldmatrix(&r0, row, 1, true),
         "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r0) : "r"(shared_address(row)) : "memory");
}
GK_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  GK_PTX(sim::ldmatrix(r, row, 2, true), "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
         "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
GK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  GK_PTX(sim::ldmatrix(r, row, 4, true), "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
         "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// d += a b. With g = lane / 4, t = lane % 4: d[e] is row g + 8 (e / 2), column 2 t + e % 2. 16 bits: a[r] holds row g + 8 (r %
// 2), k = 2 t + 8 (r / 2) and the next; b[r] column g, k = 2 t + 8 r and the next. tf32: k = t + 4 (r / 2) and t + 4 r.
#define GK_MMA(name, simulated, ptx)                                                                                          \
  GK_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                                        \
    GK_PTX(sim::mma(simulated, d, a, b), ptx " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]), \
           "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));            \
  }
GK_MMA(mma_m16n8k16_bf16, sim::Mma::bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
GK_MMA(mma_m16n8k16_f16, sim::Mma::f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
GK_MMA(mma_m16n8k8_tf32, sim::Mma::tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef GK_MMA

// ---- conversions, to nearest even ("Data Movement and Conversion: cvt") ----
// two floats to a pair of 16-bit values, `low` in the lower half
GK_DEVICE uint32_t cvt_bf16x2(float low, float high) {
#ifdef GK_SIM
  const auto round = [](float x) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7FFFu : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
#else
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#endif
}
GK_DEVICE uint32_t cvt_f16x2(float low, float high) {
  uint32_t r;
  GK_PURE(r = sim::to_f16(low) | uint32_t(sim::to_f16(high)) << 16, "cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high),
          "f"(low));
  return r;
}
GK_DEVICE float cvt_f32_f16(uint16_t bits) {
  float r;
  GK_PURE(r = sim::from_f16(bits), "cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}
// to the nearest tf32, ties away from zero, as a register of mma_m16n8k8_tf32
GK_DEVICE uint32_t cvt_tf32(float x) {
  uint32_t r;
  GK_PURE(r = (x != x ? 0x7FFFFFFFu : (__float_as_uint(x) + 0x1000) & 0xFFFFE000),
          "cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// ---- approximate functions ("Floating Point: ex2", "lg2", "rcp"): relative error about 2^-22 ----
// Subnormals count as 0. The simulator computes them to the last bit.
GK_DEVICE float ex2_approx(float x) {
  float r;
  GK_PURE(r = std::exp2(x), "ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
GK_DEVICE float rcp_approx(float x) {
  float r;
  GK_PURE(r = 1 / x, "rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// ---- the warp ("shfl.sync", "vote.sync", "bar.warp.sync"): always all 32 lanes ----
#define GK_SHUFFLE(name, how, ptx, clamp)                                                              \
  GK_DEVICE uint32_t name(uint32_t value, int operand) {                                               \
    uint32_t r;                                                                                        \
    GK_PTX(r = sim::shuffle(sim::Shuffle::how, value, operand, full_mask),                             \
           ptx " %0, %1, %2, " clamp ", 0xffffffff;" : "=r"(r) : "r"(value), "r"(operand) : "memory"); \
    return r;                                                                                          \
  }                                                                                                    \
  GK_DEVICE float name(float value, int operand) { return __uint_as_float(name(__float_as_uint(value), operand)); }
GK_SHUFFLE(shfl_index, index, "shfl.sync.idx.b32", "0x1f")
GK_SHUFFLE(shfl_xor, xor_, "shfl.sync.bfly.b32", "0x1f")
GK_SHUFFLE(shfl_up, up, "shfl.sync.up.b32", "0x0")
GK_SHUFFLE(shfl_down, down, "shfl.sync.down.b32", "0x1f")
#undef GK_SHUFFLE
GK_DEVICE uint32_t ballot(bool predicate) {
#ifdef GK_SIM
  return sim::ballot(predicate, full_mask);
#else
  return __ballot_sync(full_mask, predicate);
#endif
}
GK_DEVICE bool warp_any(bool predicate) { return ballot(predicate) != 0; }
GK_DEVICE bool warp_all(bool predicate) { return ballot(predicate) == full_mask; }
// orders the warp's memory accesses, which shuffles, votes, ldmatrix and mma do not
GK_DEVICE void warp_sync() { GK_PTX(sim::sync_warp(full_mask), "bar.warp.sync 0xffffffff;" :: : "memory"); }

// ---- the block ("Parallel Synchronization: barrier"): 16 barriers, 0 is __syncthreads'; `threads` counts those that sync and
// those that arrive ----
GK_DEVICE void barrier_sync(unsigned id, unsigned threads) {
  GK_PTX(sim::barrier_sync(id, threads), "barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
GK_DEVICE void barrier_arrive(unsigned id, unsigned threads) {
  GK_PTX(sim::barrier_arrive(id, threads), "barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- between blocks ("atom", "red", "ld.acquire", "st.release"; order: "Memory Consistency Model") ----
// Counts arrivals: a block that gets count - 1 sees what all before it wrote (after a __syncthreads on both sides).
GK_DEVICE uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t value) {
  uint32_t r;
  GK_PTX(r = sim::atomic_add(p, value), "atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(r) : "l"(p),
         "r"(value) : "memory");
  return r;
}

}  // namespace gk
