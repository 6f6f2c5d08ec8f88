// Tiles of attention in shared memory: how they lie there, and how a block's threads bring them in and take them out.
#pragma once
#include "common.cuh"

#include "../args/attention.h"

namespace gk {

// The GPU that code is compiled for, from which its tiles follow; the simulator's is the oldest, or one that a test names.
#ifdef __CUDA_ARCH__
constexpr int tile_arch = __CUDA_ARCH__ / 10;
#elif defined(GK_TILE_ARCH)
constexpr int tile_arch = GK_TILE_ARCH;
#else
constexpr int tile_arch = 80;
#endif

// ---- tiles in shared memory ---- Rows of `columns` elements in chunks of 16 bytes. Shared memory has 32 banks of 4 bytes, a
// chunk is in four of them; rows of 128 bytes one below the other would have the same chunk in the same banks, and eight such
// reads would take eight turns. So chunk c of a row stands at c ^ turn(row), "swizzled": the same chunk of eight neighbouring
// rows, which is what ldmatrix and a warp's stores of 16-bit fragments touch, lies in 32 different banks; and so do two
// neighbouring chunks of four rows, which is what half a warp's stores of float32 fragments touch.
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
  opaque(first);  // here and below: or the addresses of every row and tile to come are computed ahead, and held in registers
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
  opaque(thread);  // or the places of all its chunks are computed before the caller's loop, and held in registers through it
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

}  // namespace gk
