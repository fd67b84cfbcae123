// out = the mean of an element's K gradients without the least and the largest: one read of the K rows, one write.
//
// Thread to work: blocks take chunks in turn. Inside a chunk thread i takes groups i, i + 256, ..., where a group is as
// many elements as fit the registers: 16 bytes of each row for up to 16 rows, 4 bytes for 64. It loads four rows at a
// time and sorts each element's gradients by a network of comparisons that is unrolled for 4, 8, 16, 32 or 64 of them;
// missing rows are infinite and so come last. It reads all rows of an element before it writes the element, so that the
// output may be one of the rows.
//
// Bytes moved: (K + 1) * itemsize * P. The gradients in the middle are added in ascending order in double, divided once
// and rounded once. So the result depends neither on the order of the tasks nor on an address. An element with a
// gradient that is not finite becomes NaN: the sum of 0 * g is added.
#pragma once
#include "../sorting_network.h"
#include "elements.cuh"
#include "table.h"

namespace mtlfast::cuda {

__device__ inline void order(float& low, float& high) {
  const float a = low, b = high;
  low = fminf(a, b);
  high = fmaxf(a, b);
}
__device__ inline void order(double& low, double& high) {
  const double a = low, b = high;
  low = fmin(a, b);
  high = fmax(a, b);
}

// Makes the comparisons First .. First + Count of the network of N numbers.
template <int N, int First, int Count, class W>
__device__ inline void order_some(W (&v)[N]) {
  if constexpr (Count > 1) {
    order_some<N, First, Count / 2>(v);
    order_some<N, First + Count / 2, Count - Count / 2>(v);
  } else if constexpr (Count == 1) {
    constexpr int low = kSortingNetwork<N>.low[First], high = kSortingNetwork<N>.high[First];
    order(v[low], v[high]);
  }
}

template <int N, class W>
__device__ inline void sort(W (&v)[N]) {
  constexpr int count = kSortingNetwork<N>.count;
#if defined(__CUDACC__)
  order_some<N, 0, count>(v);
#else  // a host compiler takes minutes to unroll it
  for (int i = 0; i < count; ++i) order(v[kSortingNetwork<N>.low[i]], v[kSortingNetwork<N>.high[i]]);
#endif
}

// Elements of a group for N rows: so many that the sorted numbers take at most 64 registers, but at least a word.
template <class T, int N>
constexpr int kSortedGroup = [] {
  constexpr int fitting = 64 * 4 / (N * static_cast<int>(sizeof(Wide<T>))), least = sizeof(T) < 4 ? 2 : 1;
  return fitting > kGroup<T> ? kGroup<T> : fitting > least ? fitting : least;
}();

// An entry's rows are the K <= N gradients and the output. Its tag is the widest access to the gradients plus 256 times
// the widest to the output. Grid: any; block: kThreads.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    trimmed_mean_kernel(const Table __grid_constant__ table, const int num_tasks, const int trim) {
  constexpr int width = kSortedGroup<T, N>, kAtOnce = 4;
  using W = Wide<T>;
  const double kept = num_tasks - 2 * trim;
  for (long long chunk = blockIdx.x; chunk < table.num_chunks; chunk += gridDim.x) {
    const Piece piece = piece_of(table, static_cast<int>(chunk));
    const int load_bytes = table.tag(piece.entry) & 255, store_bytes = table.tag(piece.entry) >> 8;
    for (int column = thread() * width; column < piece.n; column += kThreads * width) {
      const long long at = piece.begin + column;
      const int left = piece.n - column;
      W v[width][N], zero[width] = {};
#pragma unroll
      for (int k = 0; k < N; k += kAtOnce) {
        const T* from[kAtOnce];
        Group<T, width> rows[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const T* row = k + i < num_tasks ? table.row<const T>(piece.entry, k + i) : nullptr;
          from[i] = row ? row + at : nullptr;
        }
        load_groups(from, left, load_bytes, rows);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
          for (int e = 0; e < width; ++e) {
            const W g = widen(rows[i].element[e]);
            v[e][k + i] = k + i < num_tasks ? g : static_cast<W>(INFINITY);
            zero[e] += 0 * g;
          }
      }
      Group<T, width> result;
#pragma unroll
      for (int e = 0; e < width; ++e) {
        sort(v[e]);
        double sum = 0;
#pragma unroll
        for (int k = 0; k < N; ++k)
          if (k >= trim && k < num_tasks - trim) sum += v[e][k];
        narrow(sum / kept + zero[e], result.element[e]);
      }
      store_group(result, table.row<T>(piece.entry, num_tasks) + at, left, store_bytes);
    }
  }
}

}  // namespace mtlfast::cuda
