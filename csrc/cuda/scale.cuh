// g_k[c] *= factors[k], in place: one read and one write of K * P elements.
//
// Thread to work: an entry is one task's gradient of one tensor. Blocks take chunks in turn; inside one, thread i takes
// groups i, i + 256, ... in the widest accesses that the address allows.
// Bytes moved: 2 * K * P * itemsize. Deterministic: each element is written once, by one product.
#pragma once
#include "elements.cuh"
#include "table.h"

namespace mtlfast::cuda {

// An entry's row is the gradient, and its tag is the task. Grid: any; block: kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const Table __grid_constant__ table, const double* factors) {
  for (long long chunk = blockIdx.x; chunk < table.num_chunks; chunk += gridDim.x) {
    const Piece piece = piece_of(table, static_cast<int>(chunk));
    const Wide<T> factor = static_cast<Wide<T>>(factors[table.tag(piece.entry)]);
    T* row = table.row<T>(piece.entry, 0) + piece.begin;
    const int bytes = widest_access(reinterpret_cast<unsigned long long>(row));
    for (int column = thread() * kGroup<T>; column < piece.n; column += kThreads * kGroup<T>) {
      const T* const from[1] = {row + column};
      Group<T> group[1];
      load_groups(from, piece.n - column, bytes, group);
#pragma unroll
      for (int e = 0; e < kGroup<T>; ++e) narrow(widen(group[0].element[e]) * factor, group[0].element[e]);
      store_group(group[0], row + column, piece.n - column, bytes);
    }
  }
}

}  // namespace mtlfast::cuda
