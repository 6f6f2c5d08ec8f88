// What attention's kernels share: tiles in shared memory, products of tiles, score steps, dropout. The op:
// gpt_kernels/ops/attention.py.
//
// A score tile and an output tile live in registers as the accumulators of mma_m16n8k16: acc[m][n][e] is row 16 m + g + 8 (e /
// 2), column 8 n + 2 t + e % 2, with g = lane / 4 and t = lane % 4. float32 keeps the same places and multiplies in true
// float32.
#pragma once
#include "common.cuh"

#include "../args/attention.h"

namespace gk {

constexpr float log2_e = 1.44269504f, infinity = INFINITY;

// The GPU that code is compiled for, from which its tiles follow; the simulator's is the oldest, or one that a test names.
#ifdef __CUDA_ARCH__
constexpr int tile_arch = __CUDA_ARCH__ / 10;
#elif defined(GK_TILE_ARCH)
constexpr int tile_arch = GK_TILE_ARCH;
#else
constexpr int tile_arch = 80;
#endif

// ---- tiles in shared memory ----
// Rows of `columns` elements in chunks of 16 bytes. Chunk c of a row stands at c ^ turn(row), so that the same chunk of eight
// neighbouring rows, which is what ldmatrix and a warp's stores of 16-bit fragments touch, lies in 32 different banks; and so
// do two neighbouring chunks of four rows, which is what half a warp's stores of float32 fragments touch.
template <class T, int columns> struct Tile {
  static constexpr int chunks = columns / per_16<T>, row_bytes = columns * int(sizeof(T));
  static constexpr int period = chunks % 8 == 0 ? 8 : chunks % 4 == 0 ? 4 : chunks % 2 == 0 ? 2 : 1;
  static constexpr int half = period > 1 ? period / 2 : 1;
  GK_DEVICE static int turn(int row) {
    return row / (8 / period) % half * 2 % period + row / (8 / period) / half % 2 * (period > 1);
  }
  GK_DEVICE static int chunk(int row, int c) { return row * row_bytes + (c ^ turn(row)) * 16; }
  GK_DEVICE static int element(int row, int column) {
    return chunk(row, column / per_16<T>) + column % per_16<T> * int(sizeof(T));
  }
};

// A matrix of `width` columns in global memory; `aligned`: its chunks stand on multiples of 16 bytes and are whole.
template <class T> struct Rows {
  T* at;
  int64_t stride;
  int width;
  bool aligned;
};
template <class T> GK_DEVICE Rows<T> rows_of(const View& view, unsigned b, unsigned h, int64_t width, bool aligned) {
  return {view.at<T>(b, h, 0), view.row, int(width), aligned};
}

// How `threads` share a tile: neighbours take a row's neighbouring chunks, and a thread's rows are a multiple of 8 apart (two
// warps or more), so that its place in a row and its turn never change.
template <class T, int columns, int rows, int threads> struct Share {
  static constexpr int chunks = Tile<T, columns>::chunks;
  static constexpr int lowest_bit = chunks & -chunks, widest = threads < 64 ? 8 : threads / 8;
  static constexpr int group = lowest_bit < widest ? lowest_bit : widest, step = threads / group;
  // f(row, chunk)
  template <class F> GK_DEVICE static void each(int thread, const F& f) {
    const int row = thread / group, chunk = thread % group;
#pragma unroll 1
    for (int r = 0; r < rows; r += step)
      if (rows % step == 0 || row + r < rows)
#pragma unroll
        for (int c = 0; c < chunks; c += group) f(row + r, chunk + c);
  }
};

// Rows [first, first + rows) of a matrix to a tile, zeros beyond its width unless `full`, and beyond row `end` if `tail`.
// Asynchronous where aligned: the thread's pointer then goes from row to row by one addition each.
template <class T, int columns, int rows, int threads, bool full = false, bool tail = true>
GK_DEVICE void load_tile(unsigned char* tile, const Rows<const T>& from, int first, int end, int thread = threadIdx.x) {
  using Tile_ = Tile<T, columns>;
  using S = Share<T, columns, rows, threads>;
  opaque(first);  // here and below: nothing that follows from it shall live on from tile to tile, which would take registers
  const int there = end - first;
  if (from.aligned) {
    static_assert(S::group % Tile_::period == 0 && S::step % 8 == 0);
    const int row = thread / S::group, chunk = thread % S::group;
    int column = chunk * per_16<T>;
    opaque(column);
    int64_t offset = int64_t(first + row) * from.stride + column;
    opaque(offset);
    const T* at = from.at + offset;
    unsigned char* const to = tile + Tile_::chunk(row, chunk);
#pragma unroll
    for (int r = 0; r < rows; r += S::step) {
      if (rows % S::step == 0 || row + r < rows)
#pragma unroll
        for (int c = 0; c < S::chunks; c += S::group) {
          const bool valid = (!tail || row + r < there) && (full || (chunk + c) * per_16<T> < from.width);
          cp_async_16(to + r * Tile_::row_bytes + c * 16, at + c * per_16<T>, valid ? 16 : 0);
        }
      at += S::step * from.stride;
      opaque(at);
    }
  } else {
    const T* start = from.at + int64_t(first) * from.stride;
    S::each(thread, [&](int row, int c) {
      float v[per_16<T>];
#pragma unroll
      for (int e = 0; e < per_16<T>; e++) {
        const int column = c * per_16<T> + e;
        v[e] = row < there && column < from.width ? to_float(start[row * from.stride + column]) : 0.f;
      }
      store_16(tile + Tile_::chunk(row, c), pack<T>(v));  // exact: they come from T
    });
  }
}

// The other way, of rows that are there and columns of the width.
template <class T, int columns, int rows, int threads>
GK_DEVICE void store_tile(const unsigned char* tile, const Rows<T>& to, int first, int end, int thread = threadIdx.x) {
  opaque(thread);  // or the places of all chunks live through a loop around this
  T* start = to.at + int64_t(first) * to.stride;
  const int there = end - first;
  Share<T, columns, rows, threads>::each(thread, [&](int row, int c) {
    if (row >= there || c * per_16<T> >= to.width) return;
    const uint4 bits = load_16(tile + Tile<T, columns>::chunk(row, c));
    T* out = start + row * to.stride + c * per_16<T>;
    if (to.aligned) return store_16(out, bits);
    float v[per_16<T>];
    unpack<T>(bits, v);
#pragma unroll
    for (int e = 0; e < per_16<T>; e++)
      if (c * per_16<T> + e < to.width) out[e] = from_float<T>(v[e]);
  });
}

// ---- operands of a product, in blocks of 16 x 16 ----
// An operand is a tile, stored with the sum's index along rows (`transposed`) or along columns. Its blocks along the other
// index are `stride` blocks apart in a transposed tile, where warps share columns in turn. is_a: the left operand.
// first_block: below `stride`, or a multiple of the blocks that a warp takes.
template <class T, int columns, bool transposed, bool is_a, int stride = 1> struct Operand {
  using Tile_ = Tile<T, columns>;
  static constexpr int apart = transposed ? stride : 1;  // blocks between a lane's chunks of one row
  static constexpr int variants = Tile_::period > 2 * apart ? Tile_::period / (2 * apart) : 1;
  int at[variants];

  // `base`: where the tile is in shared memory
  GK_DEVICE Operand(int base, int first_row, int first_block = 0) {
    // the four 8 x 8 matrices of an ldmatrix, in the order of a fragment's registers
    const int lane = threadIdx.x % 32;
    constexpr bool rows_first = transposed != is_a;
    const int row = first_row + (rows_first ? lane % 16 : lane % 8 + lane / 16 * 8);
    const int chunk = 2 * first_block + (rows_first ? lane / 16 : lane / 8 % 2);
#pragma unroll
    for (int v = 0; v < variants; v++) at[v] = base + (Tile_::chunk(row, chunk) ^ v * 32 * apart);
  }
  GK_DEVICE void load(uint32_t (&r)[4], const unsigned char* shared, int block, int k) const {
    const int row = transposed ? k : block, column = transposed ? block : k;
    const void* p = shared + at[column % variants] + column / variants * (variants * 32 * apart) + row * 16 * Tile_::row_bytes;
    if constexpr (transposed) ldmatrix_x4_trans(r, p);
    else ldmatrix_x4(r, p);
  }
};
// float32: values one by one, or, rounded to tf32, the fragments of mma_m16n8k8_tf32
template <int columns, bool transposed, bool is_a, int stride> struct Operand<float, columns, transposed, is_a, stride> {
  using Tile_ = Tile<float, columns>;
  int base, row, block;
  GK_DEVICE Operand(int base, int first_row, int first_block = 0) : base(base), row(first_row), block(first_block) {}
  // of a block of 16 rows: they turn as the tile's first ones do
  GK_DEVICE int at(int row_block) const { return base + (row + row_block * 16) * Tile_::row_bytes; }
  // four values along the sum from k on, of index `i` of the lane's: row of the left operand, column of the right
  GK_DEVICE void load(float (&v)[4], const unsigned char* shared, int i, int k) const {
    const int lane = threadIdx.x % 32;
    const int block_of_i = i / (is_a ? 2 : 4), inside = is_a ? i % 2 * 8 + lane / 4 : i / 2 % 2 * 8 + lane % 4 * 2 + i % 2;
    if constexpr (transposed) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        v[e] = *(const float*)(shared + at(0) + Tile_::element(k + e, (block + block_of_i * stride) * 16 + inside));
    } else {
      unpack<float>(load_16(shared + at(block_of_i) + Tile_::chunk(inside, k / 4)), v);
    }
  }
  // block i of 16 rows of the left operand, or of 16 columns of the right, from k on: eight of the sum
  GK_DEVICE void load_tf32(uint32_t (&r)[4], const unsigned char* shared, int i, int k) const {
    const int lane = threadIdx.x % 32;
    if constexpr (transposed) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int along = (is_a ? e / 2 : e % 2) * 4 + lane % 4, across = (is_a ? e % 2 : e / 2) * 8 + lane / 4;
        r[e] = *(const uint32_t*)(shared + at(0) + Tile_::element(k + along, (block + i * stride) * 16 + across));
      }
    } else {  // an 8 x 8 matrix of 16 bits is one of 8 x 4 floats
      const int across = is_a ? lane % 16 : lane % 8 + lane / 16 * 8, along = is_a ? lane / 16 : lane / 8 % 2;
      ldmatrix_x4(r, shared + at(i) + Tile_::chunk(across, k / 4 + along));
    }
#pragma unroll
    for (int e = 0; e < 4; e++) r[e] = cvt_tf32(__uint_as_float(r[e]));
  }
};

// acc += A B, the k-th block of 16 of the sum, with A in registers
template <class T, int M, int N, class B>
GK_DEVICE void multiply_step(float (&acc)[M][N][4], const unsigned char* shared, const uint32_t (&left)[M][4], const B& b,
                             int k) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t r[4];
    b.load(r, shared, n / 2, k);
    const uint32_t right[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
    for (int m = 0; m < M; m++)
      mma_m16n8k16<T>(acc[m][n], left[m], right[0]), mma_m16n8k16<T>(acc[m][n + 1], left[m], right[1]);
  }
}
// acc += A B over `depth` blocks of 16; tf32: of float32 rounded to nearest, on the tensor cores (which would truncate).
// `apart`: a product of true float32 is a sum of its own before it is added, so many columns at a time as there are registers for: one
// running sum over all the tiles of a long sequence loses what a tile adds, in proportion to the root of its length.
template <class T, int depth, bool apart = false, int M, int N, class A, class B>
GK_DEVICE void multiply(float (&acc)[M][N][4], const unsigned char* shared, const A& a, const B& b,
                        [[maybe_unused]] bool tf32 = false) {
  if constexpr (!std::is_same_v<T, float>) {
#pragma unroll
    for (int k = 0; k < depth; k++) {
      uint32_t left[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) a.load(left[m], shared, m, k);
      multiply_step<T>(acc, shared, left, b, k);
    }
  } else if (tf32) {
#pragma unroll 1
    for (int k = 0; k < depth * 16; k += 8) {
      uint32_t left[M][4], r[4];
#pragma unroll
      for (int m = 0; m < M; m++) a.load_tf32(left[m], shared, m, k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        b.load_tf32(r, shared, n / 2, k);
        const uint32_t right[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
        for (int m = 0; m < M; m++)
          mma_m16n8k8_tf32(acc[m][n], left[m], right[0]), mma_m16n8k8_tf32(acc[m][n + 1], left[m], right[1]);
      }
    }
  } else {
    constexpr int columns = apart && M * N > 8 ? 8 / M : N;
    static_assert(N % columns == 0);
#pragma unroll
    for (int first = 0; first < N; first += columns) {
      float sum[M][columns][4];
#pragma unroll
      for (int i = 0; i < M * columns * 4; i++)
        sum[i / 4 / columns][i / 4 % columns][i % 4] = apart ? 0.f : acc[i / 4 / columns][i / 4 % columns][i % 4];
#pragma unroll 1
      for (int k = 0; k < depth * 16; k += 4) {
        opaque(k);  // or every address lives through the loop
        float left[2 * M][4], right[4];
#pragma unroll
        for (int i = 0; i < 2 * M; i++) a.load(left[i], shared, i, k);
#pragma unroll
        for (int j = 0; j < 2 * columns; j++) {
          b.load(right, shared, 2 * first + j, k);
#pragma unroll
          for (int i = 0; i < 2 * M; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[i / 2][j / 2][i % 2 * 2 + j % 2] += left[i][e] * right[e];
        }
      }
#pragma unroll
      for (int i = 0; i < M * columns * 4; i++) {
        float& to = acc[i / 4 / columns][first + i / 4 % columns][i % 4];
        to = apart ? to + sum[i / 4 / columns][i / 4 % columns][i % 4] : sum[i / 4 / columns][i / 4 % columns][i % 4];
      }
    }
  }
}
// Accumulators, rounded, as they lie are what the tensor cores take as a left operand: two registers of each four values.
template <class T, int M, int N> GK_DEVICE void round_tile(uint32_t (&to)[M][N][2], const float (&from)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) to[m][n][half] = pack_2<T>(from[m][n][2 * half], from[m][n][2 * half + 1]);
}
// acc += P B with P so rounded
template <class T, int M, int N, int depth, class B>
GK_DEVICE void multiply(float (&acc)[M][N][4], const unsigned char* shared, const uint32_t (&p)[M][depth][2], const B& b) {
#pragma unroll
  for (int k = 0; k < depth / 2; k++) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 4; r++) left[m][r] = p[m][2 * k + r / 2][r % 2];
    multiply_step<T>(acc, shared, left, b, k);
  }
}

// The lane's places in a tile of accumulators' shape: f(m, n, e, address) for every even e, that is for two neighbours of a
// row. Rows from `row` on, in blocks of 16 that are row_stride blocks apart; columns likewise, first_block as an operand's.
template <class T, int columns, int stride, int row_stride, int M, int N, class F>
GK_DEVICE void each_pair(unsigned char* tile, int row, int first_block, const F& f) {
  using Tile_ = Tile<T, columns>;
  int lane = threadIdx.x % 32;
  opaque(lane);  // or an address for every n lives through a loop around this
  const int start = Tile_::element(row + lane / 4, first_block * 16 + lane % 4 * 2);
#pragma unroll
  for (int n = 0; n < N; n++) {
    const int chunk = (n / 2 * stride * 16 + n % 2 * 8) / per_16<T>, inside = chunk % Tile_::period;
    unsigned char* const top = tile + (start ^ inside * 16) + (chunk - inside) * 16;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int e = 0; e < 4; e += 2)  // a multiple of 8 rows further down the turn is the same
        f(m, n, e, top + (16 * row_stride * m + 4 * e) * Tile_::row_bytes);
  }
}
// Accumulators, times `factor`, to a tile as T.
template <class T, int columns, int stride = 1, int row_stride = 1, int M, int N>
GK_DEVICE void write_fragments(unsigned char* tile, const float (&acc)[M][N][4], int row, int first_block, float factor = 1.f) {
  each_pair<T, columns, stride, row_stride, M, N>(tile, row, first_block, [&](int m, int n, int e, unsigned char* p) {
    const float low = acc[m][n][e] * factor, high = acc[m][n][e + 1] * factor;
    if constexpr (std::is_same_v<T, float>) *(uint64_t*)p = __float_as_uint(low) | uint64_t(__float_as_uint(high)) << 32;
    else *(uint32_t*)p = pack_2<T>(low, high);
  });
}

template <int M, int N> GK_DEVICE void fill(float (&acc)[M][N][4], float value) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[m][n][e] = value;
}

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

// ==== host ====

// The head dim that a kernel of no exact one is made for.
inline int padded_head_dim(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }
// f(integral_constant) of a padded head dim
template <int... dims, class F> void with_dim(int D, const F& f) {
  ((D == dims ? (f(std::integral_constant<int, dims>()), 0) : 0), ...);
}

// bytes of shared memory that a block may have
inline int most_shared(int arch) {
  return (arch == 86 || arch == 89 || arch >= 120 ? 99 : arch == 80 || arch == 87 ? 163 : 227) << 10;
}

inline bool whole_chunks(const Tensor& t) {
  const int64_t size = element_size(t.scalar_type());
  bool whole = stands_on_16(t) && t.size(3) * size % 16 == 0;
  for (int d = 0; d < 3; d++) whole = whole && (t.size(d) <= 1 || t.stride(d) * size % 16 == 0);
  return whole;
}

// torch.backends.cuda.matmul asks for TF32 in products of float32.
bool tf32_wanted();

// The kernels for plain scores are those that are tuned: 16 bits, the head dims of GPT models; `fits`: the GPU can run them.
inline Scores scores_of(const AttentionArgs& s, bool aligned, int64_t size, bool fits) {
  const bool tuned = size == 2 && s.D == s.Dv && (s.D == 64 || s.D == 80 || s.D == 96 || s.D == 128) && aligned && fits;
  const bool plain = tuned && s.softcap == 0 && !s.slopes && s.bias_kind == Bias::none && !s.philox.drop_below && s.scale > 0;
  const auto near = [](int64_t x) { return int(std::clamp<int64_t>(x, -far, far)); };
  const int low = s.window_left < 0 ? -far : near(s.diagonal - s.window_left);
  const int high = s.window_right < 0 ? far : near(s.diagonal + s.window_right);
  const float rate = float((plain ? s.scale : 1) * double(log2_e));
  return {plain, aligned,         size == 4 && tf32_wanted(), float(s.scale), float(s.softcap), rate, int(s.Tq), int(s.Tk), low,
          high,  near(s.diagonal)};
}

// Everything that AttentionArgs does not check for a GPU.
inline void check_gpu(const char* op, const AttentionArgs& s, const Tensor& q, std::initializer_list<const Tensor*> more,
                      std::initializer_list<const OptTensor*> optional) {
  GK_CHECK(q.scalar_type() != ScalarType::Double, op, ": q must be float32, bfloat16 or float16, got float64 (CUDA kernels)");
  constexpr int64_t most = far - 1024;
  GK_CHECK(s.Tq <= most && s.Tk <= most, op, ": at most ", most, " tokens, got q ", s.Tq, ", k ", s.Tk, " (CUDA kernels)");
  for (const Tensor* t : more) check_same_device(op, "every argument", *t, q);
  for (const OptTensor* t : optional)
    if (*t) check_same_device(op, "every argument", **t, q);
}

}  // namespace gk
