// attention on the CPU, forward. The op: gpt_kernels/ops/attention.py. The backward: attention_bwd.cpp.
#ifndef GK_TARGET

#include "attention_launch.h"
#include "../launchers.h"

#define GK_FILE "attention.cpp"
#include "foreach_target.h"

namespace gk {

void attention_into(Tensor& o, Tensor& lse, AttentionArgs s, const Tensor& q) {
  s.o = view_of(o);
  s.lse = lse.mutable_data_ptr();
  if (o.numel() == 0 && lse.numel() == 0) return;
  with_dtype(dtype_of(q), [&](auto tag) {
    using T = decltype(tag);
    const auto tasks = GK_BEST(attention_fwd_tasks<T>);
    const auto scratch_bytes = GK_BEST(attention_fwd_scratch<T>);
    const auto run = GK_BEST(attention_fwd_range<T>);
    const double work = s.Tq <= few_queries ? 8 * score_work(s) : score_work(s);  // few rows go without the matrix kernel
    run_with_scratch("attention_fwd", tasks(s), work, scratch_bytes(s),
                     [&](int64_t t0, int64_t t1, char* scratch) { run(s, t0, t1, scratch); });
  });
}

static std::tuple<Tensor, Tensor> attention_fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& bias,
                                                    const OptTensor& alibi_slopes, const OptTensor& rng_state, double scale,
                                                    double softcap, double dropout_p, int64_t causal_offset,
                                                    int64_t window_left, int64_t window_right) {
  const AttentionArgs s = attention_args("attention_fwd", q, k, v, bias, alibi_slopes, rng_state, scale, softcap, dropout_p,
                                         causal_offset, window_left, window_right);
  Tensor o = new_heads(q, s.B, s.H, s.Tq, s.Dv), lse = new_tensor(q, {s.B, s.H, s.Tq}, stat_dtype(dtype_of(q)));
  attention_into(o, lse, s, q);
  return {o, lse};
}

STABLE_TORCH_LIBRARY_IMPL(gpt_kernels, CPU, m) { m.impl("attention_fwd", TORCH_BOX(&attention_fwd_cpu)); }

}  // namespace gk

#else  // kernels

#include "vec.h"
#include "philox.h"
#include "attention_tile.h"

namespace GK_TARGET {
namespace {

using gk::few_queries;

// a multiple of tile_rows; large, since each block of queries streams the head's packed keys and values once
constexpr int64_t query_block = 96;

// One thread's memory and the forward pass of one head or block of queries.
template <class T> struct Forward {
  typedef operand_t<T> Op;
  typedef typename Op::C C;
  typedef typename Op::unit unit;
  static constexpr int W = lanes<C>;

  const AttentionArgs& s;
  const bool plain;      // the scores are scale * q k^T and nothing else: the scale goes into the exponential
  const C factor;        // p = exp(factor * (score - m))
  const int64_t q_units, o_width, k_units, v_units;
  unit *q, *keys, *values, *p;
  C *o, *score, *m, *l;  // o, m, l of one block of queries: unnormalised output, running maximum, running sum by lane
  uint16_t* random;
  uintptr_t end;

  Forward(const AttentionArgs& s, uintptr_t at)
      : s(s), plain(plain_scores(s)), factor(plain ? s.scale : 1), q_units(row_units<Op>(s.D)), o_width(padded<C>(s.Dv)),
        k_units(units<Op>(s.D) * key_block), v_units(key_block / Op::depth * o_width) {
    // packed once per head and used by all its blocks of queries; a single block needs no more than the tile at hand
    const int64_t blocks = s.Tq <= few_queries ? 0 : s.Tq <= query_block ? 1 : (s.Tk + key_block - 1) / key_block;
    take(at, q, query_block * q_units), take(at, keys, blocks * k_units), take(at, values, blocks * v_units);
    take(at, p, tile_rows * key_block), take(at, o, query_block * o_width), take(at, score, tile_rows * key_block);
    take(at, m, query_block), take(at, l, query_block * W), take(at, random, tile_rows * key_block);
    end = at;
  }

  void pack_block(int64_t b, int64_t hk, int64_t block, int64_t slot) {
    const int64_t j0 = block * key_block, n = s.Tk - j0 < key_block ? s.Tk - j0 : key_block;
    pack_transposed(keys + slot * k_units, s.k.at<const T>(b, hk, j0), s.k.row, n, s.D, key_block);
    pack_depth(values + slot * v_units, s.v.at<const T>(b, hk, j0), s.v.row, n, s.Dv);
    const int64_t filled = units<Op>(n) * o_width;  // hidden keys weigh 0, and 0 times garbage may be NaN
    __builtin_memset(values + slot * v_units + filled, 0, (v_units - filled) * sizeof(unit));
  }

  // The online softmax of one row: new maximum, probabilities to `weights` (an operand of O's units), o and l rescaled.
  // The difference comes before the factor, so that scores near the largest float stay apart.
  template <class O>
  GK_INLINE void softmax_step(const C* score, typename O::unit* weights, C* o, C* m, C* l, int64_t width,
                              const uint16_t* random) {
    const C rate = factor * C(1.4426950408889634);
    vec<C> largest = load(score);
    for (int64_t j = W; j < width; j += W) largest = vmax(largest, load(score + j));
    const C now = hmax<C>(largest), before = *m;
    if (now > before) {
      *m = now;
      const vec<C> shrink = exp2(splat((before - now) * rate));
      store(l, load(l) * shrink);
      for (int64_t d = 0; d < o_width; d += W) store(o + d, load(o + d) * shrink);
    }
    const C base = *m == minus_infinity<C> ? 0 : *m;
    vec<C> sum = load(l);
    store_operand<O>(weights, width, [&](int64_t j) __attribute__((always_inline)) {
      const vec<C> p = exp2((load(score + j) - base) * rate);
      sum += p;
      return random ? drop(p, random + j, s.philox) : p;
    });
    store(l, sum);
  }

  void reset(int64_t rows) {
    for (int64_t r = 0; r < rows; r++) m[r] = minus_infinity<C>;
    __builtin_memset(l, 0, rows * W * sizeof(C));
    __builtin_memset(o, 0, rows * o_width * sizeof(C));
  }

  // o / l to the output, lse = m + log l
  void finish_row(int64_t b, int64_t h, int64_t i, int64_t r) {
    const C total = hsum<C>(load(l + r * W)), inverse = total == 0 ? 0 : (C)s.philox.keep_scale / total;
    T* out = s.o.at<T>(b, h, i);
    for_vectors<C>(s.Dv, [&](int64_t d, int64_t n) { store_any(out + d, load(o + r * o_width + d) * inverse, n); });
    // the product rounded on its own, as the backward pass rounds the score's
    ((C*)s.lse)[(b * s.H + h) * s.Tq + i] = total == 0 ? minus_infinity<C> : rounded(m[r] * factor) + log_of(total);
  }

  // queries [i0, i0 + rows) against every key they see; packed: the head's keys lie in `keys` already
  void query_rows(int64_t b, int64_t h, int64_t i0, int64_t rows, bool packed) {
    pack_rows(q, s.q.at<const T>(b, h, i0), s.q.row, rows, s.D);
    reset(rows);
    const int64_t first = s.first_column(i0) / key_block, last = (s.end_column(i0 + rows - 1) + key_block - 1) / key_block;
    for (int64_t block = first; block < last; block++) {
      const int64_t slot = packed ? block : 0, j0 = block * key_block, present = s.Tk - j0 < key_block ? s.Tk - j0 : key_block;
      if (!packed) pack_block(b, h / (s.H / s.Hk), block, slot);
      for (int64_t r = 0; r < rows; r += tile_rows) {
        const int64_t count = rows - r < tile_rows ? rows - r : tile_rows, i = i0 + r;
        const int64_t seen = s.end_column(i + count - 1) - j0, n = seen < present ? seen : present, width = round_up(n, W);
        if (n <= 0 || s.first_column(i) >= j0 + present) continue;
        product<Op>(score, key_block, q + r * q_units, q_units, 1, keys + slot * k_units, key_block, count, units<Op>(s.D),
                    width, false);
        const bool all_seen = width <= present && s.first_column(i + count - 1) <= j0 && s.end_column(i) >= j0 + width;
        if (s.philox.drop_below) random_rows(random, s, b * s.H + h, i, count, j0);
        for (int64_t c = 0; c < count; c++) {
          C* row = score + c * key_block;
          if (!plain || !all_seen) score_steps<T>(row, (C*)nullptr, s, b, h, i + c, j0, n, width);
          softmax_step<Op>(row, p + c * key_block / Op::depth, o + (r + c) * o_width, m + r + c, l + (r + c) * W, width,
                           s.philox.drop_below ? random + c * key_block : nullptr);
        }
        product<Op>(o + r * o_width, o_width, p, key_block / Op::depth, 1, values + slot * v_units, o_width, count,
                    units<Op>(width), o_width, true);
      }
    }
    for (int64_t r = 0; r < rows; r++) finish_row(b, h, i0 + r, r);
  }

  // A handful of queries, as in decoding: keys and values are used where they lie.
  void few_rows(int64_t b, int64_t h) {
    const int64_t hk = h / (s.H / s.Hk);
    C weights[key_block];
    for (int64_t i = 0; i < s.Tq; i++) {
      reset(1);
      const int64_t first = s.first_column(i) / key_block, last = (s.end_column(i) + key_block - 1) / key_block;
      for (int64_t block = first; block < last; block++) {
        const int64_t j0 = block * key_block, seen = s.end_column(i) - j0, n = seen < key_block ? seen : key_block;
        const int64_t width = round_up(n, W);
        few_scores(score, s.q.at<const T>(b, h, i), s.k.at<const T>(b, hk, j0), s.k.row, n, s.D);
        if (s.philox.drop_below) random_rows(random, s, b * s.H + h, i, 1, j0);
        score_steps<T>(score, (C*)nullptr, s, b, h, i, j0, n, width);
        softmax_step<Plain<T>>(score, weights, o, m, l, width, s.philox.drop_below ? random : nullptr);
        for_vectors<C>(s.Dv, [&](int64_t d, int64_t count) {
          vec<C> sum = load(o + d);
          for (int64_t j = 0; j < n; j++) sum += weights[j] * load_any(s.v.at<const T>(b, hk, j0 + j) + d, count);
          store(o + d, sum);
        });
      }
      finish_row(b, h, i, 0);
    }
  }
};

template <class T> int64_t query_blocks(const AttentionArgs& s) {
  return s.Tq <= few_queries ? 1 : (s.Tq + query_block - 1) / query_block;
}

}  // namespace

template <class T> static int64_t attention_fwd_scratch(const AttentionArgs& s) { return Forward<T>(s, 0).end; }

// a task is one block of queries of one head
template <class T> static int64_t attention_fwd_tasks(const AttentionArgs& s) { return s.B * s.H * query_blocks<T>(s); }

template <class T> static void attention_fwd_range(const AttentionArgs& s, int64_t task0, int64_t task1, char* scratch) {
  Forward<T> f(s, (uintptr_t)scratch);
  const int64_t per_head = query_blocks<T>(s);
  int64_t packed_head = -1;
  for (int64_t task = task0; task < task1; task++) {
    const int64_t head = task / per_head, b = head / s.H, h = head % s.H, turn = task % per_head;
    if (s.Tq <= few_queries) {
      f.few_rows(b, h);
      continue;
    }
    // first, last, second, last but one ...: a causal head's cheap and dear blocks fall evenly on the threads
    const int64_t block = turn % 2 ? per_head - 1 - turn / 2 : turn / 2, i0 = block * query_block;
    const int64_t kv_head = b * s.Hk + h / (s.H / s.Hk);
    if (per_head > 1 && kv_head != packed_head) {
      packed_head = kv_head;
      for (int64_t j = 0; j * key_block < s.Tk; j++) f.pack_block(b, kv_head - b * s.Hk, j, j);
    }
    f.query_rows(b, h, i0, s.Tq - i0 < query_block ? s.Tq - i0 : query_block, per_head > 1);
  }
}

}  // namespace GK_TARGET
#endif
