// out = the mean of an element's K gradients without the least and the largest: one read of the K rows, one write.
//
// A vector of each row is loaded and the vectors are sorted, lane by lane, by a network of comparisons for 1, 2, 4, 8,
// 16, 32 or 64 of them: up to 16 in registers, more in the first-level cache. Missing rows are infinite and so come
// last. The middle ones are added in ascending order in double, divided once and rounded once. So the result depends
// neither on the order of the tasks nor on an element's address.
//
// Work for each element: 19 comparisons for 8 rows, 63 for 16, 191 for 32, 543 for 64. An element with a gradient that
// is not finite becomes NaN: the sum of 0 * g is added.
#include "../sorting_network.h"
#include "kernels.h"
#include "rows.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int kInRegisters = 16;

template <class V>
MTLFAST_INLINE void order(V& low, V& high) {
  const V a = low, b = high;
  low = a < b ? a : b;
  high = a > b ? a : b;
}

// Makes the comparisons First .. First + Count of the network of N vectors.
template <int N, int First, int Count, class V>
MTLFAST_INLINE void order_some(V (&v)[N]) {
  if constexpr (Count > 1) {
    order_some<N, First, Count / 2>(v);
    order_some<N, First + Count / 2, Count - Count / 2>(v);
  } else if constexpr (Count == 1) {
    order(v[kSortingNetwork<N>.low[First]], v[kSortingNetwork<N>.high[First]]);
  }
}

// Sorts the vectors, lane by lane. Only `sorted` is read by indices that the compiler does not know, so that `v` can
// stay in registers.
template <int N, class V>
MTLFAST_INLINE void sort(V (&v)[N], V (&sorted)[N]) {
  constexpr int count = kSortingNetwork<N>.count;
  if constexpr (N <= kInRegisters) {
    order_some<N, 0, count>(v);
  } else {
    for (int i = 0; i < count; ++i) order(v[kSortingNetwork<N>.low[i]], v[kSortingNetwork<N>.high[i]]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < N; ++k) sorted[k] = v[k];
}

// Means over n columns of `count` <= N rows.
template <class T, int N>
void trimmed_means(const T* const* rows, int64_t count, int64_t n, int64_t trim, T* to) {
  using S = InOrder<T>;
  using V = typename S::Vec;
  constexpr int wides = kWides<V>;
  const double kept = static_cast<double>(count - 2 * trim);
  for (int64_t c = 0; c < n; c += S::kStep) {
    V v[N], sorted[N], zero = {};
#pragma GCC unroll 16
    for (int k = 0; k < N; ++k) {
      if (k < count) {
        v[k] = S::load(rows[k] + c);
        zero += 0 * v[k];  // NaN for one that is not finite
      } else {
        v[k] = V{} + __builtin_inff();
      }
    }
    sort(v, sorted);
    F64 sums[wides] = {};
    for (int64_t k = trim; k < count - trim; ++k)
      for (int i = 0; i < wides; ++i) sums[i] += widened(sorted[k], i);
    for (int i = 0; i < wides; ++i) sums[i] = sums[i] / kept + widened(zero, i);
    store_first(to + c, narrowed(sums), n - c);
  }
}

// The least network for so many rows.
template <class T, int N = 1>
void sort_rows(const T* const* rows, int64_t count, int64_t n, int64_t trim, T* to) {
  if constexpr (N < kMostSorted)
    if (count > N) return sort_rows<T, 2 * N>(rows, count, n, trim, to);
  trimmed_means<T, N>(rows, count, n, trim, to);
}

}  // namespace

int64_t trimmed_mean_scratch(int64_t num_tasks) { return rows_scratch(num_tasks); }

void trimmed_mean(const TaskView& grads, int64_t begin, int64_t end, int64_t trim, void* scratch, void* const* out) {
  visit(grads.dtype, [&]<class T>(T) {
    for_each_row_block<T>(grads, begin, end, scratch, [&](const T* const* rows, int64_t n, int64_t t, int64_t at) {
      sort_rows<T>(rows, grads.num_tasks, n, trim, static_cast<T*>(out[t]) + at);
    });
  });
}

}  // namespace mtlfast::MTLFAST_ISA
