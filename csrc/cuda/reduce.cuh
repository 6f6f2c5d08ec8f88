// The second stage of every sum over rows: partial[blocks][planes][N] -> out[N] of one plane, added in the same
// order every time.
#pragma once
#include "common.cuh"

namespace gk {

constexpr int sum_columns = 32, sum_warps = 8;

// A warp adds every eighth partial of 32 columns, side by side in memory; then the warps' sums are added in order.
template <class P>
__global__ void __launch_bounds__(sum_columns* sum_warps)
    sum_partials(P* out0, P* out1, const float* partial, int blocks, int planes, int64_t N) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, plane = blockIdx.y;
  const int64_t column = int64_t(blockIdx.x) * sum_columns + lane;
  GK_SHARED(float, sums, [sum_warps][sum_columns]);
  float sum = 0;
#pragma unroll 4
  for (int b = warp; b < blocks; b += sum_warps)
    if (column < N) sum += partial[(int64_t(b) * planes + plane) * N + column];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= N) return;
  sum = 0;
#pragma unroll
  for (int w = 0; w < sum_warps; w++) sum += sums[w][lane];
  P* out = plane ? out1 : out0;
  if (out) out[column] = from_float<P>(sum);
}

// out0 is the sum of plane 0, out1 of plane 1; either may be null.
template <class P> void launch_sum_partials(const Gpu& gpu, P* out0, P* out1, const Tensor& partial, int64_t N) {
  const int blocks = int(partial.size(0)), planes = int(partial.size(1));
  launch(GK_KERNEL(sum_partials<P>), dim3(unsigned(cdiv(N, sum_columns)), planes), sum_columns * sum_warps, 0, gpu.stream, out0,
         out1, data<float>(partial), blocks, planes, N);
}

}  // namespace gk
