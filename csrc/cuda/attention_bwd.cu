// attention on NVIDIA GPUs, backward: the scores are computed again tile by tile, five products per tile of scores.
//
// A block takes every splits-th block of keys of one key head, one after another, and for each of them walks over the queries
// that see it: S = Q K^T, dP = dO V^T, dV += P^T dO, dK += dS^T Q, dQ += dS K. dV and dK stay in registers; dQ is added to the
// block's own float32 copy of it in memory, by the same thread each time, so that every sum has one order; the copies of the
// `splits` blocks of a head are added last.
//
// Two ways from the scores to the other products. Shared: P and dS go by way of shared memory, and the warps lie over dK and dV
// as they please. Own: scores are computed transposed, a warp has all those of its own keys, and P^T and dS^T are left operands
// as they lie in registers; only dQ's needs dS in shared memory. It takes half as many registers again for dK and dV, of which
// head dim 64 leaves enough, and its shared memory is less busy than the tensor cores.
#include "attention.cuh"

namespace gk {

// ---- tiles ----
struct BackwardTile {
  int rows, keys, warps;
  bool apart;  // P and dS have memory of their own; else dS waits in registers until P has been used
  bool own;
  // how the warps lie over scores, over dK and dV, over dQ: so many along rows, the rest along columns
  GK_BOTH constexpr int score_warp_rows() const { return rows >= 64 ? rows / 32 : rows / 16; }
  GK_BOTH constexpr int score_warp_columns() const { return keys > 16 ? 2 : 1; }
  GK_BOTH constexpr int key_warp_rows() const { return own ? warps : keys >= 64 ? keys / 32 : 1; }
  GK_BOTH constexpr int query_warp_rows() const { return rows / 32; }
  GK_BOTH constexpr int stats_at(int D, int size) const {
    return (2 * (rows + keys) * D + (1 + (apart && !own)) * rows * keys) * size;
  }
  GK_BOTH constexpr int bias_at(int D, int size) const { return stats_at(D, size) + 2 * rows * int(sizeof(float)); }
  constexpr int shared_bytes(int D, int size, bool bias) const { return bias_at(D, size) + bias * rows * keys * 4; }
};
// By head dim and architecture: ptxas for later ones keeps more in registers. Where a tuned one does not fit the memory (96 and
// 128 in 99 KB) the general kernel serves. What the launcher sees is sm_80's: it has the most keys, and the rest alike.
template <class T, int D, bool plain> GK_BOTH constexpr BackwardTile backward_tile(int arch = tile_arch) {
  if (plain && D <= 64) return {64, arch < 90 ? 128 : 64, 4, false, true};
  if (plain) return {128, 128, 8, false, false};
  if (sizeof(T) == 4) return {D <= 64 ? 64 : 32, D <= 128 ? 32 : 16, D <= 128 ? 4 : 8, D <= 128, false};
  return {D <= 128 ? 64 : 32, D <= 64 ? 64 : 32, D <= 128 ? 4 : 8, true, false};
}

constexpr int64_t most_splits = 8;

// ---- kernels ----

// Before: delta = sum over d of do * o, the row's mean of dp under p; the log-sum-exp in `unit`s, with +inf for a row that saw
// no key, so that its probabilities become 0; zeros into the sums of dq. A warp per row.
template <class T>
__global__ void __launch_bounds__(128) attention_bwd_start(const __grid_constant__ AttentionArgs s, bool aligned, float unit,
                                                           float* base, float* delta, float4* dq, int64_t dq_16) {
  const int64_t row = int64_t(blockIdx.x) * 4 + threadIdx.x / 32, all = int64_t(gridDim.x) * 128;
  for (int64_t i = int64_t(blockIdx.x) * 128 + threadIdx.x; i < dq_16; i += all) store_16(dq + i, make_uint4(0, 0, 0, 0));
  if (row >= s.B * s.H * s.Tq) return;
  const int64_t head = row / s.Tq, i = row % s.Tq;
  const T *dout = s.dout.at<const T>(head / s.H, head % s.H, i), *o = s.o.at<const T>(head / s.H, head % s.H, i);
  constexpr int V = per_16<T>;
  float sum = 0;
  for (int d = threadIdx.x % 32 * V; d < s.Dv; d += 32 * V) {
    float x[V], y[V];
    if (aligned) unpack<T>(load_16(dout + d), x), unpack<T>(load_16(o + d), y);
    else
#pragma unroll
      for (int e = 0; e < V; e++)
        x[e] = d + e < s.Dv ? to_float(dout[d + e]) : 0.f, y[e] = d + e < s.Dv ? to_float(o[d + e]) : 0.f;
#pragma unroll
    for (int e = 0; e < V; e++) sum += x[e] * y[e];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 != 0) return;
  const float lse = ((const float*)s.lse)[row];
  delta[row] = sum, base[row] = lse == -infinity ? infinity : lse * unit;
}

// Products q k^T to probabilities, in place; slope: the derivative of softcap. base: of the lane's first query, in shared
// memory.
template <class T, bool plain, bool flipped = false, int M, int N>
GK_DEVICE void probabilities(float (&p)[M][N][4], [[maybe_unused]] float (&slope)[M][N][4], const AttentionArgs& s,
                             const Scores& c, const Place& at, bool whole, const unsigned char* base, unsigned char* bias) {
  if constexpr (!plain) score_steps<T, true>(p, slope, s, c, at, bias);
  if (!whole) hide<flipped>(p, c, at);
  each_score<M, N>([&](int m, int n, int e, int row, int column) {
    const float of_query = ((const float*)base)[flipped ? column : row];
    p[m][n][e] = ex2_approx(plain ? fmaf(p[m][n][e], c.rate, -of_query) : (p[m][n][e] - of_query) * c.rate);
  });
}

template <class T, int D, bool plain>
__global__ void __launch_bounds__(32 * backward_tile<T, D, plain>().warps, D > (plain ? 64 : 128) ? 1 : 2)
    attention_bwd(const __grid_constant__ AttentionArgs s, const __grid_constant__ Scores c, const float* base,
                  const float* delta, float4* dq_sums, unsigned splits, unsigned row_blocks) {
  constexpr BackwardTile tile = backward_tile<T, D, plain>();
  constexpr int rows = tile.rows, keys = tile.keys, warps = tile.warps, threads = 32 * warps, size = sizeof(T);
  constexpr int k_at = 0, v_at = k_at + keys * D * size, q_at = v_at + keys * D * size, do_at = q_at + rows * D * size;
  constexpr int base_at = tile.stats_at(D, size), ds_at = base_at - rows * keys * size, delta_at = base_at + rows * 4;
  [[maybe_unused]] constexpr int p_at = do_at + rows * D * size;
  // scores, dK and dV, dQ: warps along columns, blocks of 16 rows and of 8 columns of a warp
  constexpr int SR = tile.score_warp_rows(), SC = tile.score_warp_columns(), SM = rows / 16 / SR, SN = keys / 8 / SC;
  constexpr int KR = tile.key_warp_rows(), KC = warps / KR, KM = keys / 16 / KR, KN = D / 8 / KC;
  constexpr int key_stride = tile.own ? 1 : KR;
  constexpr int QR = tile.query_warp_rows(), QC = warps / QR, QM = rows / 16 / QR, QN = D / 8 / QC;
  // until dP is there P waits as it is written to shared memory: in half the registers, or there, where dK and dV leave none
  [[maybe_unused]] constexpr bool halve = plain && tile.apart, reread = plain && !tile.apart;
  GK_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int score_row = warp / SC * 16 * SM, score_key = warp % SC * 8 * SN, own_key = warp / KC * 16 * (tile.own ? KM : 1);
  [[maybe_unused]] unsigned char* const bias = shared + tile.bias_at(D, size) + warp * SM * SN * 512;
  const unsigned split = blockIdx.x % splits, kv_head = blockIdx.x / splits, group = unsigned(s.H) / unsigned(s.Hk);
  const unsigned b = kv_head / unsigned(s.Hk), hk = kv_head % unsigned(s.Hk);
  const bool aligned = plain || c.aligned;
  constexpr bool full = plain && D != 96;  // that one serves 80, too
  constexpr bool tight = plain && D < 128;  // no register is left for what follows from a thread's number
  const auto load_queries = [&](unsigned h, int i0) {
    int r = threadIdx.x;
    if constexpr (tight) opaque(r);
    load_tile<T, D, rows, threads, full>(shared + q_at, rows_of<const T>(s.q, b, h, s.D, aligned), i0, c.Tq, r);
    if (r < rows)
      cp_async_4(shared + base_at + r * 4, i0 + r < c.Tq ? base + (b * s.H + h) * c.Tq + i0 + r : base, i0 + r < c.Tq ? 4 : 0);
  };
  const auto load_gradients = [&](unsigned h, int i0) {
    int r = threadIdx.x;
    if constexpr (tight) opaque(r);
    load_tile<T, D, rows, threads, full>(shared + do_at, rows_of<const T>(s.dout, b, h, s.Dv, aligned), i0, c.Tq, r);
    if (r < rows)
      cp_async_4(shared + delta_at + r * 4, i0 + r < c.Tq ? delta + (b * s.H + h) * c.Tq + i0 + r : delta,
                 i0 + r < c.Tq ? 4 : 0);
  };

#pragma unroll 1
  for (int j0 = split * keys; j0 < c.Tk; j0 += splits * keys) {
    // the rows that see any of the keys
    const int last_key = (j0 + keys < c.Tk ? j0 + keys : c.Tk) - 1;
    const int i_first = (j0 - c.high < 0 ? 0 : j0 - c.high < c.Tq ? j0 - c.high : c.Tq) / rows * rows;
    const int i_end = last_key - c.low < 0 ? 0 : last_key - c.low < c.Tq ? last_key - c.low + 1 : c.Tq;
    unsigned h = hk * group;
    int i0 = i_first;
    float dk[KM][KN][4], dv[KM][KN][4];
    fill(dk, 0.f), fill(dv, 0.f);
    if (i_first < i_end) {
      load_tile<T, D, keys, threads, full>(shared + k_at, rows_of<const T>(s.k, b, hk, s.D, aligned), j0, c.Tk);
      load_tile<T, D, keys, threads, full>(shared + v_at, rows_of<const T>(s.v, b, hk, s.Dv, aligned), j0, c.Tk);
      load_queries(h, i0), load_gradients(h, i0);
      cp_async_commit();
    }
#pragma unroll 1
    while (i_first < i_end && h < (hk + 1) * group) {
      const bool down = i0 + rows < i_end;
      const unsigned next_h = down ? h : h + 1;
      const int next_i0 = down ? i0 + rows : i_first;
      const bool more = next_h < (hk + 1) * group;
      const int last_row = (i0 + rows < c.Tq ? i0 + rows : c.Tq) - 1;
      const bool whole = j0 - last_row >= c.low && j0 + keys - 1 - i0 <= c.high && j0 + keys <= c.Tk;
      cp_async_wait<0>();
      __syncthreads();

      float dq[QM][QN][4];  // the sums so far; tuned kernels have the registers to fetch them while dK is made
      float4* const sums =
          dq_sums + (((b * s.H + h) * splits + split) * row_blocks + i0 / rows) * (QM * QN * threads) + threadIdx.x;
      const auto fetch_sums = [&] {
#pragma unroll
        for (int m = 0; m < QM; m++)
#pragma unroll
          for (int n = 0; n < QN; n++) unpack<float>(load_16(sums + (m * QN + n) * threads), dq[m][n]);
      };
      if constexpr (tile.own) {
        float p[KM][rows / 8][4];
        fill(p, 0.f);
        multiply<T, D / 16>(p, shared, Operand<T, D, false, true>(k_at, own_key), Operand<T, D, false, false>(q_at, 0));
        const Place at{b, h, i0 + lane % 4 * 2, j0 + own_key + lane / 4};
        probabilities<T, true, true>(p, p, s, c, at, whole, shared + base_at + lane % 4 * 8, nullptr);
        uint32_t rounded[KM][rows / 8][2];
        round_tile<T>(rounded, p);
        multiply<T>(dv, shared, rounded, Operand<T, D, true, false>(do_at, 0));
        // dS = P (dP - delta), half of the queries at a time: there are no registers for more
        constexpr int N = rows / 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float ds[KM][N][4];
          fill(ds, 0.f);
          multiply<T, D / 16>(ds, shared, Operand<T, D, false, true>(v_at, own_key),
                              Operand<T, D, false, false>(do_at, half * 8 * N));
          each_score<KM, N>([&](int m, int n, int e, int, int column) {
            float pair[2];
            unpack_2<T>(rounded[m][half * N + n][e / 2], pair[0], pair[1]);
            ds[m][n][e] =
                pair[e % 2] * (ds[m][n][e] - ((const float*)(shared + delta_at))[half * 8 * N + lane % 4 * 2 + column]);
          });
          write_fragments<T, rows>(shared + ds_at, ds, own_key, half * N / 2);
          uint32_t left[KM][N][2];
          round_tile<T>(left, ds);
          multiply<T>(dk, shared, left, Operand<T, D, true, false>(q_at, half * 8 * N));
        }
        fetch_sums();
      } else {
        const bool scores_here = SR * SC == warps || warp < SR * SC;
        float ds[SM][SN][4];
        if (scores_here) {
          const Place at{b, h, i0 + score_row + lane / 4, j0 + score_key + lane % 4 * 2};
          if constexpr (!plain)
            if (s.bias_kind != Bias::none) load_bias<T, SM, SN>(bias, s, c, {b, h, i0 + score_row, j0 + score_key});
          float p[SM][SN][4];
          fill(p, 0.f);
          multiply<T, D / 16>(p, shared, Operand<T, D, false, true>(q_at, score_row),
                              Operand<T, D, false, false>(k_at, score_key), c.tf32);
          // ds: softcap's derivative for the time being
          probabilities<T, plain>(p, ds, s, c, at, whole, shared + base_at + (score_row + lane / 4) * 4, bias);
          [[maybe_unused]] uint32_t kept = ~0u, rounded[SM][SN][2];
          if constexpr (halve) round_tile<T>(rounded, p);
          if constexpr (!plain) {
            // through softcap, before anything is dropped: what a score's gradient is multiplied by
            each_score<SM, SN>([&](int m, int n, int e, int, int) { ds[m][n][e] *= p[m][n][e]; });
            if (s.philox.drop_below)
              each_kept<SM, SN>(s, at, [&](int m, int n, int e, bool keep) {
                p[m][n][e] = keep ? p[m][n][e] : 0.f;
                if (!keep) kept &= ~(1u << ((m * SN + n) * 4 + e));
              });
          }
          write_fragments<T, keys>(shared + p_at, p, score_row, score_key / 16);
          if constexpr (!plain) each_score<SM, SN>([&](int m, int n, int e, int, int) { p[m][n][e] = ds[m][n][e]; });
          // dS = P (dP - delta)
          fill(ds, 0.f);
          multiply<T, D / 16>(ds, shared, Operand<T, D, false, true>(do_at, score_row),
                              Operand<T, D, false, false>(v_at, score_key), c.tf32);
          [[maybe_unused]] const float keep_scale = s.philox.drop_below ? s.philox.keep_scale : 1.f;
          each_pair<T, keys, 1, 1, SM, SN>(shared + p_at, score_row, score_key / 16,
                                           [&](int m, int n, int e, const unsigned char* at) {
            const float of_row = ((const float*)(shared + delta_at))[score_row + lane / 4 + 16 * m + 4 * e];
            float pair[2] = {p[m][n][e], p[m][n][e + 1]};
            if constexpr (halve) unpack_2<T>(rounded[m][n][e / 2], pair[0], pair[1]);
            if constexpr (reread) unpack_2<T>(*(const uint32_t*)at, pair[0], pair[1]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const bool keep = plain || (kept >> ((m * SN + n) * 4 + e + i) & 1);
              float& d = ds[m][n][e + i];
              d = pair[i] * ((plain ? d : keep ? d * keep_scale : 0.f) - of_row);
            }
          });
          if constexpr (tile.apart) write_fragments<T, keys>(shared + ds_at, ds, score_row, score_key / 16);
        }
        __syncthreads();
        multiply<T, rows / 16, true>(dv, shared, Operand<T, keys, true, true, KR>(p_at, 0, warp / KC),
                                     Operand<T, D, true, false, KC>(do_at, 0, warp % KC), c.tf32);
        if constexpr (!tile.apart) {
          __syncthreads();
          if (scores_here) write_fragments<T, keys>(shared + ds_at, ds, score_row, score_key / 16);
          if (more) load_gradients(next_h, next_i0);
          cp_async_commit();
          __syncthreads();
        }
        if constexpr (plain) fetch_sums();
        multiply<T, rows / 16, true>(dk, shared, Operand<T, keys, true, true, KR>(ds_at, 0, warp / KC),
                                     Operand<T, D, true, false, KC>(q_at, 0, warp % KC), c.tf32);
      }
      __syncthreads();
      // the queries' tile is free, what follows needs only dS and K: the next one is on its way meanwhile
      if (more) load_queries(next_h, next_i0);
      if (more && (tile.apart || tile.own)) load_gradients(next_h, next_i0);
      cp_async_commit();
      if constexpr (!plain) fetch_sums();
      const Operand<T, D, true, false, QC> key_columns(k_at, 0, warp % QC);
      using Rounded = std::conditional_t<tile.own, Operand<T, rows, true, true>, Operand<T, keys, false, true>>;
      const Rounded dS(ds_at, tile.own ? 0 : warp / QC * 16 * QM, tile.own ? warp / QC * QM : 0);
      multiply<T, keys / 16, true>(dq, shared, dS, key_columns, c.tf32);
#pragma unroll
      for (int m = 0; m < QM; m++)
#pragma unroll
        for (int n = 0; n < QN; n++) store_16(sums + (m * QN + n) * threads, pack<float>(dq[m][n]));
      h = next_h, i0 = next_i0;
    }
    // dK and dV by way of the tiles of K and V
    cp_async_wait<0>();
    __syncthreads();
    const float keep_scale = s.philox.drop_below ? s.philox.keep_scale : 1.f;
    write_fragments<T, D, KC, key_stride>(shared + k_at, dk, own_key, warp % KC, c.scale);
    write_fragments<T, D, KC, key_stride>(shared + v_at, dv, own_key, warp % KC, keep_scale);
    __syncthreads();
    int batch = b, head = hk;
    // or where dk's and dv's tiles begin is computed before the loop above, and held in registers through it; ptxas does so
    // with the batch's part for some kernels only, and these are they
    opaque(head);
    if constexpr (tile_arch >= 90 || D == 96) opaque(batch);
    store_tile<T, D, keys, threads>(shared + k_at, rows_of<T>(s.dk, batch, head, s.D, aligned), j0, c.Tk);
    store_tile<T, D, keys, threads>(shared + v_at, rows_of<T>(s.dv, batch, head, s.Dv, aligned), j0, c.Tk);
    __syncthreads();
  }
}

// The gradient of an additive bias, a pass of its own so that its sums over broadcast dimensions have one order: a block takes
// a tile of the bias and goes over all the tiles of scores that it was added to. The head dim in slices: one kernel for all of
// them.
constexpr BackwardTile dbias_tile = {64, 64, 4, false, false};
constexpr int dbias_slice = 64;
template <class T>
__global__ void __launch_bounds__(32 * dbias_tile.warps)
    attention_dbias(const __grid_constant__ AttentionArgs s, const __grid_constant__ Scores c,
                    const __grid_constant__ BiasGradient g, const float* base, const float* delta) {
  constexpr int rows = dbias_tile.rows, keys = dbias_tile.keys, threads = 32 * dbias_tile.warps;
  constexpr int D = dbias_slice, size = sizeof(T);
  constexpr int k_at = 0, v_at = k_at + keys * D * size, q_at = v_at + keys * D * size, do_at = q_at + rows * D * size;
  constexpr int base_at = dbias_tile.stats_at(D, size), delta_at = base_at + rows * 4;
  constexpr int SR = dbias_tile.score_warp_rows(), SC = dbias_tile.score_warp_columns();
  constexpr int SM = rows / 16 / SR, SN = keys / 8 / SC;
  static_assert(SR * SC == dbias_tile.warps);
  GK_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, score_row = warp / SC * 16 * SM, score_key = warp % SC * 8 * SN;
  unsigned char* const bias = shared + dbias_tile.bias_at(D, size) + warp * SM * SN * 512;
  const bool sum_rows = g.size[2] == 1, sum_columns = g.size[3] == 1;
  const unsigned row_tiles = (c.Tq + rows - 1) / rows, key_tiles = (c.Tk + keys - 1) / keys;
  unsigned at = blockIdx.x;
  const unsigned key_tile = sum_columns ? 0 : at % key_tiles;
  at /= sum_columns ? 1 : key_tiles;
  const unsigned row_tile = sum_rows ? 0 : at % row_tiles;
  at /= sum_rows ? 1 : row_tiles;
  const unsigned bias_h = at % unsigned(g.size[1]), bias_b = at / unsigned(g.size[1]);
  const int first_row = row_tile * rows, end_row = sum_rows ? c.Tq : first_row + 1;
  const int first_key = key_tile * keys, end_key = sum_columns ? c.Tk : first_key + 1;

  float sum[SM][SN][4];
  fill(sum, 0.f);
  for (unsigned b = g.size[0] == 1 ? 0 : bias_b; b < (g.size[0] == 1 ? unsigned(s.B) : bias_b + 1); b++)
    for (unsigned h = g.size[1] == 1 ? 0 : bias_h; h < (g.size[1] == 1 ? unsigned(s.H) : bias_h + 1); h++)
      for (int i0 = first_row; i0 < end_row; i0 += rows)
        for (int j0 = first_key; j0 < end_key; j0 += keys) {
          const int last_row = (i0 + rows < c.Tq ? i0 + rows : c.Tq) - 1;
          if (j0 >= c.end_column(last_row) || j0 + keys <= c.first_column(i0)) continue;
          const unsigned hk = h / (unsigned(s.H) / unsigned(s.Hk));
          auto q = rows_of<const T>(s.q, b, h, s.D, c.aligned), k = rows_of<const T>(s.k, b, hk, s.D, c.aligned);
          auto dout = rows_of<const T>(s.dout, b, h, s.Dv, c.aligned), v = rows_of<const T>(s.v, b, hk, s.Dv, c.aligned);
          const int64_t stats = (b * s.H + h) * c.Tq + i0;
          float p[SM][SN][4], dp[SM][SN][4], slope[SM][SN][4];
          fill(p, 0.f), fill(dp, 0.f);
#pragma unroll 1
          for (int d = 0; d < (s.D > s.Dv ? s.D : s.Dv); d += D) {
            __syncthreads();
            load_tile<T, D, keys, threads>(shared + k_at, k, j0, c.Tk);
            load_tile<T, D, keys, threads>(shared + v_at, v, j0, c.Tk);
            load_tile<T, D, rows, threads>(shared + q_at, q, i0, c.Tq);
            load_tile<T, D, rows, threads>(shared + do_at, dout, i0, c.Tq);
            if (const int r = threadIdx.x; r < rows) {
              cp_async_4(shared + base_at + 4 * r, base + stats + (i0 + r < c.Tq ? r : 0), i0 + r < c.Tq ? 4 : 0);
              cp_async_4(shared + delta_at + 4 * r, delta + stats + (i0 + r < c.Tq ? r : 0), i0 + r < c.Tq ? 4 : 0);
            }
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            multiply<T, D / 16>(p, shared, Operand<T, D, false, true>(q_at, score_row),
                                Operand<T, D, false, false>(k_at, score_key), c.tf32);
            multiply<T, D / 16>(dp, shared, Operand<T, D, false, true>(do_at, score_row),
                                Operand<T, D, false, false>(v_at, score_key), c.tf32);
            for (auto* matrix : {&q, &k, &dout, &v}) matrix->at += D, matrix->width -= D;
          }
          const Place place{b, h, i0 + score_row + lane / 4, j0 + score_key + lane % 4 * 2};
          load_bias<T, SM, SN>(bias, s, c, {b, h, i0 + score_row, j0 + score_key});
          probabilities<T, false>(p, slope, s, c, place, false, shared + base_at + (score_row + lane / 4) * 4, bias);
          if (s.philox.drop_below)
            each_kept<SM, SN>(s, place, [&](int m, int n, int e, bool kept) {
              dp[m][n][e] = kept ? dp[m][n][e] * s.philox.keep_scale : 0.f;
            });
          each_score<SM, SN>([&](int m, int n, int e, int row, int) {
            sum[m][n][e] += p[m][n][e] * (dp[m][n][e] - ((const float*)(shared + delta_at))[score_row + row + lane / 4]);
          });
        }
  // the tile's own sums over rows, then over columns, in order
  __syncthreads();
  using Sums = Tile<float, keys>;
  const auto value = [&](int row, int column) -> float& { return *(float*)(shared + Sums::element(row, column)); };
  write_fragments<float, keys>(shared, sum, score_row, score_key / 16);
  __syncthreads();
  if (sum_rows)
    for (int column = threadIdx.x; column < keys; column += threads)
      for (int row = 1; row < rows; row++) value(0, column) += value(row, column);
  __syncthreads();
  if (sum_columns)
    for (int row = threadIdx.x; row < (sum_rows ? 1 : rows); row += threads)
      for (int column = 1; column < keys; column++) value(row, 0) += value(row, column);
  __syncthreads();
  for (int i = threadIdx.x; i < (sum_rows ? 1 : rows) * (sum_columns ? 1 : keys); i += threads) {
    const int row = sum_columns ? i : i / keys, column = sum_columns ? 0 : i % keys;
    if (first_row + row >= g.size[2] || first_key + column >= g.size[3]) continue;
    const int64_t to = ((bias_b * g.size[1] + bias_h) * g.size[2] + first_row + row) * g.size[3] + first_key + column;
    if (s.bias_kind == Bias::stat) ((float*)g.data)[to] = value(row, column);
    else ((T*)g.data)[to] = from_float<T>(value(row, column));
  }
}

// After: dq = scale * the sums of all splits, in their order. A thread has two neighbouring blocks of what one of attention_bwd
// had, two rows of 16 columns with its quad, of which it writes half a row.
struct QueryTile {
  int rows, threads, columns, QC, QM, QN;  // columns: the padded head dim
};
template <class T>
__global__ void __launch_bounds__(256)
    attention_bwd_dq(const __grid_constant__ AttentionArgs s, const __grid_constant__ Scores c, const float4* dq_sums,
                     unsigned splits, unsigned row_blocks, const __grid_constant__ QueryTile tile) {
  const unsigned parts = tile.rows * tile.columns / 8, head = blockIdx.x / row_blocks, block = blockIdx.x % row_blocks;
  for (unsigned part = threadIdx.x; part < parts; part += 256) {
    const int thread = part % tile.threads, n = part / tile.threads % (tile.QN / 2), m = part / tile.threads / (tile.QN / 2);
    float sum[2][4] = {};
    for (unsigned split = 0; split < splits; split++) {
      const int64_t tiles = (int64_t(head) * splits + split) * row_blocks + block;
      const float4* const from = dq_sums + (tiles * tile.QM + m) * tile.QN * tile.threads + thread;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float more[4];
        unpack<float>(load_16_once(from + (2 * n + i) * tile.threads), more);
#pragma unroll
        for (int e = 0; e < 4; e++) sum[i][e] += more[e];
      }
    }
    const int warp = thread / 32, lane = thread % 32, t = lane % 4;
    const int row = block * tile.rows + (warp / tile.QC * tile.QM + m) * 16 + t / 2 * 8 + lane / 4;
    const int column = (warp % tile.QC + n * tile.QC) * 16 + t % 2 * 8;
    float v[8];
    uint32_t w[2][4];  // word 2 half + i: of row `half`, block i
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float low = sum[i % 2][i / 2 * 2] * c.scale, high = sum[i % 2][i / 2 * 2 + 1] * c.scale;
      if constexpr (sizeof(T) == 4) w[0][i] = __float_as_uint(low), w[1][i] = __float_as_uint(high);
      else w[0][i] = pack_2<T>(low, high);
    }
    transpose_quad(w[0]);
    if constexpr (sizeof(T) == 4) transpose_quad(w[1]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (sizeof(T) == 4) v[2 * i] = __uint_as_float(w[0][i]), v[2 * i + 1] = __uint_as_float(w[1][i]);
      else unpack_2<T>(w[0][i], v[2 * i], v[2 * i + 1]);
    }
    T* const out = s.dq.at<T>(head / unsigned(s.H), head % unsigned(s.H), row) + column;
    if (row >= c.Tq) continue;
#pragma unroll
    for (int i = 0; i < 8; i += per_16<T>) {
      if (c.aligned) {
        if (column + i < s.D) store_16(out + i, pack<T>(*reinterpret_cast<float (*)[per_16<T>]>(v + i)));
        continue;
      }
#pragma unroll
      for (int e = i; e < i + per_16<T>; e++)
        if (column + e < s.D) out[e] = from_float<T>(v[e]);
    }
  }
}

// ==== launcher ====

static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_cuda(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
    const OptTensor& bias, const OptTensor& alibi_slopes, const OptTensor& rng_state, double scale, double softcap,
    double dropout_p, int64_t causal_offset, int64_t window_left, int64_t window_right, bool need_dbias) {
  const char* op = "attention_bwd";
  AttentionArgs s = attention_args(op, q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset,
                                   window_left, window_right);
  attention_bwd_args(op, s, dout, q, o, lse, bias, need_dbias);
  check_gpu(op, s, q, {&dout, &k, &v, &o, &lse}, {&bias, &alibi_slopes, &rng_state});
  const Gpu gpu(q);
  Tensor dq = new_heads(q, s.B, s.H, s.Tq, s.D);
  Tensor dk = new_heads(k, s.B, s.Hk, s.Tk, s.D), dv = new_heads(v, s.B, s.Hk, s.Tk, s.Dv);
  Tensor dbias = need_dbias ? new_tensor(*bias, bias->sizes(), dtype_of(*bias)) : new_tensor(q, {0}, dtype_of(q));
  s.dq = view_of(dq), s.dk = view_of(dk), s.dv = view_of(dv);
  bool aligned = true;
  for (const Tensor& t : {dout, q, k, v, o, dq, dk, dv}) aligned = aligned && whole_chunks(t);
  const int exact = s.D == 80 ? 96 : int(s.D);
  bool fits = false;
  with_dim<64, 96, 128>(
      exact, [&](auto dim) { fits = backward_tile<bf16, dim, true>().shared_bytes(dim, 2, false) <= most_shared(gpu.arch()); });
  const Scores c = scores_of(s, aligned, element_size(dtype_of(q)), fits);
  Tensor stats = new_tensor(q, {2, s.B * s.H, s.Tq}, ScalarType::Float);
  float *base = out<float>(stats), *delta = base + s.B * s.H * s.Tq;

  with_dtype(dtype_of(q), [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto dim, auto is_plain) {
      constexpr int D = decltype(dim)::value;
      constexpr bool plain = decltype(is_plain)::value;
      constexpr BackwardTile tile = backward_tile<T, D, plain>();
      const int64_t row_blocks = cdiv(s.Tq, tile.rows), key_blocks = cdiv(s.Tk, tile.keys), heads = s.B * s.Hk;
      // a processor for each block of threads, so many as there are; each split costs memory of a float32 dq
      const int64_t wanted = heads ? cdiv(gpu.processors(), heads) : 1;
      const int64_t splits = std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(key_blocks, 1, most_splits));
      const int64_t query_blocks = row_blocks * s.B * s.H, most = (int64_t{1} << 31) - 1;
      GK_CHECK(heads * splits <= most && query_blocks <= most, op, ": at most ", most, " blocks, got ", heads * splits,
               " of keys and ", query_blocks, " of queries");
      Tensor sums = new_tensor(q, {s.B * s.H * splits * row_blocks, tile.rows * D}, ScalarType::Float);
      const int shared = tile.shared_bytes(D, sizeof(T), s.bias_kind != Bias::none);
      launch(GK_KERNEL(attention_bwd_start<T>), unsigned(cdiv(s.B * s.H * s.Tq, 4)), 128, 0, gpu.stream, s, aligned,
             plain ? log2_e : 1.f, base, delta, out<float4>(sums), sums.numel() / 4);
      launch(GK_KERNEL(attention_bwd<T, D, plain>), unsigned(heads * splits), 32 * tile.warps, shared, gpu.stream, s, c, base,
             delta, out<float4>(sums), unsigned(splits), unsigned(row_blocks));
      constexpr int QC = tile.warps / tile.query_warp_rows();
      const QueryTile queries = {tile.rows, 32 * tile.warps, D, QC, 2, D / 8 / QC};
      launch(GK_KERNEL(attention_bwd_dq<T>), unsigned(query_blocks), 256, 0, gpu.stream, s, c, data<float4>(sums),
             unsigned(splits), unsigned(row_blocks), queries);
    };
    if constexpr (!std::is_same_v<T, float>)
      if (c.plain) return with_dim<64, 96, 128>(exact, [&](auto dim) { run(dim, std::true_type()); });
    with_dim<64, 128, 256>(padded_head_dim(std::max(s.D, s.Dv)), [&](auto dim) { run(dim, std::false_type()); });
    if (!need_dbias) return;
    const BiasGradient g = {dbias.mutable_data_ptr(), {bias->size(0), bias->size(1), bias->size(2), bias->size(3)}};
    const int64_t row_tiles = g.size[2] == 1 ? 1 : cdiv(s.Tq, dbias_tile.rows);
    const int64_t key_tiles = g.size[3] == 1 ? 1 : cdiv(s.Tk, dbias_tile.keys);
    const int64_t tiles = g.size[0] * g.size[1] * row_tiles * key_tiles;
    GK_CHECK(tiles < int64_t{1} << 31, op, ": at most 2147483647 tiles of the bias, got ", tiles);
    const int shared = dbias_tile.shared_bytes(dbias_slice, sizeof(T), true);
    launch(GK_KERNEL(attention_dbias<T>), unsigned(tiles), 32 * dbias_tile.warps, shared, gpu.stream, s, c, g, base, delta);
  });
  return {dq, dk, dv, dbias};
}

GK_REGISTER(m) { m.impl("attention_bwd", TORCH_BOX(&attention_bwd_cuda)); }

}  // namespace gk
