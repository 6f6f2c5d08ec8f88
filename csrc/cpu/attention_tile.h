// The pieces of the attention kernels, per target, after vec.h and philox.h: operand types, the matrix micro-kernel, packing,
// the score steps (each written once), dropout's rows of random numbers.
//
// A "unit" is what one multiply-add consumes: one float or double, or a pair of bf16 for the AVX-512 bf16 dot product. A
// product C += A B runs on A in units (row stride, k stride) and B packed as [k][columns] units.

namespace GK_TARGET {
namespace {

using gk::AttentionArgs;
using gk::Bias;
using gk::key_block;

template <class T> struct Plain {  // T -> float (or double) operands
  typedef compute_t<T> C;
  typedef C unit;
  static constexpr int depth = 1;  // elements per unit
  static GK_INLINE vec<C> mac(vec<C> acc, unit a, vec<C> b) { return acc + a * b; }
  static GK_INLINE vec<C> load_units(const unit* p) { return load(p); }
};
#ifdef GK_BF16
struct Pairs {  // bf16 pairs into float
  typedef float C;
  typedef uint32_t unit;
  static constexpr int depth = 2;
  static GK_INLINE vf mac(vf acc, unit a, vi b) { return dot_pairs(acc, (vi)(vu{} + a), b); }
  static GK_INLINE vi load_units(const unit* p) {
    vi v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
};
template <class T> struct operand { typedef Plain<T> type; };
template <> struct operand<bf16> { typedef Pairs type; };
#else
template <class T> struct operand { typedef Plain<T> type; };
#endif
template <class T> using operand_t = typename operand<T>::type;

GK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class C> GK_INLINE int64_t padded(int64_t n) { return round_up(n, lanes<C>); }

// rows of C held in registers, and vectors per row: 6 x 4 of the 32 AVX-512 registers, 6 x 2 of 16
constexpr int tile_rows = 6;
constexpr int tile_vectors = GK_BYTES == 64 ? 4 : 2;

// c[r][0 .. NV vectors) (+)= sum over k of a[r * a_row + k * a_k] * b[k * b_row + ...]. The sum is its own before it is added
// to c: one running sum over all the tiles of a long sequence would lose what a tile adds, in proportion to the root of its
// length.
template <class Op, int MR, int NV>
static inline __attribute__((always_inline)) void tile(typename Op::C* c, int64_t c_row, const typename Op::unit* a,
                                                       int64_t a_row, int64_t a_k, const typename Op::unit* b, int64_t b_row,
                                                       int64_t depth, bool accumulate) {
  typedef typename Op::C C;
  vec<C> acc[MR][NV];
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = vec<C>{};
  for (int64_t k = 0; k < depth; k++, a += a_k, b += b_row) {
    decltype(Op::load_units(b)) bv[NV];
    for (int v = 0; v < NV; v++) bv[v] = Op::load_units(b + v * lanes<C>);
    for (int r = 0; r < MR; r++)
      for (int v = 0; v < NV; v++) acc[r][v] = Op::mac(acc[r][v], a[r * a_row], bv[v]);
  }
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) {
      C* out = c + r * c_row + v * lanes<C>;
      store(out, accumulate ? load(out) + acc[r][v] : acc[r][v]);
    }
}

template <class Op, int MR>
static __attribute__((noinline)) void tile_columns(typename Op::C* c, int64_t c_row, const typename Op::unit* a, int64_t a_row,
                                                   int64_t a_k, const typename Op::unit* b, int64_t b_row, int64_t depth,
                                                   int64_t columns, bool accumulate) {
  constexpr int W = lanes<typename Op::C>;
  int64_t n = 0;
  for (; n + tile_vectors * W <= columns; n += tile_vectors * W)
    tile<Op, MR, tile_vectors>(c + n, c_row, a, a_row, a_k, b + n, b_row, depth, accumulate);
  if (tile_vectors > 2 && n + 2 * W <= columns) {
    tile<Op, MR, 2>(c + n, c_row, a, a_row, a_k, b + n, b_row, depth, accumulate);
    n += 2 * W;
  }
  if (n < columns) tile<Op, MR, 1>(c + n, c_row, a, a_row, a_k, b + n, b_row, depth, accumulate);
}

// C (rows x columns, columns a multiple of the vector) (+)= A B
template <class Op>
static void product(typename Op::C* c, int64_t c_row, const typename Op::unit* a, int64_t a_row, int64_t a_k,
                    const typename Op::unit* b, int64_t b_row, int64_t rows, int64_t depth, int64_t columns, bool accumulate) {
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows)
    tile_columns<Op, tile_rows>(c + r * c_row, c_row, a + r * a_row, a_row, a_k, b, b_row, depth, columns, accumulate);
  c += r * c_row, a += r * a_row;
  switch (rows - r) {
    case 1: return tile_columns<Op, 1>(c, c_row, a, a_row, a_k, b, b_row, depth, columns, accumulate);
    case 2: return tile_columns<Op, 2>(c, c_row, a, a_row, a_k, b, b_row, depth, columns, accumulate);
    case 3: return tile_columns<Op, 3>(c, c_row, a, a_row, a_k, b, b_row, depth, columns, accumulate);
    case 4: return tile_columns<Op, 4>(c, c_row, a, a_row, a_k, b, b_row, depth, columns, accumulate);
    case 5: return tile_columns<Op, 5>(c, c_row, a, a_row, a_k, b, b_row, depth, columns, accumulate);
  }
}

// ---- scratch memory: arrays one after another, each on a cache line ----
template <class P> GK_INLINE void take(uintptr_t& at, P*& array, int64_t n) {
  array = (P*)at;
  at += round_up(n * sizeof(P), 64);
}

// ---- packing: from T rows by stride into units, zeros beyond the data ----

// rows as they are: unit [rows][padded columns / depth], an A operand along k = columns, and for depth 1 a B operand too
template <class T>
static void pack_rows(typename Plain<T>::unit* out, const T* in, int64_t in_row, int64_t rows, int64_t columns) {
  typedef compute_t<T> C;
  const int64_t width = padded<C>(columns);
  for (int64_t r = 0; r < rows; r++, in += in_row, out += width)
    for_vectors<C>(columns, [&](int64_t i, int64_t n) { store(out + i, load_any(in + i, n)); });
}
// the transpose: unit [units of columns][block], a B operand along k = columns of the source; zeros for rows beyond the data.
// words(p, left): the next vector of units at p, of a row with `left` elements left.
template <class Unit, class T, class Words>
static void pack_transposed_words(Unit* out, const T* in, int64_t in_row, int64_t rows, int64_t columns, int64_t block,
                                  const Words& words) {
  constexpr int W = lanes<float>, depth = Words::pairs ? 2 : 1;
  const int64_t n = (columns + depth - 1) / depth;
  for (int64_t r = 0; r < block; r += W)
    for (int64_t c = 0; c < n; c += W) {
      vu square[W];
      for (int i = 0; i < W; i++)
        square[i] = r + i < rows ? words(in + (r + i) * in_row + c * depth, columns - c * depth) : vu{};
      transpose(square);
      for (int i = 0; i < W && c + i < n; i++) __builtin_memcpy(out + (c + i) * block + r, &square[i], sizeof(vu));
    }
}
struct AsFloats {
  static constexpr bool pairs = false;
  template <class T> GK_INLINE vu operator()(const T* p, int64_t left) const {
    return bits_as<vu>(load_any(p, left < lanes<float> ? left : (int64_t)lanes<float>));
  }
};
template <class T>
static void pack_transposed(float* out, const T* in, int64_t in_row, int64_t rows, int64_t columns, int64_t block) {
  pack_transposed_words(out, in, in_row, rows, columns, block, AsFloats());
}
static void pack_transposed(double* out, const double* in, int64_t in_row, int64_t rows, int64_t columns, int64_t block) {
  for (int64_t r = 0; r < block; r++)
    for (int64_t c = 0; c < columns; c++) out[c * block + r] = r < rows ? in[r * in_row + c] : 0;
}
// rows as a B operand along k = rows: unit [rows / depth][padded columns]
template <class T>
static void pack_depth(typename Plain<T>::unit* out, const T* in, int64_t in_row, int64_t rows, int64_t columns) {
  pack_rows(out, in, in_row, rows, columns);
}

#ifdef GK_BF16
struct AsPairs {
  static constexpr bool pairs = true;
  GK_INLINE vu operator()(const bf16* p, int64_t left) const {
    vu words = {};
    __builtin_memcpy(&words, p, left * 2 < (int64_t)sizeof words ? left * 2 : sizeof words);
    return words;
  }
};
static void pack_rows(uint32_t* out, const bf16* in, int64_t in_row, int64_t rows, int64_t columns) {
  const int64_t width = padded<float>(columns) / 2;
  for (int64_t r = 0; r < rows; r++, in += in_row, out += width) {
    __builtin_memset(out, 0, width * sizeof *out);
    __builtin_memcpy(out, in, columns * sizeof *in);
  }
}
static void pack_transposed(uint32_t* out, const bf16* in, int64_t in_row, int64_t rows, int64_t columns, int64_t block) {
  pack_transposed_words(out, in, in_row, rows, columns, block, AsPairs());
}
static void pack_depth(uint32_t* out, const bf16* in, int64_t in_row, int64_t rows, int64_t columns) {
  const int64_t width = padded<float>(columns);
  for (int64_t r = 0; r < rows; r += 2, in += 2 * in_row, out += width) {
    __builtin_memset(out, 0, width * sizeof *out);
    for (int64_t c = 0; c < columns; c++) out[c] = in[c].bits | (r + 1 < rows ? (uint32_t)in[in_row + c].bits << 16 : 0);
  }
}
#endif
// units along k for `n` elements of depth, as pack_rows and pack_transposed lay them out
template <class Op> GK_INLINE int64_t units(int64_t n) { return (n + Op::depth - 1) / Op::depth; }
// unit stride between the rows that pack_rows wrote
template <class Op> GK_INLINE int64_t row_units(int64_t columns) { return padded<typename Op::C>(columns) / Op::depth; }

// Products of one query with n keys where they lie, which costs less than packing them. Forward and backward must add in the
// same order: exp(score - lse) magnifies what a score of some hundred differs by. noinline: so must the compiler.
template <class T, class C = compute_t<T>>
static __attribute__((noinline)) void few_scores(C* score, const T* q, const T* k, int64_t k_row, int64_t n, int64_t D) {
  C query[gk::max_head_dim];
  for_vectors<C>(D, [&](int64_t d, int64_t count) { store(query + d, load_any(q + d, count)); });
  for (int64_t j = 0; j < n; j++, k += k_row) {
    vec<C> sum = {};
    for_vectors<C>(D, [&](int64_t d, int64_t count) { sum += load(query + d) * load_any(k + d, count); });
    score[j] = hsum<C>(sum);
  }
}

// ---- probabilities back into operands ----

// value(j) for j = 0, lanes, 2 lanes ... < width as an A operand along k = columns
template <class Op, class Value> GK_INLINE void store_operand(typename Op::unit* out, int64_t width, const Value& value) {
  constexpr int W = lanes<typename Op::C>;
#ifdef GK_BF16
  if constexpr (Op::depth == 2) {
    int64_t j = 0;
    for (; j + 2 * W <= width; j += 2 * W) {
      const auto first = value(j);
      const vi pair = narrow_pair(first, value(j + W));
      __builtin_memcpy(out + j / 2, &pair, sizeof pair);
    }
    if (j < width) {
      const vi pair = narrow_pair(value(j), vf{});
      __builtin_memcpy(out + j / 2, &pair, sizeof pair / 2);
    }
    return;
  }
#endif
  if constexpr (Op::depth == 1)
    for (int64_t j = 0; j < width; j += W) store(out + j, value(j));
}

// ---- dropout ----

// 16-bit random values for rows [i0, i0 + rows) and key_block columns from j0 (a multiple of 8): out[rows][key_block]
static void random_rows(uint16_t* out, const AttentionArgs& s, int64_t head_index, int64_t i0, int64_t rows, int64_t j0) {
  constexpr uint32_t per_row = key_block / 8;
  for (uint32_t g = 0; g < (uint32_t)rows * per_row; g += lanes<float>) {
    const vu group = lane_index() + g;
    philox_groups(out + g * 8, (uint32_t)rows * per_row - g, (uint32_t)(j0 / 8) + (group & (per_row - 1)),
                  (uint32_t)i0 + group / per_row, (uint32_t)head_index, s.philox);
  }
}

// ---- the score steps ----

template <class C> constexpr C minus_infinity = -__builtin_inff();

// Is the raw score times `scale` all there is? Then the factor goes into the exponential and no pass is needed.
static inline bool plain_scores(const AttentionArgs& s) {
  return s.softcap == 0 && !s.slopes && s.bias_kind == Bias::none && s.scale > 0;
}

// a[n] as the bias of row i from column j0 on; booleans as 0 and -inf
template <class T, class C = compute_t<T>>
static void bias_row(C* out, const AttentionArgs& s, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n) {
  const int64_t step = s.bias_column;
  if (s.bias_kind == Bias::boolean) {
    const uint8_t* p = s.bias.at<uint8_t>(b, h, i) + j0 * step;
    for (int64_t j = 0; j < n; j++) out[j] = p[j * step] ? 0 : minus_infinity<C>;
  } else if (s.bias_kind == Bias::stat) {
    const C* p = s.bias.at<C>(b, h, i) + j0 * step;
    for (int64_t j = 0; j < n; j++) out[j] = p[j * step];
  } else {
    const T* p = s.bias.at<T>(b, h, i) + j0 * step;
    for (int64_t j = 0; j < n; j++) out[j] = load_one(p + j * step);
  }
}

// Row i's raw products q k^T of columns [j0, j0 + n) to scores, in place; -inf in every hidden column and from n on up to
// `width` (a multiple of the vector). `capped` (or null) receives the scores after softcap, before bias and masks.
// With plain_scores the values stay unscaled: the caller scales.
template <class T, class C = compute_t<T>>
static void score_steps(C* score, C* capped, const AttentionArgs& s, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n,
                        int64_t width) {
  constexpr int W = lanes<C>;
  if (!plain_scores(s)) {
    const C scale = s.scale, cap = s.softcap;
    for (int64_t j = 0; j < width; j += W) {
      vec<C> v = load(score + j) * scale;
      if (cap > 0) v = cap * tanh(v / cap);
      if (capped) store(capped + j, v);
      store(score + j, v);
    }
    if (s.slopes) {
      const C slope = ((const C*)s.slopes)[b * s.slopes_batch + h * s.slopes_head];
      for (int64_t j = 0; j < n; j++) {
        const int64_t distance = i + s.diagonal - (j0 + j);
        score[j] -= slope * (C)(distance < 0 ? -distance : distance);
      }
    }
    if (s.bias_kind != Bias::none) {
      C bias[key_block];
      bias_row<T>(bias, s, b, h, i, j0, n);
      const bool boolean = s.bias_kind == Bias::boolean;
      // a hidden key's score may be anything, even NaN: it is replaced, not added to
      for (int64_t j = 0; j < n; j++) score[j] = boolean ? (bias[j] == 0 ? score[j] : bias[j]) : score[j] + bias[j];
    }
  }
  const int64_t begin = s.first_column(i) - j0, end = s.end_column(i) - j0;
  for (int64_t j = 0; j < begin && j < n; j++) score[j] = minus_infinity<C>;
  for (int64_t j = end < 0 ? 0 : end < n ? end : n; j < width; j++) score[j] = minus_infinity<C>;
}

}  // namespace
}  // namespace GK_TARGET
