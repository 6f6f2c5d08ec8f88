// What becomes of a product of queries and keys: scale, softcap, ALiBi, bias, what is hidden, dropout. The formula:
// gpt_kernels/ops/attention.py.
#pragma once
#include "product.cuh"

namespace gk {

constexpr float log2_e = 1.44269504f, infinity = INFINITY;

// ---- what a score is, for kernels ----
constexpr int far = 1 << 30;  // more tokens than there are; the sum of two of them stays within 32 bits
// plain: the score is scale * q k^T and nothing else but hidden columns; `rate` then carries the scale into the exponential.
struct Scores {
  bool plain, aligned, tf32;  // aligned: every matrix's rows are whole chunks of 16 bytes on 16-byte boundaries
  float scale, softcap, rate;
  int Tq, Tk, low, high, diagonal;  // row i sees column j where low <= j - i <= high
  // the columns that rows [i0, i1] can see: begin of the first row, end of the last
  GK_BOTH int first_column(int i) const { return i + low < 0 ? 0 : i + low > Tk ? Tk : i + low; }
  GK_BOTH int end_column(int i) const { return i + high < 0 ? 0 : i + high >= Tk ? Tk : i + high + 1; }
};

// Where a lane's part of a score tile is: its first row and column.
struct Place {
  unsigned b, h;
  int row, column;
};

// f(m, n, e, row, column) for each of the lane's scores; row and column from its first
template <int M, int N, class F> GK_DEVICE void each_score(const F& f) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) f(m, n, e, 16 * m + e / 2 * 8, 8 * n + e % 2);
}

// -inf where a row does not see a column (the columns beyond Tk included); flipped: keys lie along rows, queries along columns.
// A warp whose tile is seen whole does nothing.
template <bool flipped, int M, int N> GK_DEVICE void hide(float (&score)[M][N][4], const Scores& c, const Place& at) {
  const int ahead = at.column - at.row, low = c.low - ahead, high = c.high - ahead, present = c.Tk - at.column;
  constexpr int most_query = flipped ? 8 * N - 7 : 16 * M - 8, most_key = flipped ? 16 * M - 8 : 8 * N - 7;
  if (warp_all(low <= -most_query && high >= most_key && present > most_key)) return;
  each_score<M, N>([&](int m, int n, int e, int row, int column) {
    const int query = flipped ? column : row, key = flipped ? row : column;
    if (key < low + query || key > high + query || key >= present) score[m][n][e] = -infinity;
  });
}

// The warp's part of the bias to its tile of floats in shared memory, row by row whatever its type; -inf where it hides a key.
template <class T, int M, int N>
GK_DEVICE void load_bias(unsigned char* tile, const AttentionArgs& s, const Scores& c, const Place& warp) {
  const auto to_tile = [&](auto type) {
    const auto* bias = s.bias.at<const decltype(type)>(warp.b, warp.h, warp.row) + warp.column * s.bias_column;
#pragma unroll 2
    for (int i = threadIdx.x % 32; i < 128 * M * N; i += 32) {
      const int row = i / (8 * N), column = i % (8 * N);
      float value = 0;
      if (warp.row + row < c.Tq && warp.column + column < c.Tk) {
        const auto x = bias[row * s.bias.row + column * s.bias_column];
        if constexpr (std::is_same_v<decltype(type), uint8_t>) value = x ? 0 : -infinity;
        else value = to_float(x);
      }
      *(float*)(tile + Tile<float, 8 * N>::element(row, column)) = value;
    }
  };
  if (s.bias_kind == Bias::boolean) to_tile(uint8_t());
  else if (s.bias_kind == Bias::stat) to_tile(float());
  else to_tile(T());
  warp_sync();
}

// x to (-1, 1); for 16 bits an error of 2^-22 is none
template <class T> GK_DEVICE float tanh_of(float x) {
  if constexpr (std::is_same_v<T, float>) return tanhf(x);
  else return 1 - 2 * rcp_approx(ex2_approx(2 * log2_e * x) + 1);
}

// Every step from products q k^T to scores, in place, but for hide(). slope[m][n][e] becomes softcap's derivative, if wanted.
// bias: the warp's tile of it
template <class T, bool derivative, int M, int N>
GK_DEVICE void score_steps(float (&score)[M][N][4], float (&slope)[M][N][4], const AttentionArgs& s, const Scores& c,
                           const Place& at, unsigned char* bias) {
  each_score<M, N>([&](int m, int n, int e, int, int) { score[m][n][e] *= c.scale; });
  if constexpr (derivative) fill(slope, 1.f);
  if (c.softcap > 0) {
    const float inverse = 1 / c.softcap;
    each_score<M, N>([&](int m, int n, int e, int, int) {
      const float t = tanh_of<T>(score[m][n][e] * inverse);
      score[m][n][e] = c.softcap * t;
      if constexpr (derivative) slope[m][n][e] = 1 - t * t;
    });
  }
  if (s.slopes) {
    const float alibi = ((const float*)s.slopes)[at.b * s.slopes_batch + at.h * s.slopes_head];
    const int first = at.row - at.column + c.diagonal;
    each_score<M, N>(
        [&](int m, int n, int e, int row, int column) { score[m][n][e] -= alibi * fabsf(float(first + row - column)); });
  }
  if (s.bias_kind != Bias::none)
    each_pair<float, 8 * N, 1, 1, M, N>(bias, 0, 0, [&](int m, int n, int e, const unsigned char* p) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float value = ((const float*)p)[i];
        // a hidden key's score may be anything, even NaN: it is replaced, not added to
        float& x = score[m][n][e + i];
        x = value == -infinity ? -infinity : x + value;
      }
    });
}

// ---- dropout ----
// A 4 x 4 transpose over the quad: afterwards w[i] is word t of lane i.
GK_DEVICE void transpose_quad(uint32_t (&w)[4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (!(i & distance)) {
        const bool upper = t & distance;
        const uint32_t got = shfl_xor(upper ? w[i] : w[i + distance], distance);
        w[i] = upper ? got : w[i], w[i + distance] = upper ? w[i + distance] : got;
      }
}
// keep(m, n, e, kept) for each of the lane's scores. A call of Philox serves eight columns of a row, that is the four lanes of
// a quad: each calls it for another group of columns, then they trade words.
template <int M, int N, class F> GK_DEVICE void each_kept(const AttentionArgs& s, const Place& at, const F& keep) {
  const uint64_t seed = s.philox.state[0];
  const uint32_t offset = uint32_t(s.philox.state[1]), plane = at.b * unsigned(s.H) + at.h, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int n = 0; n < N; n += 4) {
        const uint32_t group = at.column / 8 + n + t, row = at.row + 16 * m + 8 * half;
        const uint4 words = philox_8(seed, offset, group, row, plane);
        uint32_t w[4] = {words.x, words.y, words.z, words.w};
        transpose_quad(w);
#pragma unroll
        for (int i = 0; i < 4 && n + i < N; i++) {
          keep(m, n + i, 2 * half, (w[i] & 0xFFFF) >= s.philox.drop_below);
          keep(m, n + i, 2 * half + 1, w[i] >> 16 >= s.philox.drop_below);
        }
      }
}

}  // namespace gk
