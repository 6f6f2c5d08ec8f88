// Kernels that exercise the model itself, most of them with a fault that it must find. Called by test_sim.py through ctypes.
#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/sim/face.h"

#include <stdexcept>
#include <string>

namespace gk {

// What may be wrong with `gemm`, and must be seen.
enum Fault { none, wait_too_lax, no_barrier_after_wait, no_barrier_before_refill, swapped_accumulators };

// C[32, 8] = A[32, K] B[8, K]^T by two warps that share B; both tiles double-buffered.
__global__ void gemm(float* C, const uint16_t* A, const uint16_t* B, int K, Fault fault) {
  GK_SHARED(uint16_t, tile_a, [2][32 * 16]);
  GK_SHARED(uint16_t, tile_b, [2][8 * 16]);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  const auto fetch = [&](int stage, int k) {
    cp_async_16(&tile_a[stage][t * 8], A + t / 2 * K + k + t % 2 * 8);
    if (t < 16) cp_async_16(&tile_b[stage][t * 8], B + t / 2 * K + k + t % 2 * 8);
  };
  float d[4] = {};
  fetch(0, 0), cp_async_commit();
  for (int k = 0; k < K; k += 16) {
    const int stage = k / 16 % 2;
    if (k + 16 < K) fetch(stage ^ 1, k + 16);
    cp_async_commit();
    if (fault == wait_too_lax && k + 16 < K) cp_async_wait<2>();
    else cp_async_wait<1>();
    if (fault != no_barrier_after_wait) __syncthreads();
    uint32_t a[4], b[2];
    ldmatrix_x4(a, &tile_a[stage][(warp * 16 + lane % 16) * 16 + lane / 16 * 8]);
    ldmatrix_x2(b, &tile_b[stage][lane % 8 * 16 + lane / 8 % 2 * 8]);
    mma_m16n8k16_bf16(d, a, b);
    if (fault != no_barrier_before_refill) __syncthreads();
  }
  const int swap = fault == swapped_accumulators;
  float* c = C + (warp * 16 + lane / 4) * 8 + lane % 4 * 2;
  c[0] = d[0], c[1] = d[1 + swap], c[64] = d[2 - swap], c[65] = d[3];
}

// One product of each kind, every lane's registers given.
__global__ void probe_mma(float* d, const uint32_t* a, const uint32_t* b, int type) {
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; i++) ra[i] = a[lane * 4 + i], rd[i] = d[lane * 4 + i];
  for (int i = 0; i < 2; i++) rb[i] = b[lane * 2 + i];
  if (type == 0) mma_m16n8k16_bf16(rd, ra, rb);
  else if (type == 1) mma_m16n8k16_f16(rd, ra, rb);
  else mma_m16n8k8_tf32(rd, ra, rb);
  for (int i = 0; i < 4; i++) d[lane * 4 + i] = rd[i];
}

// out[lane][4]: what ldmatrix gives of four 8x8 matrices, one after the other in memory
__global__ void probe_ldmatrix(uint32_t* out, const uint16_t* in, int count, int transposed) {
  GK_SHARED(uint16_t, tile, [4 * 64]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i] = in[i];
  warp_sync();
  uint32_t r[4] = {}, pair[2] = {};
  const uint16_t* row = &tile[lane * 8];
  if (count == 1) transposed ? ldmatrix_x1_trans(r[0], row) : ldmatrix_x1(r[0], row);
  if (count == 2) transposed ? ldmatrix_x2_trans(pair, row) : ldmatrix_x2(pair, row), r[0] = pair[0], r[1] = pair[1];
  if (count == 4) transposed ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = r[i];
}

// Shuffles and votes: out[lane][6]
__global__ void probe_warp(uint32_t* out) {
  const uint32_t lane = threadIdx.x;
  out += lane * 6;
  out[0] = shfl_xor(lane, 5), out[1] = shfl_down(lane, 3), out[2] = shfl_up(lane, 3), out[3] = shfl_index(lane, 35);
  out[4] = ballot(lane % 3 == 0), out[5] = warp_any(lane == 7) + 2 * warp_all(lane < 31) + 4 * warp_all(true);
}

// Copies of every size with `valid` bytes of it, the rest zero: out[3][16] bytes
__global__ void probe_cp_async(uint8_t* out, const uint8_t* in, int valid4, int valid8, int valid16) {
  GK_SHARED(uint8_t, to, [3][16]);
  if (threadIdx.x == 0) {
    cp_async_4(to[0], in, valid4), cp_async_8(to[1], in, valid8), cp_async_16(to[2], in, valid16);
    cp_async_commit(), cp_async_wait<0>();
    for (int i = 0; i < 48; i++) out[i] = to[i / 16][i % 16];
  }
}

// One warp fills a buffer for the others, handed over by two named barriers.
__global__ void producer_consumer(int* out, int rounds) {
  GK_SHARED(int, buffer, [32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, threads = blockDim.x;
  for (int i = 0; i < rounds; i++) {
    if (warp == 0) {
      if (i) barrier_sync(2, threads);  // read by all
      buffer[lane] = i * 100 + lane;
      barrier_arrive(1, threads);
    } else {
      barrier_sync(1, threads);
      out[(warp - 1) * 32 + lane] += buffer[31 - lane];
      if (i + 1 < rounds) barrier_arrive(2, threads);
    }
  }
}

// The last block to arrive adds what all blocks left.
__global__ void last_block_sums(int* out, int* partial, uint32_t* arrived, int ordered) {
  GK_SHARED(int, last, [1]);
  const int t = threadIdx.x;
  if (t == 0) partial[blockIdx.x] = int(blockIdx.x) + 1;
  if (ordered) __syncthreads();
  if (t == 0) last[0] = (ordered ? atomic_add_acq_rel(arrived, 1u) : blockIdx.x) == gridDim.x - 1;
  __syncthreads();
  if (!last[0]) return;
  if (t == 0)
    for (unsigned b = 0; b < gridDim.x; b++) out[0] += partial[b];
}

// Reads of shared memory `stride` words apart: the bank conflicts are known.
__global__ void banks(float* out, int stride) {
  GK_SHARED(float, words, [32 * 33]);
  for (int i = threadIdx.x; i < 32 * 33; i += 32) words[i] = float(i);
  warp_sync();
  out[threadIdx.x] = words[threadIdx.x * stride];
}

__global__ void wrong(float* p, int what) {
  GK_SHARED(float, words, [64]);
  GK_DYNAMIC_SHARED(bytes);
  const int t = threadIdx.x;
  switch (what) {
    case 0:
      if (t < 32) __syncthreads();
      break;                        // the other warp never comes
    case 1:
      if (t % 32 < 16) p[t] = shfl_xor(p[t], 1);
      break;          // half a warp
    case 2: t % 2 ? (void)shfl_xor(1u, 1) : warp_sync(); break;        // two operations at once
    case 3: p[t] = words[64 + t]; break;                               // past the end
    case 4: store_16(p + 1, make_uint4(0, 0, 0, 0)); break;            // not a multiple of 16 bytes
    case 5: cp_async_16(words, p), cp_async_commit(); break;           // never waited for
    case 6: cp_async_16(words, p + 2); break;                          // misaligned source
    case 7: barrier_sync(1, t < 32 ? 64 : 32); break;                  // no agreement on the count
    case 8: p[t] = words[t]; break;                                    // read before written: NaN
    case 9: words[t] = float(t), p[t] = words[t ^ 1]; break;           // no barrier between lanes
    case 10: p[t] = *reinterpret_cast<float*>(bytes + 256 + 4 * t); break;  // past the end
    case 11: {
      uint32_t r;
      ldmatrix_x1(r, bytes + 2 * (t % 8));
      break;
    }  // misaligned row
    case 12:
      if (t == 40) __trap();
      break;
    default: break;
  }
}

// a kernel for each test: what was asked for stays
template <int which> __global__ void declares(float* p) {
  GK_SHARED(float, words, [64]);
  words[threadIdx.x % 64] = 1, p[threadIdx.x] = 1;
}

}  // namespace gk

static std::string report;
template <class F> static const char* reporting(const F& f) {
  try {
    return f(), nullptr;
  } catch (const std::exception& e) { return (report = e.what()).c_str(); }
}

#define GK_TEST(name, kernel, grid, block, ...)                                                         \
  extern "C" __attribute__((visibility("default"))) const char* name {                                  \
    return reporting([&] { gk::launch(GK_KERNEL(gk::kernel), grid, block, 0, nullptr, __VA_ARGS__); }); \
  }
GK_TEST(test_gemm(float* C, const uint16_t* A, const uint16_t* B, int K, gk::Fault fault), gemm, 1, 64, C, A, B, K, fault)
GK_TEST(test_mma(float* d, const uint32_t* a, const uint32_t* b, int type), probe_mma, 1, 32, d, a, b, type)
GK_TEST(test_ldmatrix(uint32_t* out, const uint16_t* in, int count, int trans), probe_ldmatrix, 1, 32, out, in, count, trans)
GK_TEST(test_warp(uint32_t* out), probe_warp, 1, 32, out)
GK_TEST(test_cp_async(uint8_t* out, const uint8_t* in, int a, int b, int c), probe_cp_async, 1, 32, out, in, a, b, c)
GK_TEST(test_named(int* out, int rounds, int warps), producer_consumer, 1, 32 * warps, out, rounds)
GK_TEST(test_last(int* out, int* partial, uint32_t* arrived, int blocks, int ordered), last_block_sums, blocks, 64, out,
        partial, arrived, ordered)
GK_TEST(test_banks(float* out, int stride), banks, 1, 32, out, stride)
GK_TEST(test_wrong(float* p, int what), wrong, 1, 64, p, what)

// A launch of any size of a kernel that declares 256 bytes, through the launcher or, where `which` is 0, as the runtime meets one
// that never asked.
extern "C" __attribute__((visibility("default"))) const char* test_size(int which, unsigned x, unsigned y, unsigned z,
                                                                        unsigned threads, size_t shared) {
  static float memory[1024], *const out = memory;
  const dim3 grid(x, y, z);
  return reporting([&] {
    switch (which) {
      case 1: return gk::launch(GK_KERNEL(gk::declares<1>), grid, threads, shared, nullptr, out);
      case 2: return gk::launch(GK_KERNEL(gk::declares<2>), grid, threads, shared, nullptr, out);
      case 3: return gk::launch(GK_KERNEL(gk::declares<3>), grid, threads, shared, nullptr, out);
      case 4: return gk::launch(GK_KERNEL(gk::declares<4>), grid, threads, shared, nullptr, out);
    }
    gk::sim::Call call{"declares<0>", [](void*) { gk::declares<0>(out); }, nullptr};
    void* args[] = {&call};
    const cudaError_t error = cudaLaunchKernel((const void*)&gk::declares<0>, grid, threads, args, shared, nullptr);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
  });
}
// for gemm.py, which runs without torch and pybind11 where a sanitizer's runtime is preloaded
extern "C" __attribute__((visibility("default"))) void test_seed(int64_t seed) { gk::sim::dials.seed = seed; }
