// What launchers share beyond the torch API: storage types, the switch from a dtype to a C++ type, and the one way to
// reduce over rows that gives the same bits for any number of threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../types.h"

namespace gk {

// Has the page of this address never been written to? (isa.cpp; false where the system does not tell)
bool is_fresh(const void* address);

template <class T> using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Sums over rows (weight and bias gradients) are split by SHAPE into at most 64 chunks, each summed by one thread in row
// order, and the partials added in chunk order: bitwise the same for 1, 2, 4 ... threads.
inline int64_t row_chunks(int64_t rows) { return std::clamp<int64_t>(rows / 32, 1, 64); }
inline int64_t chunk_begin(int64_t chunk, int64_t chunks, int64_t rows) {  // rows * chunk / chunks without overflow
  return (rows / chunks) * chunk + std::min<int64_t>(chunk, rows % chunks);
}

// Rows per parallel_for grain: about 32 KB of work, so that tiny tensors stay on the calling thread.
inline int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, columns)); }

// The same counted in chunks of rows.
inline int64_t chunk_grain(int64_t rows, int64_t columns, int64_t chunks) {
  return std::max<int64_t>(1, row_grain(columns) * chunks / std::max<int64_t>(1, rows));
}

// May an output be written past the cache (non-temporal stores)? That saves reading each line before it is overwritten, and
// costs where the line is in the cache anyway. So: only if the call's tensors, `tensors` of them as large as the output, exceed
// what a last-level cache keeps (32 MB: LOG L124); and not into pages that malloc has just got from the system and nobody has
// written to. The system zeroes such a page at its first touch, which leaves its lines in the cache: a plain store finds them
// there, a non-temporal one would have to throw them out first (LOG L125). One page in the middle of the output is asked about.
inline bool output_streams(const Tensor& out, int64_t tensors) {
  const int64_t bytes = out.numel() * element_size(dtype_of(out));
  return tensors * bytes >= (int64_t{32} << 20) && !is_fresh((const char*)out.const_data_ptr() + bytes / 2);
}
// The same of an output in rows: each must begin on a boundary of 64 bytes.
inline bool row_streams(const Tensor& out, int64_t columns, int64_t tensors) {
  return columns * element_size(dtype_of(out)) % 64 == 0 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0 &&
         output_streams(out, tensors);
}

// What a thread has written past the cache is in memory before it says that it is done. What is one thread's work is this one's:
// asking torch for threads takes longer than a tiny op (LOG L169).
template <class F> inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end - begin <= grain) return begin < end ? f(begin, end) : void();
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) {
    f(b, e);
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
  });
}

}  // namespace gk
