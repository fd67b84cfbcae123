// The table of kernels that are compiled, by rows and dtype. Every entry costs build time and binary size, so it holds
// only what a kernel needs to run at memory speed. Widths of loads are branches inside a kernel, not instances.
#pragma once
#include "../host_device.h"

namespace mtlfast::cuda {

template <int... Rows>
struct RowCounts {};

// gram_kernel<T, Rows, Sum>. K tasks take the next larger number of rows. The missing rows cost multiply-adds but no
// reads, and the kernel still waits for memory. The numbers are closer where registers change, because these limit the
// blocks that share a processor: on sm_90 8 rows of float take 80 registers, 10 take 122 and 12 take 222. A double sum
// takes two registers, so that 12 rows would spill.
template <class Sum>
struct GramRows {
  using counts = RowCounts<1, 2, 3, 4, 6, 8, 10, 12, 16>;
  static constexpr int most = 16;
};
template <>
struct GramRows<double> {
  using counts = RowCounts<1, 2, 3, 4, 6, 8>;
  static constexpr int most = 8;
};

// gram_staged_kernel<T, Rows, Sum>: 32 and 64 rows with themselves, or half of them with as many others, and 128 for 64
// rows with 64 others. More rows in the same shared memory make shorter stages.
constexpr int kStagedRows = 64;  // the most rows that one launch multiplies with each other

// trimmed_mean_kernel<T, Rows>: the numbers for which a network has no comparison to spare. The missing rows cost
// comparisons but no reads.
using SortedRows = RowCounts<4, 8, 16, 32, 64>;

// combine_kernel<T, Out, Outs>: one output at a time, or four.
constexpr int kOutsAtOnce = 4;

// Calls use.template operator()<Rows>() with the least number of rows that is at least `rows`.
template <int First, int... Rest, class Use>
auto visit_rows(RowCounts<First, Rest...>, int64_t rows, Use use) {
  if constexpr (sizeof...(Rest) > 0)
    if (rows > First) return visit_rows(RowCounts<Rest...>{}, rows, use);
  return use.template operator()<First>();
}

}  // namespace mtlfast::cuda
