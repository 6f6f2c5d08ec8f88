// Products of tiles, on tensor cores in 16 bits and TF32, by multiply-adds in float32.
//
// A tile of results lives in registers as the accumulators of mma_m16n8k16: acc[m][n][e] is row 16 m + g + 8 (e / 2), column
// 8 n + 2 t + e % 2, with g = lane / 4 and t = lane % 4. float32 keeps the same places and multiplies in true float32.
#pragma once
#include "tile.cuh"

namespace gk {

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
// `apart`: a product of true float32 is a sum of its own before it is added, so many columns at a time as there are registers
// for: one running sum over all the tiles of a long sequence loses what a tile adds, in proportion to the root of its length.
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
        opaque(k);  // or the addresses of all steps are computed before the loop, a register each
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
  opaque(lane);  // or an address for every n is computed before the caller's loop, and held in registers through it
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

}  // namespace gk
