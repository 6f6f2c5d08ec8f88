// Rows that are read once: a warp or a block keeps its row, of any alignment, between the passes over it, in registers or, a
// longer one, in shared memory. A row too long for that, or one of too few, is cut into parts, a block each: one launch reads
// them, a second one writes.
//
// A guide to the template parameters, here and in softmax.cu and cross_entropy.cu:
//   T      what a row's elements are in memory: float, Half or BFloat16; arithmetic is in float
//   V      elements of a 16-byte chunk, the unit of every load and store: 4 or 8 (per_16<T>)
//   block  false: a warp has a row, up to 1024 columns of it; true: a block of up to 512 threads shares a row, or a part of one
//   kept   chunks that a thread keeps in registers between its passes over a row; 0: the row waits in shared memory instead
//   few    the most that an op can keep, beside what its arithmetic needs
//   held   the op has a kernel for rows in shared memory
//   Pass   whole: one launch does all; read, then write: two launches, of a row in parts that tell each other their statistics
// row_shape() chooses from the sizes, with_row_shape() makes constants of them, RowPlace says which columns are a thread's,
// Chunks loads and stores them whatever address the row begins at, KeptRow is where they wait.
#pragma once
#include "common.cuh"

namespace gk {

// ---- how a shape is cut, in one place ----
// A block of up to 512 threads keeps `few` chunks of 16 bytes for each; an op says how many leave room for its arithmetic. The
// same for all architectures, whose registers are as many. Of shared memory they have 99, 163 or 227 KB: a 16-bit row of 50257
// columns fits everywhere.
struct RowShape {
  bool block;  // does a block share a row, or a warp?
  int kept;  // chunks per thread in registers; 0: in shared memory
  int threads;  // per block
  int parts;  // of a row
  int64_t span;  // columns of a part
  size_t shared = 0;
  int64_t wave = 0;  // blocks that go from row to row, so that one row is on its way while another is written
  unsigned blocks(int64_t M) const { return unsigned(!block ? cdiv(M, threads / 32) : kept ? M * parts : std::min(M, wave)); }
};
constexpr int64_t row_warp_columns = 1024, row_part_columns = 8192;  // a warp's longest row; what is worth a block of its own
template <class T> constexpr int row_warp_few = 16 / per_16<T> + 1;  // chunks that a thread of a warp keeps: 512 columns
template <class T> constexpr int row_warp_many = 32 / per_16<T> + 1;  // or 1024, wherever they begin
template <bool block> constexpr int row_threads = block ? 512 : 128;  // at most
constexpr int row_scratch = 768;  // bytes of shared memory that the reductions take
// of a row wherever it begins, so that it has as many threads, and with it its sums their order
template <class T> constexpr int64_t row_chunks(int64_t n) { return (n + 2 * (per_16<T> - 1)) / per_16<T>; }

// tensors: rows of so many are held in shared memory together; of those blocks a processor's registers serve `resident`
template <class T, int few> RowShape row_shape(int64_t M, int64_t N, const Gpu& gpu, int tensors = 0, int64_t resident = 2) {
  constexpr int most = row_threads<true>;
  const int64_t chunks = row_chunks<T>(N), per_row = gpu.processors() / std::max<int64_t>(M, 1);
  if (N <= row_warp_columns) return {false, chunks <= 32 * row_warp_few<T> ? row_warp_few<T> : row_warp_many<T>, 128, 1, N};
  constexpr int64_t longest = (few * most - 1) * per_16<T> / 64 * 64;
  const int64_t wanted = per_row >= 2 ? std::min(per_row, N / row_part_columns) : 1;
  const int64_t bytes = tensors * chunks * 16, limit = gpu.shared_per_block();
  if (wanted <= 1 && chunks > few * most && tensors && bytes + row_scratch <= limit) {
    const int64_t blocks = std::min(resident, (limit + 1024) / (bytes + row_scratch + 1024));  // a KB of each is the system's
    return {true, 0, most, 1, N, size_t(bytes), gpu.processors() * blocks};
  }
  const int64_t parts = std::max(chunks <= few * most ? 1 : cdiv(N, longest), wanted);
  const int64_t span = parts > 1 ? cdiv(cdiv(N, parts), 64) * 64 : N;
  const int threads = int(std::max<int64_t>(cdiv(row_chunks<T>(span), 32 * few), 4)) * 32;
  return {true, few, threads, int(cdiv(N, span)), span};
}

// What a launch does: everything, or a part's statistics, or a part's output from the statistics of all parts.
enum class Pass { whole, read, write };
template <Pass pass> using PassIs = std::integral_constant<Pass, pass>;
template <int kept> using KeptIs = std::integral_constant<int, kept>;

// f(block, kept, pass) as constants, for each launch that the shape needs, in order; held: are there rows in shared memory?
template <class T, int few, bool held, class F> void with_row_shape(const RowShape& shape, const F& f) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (!shape.block && shape.kept == row_warp_few<T>) f(no, KeptIs<row_warp_few<T>>{}, PassIs<Pass::whole>{});
  else if (!shape.block) f(no, KeptIs<row_warp_many<T>>{}, PassIs<Pass::whole>{});
  else if (shape.parts > 1) f(yes, KeptIs<few>{}, PassIs<Pass::read>{}), f(yes, KeptIs<few>{}, PassIs<Pass::write>{});
  else if (shape.kept) f(yes, KeptIs<few>{}, PassIs<Pass::whole>{});
  else if constexpr (held) f(yes, KeptIs<0>{}, PassIs<Pass::whole>{});
}

inline void check_row_count(const char* op, int64_t M) {
  GK_CHECK(M < int64_t{1} << 31, op, ": at most 2147483647 rows, got ", M);
}

// ---- in a kernel ----

// Which part of which row is this thread's, and its place among those that share it.
template <bool block, int kept> struct RowPlace {
  unsigned row, part;
  int64_t begin;  // the part's first column
  int n;  // and how many
  int me, peers;
  GK_DEVICE RowPlace(int64_t N, int64_t span, int parts) {
    peers = !block ? 32 : kept ? blockDim.x : row_threads<true>, me = block ? threadIdx.x : threadIdx.x % 32;
    const unsigned index = block ? blockIdx.x : blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    part = parts > 1 ? index % parts : 0;
    row = parts > 1 ? index / parts : index;
    begin = part * span;
    n = int(min(span, N - begin));
  }
};

// n columns in chunks of 16 bytes that stand on 16-byte boundaries of the row that is written: the first begins up to V - 1
// columns before the row, at -skew. Thread `me` of `peers` has each peers-th chunk, its j-th at column(j).
template <class T> struct Chunks {
  static constexpr int V = per_16<T>;
  int n, skew, me, peers;
  GK_DEVICE Chunks(const T* written, int n, int me, int peers)
      : n(n), skew(int(reinterpret_cast<uintptr_t>(written) % 16 / sizeof(T))), me(me), peers(peers) {}
  GK_DEVICE int column(int j) const { return (me + j * peers) * V - skew; }
  GK_DEVICE int last() const { return (n + skew - 1) / V * V - skew; }  // the column at which the last chunk begins
  GK_DEVICE static bool inside(int column, int end) { return column >= 0 && column + V <= end; }  // all of a chunk

  // In chunk j, `value` for what is not in [0, end).
  GK_DEVICE void fill(int j, int end, float (&v)[V], float value) const {
    const int at = column(j);
    if (inside(at, end)) return;
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = at + k >= 0 && at + k < end ? v[k] : value;
  }

  // A chunk element by element, 0 outside the row.
  GK_DEVICE uint4 by_element(const T* x, int at) const {
    float v[V];
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = at + k >= 0 && at + k < n ? to_float(x[at + k]) : 0.f;
    return pack<T>(v);  // exact: they come from T
  }
  // of the boundary before a chunk
  GK_DEVICE int ahead(const T* x) const { return int(reinterpret_cast<uintptr_t>(x - skew) % 16 / sizeof(T)); }
  // Both 16-byte blocks that hold a chunk are inside the row.
  GK_DEVICE bool across(int column, int ahead) const { return column >= ahead && column + 2 * V - ahead <= n; }

  // The row x, which may be aligned otherwise; columns outside, and chunks from `end` on, are 0.
  template <int kept> GK_DEVICE void load(uint4 (&raw)[kept], const T* x, int end) const {
    const int ahead = this->ahead(x);
    if (ahead == 0) {
#pragma unroll
      for (int j = 0; j < kept; j++)
        raw[j] = column(j) < end && inside(column(j), n) ? load_16_once(x + column(j)) : make_uint4(0, 0, 0, 0);
      if (skew == 0 && n % V == 0) return;
    } else {
#pragma unroll
      for (int j = 0; j < kept; j++) {
        const bool whole = column(j) < end && across(column(j), ahead);
        raw[j] = whole ? load_16_across(x + column(j)) : make_uint4(0, 0, 0, 0);
      }
    }
    // at the row's ends, element by element
#pragma unroll 1
    for (int edge = 0; edge < 4; edge++) {
      const int at = edge < 2 ? edge * V - skew : last() - (3 - edge) * V;
      if (at + V <= 0 || max(at, 0) >= end || (ahead == 0 ? inside(at, n) : across(at, ahead))) continue;
      bool mine = false;
#pragma unroll
      for (int j = 0; j < kept; j++) mine |= column(j) == at;
      if (!mine) continue;
      const uint4 bits = by_element(x, at);
#pragma unroll
      for (int j = 0; j < kept; j++) raw[j] = column(j) == at ? bits : raw[j];
    }
  }
  template <int kept> GK_DEVICE void store(T* y, const uint4 (&raw)[kept]) const {
#pragma unroll
    for (int j = 0; j < kept; j++)
      if (inside(column(j), n)) store_16(y + column(j), raw[j]);
    if (skew == 0 && n % V == 0) return;
#pragma unroll 1
    for (int edge = 0; edge < 2; edge++) {
      const int at = edge == 0 ? -skew : last();
      if (inside(at, n) || (edge == 1 && at == -skew)) continue;
      uint4 bits = make_uint4(0, 0, 0, 0);
      bool mine = false;
#pragma unroll
      for (int j = 0; j < kept; j++)
        if (column(j) == at) bits = raw[j], mine = true;
      if (!mine) continue;
      float v[V];
      unpack<T>(bits, v);
#pragma unroll
      for (int k = 0; k < V; k++)
        if (at + k >= 0 && at + k < n) y[at + k] = from_float<T>(v[k]);
    }
  }

  GK_DEVICE void store(T* y, int j, const float (&v)[V]) const {
    const int at = column(j);
    if (inside(at, n)) return store_16(y + at, pack<T>(v));
#pragma unroll
    for (int k = 0; k < V; k++)
      if (at + k >= 0 && at + k < n) y[at + k] = from_float<T>(v[k]);
  }

  // Before a row's sum: v[k] is what this thread has summed of the k-th elements of its chunks. Chunks begin `skew` columns
  // before the row, so the k-th element is another column of the row for another skew, and the row's sum would add the same
  // numbers in another order: other last bits for the same row at another address. So the sums are handed on, the first `skew`
  // of each thread to the thread before it, and rotated by `skew`: then v[k] is of columns k, k + V, ... of the row itself,
  // always.
  template <bool block> GK_DEVICE void turn(float (&v)[V]) const {
    if (skew == 0) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // a thread's first `skew` elements are those of the one before
    float next[V];
#pragma unroll
    for (int k = 0; k < V; k++) next[k] = shfl_index(v[k], (lane + 1) % 32);
    if constexpr (block) {
      GK_SHARED(float, first, [row_threads<true> / 32][V]);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < V; k++)
        if (lane == 0) first[warp][k] = v[k];
      __syncthreads();
#pragma unroll
      for (int k = 0; k < V; k++)
        if (lane == 31) next[k] = first[(warp + 1) % (peers / 32)][k];
    }
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = k < skew ? next[k] : v[k];
#pragma unroll
    for (int by = 1; by < V; by *= 2) {
#pragma unroll
      for (int k = 0; k < V; k++) next[k] = v[(k + by) % V];
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = skew & by ? next[k] : v[k];
    }
  }
  // The row's sum, for each of its threads.
  template <bool block> GK_DEVICE float sum(float (&v)[V]) const {
    turn<block>(v);
    float total[1] = {};
#pragma unroll
    for (int k = 0; k < V; k++) total[0] += v[k];
    row_sum<block>(total);
    return total[0];
  }
};

// Between two passes over what is kept. The compiler would hold the elements of one pass for the next, in registers that are
// not there; bits that a number below 2^62 may have changed, for all it knows, it unpacks anew.
template <int kept> GK_DEVICE void forget(uint4 (&raw)[kept], int64_t below_2_62) {
  const uint32_t zero = uint32_t(below_2_62 >> 62);
#pragma unroll
  for (int j = 0; j < kept; j++) raw[j].x += zero, raw[j].y += zero, raw[j].z += zero, raw[j].w += zero;
}

// A row to be read: in chunks of the one that is written, up to the column `end`, from which on it is 0.
template <class T> struct RowSource {
  Chunks<T> chunks;
  const T* x;
  int end;
};

// What a row's threads keep of it: `kept` chunks each in registers.
template <class T, int kept> struct KeptRow {
  static constexpr int V = per_16<T>;
  uint4 raw[kept];
  GK_DEVICE explicit KeptRow(int64_t, int = 0) {}
  GK_DEVICE void fetch(const RowSource<T>&) {}
  GK_DEVICE void fetch(const RowSource<T>&, int) {}
  GK_DEVICE void load(const RowSource<T>& row) { row.chunks.load(raw, row.x, row.end); }
  GK_DEVICE void get(int j, float (&v)[V]) const { unpack<T>(raw[j], v); }
  template <class F> GK_DEVICE static void each(const RowSource<T>&, const F& f) {  // f(j) of each chunk
#pragma unroll
    for (int j = 0; j < kept; j++) f(j);
  }
  // f(j, v) makes each chunk of y
  template <class F, class Refill> GK_DEVICE void write(T* y, const RowSource<T>& row, const F& f, const Refill&) {
#pragma unroll
    for (int j = 0; j < kept; j++) {
      float v[V];
      f(j, v);
      raw[j] = pack<T>(v);
    }
    row.chunks.store(y, raw);
  }
  GK_DEVICE void forget(int64_t below_2_62) { gk::forget(raw, below_2_62); }
};

// Or in shared memory, every chunk in a slot that no other thread looks at: no barrier, and a slot is refilled with the next
// row's chunk as soon as its own is written. `tensor` of those that are kept, of rows of N columns.
template <class T> struct KeptRow<T, 0> {
  static constexpr int V = per_16<T>, peers = row_threads<true>;
  unsigned char* slots;
  int last;  // the first j beyond any row's chunks, wherever it begins
  int end = 0;  // column(j) from which on there is nothing
  int skew = 0;
  GK_DEVICE explicit KeptRow(int64_t N, int tensor = 0) {
    GK_DYNAMIC_SHARED(shared);
    const int chunks = int((N + 2 * (V - 1)) / V);  // row_chunks
    slots = shared + (int64_t(tensor) * chunks + threadIdx.x) * 16;
    last = (chunks - int(threadIdx.x) + peers - 1) / peers;
  }
  GK_DEVICE unsigned char* slot(int j) const { return slots + j * (peers * 16); }
  GK_DEVICE void fetch(const RowSource<T>& row, int j) {
    const int at = row.chunks.column(j);
    if (max(at, 0) >= row.end || row.chunks.ahead(row.x)) return;
    if (row.chunks.inside(at, row.chunks.n)) cp_async_16(slot(j), row.x + at);
    else store_16(slot(j), row.chunks.by_element(row.x, at));
  }
  GK_DEVICE void fetch(const RowSource<T>& row) {
    for (int j = 0; j < last; j++) fetch(row, j);
    cp_async_commit();
  }
  // What was fetched is there. A row that is aligned otherwise than the one written is read only now.
  GK_DEVICE void load(const RowSource<T>& row) {
    end = row.end, skew = row.chunks.skew;
    cp_async_wait<0>();
    const int ahead = row.chunks.ahead(row.x);
    if (ahead == 0) return;
#pragma unroll 4
    for (int j = 0; j < last; j++) {
      const int at = row.chunks.column(j);
      if (max(at, 0) >= end) continue;
      store_16(slot(j), row.chunks.across(at, ahead) ? load_16_across(row.x + at) : row.chunks.by_element(row.x, at));
    }
  }
  GK_DEVICE void get(int j, float (&v)[V]) const {
    const int at = (int(threadIdx.x) + j * peers) * V - skew;
    unpack<T>(max(at, 0) < end ? load_16(slot(j)) : make_uint4(0, 0, 0, 0), v);
  }
  template <class F> GK_DEVICE static void each(const RowSource<T>& row, const F& f) {
#pragma unroll 4
    for (int j = 0; row.chunks.column(j) < row.end; j++) f(j);
  }
  template <class F, class Refill> GK_DEVICE void write(T* y, const RowSource<T>& row, const F& f, const Refill& refill) {
#pragma unroll 2
    for (int j = 0; j < last; j++) {
      if (row.chunks.column(j) < row.chunks.n) {
        float v[V];
        f(j, v);
        row.chunks.store(y, j, v);
      }
      refill(j);
    }
    cp_async_commit();
  }
  GK_DEVICE void forget(int64_t) {}
};

template <bool block> GK_DEVICE float row_max(float v) {
  if constexpr (block) return block_max(v);
  else return warp_max(v);
}
constexpr float minus_inf = -__builtin_inff(), log2_e = 1.4426950408889634f;
// A maximum of -inf is no origin to measure from: -inf - -inf is nan.
GK_DEVICE float origin_of(float top) { return top == minus_inf ? 0.f : top; }

// One of the statistics of a row's parts, partial[parts][count]: f of each, added or their maximum, in the same order every
// time and for each lane of a warp.
template <class F> GK_DEVICE float max_of_parts(int parts, const F& f) {
  float v = minus_inf;
  for (int s = threadIdx.x % 32; s < parts; s += 32) v = fmaxf(v, f(s));
  return warp_max(v);
}
template <class F> GK_DEVICE float sum_of_parts(int parts, const F& f) {
  float v = 0;
  for (int s = threadIdx.x % 32; s < parts; s += 32) v += f(s);
  return warp_sum(v);
}

}  // namespace gk
