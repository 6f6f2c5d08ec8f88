// attention on NVIDIA GPUs, forward. The op: gpt_kernels/ops/attention.py. The backward: attention_bwd.cu.
//
// A block takes `rows` queries of one head and walks over the key blocks that they see, from the last to the first: S = Q K^T,
// the online softmax in registers, O += P V with P as it lies there. Keys and values stream through a ring of three tiles.
#include "attention.cuh"

namespace gk {

// ---- tiles: queries and keys of a block, its warps ----
struct ForwardTile {
  int rows, keys, warps;
  // queries, three tiles of keys or values; float32's probabilities; the bias, where there is one
  GK_BOTH constexpr int p_at(int D, int size) const { return (rows + 3 * keys) * D * size; }
  GK_BOTH constexpr int bias_at(int D, int size) const { return p_at(D, size) + (size == 4) * rows * keys * 4; }
  constexpr int shared_bytes(int D, int size, bool bias) const { return bias_at(D, size) + bias * rows * keys * 4; }
};
// By head dim and architecture; each fits the 99 KB of the smallest. ptxas for later ones keeps more in registers. What the
// launcher sees is sm_80's: it has the most keys, and the rest alike.
template <class T, int D, bool plain> GK_BOTH constexpr ForwardTile forward_tile(int arch = tile_arch) {
  if (sizeof(T) == 4) return D <= 64 ? ForwardTile{64, 32, 4} : D <= 128 ? ForwardTile{64, 16, 4} : ForwardTile{32, 16, 2};
  if (!plain) return D <= 128 ? ForwardTile{64, 64, 4} : ForwardTile{64, 16, 4};
  if (arch >= 100) return {128, D <= 80 ? 64 : 48, 4};
  return {128, D <= 64 ? 128 : D < 128 || arch < 90 ? 64 : 48, 4};
}

// ---- kernel ----

// One step of the online softmax: scores to probabilities, in place; the running maximum m and sum l (of the lane's columns),
// and by what the output so far shrinks. The difference comes before the factor where scores may be near the largest float.
template <bool plain, int M, int N>
GK_DEVICE void softmax_step(float (&score)[M][N][4], float (&m)[M][2], float (&l)[M][2], float (&shrink)[M][2], float rate) {
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float largest = m[i][half];
#pragma unroll
      for (int n = 0; n < N; n++) largest = fmaxf(largest, fmaxf(score[i][n][2 * half], score[i][n][2 * half + 1]));
      largest = fmaxf(largest, shfl_xor(largest, 1));
      largest = fmaxf(largest, shfl_xor(largest, 2));
      const float base = largest == -infinity ? 0.f : largest, start = base * rate;
      shrink[i][half] = ex2_approx(plain ? fmaf(m[i][half], rate, -start) : (m[i][half] - base) * rate);
      m[i][half] = largest;
      float sum = l[i][half] * shrink[i][half];
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          const float p = ex2_approx(plain ? fmaf(score[i][n][e], rate, -start) : (score[i][n][e] - base) * rate);
          score[i][n][e] = p, sum += p;
        }
      l[i][half] = sum;
    }
}

template <class T, int D, bool plain>
__global__ void __launch_bounds__(32 * forward_tile<T, D, plain>().warps, 2)
    attention_fwd(const __grid_constant__ AttentionArgs s, const __grid_constant__ Scores c, unsigned first_batch) {
  constexpr ForwardTile tile = forward_tile<T, D, plain>();
  constexpr int rows = tile.rows, keys = tile.keys, threads = 32 * tile.warps;
  constexpr int M = rows / tile.warps / 16, N = keys / 8, NO = D / 8;
  constexpr int q_bytes = rows * D * int(sizeof(T)), slot_bytes = keys * D * int(sizeof(T));
  [[maybe_unused]] constexpr int p_at = tile.p_at(D, sizeof(T));
  constexpr bool q_stays = sizeof(T) == 2 && M * (D / 4 + 4 * N + 4 * NO) <= 180;  // registers of Q, S and O
  GK_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp * 16 * M;
  [[maybe_unused]] const int bias_at = tile.bias_at(D, sizeof(T)) + warp_row * keys * 4;
  // the last rows see the most keys when causal: heavy blocks first, and blocks of a head side by side for L2
  const unsigned b = first_batch + blockIdx.z, h = blockIdx.y, hk = h / (unsigned(s.H) / unsigned(s.Hk));
  const int i0 = int(gridDim.x - 1 - blockIdx.x) * rows, last_row = (i0 + rows < c.Tq ? i0 + rows : c.Tq) - 1;

  const bool aligned = plain || c.aligned;
  const auto q = rows_of<const T>(s.q, b, h, s.D, aligned);
  const auto k = rows_of<const T>(s.k, b, hk, s.D, aligned), v = rows_of<const T>(s.v, b, hk, s.Dv, aligned);
  // key blocks that any row sees, and among them those that every row sees whole
  const int first = c.first_column(i0) / keys, end = (c.end_column(last_row) + keys - 1) / keys;
  const int whole_first = (c.first_column(last_row) + keys - 1) / keys, whole_end = c.end_column(i0) / keys;

  float o[M][NO][4], m[M][2], l[M][2];
  fill(o, 0.f);
#pragma unroll
  for (int i = 0; i < M; i++) m[i][0] = m[i][1] = -infinity, l[i][0] = l[i][1] = 0.f;

  // tile 2 n of the stream is K of the n-th key block (from the end), tile 2 n + 1 its V; tile i stands in slot i % 3
  int slot = q_bytes, used = q_bytes + 2 * slot_bytes;  // of the tile in use and of the one before
  const auto advance = [&] { used = slot, slot = slot == q_bytes + 2 * slot_bytes ? q_bytes : slot + slot_bytes; };
  const auto fetch = [&](auto tail, const Rows<const T>& from, int block, int at) {
    constexpr bool tails = !plain || decltype(tail)::value;
    if (block >= first) load_tile<T, D, keys, threads, plain, tails>(shared + at, from, block * keys, c.Tk);
    cp_async_commit();
  };

  uint32_t queries[q_stays ? D / 16 : 1][M][4];
  const auto step = [&](int block, bool masked) {
    // the oldest tile has landed, for everybody, and everybody is done with the one before: its slot takes the tile after next
    cp_async_wait<1>();
    __syncthreads();
    fetch(std::false_type(), k, block - 1, used);
    if constexpr (!plain)
      if (s.bias_kind != Bias::none) load_bias<T, M, N>(shared + bias_at, s, c, {b, h, i0 + warp_row, block * keys});
    float p[M][N][4];
    fill(p, 0.f);
    const Operand<T, D, false, false> columns(slot, 0);
    if constexpr (q_stays) {
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++) multiply_step<T>(p, shared, queries[kk], columns, kk);
    } else {
      multiply<T, D / 16>(p, shared, Operand<T, D, false, true>(0, warp_row), columns, c.tf32);
    }
    const Place at{b, h, i0 + warp_row + lane / 4, block * keys + lane % 4 * 2};
    if constexpr (!plain) score_steps<T, false>(p, p, s, c, at, shared + bias_at);
    if (masked) hide<false>(p, c, at);
    float shrink[M][2];
    softmax_step<plain>(p, m, l, shrink, c.rate);
    if constexpr (!plain)
      if (s.philox.drop_below)
        each_kept<M, N>(s, at, [&](int i, int n, int e, bool kept) { p[i][n][e] = kept ? p[i][n][e] : 0.f; });
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int n = 0; n < NO; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[i][n][e] *= shrink[i][e / 2];
    // what the product takes, before the barrier: in half the registers, or float32 in the warp's own rows of a tile
    [[maybe_unused]] uint32_t rounded[M][N][2];
    if constexpr (sizeof(T) == 4) write_fragments<T, keys>(shared + p_at, p, warp_row, 0);
    else round_tile<T>(rounded, p);
    advance();
    cp_async_wait<1>();
    __syncthreads();
    fetch(std::false_type(), v, block - 1, used);
    const Operand<T, D, true, false> values(slot, 0);
    if constexpr (sizeof(T) != 4) multiply<T>(o, shared, rounded, values);
    else multiply<T, keys / 16, true>(o, shared, Operand<T, keys, false, true>(p_at, warp_row), values, c.tf32);
    advance();
  };

  if (first < end) {
    load_tile<T, D, rows, threads, plain>(shared, q, i0, c.Tq);
    fetch(std::true_type(), k, end - 1, slot);
    fetch(std::true_type(), v, end - 1, slot + slot_bytes);
    if constexpr (q_stays) {
      cp_async_wait<1>();
      __syncthreads();
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
        for (int i = 0; i < M; i++) Operand<T, D, false, true>(0, warp_row).load(queries[kk][i], shared, i, kk);
    }
    int block = end - 1;
    if constexpr (plain) {
      while (block >= first) {  // masked, whole, masked: the two loops have their own code
#pragma unroll 1
        for (; block >= first && (block >= whole_end || block < whole_first); block--) step(block, true);
#pragma unroll 1
        for (; block >= first && block >= whole_first; block--) step(block, false);
      }
    } else {
#pragma unroll 1
      for (; block >= first; block--) step(block, block >= whole_end || block < whole_first);
    }
  }

  // o / l by way of the queries' tile, of which a warp has its own rows; lse = m + log l
  const float unit = plain ? c.scale : 1.f, keep_scale = plain || !s.philox.drop_below ? 1.f : s.philox.keep_scale;
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total = l[i][half];
      total += shfl_xor(total, 1), total += shfl_xor(total, 2);
      const float inverse = total == 0.f ? 0.f : keep_scale / total;
#pragma unroll
      for (int n = 0; n < NO; n++) o[i][n][2 * half] *= inverse, o[i][n][2 * half + 1] *= inverse;
      const int row = i0 + warp_row + 16 * i + 8 * half + lane / 4;
      if (lane % 4 == 0 && row < c.Tq)
        ((float*)s.lse)[(b * s.H + h) * c.Tq + row] = total == 0.f ? -infinity : m[i][half] * unit + logf(total);
    }
  cp_async_wait<0>();
  write_fragments<T, D>(shared, o, warp_row, 0);
  warp_sync();
  unsigned char* const mine = shared + warp_row * D * int(sizeof(T));
  store_tile<T, D, 16 * M, 32>(mine, rows_of<T>(s.o, b, h, s.Dv, aligned), i0 + warp_row, c.Tq, lane);
}

// ==== launcher ====

static std::tuple<Tensor, Tensor> attention_fwd_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& bias,
                                                     const OptTensor& alibi_slopes, const OptTensor& rng_state, double scale,
                                                     double softcap, double dropout_p, int64_t causal_offset,
                                                     int64_t window_left, int64_t window_right) {
  const char* op = "attention_fwd";
  AttentionArgs s = attention_args(op, q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset,
                                   window_left, window_right);
  check_gpu(op, s, q, {&k, &v}, {&bias, &alibi_slopes, &rng_state});
  const Gpu gpu(q);
  Tensor o = new_heads(q, s.B, s.H, s.Tq, s.Dv), lse = new_tensor(q, {s.B, s.H, s.Tq}, ScalarType::Float);
  if (lse.numel() == 0) return {o, lse};
  constexpr int64_t most_grid = 65535;
  GK_CHECK(s.H <= most_grid, op, ": at most ", most_grid, " heads, got ", s.H, " (CUDA kernels)");
  s.o = view_of(o), s.lse = lse.mutable_data_ptr();
  const bool aligned = whole_chunks(q) && whole_chunks(k) && whole_chunks(v) && whole_chunks(o);
  const Scores c = scores_of(s, aligned, element_size(dtype_of(q)), true);
  with_dtype(dtype_of(q), [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto dim, auto is_plain) {
      constexpr int D = decltype(dim)::value;
      constexpr bool plain = decltype(is_plain)::value;
      constexpr ForwardTile tile = forward_tile<T, D, plain>();
      const int shared = tile.shared_bytes(D, sizeof(T), s.bias_kind != Bias::none);
      for (int64_t first = 0; first < s.B; first += most_grid) {
        const dim3 grid(cdiv(s.Tq, tile.rows), s.H, std::min(s.B - first, most_grid));
        launch(GK_KERNEL(attention_fwd<T, D, plain>), grid, 32 * tile.warps, shared, gpu.stream, s, c, unsigned(first));
      }
    };
    if constexpr (!std::is_same_v<T, float>)
      if (c.plain) return with_dim<64, 80, 96, 128>(int(s.D), [&](auto dim) { run(dim, std::true_type()); });
    with_dim<64, 128, 256>(padded_head_dim(std::max(s.D, s.Dv)), [&](auto dim) { run(dim, std::false_type()); });
  });
  return {o, lse};
}

GK_REGISTER(m) { m.impl("attention_fwd", TORCH_BOX(&attention_fwd_cuda)); }

}  // namespace gk
