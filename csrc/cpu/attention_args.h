// What the attention launchers hand to the kernels: raw pointers, sizes, strides in elements, score-step options.
#pragma once
#include "philox_launch.h"

namespace gk {

constexpr int64_t max_head_dim = 256;
constexpr int64_t key_block = 64;  // keys per tile: K^T and V of one tile and head_dim 64 fit L1

// (B, H, T, D) by stride, last dimension contiguous
struct View {
  void* data;
  int64_t batch, head, row;
  template <class T> T* at(int64_t b, int64_t h, int64_t t) const { return (T*)data + b * batch + h * head + t * row; }
};

enum class Bias { none, boolean, same, stat };  // absent; visible where true; in q's dtype; in the statistics' dtype

struct AttentionArgs {
  int64_t B, H, Hk, Tq, Tk, D, Dv;
  View q, k, v, o;
  View dout, dq, dk, dv;  // backward only
  void* lse;              // (B, H, Tq) contiguous, statistics' dtype
  Bias bias_kind;
  View bias;              // strides are 0 along broadcast dimensions
  int64_t bias_column;    // stride between columns: 1 or 0, or anything
  const void* slopes;     // ALiBi, statistics' dtype, or null
  int64_t slopes_batch, slopes_head;
  double scale, softcap;
  Philox philox;
  int64_t diagonal, window_left, window_right;  // row i sees columns i + diagonal - left .. i + diagonal + right

  // the columns that rows [i0, i1) can see, clipped to [0, Tk): begin of the first row, end of the last
  int64_t first_column(int64_t i) const {
    const int64_t j = window_left < 0 ? 0 : i + diagonal - window_left;
    return j < 0 ? 0 : j > Tk ? Tk : j;
  }
  int64_t end_column(int64_t i) const {
    const int64_t j = window_right < 0 ? Tk : i + diagonal + window_right + 1;
    return j < 0 ? 0 : j > Tk ? Tk : j;
  }
};

// where the gradient of an additive bias goes: contiguous, in the bias's dtype and shape
struct BiasGradient {
  void* data;
  int64_t size[4];
};

}  // namespace gk
