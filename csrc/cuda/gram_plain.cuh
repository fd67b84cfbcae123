// G = J J^T the slow, obvious way, in double: what the fast kernels are tested against.
//
// Thread to work: block (i, j), j <= i, adds a_i * b_j over all columns, column c to thread c % 256; then 256 sums are
// added in a tree. Bytes moved: K(K+1) * P * itemsize. Deterministic: the order of a sum depends on sizes alone.
#pragma once
#include "elements.cuh"
#include "table.h"

namespace mtlfast::cuda {

// Grid: (K, K); block: kThreads. accumulate: add to out [K, K], for the op's launches after the first.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gram_plain_kernel(const Table __grid_constant__ table, double* out, int accumulate) {
  __shared__ double sums[kThreads];
  const int i = blockIdx.x, j = blockIdx.y, K = table.num_rows;
  if (j > i) return;
  double sum = 0;
  for (int entry = 0; entry < table.num_entries; ++entry) {
    const T *a = table.row<const T>(entry, i), *b = table.row<const T>(entry, j);
    for (long long c = thread(); a && b && c < table.numel(entry); c += kThreads)
      sum += static_cast<double>(widen(a[c])) * static_cast<double>(widen(b[c]));
  }
  sums[thread()] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread() < half) sums[thread()] += sums[thread() + half];
  }
  if (thread() == 0) out[i * K + j] = out[j * K + i] = sums[0] + (accumulate ? out[i * K + j] : 0.0);
}

}  // namespace mtlfast::cuda
