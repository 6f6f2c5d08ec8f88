// attention on NVIDIA GPUs, backward: the scores are computed again tile by tile, five products per tile of scores.
//
// A block takes every splits-th block of keys of one key head, one after another, and for each of them walks over the queries
// that see it: S = Q K^T, dP = dO V^T, dV += P^T dO, dK += dS^T Q, dQ += dS K. dV and dK stay in registers; dQ is added to the
// block's own float32 copy of it in memory, by the same thread each time, so that every sum has one order; the copies of the
// `splits` blocks of a head are added last. P and dS go to the other products by way of shared memory.
#include "attention.cuh"

namespace gk {

// ---- tiles, by head dim ----
struct BackwardTile {
  int rows, keys, warps;
  bool apart;  // P and dS have memory of their own; else dS waits in registers until P has been used
  // how the warps lie over scores, over dK and dV, over dQ: so many along rows, the rest along columns
  GK_BOTH constexpr int score_warp_rows() const { return rows >= 64 ? rows / 32 : rows / 16; }
  GK_BOTH constexpr int score_warp_columns() const { return keys > 16 ? 2 : 1; }
  GK_BOTH constexpr int key_warp_rows() const { return keys >= 64 ? keys / 32 : 1; }
  GK_BOTH constexpr int query_warp_rows() const { return rows / 32; }
  GK_BOTH constexpr int shared_bytes(int D, int size) const {
    return (2 * (rows + keys) * D + (1 + apart) * rows * keys) * size + 2 * rows * int(sizeof(float));
  }
};
template <class T, int D, bool plain>
constexpr BackwardTile backward_tile = sizeof(T) == 4 ? (D <= 64    ? BackwardTile{64, 64, 4, true}
                                                         : D <= 128 ? BackwardTile{32, 32, 4, true}
                                                                    : BackwardTile{32, 16, 4, false})
                                       : !plain       ? (D <= 64    ? BackwardTile{64, 64, 4, true}
                                                         : D <= 128 ? BackwardTile{64, 32, 4, true}
                                                                    : BackwardTile{32, 32, 4, true})
                                                      : BackwardTile{128, 128, 8, D <= 96};

constexpr int64_t most_splits = 8;

// ---- kernels ----

// Before: delta = sum over d of do * o, the row's mean of dp under p; the log-sum-exp in `unit`s, with +inf for a row that saw no key, so
// that its probabilities become 0; zeros into the sums of dq. A warp per row.
template <class T>
__global__ void __launch_bounds__(128)
    attention_bwd_start(const __grid_constant__ AttentionArgs s, bool aligned, float unit, float* base, float* delta, float4* dq, int64_t dq_16) {
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
      for (int e = 0; e < V; e++) x[e] = d + e < s.Dv ? to_float(dout[d + e]) : 0.f, y[e] = d + e < s.Dv ? to_float(o[d + e]) : 0.f;
#pragma unroll
    for (int e = 0; e < V; e++) sum += x[e] * y[e];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 != 0) return;
  const float lse = ((const float*)s.lse)[row];
  delta[row] = sum, base[row] = lse == -infinity ? infinity : lse * unit;
}

// Products q k^T to probabilities, in place; slope: the derivative of softcap. base: of the lane's first row, in shared memory.
template <class T, bool plain, int M, int N>
GK_DEVICE void probabilities(float (&p)[M][N][4], float (&slope)[M][N][4], const AttentionArgs& s, const Scores& c, const Place& at, bool whole,
                             const unsigned char* base) {
  if constexpr (!plain) score_steps<T, true>(p, slope, s, c, at);
  if (!whole) hide(p, s, at);
  each_score<M, N>([&](int m, int n, int e, int row, int) {
    const float of_row = ((const float*)base)[row];
    p[m][n][e] = ex2_approx(plain ? fmaf(p[m][n][e], c.rate, -of_row) : (p[m][n][e] - of_row) * c.rate);
  });
}

template <class T, int D, bool plain>
__global__ void __launch_bounds__(32 * backward_tile<T, D, plain>.warps, plain ? 1 : 2)
    attention_bwd(const __grid_constant__ AttentionArgs s, const __grid_constant__ Scores c, const float* base, const float* delta, float4* dq_sums,
                  unsigned splits, unsigned row_blocks) {
  constexpr BackwardTile tile = backward_tile<T, D, plain>;
  constexpr int rows = tile.rows, keys = tile.keys, warps = tile.warps, threads = 32 * warps, size = sizeof(T);
  constexpr int k_at = 0, v_at = k_at + keys * D * size, q_at = v_at + keys * D * size, do_at = q_at + rows * D * size;
  constexpr int p_at = do_at + rows * D * size, ds_at = p_at + tile.apart * rows * keys * size, base_at = ds_at + rows * keys * size;
  constexpr int delta_at = base_at + rows * 4;
  // scores, dK and dV, dQ: warps along columns, blocks of 16 rows and of 8 columns of a warp
  constexpr int SR = tile.score_warp_rows(), SC = tile.score_warp_columns(), SM = rows / 16 / SR, SN = keys / 8 / SC;
  constexpr int KR = tile.key_warp_rows(), KC = warps / KR, KM = keys / 16 / KR, KN = D / 8 / KC;
  constexpr int QR = tile.query_warp_rows(), QC = warps / QR, QM = rows / 16 / QR, QN = D / 8 / QC;
  // until dP is there P waits as it is written to shared memory: in half the registers, or there, where dK and dV leave none
  constexpr bool halve = plain && tile.apart, reread = plain && !tile.apart;
  GK_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int score_row = warp / SC * 16 * SM, score_key = warp % SC * 8 * SN;
  const unsigned split = blockIdx.x % splits, kv_head = blockIdx.x / splits, b = kv_head / unsigned(s.Hk), hk = kv_head % unsigned(s.Hk);
  const unsigned group = unsigned(s.H) / unsigned(s.Hk);
  const bool aligned = plain || c.aligned;
  const Rows<const T> k{s.k.at<const T>(b, hk, 0), s.k.row, int(s.D), aligned}, v{s.v.at<const T>(b, hk, 0), s.v.row, int(s.Dv), aligned};
  const auto load_queries = [&](unsigned h, int64_t i0) {
    load_tile<T, D, rows, threads>(shared + q_at, Rows<const T>{s.q.at<const T>(b, h, 0), s.q.row, int(s.D), aligned}, i0, s.Tq);
    if (const int r = threadIdx.x; r < rows)
      cp_async_4(shared + base_at + r * 4, i0 + r < s.Tq ? base + (b * s.H + h) * s.Tq + i0 + r : base, i0 + r < s.Tq ? 4 : 0);
  };
  const auto load_gradients = [&](unsigned h, int64_t i0) {
    load_tile<T, D, rows, threads>(shared + do_at, Rows<const T>{s.dout.at<const T>(b, h, 0), s.dout.row, int(s.Dv), aligned}, i0, s.Tq);
    if (const int r = threadIdx.x; r < rows)
      cp_async_4(shared + delta_at + r * 4, i0 + r < s.Tq ? delta + (b * s.H + h) * s.Tq + i0 + r : delta, i0 + r < s.Tq ? 4 : 0);
  };

  for (int64_t j0 = int64_t(split) * keys; j0 < s.Tk; j0 += int64_t(splits) * keys) {
    // the rows that see any of the keys
    const int64_t j1 = j0 + keys < s.Tk ? j0 + keys : s.Tk;
    const int64_t first_row = s.window_right < 0 ? 0 : j0 - s.diagonal - s.window_right, end_row = s.window_left < 0 ? s.Tq : j1 - s.diagonal + s.window_left;
    const unsigned i_first = unsigned(first_row < 0 ? 0 : first_row < s.Tq ? first_row : s.Tq) / rows * rows;
    const unsigned i_end = unsigned(end_row < 0 ? 0 : end_row < s.Tq ? end_row : s.Tq);
    unsigned h = hk * group, i0 = i_first;
    float dk[KM][KN][4], dv[KM][KN][4];
    fill(dk, 0.f), fill(dv, 0.f);
    if (i_first < i_end) {
      load_tile<T, D, keys, threads>(shared + k_at, k, j0, s.Tk);
      load_tile<T, D, keys, threads>(shared + v_at, v, j0, s.Tk);
      load_queries(h, i0), load_gradients(h, i0);
      cp_async_commit();
    }
#pragma unroll 1
    while (i_first < i_end && h < (hk + 1) * group) {
      const bool down = i0 + rows < i_end;
      const unsigned next_h = down ? h : h + 1, next_i0 = down ? i0 + rows : i_first;
      const int64_t head = b * s.H + h;
      const bool more = next_h < (hk + 1) * group;
      cp_async_wait<0>();
      __syncthreads();
      float p[SM][SN][4], ds[SM][SN][4];
      if (SR * SC == warps || warp < SR * SC) {
        // probabilities
        fill(p, 0.f);
        multiply<T, D / 16>(p, shared, Operand<T, D, false, true>(q_at, score_row), Operand<T, D, false, false>(k_at, score_key));
        const Place at{b, h, int64_t(i0) + score_row + lane / 4, j0 + score_key + lane % 4 * 2};
        const int64_t last = (i0 + rows < s.Tq ? i0 + rows : s.Tq) - 1;
        const bool whole = j0 + keys <= s.end_column(i0) && s.first_column(last) <= j0;
        // ds: softcap's derivative for the time being
        probabilities<T, plain>(p, ds, s, c, at, whole, shared + base_at + (score_row + lane / 4) * 4);
        uint32_t kept = ~0u;
        uint32_t rounded[halve ? SM : 1][SN][2];
        if constexpr (halve) {
          write_fragments<T, keys>(shared + p_at, p, score_row, score_key / 16);
#pragma unroll
          for (int m = 0; m < SM; m++)
#pragma unroll
            for (int n = 0; n < SN; n++) rounded[m][n][0] = pack_2<T>(p[m][n][0], p[m][n][1]), rounded[m][n][1] = pack_2<T>(p[m][n][2], p[m][n][3]);
        } else if constexpr (plain) {
          write_fragments<T, keys>(shared + p_at, p, score_row, score_key / 16);
        } else {
          // through softcap, before anything is dropped: what a score's gradient is multiplied by
          each_score<SM, SN>([&](int m, int n, int e, int, int) { ds[m][n][e] *= p[m][n][e]; });
          if (s.philox.drop_below)
            each_kept<SM, SN>(s, at, [&](int m, int n, int e, bool keep) {
              p[m][n][e] = keep ? p[m][n][e] : 0.f;
              if (!keep) kept &= ~(1u << ((m * SN + n) * 4 + e));
            });
          write_fragments<T, keys>(shared + p_at, p, score_row, score_key / 16);
          each_score<SM, SN>([&](int m, int n, int e, int, int) { p[m][n][e] = ds[m][n][e]; });
        }
        // dS = P (dP - delta)
        fill(ds, 0.f);
        multiply<T, D / 16>(ds, shared, Operand<T, D, false, true>(do_at, score_row), Operand<T, D, false, false>(v_at, score_key));
        const float keep_scale = s.philox.drop_below ? s.philox.keep_scale : 1.f;
        if constexpr (reread)
          each_pair<T, keys, 1, 1, SM, SN>(shared + p_at, score_row, score_key / 16, [&](int m, int n, int e, const unsigned char* at) {
            const float of_row = ((const float*)(shared + delta_at))[score_row + lane / 4 + 16 * m + 4 * e];
            float low, high;
            unpack_2<T>(*(const uint32_t*)at, low, high);
            ds[m][n][e] = low * (ds[m][n][e] - of_row), ds[m][n][e + 1] = high * (ds[m][n][e + 1] - of_row);
          });
        else
          each_score<SM, SN>([&](int m, int n, int e, int row, int) {
            const float of_row = ((const float*)(shared + delta_at))[score_row + row + lane / 4];
            float& d = ds[m][n][e];
            if constexpr (halve) {
              float low, high;
              unpack_2<T>(rounded[m][n][e / 2], low, high);
              d = (e % 2 ? high : low) * (d - of_row);
            } else {
              const bool keep = kept >> ((m * SN + n) * 4 + e) & 1;
              d = p[m][n][e] * ((keep ? d * keep_scale : 0.f) - of_row);
            }
          });
        if constexpr (tile.apart) write_fragments<T, keys>(shared + ds_at, ds, score_row, score_key / 16);
      }
      __syncthreads();
      multiply<T, rows / 16>(dv, shared, Operand<T, keys, true, true, KR>(p_at, 0, warp / KC), Operand<T, D, true, false, KC>(do_at, 0, warp % KC));
      if constexpr (!tile.apart) {
        __syncthreads();
        if (SR * SC == warps || warp < SR * SC) write_fragments<T, keys>(shared + ds_at, ds, score_row, score_key / 16);
        if (more) load_gradients(next_h, next_i0);
        cp_async_commit();
        __syncthreads();
      }
      float dq[QM][QN][4];  // the sums so far, on their way while dK is made
      float4* sums = dq_sums + (((head * splits + split) * row_blocks + i0 / rows) * (QM * QN)) * threads + threadIdx.x;
#pragma unroll
      for (int m = 0; m < QM; m++)
#pragma unroll
        for (int n = 0; n < QN; n++) {
          unpack<float>(load_16(sums + (m * QN + n) * threads), dq[m][n]);
        }
      multiply<T, rows / 16>(dk, shared, Operand<T, keys, true, true, KR>(ds_at, 0, warp / KC), Operand<T, D, true, false, KC>(q_at, 0, warp % KC));
      __syncthreads();
      // the queries' tile is free, what follows needs only dS and K: the next one is on its way meanwhile
      if (more) load_queries(next_h, next_i0);
      if (tile.apart && more) load_gradients(next_h, next_i0);
      cp_async_commit();
      multiply<T, keys / 16>(dq, shared, Operand<T, keys, false, true>(ds_at, warp / QC * 16 * QM), Operand<T, D, true, false, QC>(k_at, 0, warp % QC));
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
    write_fragments<T, D, KC, KR>(shared + k_at, dk, warp / KC * 16, warp % KC, c.scale);
    write_fragments<T, D, KC, KR>(shared + v_at, dv, warp / KC * 16, warp % KC, keep_scale);
    __syncthreads();
    store_tile<T, D, keys, threads>(shared + k_at, Rows<T>{s.dk.at<T>(b, hk, 0), s.dk.row, int(s.D), aligned}, j0, s.Tk);
    store_tile<T, D, keys, threads>(shared + v_at, Rows<T>{s.dv.at<T>(b, hk, 0), s.dv.row, int(s.Dv), aligned}, j0, s.Tk);
    __syncthreads();
  }
}

// The gradient of an additive bias, a pass of its own so that its sums over broadcast dimensions have one order: a block takes a tile
// of the bias and goes over all the tiles of scores that it was added to.
template <class T, int D>
__global__ void __launch_bounds__(32 * backward_tile<T, D, false>.warps)
    attention_dbias(const __grid_constant__ AttentionArgs s, const __grid_constant__ Scores c, const __grid_constant__ BiasGradient g,
                    const float* base, const float* delta) {
  constexpr BackwardTile tile = backward_tile<T, D, false>;
  constexpr int rows = tile.rows, keys = tile.keys, threads = 32 * tile.warps, size = sizeof(T);
  constexpr int k_at = 0, v_at = k_at + keys * D * size, q_at = v_at + keys * D * size, do_at = q_at + rows * D * size;
  constexpr int base_at = do_at + rows * D * size, delta_at = base_at + rows * 4;
  constexpr int SR = tile.score_warp_rows(), SC = tile.score_warp_columns(), SM = rows / 16 / SR, SN = keys / 8 / SC;
  GK_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, score_row = warp / SC * 16 * SM, score_key = warp % SC * 8 * SN;
  const bool sum_rows = g.size[2] == 1, sum_columns = g.size[3] == 1, scores_here = SR * SC == tile.warps || warp < SR * SC;
  const int64_t row_tiles = (s.Tq + rows - 1) / rows, key_tiles = (s.Tk + keys - 1) / keys;
  int64_t at = blockIdx.x;
  const int64_t key_tile = sum_columns ? 0 : at % key_tiles;
  at /= sum_columns ? 1 : key_tiles;
  const int64_t row_tile = sum_rows ? 0 : at % row_tiles;
  at /= sum_rows ? 1 : row_tiles;
  const int64_t bias_h = at % g.size[1], bias_b = at / g.size[1];

  float sum[SM][SN][4];
  fill(sum, 0.f);
  for (int64_t b = g.size[0] == 1 ? 0 : bias_b; b < (g.size[0] == 1 ? s.B : bias_b + 1); b++)
    for (int64_t h = g.size[1] == 1 ? 0 : bias_h; h < (g.size[1] == 1 ? s.H : bias_h + 1); h++)
      for (int64_t i0 = row_tile * rows; i0 < (sum_rows ? s.Tq : row_tile * rows + 1); i0 += rows)
        for (int64_t j0 = key_tile * keys; j0 < (sum_columns ? s.Tk : key_tile * keys + 1); j0 += keys) {
          const int64_t last = (i0 + rows < s.Tq ? i0 + rows : s.Tq) - 1, hk = h / (s.H / s.Hk), head = b * s.H + h;
          if (j0 >= s.end_column(last) || j0 + keys <= s.first_column(i0)) continue;
          __syncthreads();
          load_tile<T, D, keys, threads>(shared + k_at, Rows<const T>{s.k.at<const T>(b, hk, 0), s.k.row, int(s.D), c.aligned}, j0, s.Tk);
          load_tile<T, D, keys, threads>(shared + v_at, Rows<const T>{s.v.at<const T>(b, hk, 0), s.v.row, int(s.Dv), c.aligned}, j0, s.Tk);
          load_tile<T, D, rows, threads>(shared + q_at, Rows<const T>{s.q.at<const T>(b, h, 0), s.q.row, int(s.D), c.aligned}, i0, s.Tq);
          load_tile<T, D, rows, threads>(shared + do_at, Rows<const T>{s.dout.at<const T>(b, h, 0), s.dout.row, int(s.Dv), c.aligned}, i0, s.Tq);
          for (int r = threadIdx.x; r < rows; r += threads) {
            *(float*)(shared + base_at + 4 * r) = i0 + r < s.Tq ? base[head * s.Tq + i0 + r] : 0.f;
            *(float*)(shared + delta_at + 4 * r) = i0 + r < s.Tq ? delta[head * s.Tq + i0 + r] : 0.f;
          }
          cp_async_commit();
          cp_async_wait<0>();
          __syncthreads();
          if (!scores_here) continue;
          float p[SM][SN][4], dp[SM][SN][4];
          fill(p, 0.f);
          multiply<T, D / 16>(p, shared, Operand<T, D, false, true>(q_at, score_row), Operand<T, D, false, false>(k_at, score_key));
          const Place place{b, h, i0 + score_row + lane / 4, j0 + score_key + lane % 4 * 2};
          probabilities<T, false>(p, dp, s, c, place, false, shared + base_at + (score_row + lane / 4) * 4);
          fill(dp, 0.f);
          multiply<T, D / 16>(dp, shared, Operand<T, D, false, true>(do_at, score_row), Operand<T, D, false, false>(v_at, score_key));
          if (s.philox.drop_below)
            each_kept<SM, SN>(s, place, [&](int m, int n, int e, bool kept) { dp[m][n][e] = kept ? dp[m][n][e] * s.philox.keep_scale : 0.f; });
          each_score<SM, SN>([&](int m, int n, int e, int row, int) {
            sum[m][n][e] += p[m][n][e] * (dp[m][n][e] - ((const float*)(shared + delta_at))[score_row + row + lane / 4]);
          });
        }
  // the tile's own sums over rows, then over columns, in order
  __syncthreads();
  using Sums = Tile<float, keys>;
  const auto value = [&](int row, int column) -> float& { return *(float*)(shared + Sums::element(row, column)); };
  if (scores_here) write_fragments<float, keys>(shared, sum, score_row, score_key / 16);
  __syncthreads();
  if (sum_rows)
    for (int column = threadIdx.x; column < keys; column += threads)
      for (int row = 1; row < rows; row++) value(0, column) += value(row, column);
  __syncthreads();
  if (sum_columns)
    for (int row = threadIdx.x; row < (sum_rows ? 1 : rows); row += threads)
      for (int column = 1; column < keys; column++) value(row, 0) += value(row, column);
  __syncthreads();
  const int64_t first_row = row_tile * rows, first_key = key_tile * keys;
  for (int i = threadIdx.x; i < (sum_rows ? 1 : rows) * (sum_columns ? 1 : keys); i += threads) {
    const int row = sum_columns ? i : i / keys, column = sum_columns ? 0 : i % keys;
    if (first_row + row >= g.size[2] || first_key + column >= g.size[3]) continue;
    const int64_t to = ((bias_b * g.size[1] + bias_h) * g.size[2] + first_row + row) * g.size[3] + first_key + column;
    if (s.bias_kind == Bias::stat) ((float*)g.data)[to] = value(row, column);
    else ((T*)g.data)[to] = from_float<T>(value(row, column));
  }
}

// After: dq = scale * the sums of all splits, in their order. The threads lie over a block of queries as in attention_bwd.
template <class T, int D, bool plain>
__global__ void __launch_bounds__(32 * backward_tile<T, D, plain>.warps)
    attention_bwd_dq(const __grid_constant__ AttentionArgs s, const __grid_constant__ Scores c, const float4* dq_sums, unsigned splits, unsigned row_blocks) {
  constexpr BackwardTile tile = backward_tile<T, D, plain>;
  constexpr int rows = tile.rows, threads = 32 * tile.warps;
  constexpr int QR = tile.query_warp_rows(), QC = tile.warps / QR, QM = rows / 16 / QR, QN = D / 8 / QC;
  GK_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32;
  const unsigned head = blockIdx.x / row_blocks, block = blockIdx.x % row_blocks;
  float dq[QM][QN][4];
  fill(dq, 0.f);
#pragma unroll
  for (int m = 0; m < QM; m++)
#pragma unroll
    for (int n = 0; n < QN; n++)
      for (unsigned split = 0; split < splits; split++) {
        float more[4];
        unpack<float>(load_16(dq_sums + (((int64_t(head) * splits + split) * row_blocks + block) * (QM * QN) + m * QN + n) * threads + threadIdx.x), more);
#pragma unroll
        for (int e = 0; e < 4; e++) dq[m][n][e] += more[e];
      }
  write_fragments<T, D, QC>(shared, dq, warp / QC * 16 * QM, warp % QC, c.scale);
  __syncthreads();
  store_tile<T, D, rows, threads>(shared, Rows<T>{s.dq.at<T>(head / unsigned(s.H), head % unsigned(s.H), 0), s.dq.row, int(s.D), plain || c.aligned},
                               int64_t(block) * rows, s.Tq);
}

// ==== launcher ====

static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_cuda(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse, const OptTensor& bias,
    const OptTensor& alibi_slopes, const OptTensor& rng_state, double scale, double softcap, double dropout_p, int64_t causal_offset,
    int64_t window_left, int64_t window_right, bool need_dbias) {
  const char* op = "attention_bwd";
  AttentionArgs s = attention_args(op, q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset, window_left,
                                   window_right);
  attention_bwd_args(op, s, dout, q, o, lse, bias, need_dbias);
  check_gpu_tensors(op, q, {&dout, &k, &v, &o, &lse}, {&bias, &alibi_slopes, &rng_state});
  const Gpu gpu(q);
  Tensor dq = new_heads(q, s.B, s.H, s.Tq, s.D), dk = new_heads(k, s.B, s.Hk, s.Tk, s.D), dv = new_heads(v, s.B, s.Hk, s.Tk, s.Dv);
  Tensor dbias = need_dbias ? new_tensor(*bias, bias->sizes(), bias->scalar_type()) : new_tensor(q, {0}, q.scalar_type());
  s.dq = view_of(dq), s.dk = view_of(dk), s.dv = view_of(dv);
  bool aligned = true;
  for (const Tensor* t : {&dout, &q, &k, &v, &o, (const Tensor*)&dq, (const Tensor*)&dk, (const Tensor*)&dv}) aligned = aligned && whole_chunks(*t);
  const Scores c = scores_of(s, aligned, element_size(q.scalar_type()), large_shared(gpu.arch()));
  Tensor stats = new_tensor(q, {2, s.B * s.H, s.Tq}, ScalarType::Float);
  float *base = out<float>(stats), *delta = base + s.B * s.H * s.Tq;

  with_dtype(q.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto dim, auto is_plain) {
      constexpr int D = decltype(dim)::value;
      constexpr bool plain = decltype(is_plain)::value;
      constexpr BackwardTile tile = backward_tile<T, D, plain>;
      const int64_t row_blocks = cdiv(s.Tq, tile.rows), key_blocks = cdiv(s.Tk, tile.keys), heads = s.B * s.Hk;
      // a processor for each block of threads, so many as there are; each split costs memory of a float32 dq
      const int64_t splits = std::clamp<int64_t>(heads ? cdiv(gpu.processors(), heads) : 1, 1, std::clamp<int64_t>(key_blocks, 1, most_splits));
      GK_CHECK(heads * splits < int64_t{1} << 31 && row_blocks * s.B * s.H < int64_t{1} << 31, op, ": at most 2147483647 blocks, got ",
               heads * splits, " of keys and ", row_blocks * s.B * s.H, " of queries");
      Tensor sums = new_tensor(q, {s.B * s.H * splits * row_blocks, tile.rows * D}, ScalarType::Float);
      launch(GK_KERNEL(attention_bwd_start<T>), unsigned(cdiv(s.B * s.H * s.Tq, 4)), 128, 0, gpu.stream, s, aligned, plain ? log2_e : 1.f, base,
             delta, out<float4>(sums), sums.numel() / 4);
      launch(GK_KERNEL(attention_bwd<T, D, plain>), unsigned(heads * splits), 32 * tile.warps, tile.shared_bytes(D, sizeof(T)), gpu.stream, s, c,
             base, delta, out<float4>(sums), unsigned(splits), unsigned(row_blocks));
      launch(GK_KERNEL(attention_bwd_dq<T, D, plain>), unsigned(row_blocks * s.B * s.H), 32 * tile.warps, tile.rows * D * sizeof(T), gpu.stream,
             s, c, data<float4>(sums), unsigned(splits), unsigned(row_blocks));
      if constexpr (!plain)
        if (need_dbias) {
          const BiasGradient g = {dbias.mutable_data_ptr(), {bias->size(0), bias->size(1), bias->size(2), bias->size(3)}};
          const int64_t tiles = g.size[0] * g.size[1] * (g.size[2] == 1 ? 1 : row_blocks) * (g.size[3] == 1 ? 1 : key_blocks);
          GK_CHECK(tiles < int64_t{1} << 31, op, ": at most 2147483647 tiles of the bias, got ", tiles);
          launch(GK_KERNEL(attention_dbias<T, D>), unsigned(tiles), 32 * tile.warps, tile.shared_bytes(D, sizeof(T)), gpu.stream, s, c, g, base, delta);
        }
    };
    const int D = padded_head_dim(std::max(s.D, s.Dv), c.plain);
    if constexpr (!std::is_same_v<T, float>)
      if (c.plain) return with_dim<64, 96, 128>(D == 80 ? 96 : D, [&](auto dim) { run(dim, std::true_type()); });
    with_dim<64, 128, 256>(D, [&](auto dim) { run(dim, std::false_type()); });
  });
  return {dq, dk, dv, dbias};
}

GK_REGISTER(m) { m.impl("attention_bwd", TORCH_BOX(&attention_bwd_cuda)); }

}  // namespace gk
