// Which kernels are compiled: the one table of (rows, dtype). Every entry costs build time and binary size, so only
// what memory speed needs is here; widths of loads are branches inside a kernel, not instances.
#pragma once
#include "../host_device.h"

namespace mtlfast::cuda {

template <int... Rows>
struct RowCounts {};

// gram_kernel<T, Rows, Sum>. K tasks take the next larger count, whose missing rows cost multiply-adds but no reads:
// the kernel still waits for memory. Counts are closer where registers, and so the blocks that share a processor,
// change: on sm_90 8 rows of float take 80, 10 take 122, 12 take 222. fp64 sums are two registers each: with 12 rows
// they would spill.
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

// gram_staged_kernel<T, Rows, Sum>: 32 and 64 rows with themselves, and 128 = 64 against 64. More rows in the same
// shared memory make shorter stages.
constexpr int kStagedRows = 64;  // with themselves, in one launch

// combine_kernel<T, Out, Outs>: one output at a time, or four.
constexpr int kOutsAtOnce = 4;

// use.template operator()<Rows>() with the least count that holds `rows`.
template <int First, int... Rest, class Use>
auto visit_rows(RowCounts<First, Rest...>, int64_t rows, Use use) {
  if constexpr (sizeof...(Rest) > 0)
    if (rows > First) return visit_rows(RowCounts<Rest...>{}, rows, use);
  return use.template operator()<First>();
}

}  // namespace mtlfast::cuda
