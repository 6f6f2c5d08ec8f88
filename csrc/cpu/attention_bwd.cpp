// attention on the CPU, backward: the scores are computed again tile by tile, five products per tile.
#ifndef GK_TARGET

#include "attention_launch.h"
#include "../launchers.h"

#define GK_FILE "attention_bwd.cpp"
#include "foreach_target.h"

namespace gk {

// Few heads are cut into chunks of keys so that 16 threads find work; by shape, never by thread count, so that the order
// of every sum is fixed. Each chunk has its own partial dq.
static int64_t key_chunks(const AttentionArgs& s) {
  const int64_t blocks = (s.Tk + key_block - 1) / key_block, tasks = std::max<int64_t>(1, s.B * s.Hk);
  return std::clamp<int64_t>((16 + tasks - 1) / tasks, 1, std::max<int64_t>(1, blocks / 4));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_gradients(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                               const Tensor& v, const Tensor& o, const Tensor& lse,
                                                               const OptTensor& bias, const OptTensor& alibi_slopes,
                                                               const OptTensor& rng_state, double scale, double softcap,
                                                               double dropout_p, int64_t causal_offset, int64_t window_left,
                                                               int64_t window_right, bool need_dbias, bool in_tokens) {
  const char* op = "attention_bwd";
  AttentionArgs s = attention_args(op, q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset,
                                   window_left, window_right);
  const ScalarType dtype = dtype_of(q), stat = stat_dtype(dtype);
  attention_bwd_args(op, s, dout, q, o, lse, bias, need_dbias);
  Tensor dq = new_heads(q, s.B, s.H, s.Tq, s.D, in_tokens), dk = new_heads(k, s.B, s.Hk, s.Tk, s.D, in_tokens),
         dv = new_heads(v, s.B, s.Hk, s.Tk, s.Dv, in_tokens);
  Tensor dbias = need_dbias ? new_tensor(*bias, bias->sizes(), dtype_of(*bias)) : new_tensor(q, {0}, dtype);
  s.dq = view_of(dq), s.dk = view_of(dk), s.dv = view_of(dv);

  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t chunks = key_chunks(s);
    const auto width = GK_BEST(attention_bwd_dq_width<T>);
    Tensor partial = new_tensor(q, {chunks > 1 ? s.B * s.H : 0, chunks, s.Tq, width(s)}, stat);
    void* partial_data = partial.mutable_data_ptr();
    const auto scratch = GK_BEST(attention_bwd_scratch<T>);
    const auto run = GK_BEST(attention_bwd_range<T>);
    run_with_scratch(op, s.B * s.Hk * chunks, 2.5 * score_work(s), scratch(s, chunks),
                     [&](int64_t t0, int64_t t1, char* memory) { run(s, chunks, partial_data, t0, t1, memory); });
    if (chunks > 1) {
      const auto sum = GK_BEST(attention_bwd_sum_dq<T>);
      parallel_for(0, s.B * s.H, 1, [&](int64_t h0, int64_t h1) { sum(s, chunks, partial_data, h0, h1); });
    }
    if (need_dbias) {
      BiasGradient g = {dbias.mutable_data_ptr(), {bias->size(0), bias->size(1), bias->size(2), bias->size(3)}};
      const auto tasks = GK_BEST(attention_dbias_tasks<T>);
      const auto dbias_scratch = GK_BEST(attention_dbias_scratch<T>);
      const auto dbias_run = GK_BEST(attention_dbias_range<T>);
      run_with_scratch(op, tasks(s, g), score_work(s), dbias_scratch(s, g),
                       [&](int64_t t0, int64_t t1, char* memory) { dbias_run(s, g, t0, t1, memory); });
    }
  });
  return {dq, dk, dv, dbias};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_cpu(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
    const OptTensor& bias, const OptTensor& alibi_slopes, const OptTensor& rng_state, double scale, double softcap,
    double dropout_p, int64_t causal_offset, int64_t window_left, int64_t window_right, bool need_dbias) {
  return attention_gradients(dout, q, k, v, o, lse, bias, alibi_slopes, rng_state, scale, softcap, dropout_p, causal_offset,
                             window_left, window_right, need_dbias, false);
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) { m.impl("attention_bwd", TORCH_BOX(&attention_bwd_cpu)); }

}  // namespace gk

#else  // kernels

#include "vec.h"
#include "philox.h"
#include "attention_tile.h"

namespace GK_TARGET {
namespace {

using gk::BiasGradient;

constexpr int64_t query_tile = 96;  // rows of a tile of scores, a multiple of tile_rows and of 2

// Row i's scores and dp = do v^T to p (times dropout) and ds = p (dp - delta), in place, `key_block` columns; columns from
// `width` on, and hidden ones, become 0. ds is the gradient of the score before softcap, or after it if `biased`.
template <class T, class C = compute_t<T>>
static void gradient_row(C* score, C* dp, const AttentionArgs& s, bool plain, bool all_seen, int64_t b, int64_t h, int64_t i,
                         int64_t j0, int64_t n, int64_t width, C lse, C delta, const uint16_t* random, bool biased) {
  constexpr int W = lanes<C>;
  C capped[key_block];
  if (!plain || !all_seen) score_steps<T>(score, s.softcap > 0 ? capped : nullptr, s, b, h, i, j0, n, width);
  // exp(factor * score - lse), the product rounded on its own: where one score outweighs all others, it is lse to the last bit and
  // p is 1. A row that saw no key has lse = -inf and p = 0.
  const C factor = plain ? s.scale : 1, keep = s.philox.keep_scale, per_cap = s.softcap > 0 ? 1 / s.softcap : 0;
  const C base = lse == minus_infinity<C> ? -minus_infinity<C> : lse;
  for (int64_t j = 0; j < width; j += W) {
    const vec<C> p = exp2((rounded(load(score + j) * factor) - base) * C(1.4426950408889634));
    vec<C> kept = p, d = load(dp + j);
    if (random) {
      kept = drop(p, random + j, s.philox) * keep;
      d = drop(d, random + j, s.philox) * keep;
    }
    vec<C> ds = p * (d - delta);
    if (per_cap > 0 && !biased) {
      const vec<C> t = load(capped + j) * per_cap;
      ds *= 1 - t * t;
    }
    store(score + j, kept);
    store(dp + j, ds);
  }
  for (int64_t j = width; j < key_block; j += W) store(score + j, vec<C>{}), store(dp + j, vec<C>{});
}

// delta = sum over d of do * o, the row's mean of dp under p
template <class T, class C = compute_t<T>> static C delta_of(const AttentionArgs& s, int64_t b, int64_t h, int64_t i) {
  const T *dout = s.dout.at<const T>(b, h, i), *o = s.o.at<const T>(b, h, i);
  vec<C> sum = {};
  for_vectors<C>(s.Dv, [&](int64_t d, int64_t n) { sum += load_any(dout + d, n) * load_any(o + d, n); });
  return hsum<C>(sum);
}

#ifdef GK_BF16
// rows of floats as bf16 operands: along k = columns, and along k = rows
static void pairs_along_columns(uint32_t* out, const float* in, int64_t rows) {
  for (int64_t r = 0; r < rows; r++, in += key_block, out += key_block / 2)
    store_operand<Pairs>(out, key_block, [&](int64_t j) __attribute__((always_inline)) { return load(in + j); });
}
static void pairs_along_rows(uint32_t* out, const float* in, int64_t rows) {
  for (int64_t r = 0; r < rows; r += 2, in += 2 * key_block, out += key_block)
    for (int64_t j = 0; j < key_block; j += lanes<float>) {
      const vu low = bf16_bits(load(in + j)), high = r + 1 < rows ? bf16_bits(load(in + key_block + j)) : vu{};
      const vu pair = low | (high << 16);
      __builtin_memcpy(out + j, &pair, sizeof pair);
    }
}
#endif

// One thread's memory and the backward pass of one head against one chunk of its keys.
template <class T> struct Backward {
  typedef operand_t<T> Op;
  typedef typename Op::C C;
  typedef typename Op::unit unit;
  static constexpr bool paired = Op::depth == 2;

  const AttentionArgs& s;
  const int64_t chunks, blocks, q_units, v_units, q_width, v_width;
  unit *q, *dout;                      // A operands of the head: rows of queries and of do
  unit *q_depth, *dout_depth;          // the same as B operands along k = queries (one and the same memory if not paired)
  unit *keys, *values, *keys_depth;    // one block: K^T and V^T, and K along k = keys
  C *dq, *dk, *dv, *lse, *delta;       // dq of the head, dk and dv of the chunk
  C *score, *dp;                       // one tile, p and ds in the end
  unit *p_depth, *ds_depth, *ds_rows;  // the tile as operands
  uint16_t* random;
  uintptr_t end;

  Backward(const AttentionArgs& s, int64_t chunks, uintptr_t at)
      : s(s), chunks(chunks), blocks((s.Tk + key_block - 1) / key_block), q_units(row_units<Op>(s.D)),
        v_units(row_units<Op>(s.Dv)), q_width(padded<C>(s.D)), v_width(padded<C>(s.Dv)) {
    const int64_t chunk_keys = (blocks + chunks - 1) / chunks * key_block, even = round_up(s.Tq, 2);
    take(at, q, s.Tq * q_units), take(at, dout, s.Tq * v_units);
    q_depth = q, dout_depth = dout;
    if (paired) take(at, q_depth, even / 2 * q_width), take(at, dout_depth, even / 2 * v_width);
    take(at, keys, units<Op>(s.D) * key_block), take(at, values, units<Op>(s.Dv) * key_block);
    take(at, keys_depth, key_block / Op::depth * q_width);
    take(at, dq, s.Tq * q_width), take(at, dk, chunk_keys * q_width), take(at, dv, chunk_keys * v_width);
    take(at, lse, s.Tq), take(at, delta, s.Tq), take(at, score, query_tile * key_block), take(at, dp, query_tile * key_block);
    p_depth = (unit*)score, ds_depth = ds_rows = (unit*)dp;
    if (paired) {
      const int64_t tile_units = query_tile * key_block / 2;
      take(at, p_depth, tile_units), take(at, ds_depth, tile_units), take(at, ds_rows, tile_units);
    }
    take(at, random, tile_rows * key_block);
    end = at;
  }

  void pack_head(int64_t b, int64_t h) {
    pack_rows(q, s.q.at<const T>(b, h, 0), s.q.row, s.Tq, s.D);
    pack_rows(dout, s.dout.at<const T>(b, h, 0), s.dout.row, s.Tq, s.Dv);
    if (paired) {
      pack_depth(q_depth, s.q.at<const T>(b, h, 0), s.q.row, s.Tq, s.D);
      pack_depth(dout_depth, s.dout.at<const T>(b, h, 0), s.dout.row, s.Tq, s.Dv);
    }
    for (int64_t i = 0; i < s.Tq; i++) {
      delta[i] = delta_of<T>(s, b, h, i);
      lse[i] = ((const C*)s.lse)[(b * s.H + h) * s.Tq + i];
    }
    __builtin_memset(dq, 0, s.Tq * q_width * sizeof(C));
  }

  void pack_keys(int64_t b, int64_t hk, int64_t j0, int64_t n) {
    pack_transposed(keys, s.k.at<const T>(b, hk, j0), s.k.row, n, s.D, key_block);
    pack_transposed(values, s.v.at<const T>(b, hk, j0), s.v.row, n, s.Dv, key_block);
    pack_depth(keys_depth, s.k.at<const T>(b, hk, j0), s.k.row, n, s.D);
    const int64_t filled = units<Op>(n) * q_width;
    __builtin_memset(keys_depth + filled, 0, (key_block / Op::depth * q_width - filled) * sizeof(unit));
  }

  // queries [i0, i0 + rows) against keys [j0, j0 + present); dk, dv: the block's accumulators
  void tile(int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t j0, int64_t present, C* dk_block, C* dv_block) {
    const bool plain = plain_scores(s);
    int64_t begin = rows, stop = 0;  // the rows of the tile that see any of the keys
    for (int64_t r = 0; r < rows; r += tile_rows) {
      const int64_t count = rows - r < tile_rows ? rows - r : tile_rows, i = i0 + r;
      const int64_t seen = s.end_column(i + count - 1) - j0, n = seen < present ? seen : present, width = round_up(n, lanes<C>);
      if (n <= 0 || s.first_column(i) >= j0 + present) continue;
      begin = begin < r ? begin : r, stop = r + count;
      if (s.Tq <= gk::few_queries)
        for (int64_t c = 0; c < count; c++)
          few_scores(score + (r + c) * key_block, s.q.at<const T>(b, h, i + c), s.k.at<const T>(b, h / (s.H / s.Hk), j0),
                     s.k.row, n, s.D);
      else
        product<Op>(score + r * key_block, key_block, q + i * q_units, q_units, 1, keys, key_block, count, units<Op>(s.D),
                    width, false);
      product<Op>(dp + r * key_block, key_block, dout + i * v_units, v_units, 1, values, key_block, count, units<Op>(s.Dv),
                  width, false);
      const bool all_seen = width <= present && s.first_column(i + count - 1) <= j0 && s.end_column(i) >= j0 + width;
      if (s.philox.drop_below) random_rows(random, s, b * s.H + h, i, count, j0);
      for (int64_t c = 0; c < count; c++)
        gradient_row<T>(score + (r + c) * key_block, dp + (r + c) * key_block, s, plain, all_seen, b, h, i + c, j0, n, width,
                        lse[i + c], delta[i + c], s.philox.drop_below ? random + c * key_block : nullptr, false);
    }
    if (begin >= stop) return;
    const int64_t seen_rows = stop - begin, i = i0 + begin, at = begin * key_block;
#ifdef GK_BF16
    if constexpr (paired) {
      pairs_along_rows(p_depth + at / 2, score + at, seen_rows);
      pairs_along_rows(ds_depth + at / 2, dp + at, seen_rows);
      pairs_along_columns(ds_rows + at / 2, dp + at, seen_rows);
    }
#endif
    const int64_t depth = units<Op>(seen_rows), first = begin / Op::depth * key_block, k0 = i / Op::depth;
    product<Op>(dv_block, v_width, p_depth + first, 1, key_block, dout_depth + k0 * v_width, v_width, present, depth, v_width,
                true);
    product<Op>(dk_block, q_width, ds_depth + first, 1, key_block, q_depth + k0 * q_width, q_width, present, depth, q_width,
                true);
    product<Op>(dq + i * q_width, q_width, ds_rows + at / Op::depth, key_block / Op::depth, 1, keys_depth, q_width, seen_rows,
                key_block / Op::depth, q_width, true);
  }

  // query head h against the chunk's blocks: chunk, chunk + chunks, ... (interleaved, as causal blocks differ in cost)
  void head(int64_t b, int64_t h, int64_t chunk) {
    pack_head(b, h);
    for (int64_t block = chunk; block < blocks; block += chunks) {
      const int64_t j0 = block * key_block, present = s.Tk - j0 < key_block ? s.Tk - j0 : key_block,
                    slot = block / chunks * key_block;
      pack_keys(b, h / (s.H / s.Hk), j0, present);
      for (int64_t i0 = 0; i0 < s.Tq; i0 += query_tile) {
        const int64_t rows = s.Tq - i0 < query_tile ? s.Tq - i0 : query_tile;
        if (s.end_column(i0 + rows - 1) > j0 && s.first_column(i0) < j0 + present)
          tile(b, h, i0, rows, j0, present, dk + slot * q_width, dv + slot * v_width);
      }
    }
  }

  void clear_chunk() {
    const int64_t chunk_keys = (blocks + chunks - 1) / chunks * key_block;
    __builtin_memset(dk, 0, chunk_keys * q_width * sizeof(C));
    __builtin_memset(dv, 0, chunk_keys * v_width * sizeof(C));
  }

  void write_chunk(int64_t b, int64_t hk, int64_t chunk) {
    for (int64_t block = chunk; block < blocks; block += chunks)
      for (int64_t j = block * key_block; j < s.Tk && j < (block + 1) * key_block; j++) {
        const int64_t slot = block / chunks * key_block + j % key_block;
        write_row(s.dk.at<T>(b, hk, j), dk + slot * q_width, s.D, (C)s.scale);
        write_row(s.dv.at<T>(b, hk, j), dv + slot * v_width, s.Dv, 1);
      }
  }

  static void write_row(T* out, const C* in, int64_t n, C scale) {
    for_vectors<C>(n, [&](int64_t d, int64_t count) { store_any(out + d, load(in + d) * scale, count); });
  }
};

}  // namespace

template <class T> static int64_t attention_bwd_dq_width(const AttentionArgs& s) { return padded<compute_t<T>>(s.D); }
template <class T> static int64_t attention_bwd_scratch(const AttentionArgs& s, int64_t chunks) {
  return Backward<T>(s, chunks, 0).end;
}

// a task is one chunk of keys of one key head, with all the query heads that read it
template <class T>
static void attention_bwd_range(const AttentionArgs& s, int64_t chunks, void* partial, int64_t task0, int64_t task1,
                                char* scratch) {
  typedef compute_t<T> C;
  Backward<T> w(s, chunks, (uintptr_t)scratch);
  const int64_t group = s.H / s.Hk;
  for (int64_t task = task0; task < task1; task++) {
    const int64_t chunk = task % chunks, b = task / chunks / s.Hk, hk = task / chunks % s.Hk;
    w.clear_chunk();
    for (int64_t h = hk * group; h < (hk + 1) * group; h++) {
      w.head(b, h, chunk);
      if (chunks > 1) {
        C* out = (C*)partial + ((b * s.H + h) * chunks + chunk) * s.Tq * w.q_width;
        __builtin_memcpy(out, w.dq, s.Tq * w.q_width * sizeof(C));
      } else {
        for (int64_t i = 0; i < s.Tq; i++) w.write_row(s.dq.at<T>(b, h, i), w.dq + i * w.q_width, s.D, (C)s.scale);
      }
    }
    w.write_chunk(b, hk, chunk);
  }
}

// dq = scale * the chunks' partial sums, in chunk order, for heads [h0, h1) of the batch's
template <class T>
static void attention_bwd_sum_dq(const AttentionArgs& s, int64_t chunks, const void* partial, int64_t h0, int64_t h1) {
  typedef compute_t<T> C;
  const int64_t width = padded<C>(s.D);
  for (int64_t head = h0; head < h1; head++)
    for (int64_t i = 0; i < s.Tq; i++) {
      const C* in = (const C*)partial + (head * chunks * s.Tq + i) * width;
      T* out = s.dq.at<T>(head / s.H, head % s.H, i);
      for_vectors<C>(s.D, [&](int64_t d, int64_t n) {
        vec<C> sum = {};
        for (int64_t c = 0; c < chunks; c++) sum += load(in + c * s.Tq * width + d);
        store_any(out + d, sum * (C)s.scale, n);
      });
    }
}

// ---- the gradient of an additive bias: a pass of its own, only when asked for, so that sums over broadcast dimensions
// run in a fixed order. A task is one block of keys of one (batch, head) of the bias; all of them if columns are summed.

template <class T> static int64_t attention_dbias_tasks(const AttentionArgs& s, const BiasGradient& g) {
  return g.size[0] * g.size[1] * (g.size[3] == 1 ? 1 : (s.Tk + key_block - 1) / key_block);
}

namespace {
template <class T> struct BiasBackward {
  typedef operand_t<T> Op;  // as in the other passes, whose scores these must be
  typedef typename Op::C C;
  const AttentionArgs& s;
  typename Op::unit *q, *dout, *keys, *values;
  C *score, *dp, *sums;  // sums: (bias rows, key_block)
  uint16_t* random;
  uintptr_t end;
  BiasBackward(const AttentionArgs& s, const BiasGradient& g, uintptr_t at) : s(s) {
    take(at, q, tile_rows * row_units<Op>(s.D)), take(at, dout, tile_rows * row_units<Op>(s.Dv));
    take(at, keys, units<Op>(s.D) * key_block), take(at, values, units<Op>(s.Dv) * key_block);
    take(at, score, tile_rows * key_block), take(at, dp, tile_rows * key_block), take(at, random, tile_rows * key_block);
    take(at, sums, g.size[2] * key_block);
    end = at;
  }

  // adds the block's ds of head (b, h) to sums
  void add(int64_t b, int64_t h, int64_t j0, bool one_row) {
    const bool plain = plain_scores(s);
    const int64_t hk = h / (s.H / s.Hk), present = s.Tk - j0 < key_block ? s.Tk - j0 : key_block;
    pack_transposed(keys, s.k.at<const T>(b, hk, j0), s.k.row, present, s.D, key_block);
    pack_transposed(values, s.v.at<const T>(b, hk, j0), s.v.row, present, s.Dv, key_block);
    for (int64_t i = 0; i < s.Tq; i += tile_rows) {
      const int64_t count = s.Tq - i < tile_rows ? s.Tq - i : tile_rows;
      if (s.end_column(i + count - 1) <= j0 || s.first_column(i) >= j0 + present) continue;
      const int64_t width = round_up(present, lanes<C>);
      pack_rows(q, s.q.at<const T>(b, h, i), s.q.row, count, s.D),
          pack_rows(dout, s.dout.at<const T>(b, h, i), s.dout.row, count, s.Dv);
      if (s.Tq <= gk::few_queries)
        for (int64_t c = 0; c < count; c++)
          few_scores(score + c * key_block, s.q.at<const T>(b, h, i + c), s.k.at<const T>(b, hk, j0), s.k.row, present, s.D);
      else product<Op>(score, key_block, q, row_units<Op>(s.D), 1, keys, key_block, count, units<Op>(s.D), width, false);
      product<Op>(dp, key_block, dout, row_units<Op>(s.Dv), 1, values, key_block, count, units<Op>(s.Dv), width, false);
      if (s.philox.drop_below) random_rows(random, s, b * s.H + h, i, count, j0);
      for (int64_t c = 0; c < count; c++) {
        gradient_row<T>(score + c * key_block, dp + c * key_block, s, plain, false, b, h, i + c, j0, present, width,
                        ((const C*)s.lse)[(b * s.H + h) * s.Tq + i + c], delta_of<T>(s, b, h, i + c),
                        s.philox.drop_below ? random + c * key_block : nullptr, true);
        C* row = sums + (one_row ? 0 : i + c) * key_block;
        for (int64_t j = 0; j < key_block; j += lanes<C>) store(row + j, load(row + j) + load(dp + c * key_block + j));
      }
    }
  }
};

template <class C> static C row_sum(const C* row) {
  vec<C> sum = {};
  for (int64_t j = 0; j < key_block; j += lanes<C>) sum += load(row + j);
  return hsum<C>(sum);
}
GK_INLINE void store_one(float* p, float v) { *p = v; }
GK_INLINE void store_one(double* p, double v) { *p = v; }
template <class T> GK_INLINE void store_one(T* p, float v) { store_n(p, splat(v), 1); }
}  // namespace

template <class T> static int64_t attention_dbias_scratch(const AttentionArgs& s, const BiasGradient& g) {
  return BiasBackward<T>(s, g, 0).end;
}

template <class T>
static void attention_dbias_range(const AttentionArgs& s, const BiasGradient& g, int64_t task0, int64_t task1, char* scratch) {
  typedef compute_t<T> C;
  BiasBackward<T> w(s, g, (uintptr_t)scratch);
  const int64_t blocks = (s.Tk + key_block - 1) / key_block;
  const bool one_row = g.size[2] == 1, one_column = g.size[3] == 1;
  for (int64_t task = task0; task < task1; task++) {
    const int64_t per_head = one_column ? 1 : blocks, block = task % per_head, head = task / per_head;
    const int64_t bb = head / g.size[1], bh = head % g.size[1];
    __builtin_memset(w.sums, 0, g.size[2] * key_block * sizeof(C));
    for (int64_t b = g.size[0] == 1 ? 0 : bb; b < (g.size[0] == 1 ? s.B : bb + 1); b++)
      for (int64_t h = g.size[1] == 1 ? 0 : bh; h < (g.size[1] == 1 ? s.H : bh + 1); h++)
        for (int64_t j = block; j < (one_column ? blocks : block + 1); j++) w.add(b, h, j * key_block, one_row);
    for (int64_t i = 0; i < g.size[2]; i++) {
      const C* row = w.sums + i * key_block;
      const int64_t at = (head * g.size[2] + i) * g.size[3] + block * key_block, left = g.size[3] - block * key_block;
      const int64_t n = one_column ? 1 : left < key_block ? left : key_block;
      const C total = one_column ? row_sum(row) : 0;
      for (int64_t j = 0; j < n; j++) {
        const C value = one_column ? total : row[j];
        if (s.bias_kind == Bias::stat) ((C*)g.data)[at + j] = value;
        else store_one((T*)g.data + at + j, value);
      }
    }
  }
}

}  // namespace GK_TARGET
#endif
