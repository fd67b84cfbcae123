// risks[k] = sum of x / sqrt(H_k + x + eps) with x = (factors[k] * g_k)^2: one read of 2 K rows.
//
// Thread to work: as in norms_kernel, a grid column to a task. Inside a chunk thread i takes groups i, i + 256, ...,
// where a group is the elements that 16 bytes of the wider dtype hold. Elements and sums are double for every dtype; at
// most kMostAdds are added one after another.
//
// Bytes moved: (itemsize + itemsize of H) * K * P. Deterministic: which columns meet in which sum depends on sizes
// alone.
#pragma once
#include "gram.cuh"

namespace mtlfast::cuda {

// An entry's rows are some gradients and as many rows of H, and its tag is the widest access to the gradients plus 256
// times that to H. Grid: (blocks, gradients of an entry); block: kThreads. partials: [blocks, gradients]; out: their
// risks.
template <class T, class H>
__global__ void __launch_bounds__(kThreads, 4)  // for the compiler, which would otherwise spill to have five
    excess_risks_kernel(const Table __grid_constant__ table, const Sums sums, double eps, const double* factors) {
  constexpr int width = kGroup<T> < kGroup<H> ? kGroup<T> : kGroup<H>;
  const int row = blockIdx.y, num_rows = gridDim.y;
  const double factor = factors[row];
  double run[1] = {}, sum[1] = {};
  int adds = 0;
  for (long long chunk = first_chunk_of(table, blockIdx.x, gridDim.x); chunk < table.num_chunks; chunk += gridDim.x) {
    const Piece piece = piece_of(table, static_cast<int>(chunk));
    const T* gradient = table.row<const T>(piece.entry, row);
    const H* before = table.row<const H>(piece.entry, num_rows + row);
    const int tag = table.tag(piece.entry);
    for (int step = 0; step < piece.n; step += kThreads * width) {
      const int column = step + thread() * width;
      if (column < piece.n && gradient) {
        const long long at = piece.begin + column;
        const T* const g_from[1] = {gradient + at};
        const H* const h_from[1] = {before ? before + at : nullptr};
        Group<T, width> g[1];
        Group<H, width> h[1];
        load_groups(g_from, piece.n - column, tag & 255, g);
        load_groups(h_from, piece.n - column, tag >> 8, h);
#pragma unroll
        for (int e = 0; e < width; ++e) {  // an element beyond the last is 0 / sqrt(eps)
          const double scaled = factor * widen_to<double>(g[0].element[e]), x = scaled * scaled;
          sum[0] += x / sqrt(widen_to<double>(h[0].element[e]) + x + eps);
        }
      }
      adds += width;
      if (adds == kMostAdds<double>) {
        fold_warp(sum, run);
        adds = 0;
      }
    }
  }
  fold_warp(sum, run);
  add_warps<1>(sums, sums.partials + static_cast<long long>(blockIdx.x) * num_rows + row, run);
  if (!is_last_block(sums, gridDim.x * gridDim.y)) return;
  add_up(sums.partials, gridDim.x, num_rows, [&](int k, double risk) { sums.out[k] = risk; });
}

}  // namespace mtlfast::cuda
