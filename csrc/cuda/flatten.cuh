// out[k, c] = g_k[c]: the Jacobian as a matrix, one read and one write of K rows.
//
// Thread to work: an entry is one task's gradient of one tensor and its place in the matrix. Blocks take chunks in
// turn; inside one, thread i takes groups i, i + 256, ... in the widest accesses that the two addresses allow. Bytes
// moved: K * P * (itemsize + itemsize of out). Deterministic: each element is copied once, rounded at most once.
#pragma once
#include "elements.cuh"
#include "table.h"

namespace mtlfast::cuda {

// An entry's rows are the gradient (nullptr: zeros) and the output. Its tag is the widest access to the first plus 256
// times the widest to the second. Grid: any; block: kThreads.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads) flatten_kernel(const Table __grid_constant__ table) {
  constexpr int width = kGroup<T>;
  for (long long chunk = blockIdx.x; chunk < table.num_chunks; chunk += gridDim.x) {
    const Piece piece = piece_of(table, static_cast<int>(chunk));
    const int load_bytes = table.tag(piece.entry) & 255, store_bytes = table.tag(piece.entry) >> 8;
    const T* row = table.row<const T>(piece.entry, 0);
    Out* out = table.row<Out>(piece.entry, 1) + piece.begin;
    for (int column = thread() * width; column < piece.n; column += kThreads * width) {
      const T* const from[1] = {row ? row + piece.begin + column : nullptr};
      Group<T> group[1];
      Group<Out, width> result;
      load_groups(from, piece.n - column, load_bytes, group);
#pragma unroll
      for (int e = 0; e < width; ++e) narrow(widen(group[0].element[e]), result.element[e]);
      store_group(result, out + column, piece.n - column, store_bytes);
    }
  }
}

}  // namespace mtlfast::cuda
