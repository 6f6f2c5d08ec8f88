// What attention's kernels share: tiles in shared memory, products of tiles, score steps, dropout. The op: gpt_kernels/ops/attention.py.
//
// A score tile and an output tile live in registers as the accumulators of mma_m16n8k16: acc[m][n][e] is row 16 m + g + 8 (e / 2),
// column 8 n + 2 t + e % 2, with g = lane / 4 and t = lane % 4. float32 keeps the same places and multiplies in true float32.
#pragma once
#include "common.cuh"

namespace gk {

inline Philox philox_of(const char* op, const OptTensor& rng_state, double dropout_p) {
  GK_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), got ", dropout_p);
  if (dropout_p == 0) return {};
  GK_CHECK(rng_state, op, ": dropout_p = ", dropout_p, " needs rng_state, an int64 tensor (seed, offset)");
  check_device(op, "rng_state", *rng_state), check_dtype(op, "rng_state", *rng_state, ScalarType::Long);
  GK_CHECK(rng_state->dim() == 1 && rng_state->size(0) == 2, op, ": rng_state must have shape (2,), got ", shape_text(*rng_state));
  check_contiguous(op, "rng_state", *rng_state);
  const uint32_t drop_below = uint32_t(std::min(int64_t(dropout_p * 65536 + 0.5), int64_t{65535}));
  return {data<int64_t>(*rng_state), drop_below, float(1 / (1 - drop_below / 65536.0))};
}

}  // namespace gk
#include "../attention_args.h"

namespace gk {

constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f, infinity = INFINITY;

// ---- tiles in shared memory ----
// Rows of `columns` elements in chunks of 16 bytes. Chunk c of a row stands at c ^ turn(row), so that the same chunk of eight
// neighbouring rows, which is what ldmatrix and a warp's stores of 16-bit fragments touch, lies in 32 different banks; and so do
// two neighbouring chunks of four rows, which is what half a warp's stores of float32 fragments touch.
template <class T, int columns> struct Tile {
  static constexpr int chunks = columns / per_16<T>, row_bytes = columns * int(sizeof(T));
  static constexpr int period = chunks % 8 == 0 ? 8 : chunks % 4 == 0 ? 4 : chunks % 2 == 0 ? 2 : 1;
  static constexpr int half = period > 1 ? period / 2 : 1;
  GK_DEVICE static int turn(int row) { return row / (8 / period) % half * 2 % period + row / (8 / period) / half % 2 * (period > 1); }
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

// How `threads` share a tile: neighbours take a row's neighbouring chunks, and a thread's rows are a multiple of 8 apart (two warps
// or more), so that its place in a row and its turn never change.
template <class T, int columns, int rows, int threads> struct Share {
  static constexpr int chunks = Tile<T, columns>::chunks;
  static constexpr int lowest_bit = chunks & -chunks, widest = threads < 64 ? 8 : threads / 8;
  static constexpr int group = lowest_bit < widest ? lowest_bit : widest, step = threads / group;
  // f(row, chunk)
  template <class F> GK_DEVICE static void each(int thread, const F& f) {
    const int row = thread / group, chunk = thread % group;
#pragma unroll
    for (int r = 0; r < rows; r += step)
      if (rows % step == 0 || row + r < rows)
#pragma unroll
        for (int c = 0; c < chunks; c += group) f(row + r, chunk + c);
  }
};

// Tiles of a matrix, one after another, copied asynchronously by all threads; its chunks stand on multiples of 16 bytes and are
// whole. The thread's pointer goes from row to row and on into the next tile: down the matrix, or up it. What lies beyond the
// matrix's rows [0, end) or beyond its width becomes 0.
template <class T, int columns, int rows, int threads, bool up> class Stream {
  using S = Share<T, columns, rows, threads>;
  static_assert(S::group % Tile<T, columns>::period == 0 && S::step % 8 == 0);
  static constexpr int last = (rows - 1) / S::step * S::step;  // the thread's last row, from its first
  const T* at;
  int64_t step;
  int place;  // of the first row's chunk in a tile

 public:
  GK_DEVICE Stream(const Rows<const T>& from, int64_t first, int thread = threadIdx.x) {
    const int row = thread / S::group, chunk = thread % S::group;
    at = from.at + (first + row + (up ? last : 0)) * from.stride + chunk * per_16<T>;
    step = (up ? -S::step : S::step) * from.stride, place = Tile<T, columns>::chunk(row, chunk);
  }
  // `there`: rows of this tile inside the matrix; of no consequence unless `tail`
  template <bool tail> GK_DEVICE void load(unsigned char* tile, int width, int there = rows, int thread = threadIdx.x) {
    const int row = thread / S::group, chunk = thread % S::group;
#pragma unroll
    for (int i = 0; i < rows; i += S::step) {
      const int r = up ? last - i : i;
      if (rows % S::step == 0 || row + r < rows)
#pragma unroll
        for (int c = 0; c < S::chunks; c += S::group) {
          const bool valid = (!tail || row + r < there) && (chunk + c) * per_16<T> < width;
          cp_async_16(tile + place + r * Tile<T, columns>::row_bytes + c * 16, at + c * per_16<T>, valid ? 16 : 0);
        }
      at += step;
      opaque(at);
    }
  }
};

// Rows [first, first + rows) of a matrix to a tile, zeros beyond `end` and beyond its width. Asynchronous where aligned.
template <class T, int columns, int rows, int threads>
GK_DEVICE void load_tile(unsigned char* tile, const Rows<const T>& from, int64_t first, int64_t end, int thread = threadIdx.x) {
  const int there = end - first < rows ? int(end - first) : rows;
  if (from.aligned) {
    Stream<T, columns, rows, threads, false>(from, first, thread).template load<true>(tile, from.width, there, thread);
  } else {
    const T* start = from.at + first * from.stride;
    Share<T, columns, rows, threads>::each(thread, [&](int row, int c) {
      float v[per_16<T>];
#pragma unroll
      for (int e = 0; e < per_16<T>; e++) {
        const int column = c * per_16<T> + e;
        v[e] = row < there && column < from.width ? to_float(start[row * from.stride + column]) : 0.f;
      }
      store_16(tile + Tile<T, columns>::chunk(row, c), pack<T>(v));  // exact: they come from T
    });
  }
}

// The other way, of rows that are there and columns of the width.
template <class T, int columns, int rows, int threads>
GK_DEVICE void store_tile(const unsigned char* tile, const Rows<T>& to, int64_t first, int64_t end, int thread = threadIdx.x) {
  T* start = to.at + first * to.stride;
  const int there = end - first < rows ? int(end - first) : rows;
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
template <class T, int columns, bool transposed, bool is_a, int stride = 1> struct Operand {
  using Tile_ = Tile<T, columns>;
  static constexpr int apart = transposed ? stride : 1;  // blocks between a lane's chunks of one row
  static constexpr int variants = Tile_::period > 2 * apart ? Tile_::period / (2 * apart) : 1;
  int at[variants];

  // `base`: where the tile is in shared memory; first_block < stride
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
// float32: values one by one
template <int columns, bool transposed, bool is_a, int stride> struct Operand<float, columns, transposed, is_a, stride> {
  int base, row, block;
  GK_DEVICE Operand(int base, int first_row, int first_block = 0) : base(base), row(first_row), block(first_block) {}
  // four values along the sum from k on, of index `i` of the lane's: row of the left operand, column of the right
  GK_DEVICE void load(float (&v)[4], const unsigned char* shared, int i, int k) const {
    const int lane = threadIdx.x % 32;
    const int block_of_i = i / (is_a ? 2 : 4), inside = is_a ? i % 2 * 8 + lane / 4 : i / 2 % 2 * 8 + lane % 4 * 2 + i % 2;
    using Tile_ = Tile<float, columns>;
    if constexpr (transposed) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        v[e] = *(const float*)(shared + base + Tile_::element(row + k + e, (block + block_of_i * stride) * 16 + inside));
    } else {
      unpack<float>(load_16(shared + base + Tile_::chunk(row + block_of_i * 16 + inside, k / 4)), v);
    }
  }
};

// acc += A B, the k-th block of 16 of the sum, with A in registers
template <class T, int M, int N, class B>
GK_DEVICE void multiply_step(float (&acc)[M][N][4], const unsigned char* shared, const uint32_t (&left)[M][4], const B& b, int k) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t r[4];
    b.load(r, shared, n / 2, k);
    const uint32_t right[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
    for (int m = 0; m < M; m++) mma_m16n8k16<T>(acc[m][n], left[m], right[0]), mma_m16n8k16<T>(acc[m][n + 1], left[m], right[1]);
  }
}
// acc += A B over `depth` blocks of 16
template <class T, int depth, int M, int N, class A, class B>
GK_DEVICE void multiply(float (&acc)[M][N][4], const unsigned char* shared, const A& a, const B& b) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll 2
    for (int k = 0; k < depth * 16; k += 4) {
      float left[2 * M][4], right[4];
      int here = 0;
      opaque(here);
#pragma unroll
      for (int i = 0; i < 2 * M; i++) a.load(left[i], shared + here, i, k);
#pragma unroll
      for (int j = 0; j < 2 * N; j++) {
        b.load(right, shared + here, j, k);
#pragma unroll
        for (int i = 0; i < 2 * M; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) acc[i / 2][j / 2][i % 2 * 2 + j % 2] += left[i][e] * right[e];
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < depth; k++) {
      uint32_t left[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) a.load(left[m], shared, m, k);
      multiply_step<T>(acc, shared, left, b, k);
    }
  }
}
// acc += P B with P a tile of accumulators: they are, rounded, what the unit takes as a left operand
template <class T, int M, int N, int depth, class B>
GK_DEVICE void multiply(float (&acc)[M][N][4], const unsigned char* shared, const float (&p)[M][depth][4], const B& b) {
  if constexpr (std::is_same_v<T, float>) {
    const int quad = threadIdx.x % 32 & ~3;
#pragma unroll
    for (int k = 0; k < depth * 8; k += 4) {
      float left[2 * M][4], right[4];
      int here = 0;
      opaque(here);
#pragma unroll
      for (int i = 0; i < 2 * M; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) left[i][e] = shfl_index(p[i / 2][k / 8][i % 2 * 2 + e % 2], quad + (k % 8 + e) / 2);
#pragma unroll
      for (int j = 0; j < 2 * N; j++) {
        b.load(right, shared + here, j, k);
#pragma unroll
        for (int i = 0; i < 2 * M; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) acc[i / 2][j / 2][i % 2 * 2 + j % 2] += left[i][e] * right[e];
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < depth / 2; k++) {
      uint32_t left[M][4];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 4; r++) left[m][r] = pack_2<T>(p[m][2 * k + r / 2][r % 2 * 2], p[m][2 * k + r / 2][r % 2 * 2 + 1]);
      multiply_step<T>(acc, shared, left, b, k);
    }
  }
}

// The lane's places in a tile of accumulators' shape: f(m, n, e, address) for every even e, that is for two neighbours of a row.
// Rows from `row` on, in blocks of 16 that are row_stride blocks apart; columns likewise.
template <class T, int columns, int stride, int row_stride, int M, int N, class F>
GK_DEVICE void each_pair(unsigned char* tile, int row, int first_block, const F& f) {
  using Tile_ = Tile<T, columns>;
  const int lane = threadIdx.x % 32, lane_row = row + lane / 4;
#pragma unroll
  for (int n = 0; n < N; n++) {
    const int column = (first_block + n / 2 * stride) * 16 + n % 2 * 8;
    unsigned char* const top = tile + Tile_::element(lane_row, column + lane % 4 * 2);
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
// plain: the score is scale * q k^T and nothing else but hidden columns; `rate` then carries the scale into the exponential.
struct Scores {
  bool plain, aligned;  // aligned: every matrix's rows are whole chunks of 16 bytes on 16-byte boundaries
  float scale, softcap, rate;
};

// Where a lane's part of a score tile is: its first row and column.
struct Place {
  int64_t b, h, row, column;
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

// -inf where a row does not see a column (the columns beyond Tk included)
template <int M, int N> GK_DEVICE void hide(float (&score)[M][N][4], const AttentionArgs& s, const Place& at) {
  // the columns that the lane's first row sees, from its first column; what is far outside the tile may as well be near
  const auto near = [](int64_t x) { return x < -4096 ? -4096 : x > 4096 ? 4096 : int(x); };
  const int64_t diagonal = at.row + s.diagonal - at.column;
  const int first = s.window_left < 0 ? -8192 : near(diagonal - s.window_left), end = s.window_right < 0 ? 8192 : near(diagonal + s.window_right + 1);
  const int present = near(s.Tk - at.column);
  each_score<M, N>([&](int m, int n, int e, int row, int column) {
    if (column < first + row || column >= end + row || column >= present) score[m][n][e] = -infinity;
  });
}

template <class B, int M, int N> GK_DEVICE void add_bias(float (&score)[M][N][4], const AttentionArgs& s, const Place& at) {
  const B* bias = s.bias.at<const B>(at.b, at.h, at.row) + at.column * s.bias_column;
  each_score<M, N>([&](int m, int n, int e, int row, int column) {
    if (at.row + row >= s.Tq || at.column + column >= s.Tk) return;
    const B value = bias[row * s.bias.row + column * s.bias_column];
    float& x = score[m][n][e];
    // a hidden key's score may be anything, even NaN: it is replaced, not added to
    if constexpr (std::is_same_v<B, uint8_t>) x = value ? x : -infinity;
    else x += to_float(value);
  });
}

// Every step from products q k^T to scores, in place, but for hide(). slope[m][n][e] becomes softcap's derivative, if wanted.
template <class T, bool derivative, int M, int N>
GK_DEVICE void score_steps(float (&score)[M][N][4], float (&slope)[M][N][4], const AttentionArgs& s, const Scores& c, const Place& at) {
  each_score<M, N>([&](int m, int n, int e, int, int) { score[m][n][e] *= c.scale; });
  if constexpr (derivative) fill(slope, 1.f);
  if (c.softcap > 0)
    each_score<M, N>([&](int m, int n, int e, int, int) {
      const float t = tanhf(score[m][n][e] / c.softcap);
      score[m][n][e] = c.softcap * t;
      if constexpr (derivative) slope[m][n][e] = 1 - t * t;
    });
  if (s.slopes) {
    const float alibi = ((const float*)s.slopes)[at.b * s.slopes_batch + at.h * s.slopes_head];
    const int64_t first = at.row + s.diagonal - at.column;
    each_score<M, N>([&](int m, int n, int e, int row, int column) {
      const int64_t distance = first + row - column;
      score[m][n][e] -= alibi * float(distance < 0 ? -distance : distance);
    });
  }
  if (s.bias_kind == Bias::boolean) add_bias<uint8_t>(score, s, at);
  else if (s.bias_kind == Bias::stat) add_bias<float>(score, s, at);
  else if (s.bias_kind == Bias::same) add_bias<T>(score, s, at);
}

// ---- dropout ----
// keep(m, n, e, kept) for each of the lane's scores. A call of Philox serves eight columns of a row, that is the four lanes of
// a quad: each calls it for another group of columns, then they trade words.
template <int M, int N, class F> GK_DEVICE void each_kept(const AttentionArgs& s, const Place& at, const F& keep) {
  const uint64_t seed = s.philox.state[0];
  const uint32_t offset = uint32_t(s.philox.state[1]), plane = uint32_t(at.b * s.H + at.h), t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int n = 0; n < N; n += 4) {
        const uint4 words = philox_8(seed, offset, uint32_t(at.column / 8) + n + t, uint32_t(at.row) + 16 * m + 8 * half, plane);
        uint32_t w[4] = {words.x, words.y, words.z, words.w};
        // a 4 x 4 transpose over the quad: afterwards w[i] is word t of lane i
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (!(i & distance)) {
              const bool upper = t & distance;
              const uint32_t got = shfl_xor(upper ? w[i] : w[i + distance], distance);
              w[i] = upper ? got : w[i], w[i + distance] = upper ? w[i + distance] : got;
            }
#pragma unroll
        for (int i = 0; i < 4 && n + i < N; i++) {
          keep(m, n + i, 2 * half, (w[i] & 0xFFFF) >= s.philox.drop_below);
          keep(m, n + i, 2 * half + 1, w[i] >> 16 >= s.philox.drop_below);
        }
      }
}

// ==== host ====

// The head dim a kernel is made for: those of GPT models and a few steps up to the limit. General kernels have fewer.
inline int padded_head_dim(int64_t D, bool plain) {
  return D <= 64 ? 64 : plain && D <= 80 ? 80 : plain && D <= 96 ? 96 : D <= 128 ? 128 : 256;
}
// f(integral_constant) of a padded head dim
template <int... dims, class F> void with_dim(int D, const F& f) {
  ((D == dims ? (f(std::integral_constant<int, dims>()), 0) : 0), ...);
}

// 163 KB or more of shared memory for a block; 99 KB elsewhere
inline bool large_shared(int arch) { return arch != 86 && arch != 89 && arch < 120; }

inline bool whole_chunks(const Tensor& t) {
  const int64_t size = element_size(t.scalar_type());
  bool whole = stands_on_16(t) && t.size(3) * size % 16 == 0;
  for (int d = 0; d < 3; d++) whole = whole && (t.size(d) <= 1 || t.stride(d) * size % 16 == 0);
  return whole;
}

// The kernels for plain scores are those that are tuned: 16 bits, head dims up to 128.
inline Scores scores_of(const AttentionArgs& s, bool aligned, int64_t size, bool tuned) {
  const bool plain = s.softcap == 0 && !s.slopes && s.bias_kind == Bias::none && !s.philox.drop_below && s.scale > 0 && aligned &&
                     tuned && size == 2 && s.D <= 128 && s.Dv <= 128;
  return {plain, aligned, float(s.scale), float(s.softcap), float((plain ? s.scale : 1) * double(log2_e))};
}

// Everything that AttentionArgs does not check for a GPU.
inline void check_gpu_tensors(const char* op, const Tensor& q, std::initializer_list<const Tensor*> more,
                              std::initializer_list<const OptTensor*> optional) {
  GK_CHECK(q.scalar_type() != ScalarType::Double, op, ": q must be float32, bfloat16 or float16, got float64 (CUDA kernels)");
  for (const Tensor* t : more) check_same_device(op, "every argument", *t, q);
  for (const OptTensor* t : optional)
    if (*t) check_same_device(op, "every argument", **t, q);
}

}  // namespace gk
