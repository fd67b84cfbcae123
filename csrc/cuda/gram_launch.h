// Chooses the Gram kernel for a number of tasks, and launches it table after table. Instantiated once for each dtype,
// in a file of its own, so that they compile side by side. split = 0: all products; above 0: those of the tasks before
// it with those from it on.
#pragma once
#include "gram.cuh"
#include "gram_plain.cuh"
#include "gram_staged.cuh"
#include "instances.h"
#include "launch.h"
#include "launchers.h"
#include "pack.h"

namespace mtlfast::cuda {

static_assert(kCounters >= capacity(1) && kMostGroups << kGroupBit <= int64_t{1} << 31, "each entry and group fits");

// each > 0: with groups of tensors, where every launch finishes what it begins.
inline Sums sums_of(const Workspace& workspace, double* out, int num_tasks, bool first, bool last, int split,
                    int each) {
  const int size = split > 0 ? split * (num_tasks - split) : num_tasks * num_tasks;
  const bool whole = each > 0;
  return {workspace.partials, workspace.counter, out, num_tasks, first || whole, last || whole, split, each, size};
}
inline unsigned grid_of(const Table& table, int blocks, int each) {
  return each > 0 ? (table.num_chunks + each - 1) / each : blocks;
}

// 1. Few rows: all sums in registers.
template <class T, int Rows, class Sum>
const char* gram_registers(const TaskView& grads, int split, const Workspace& workspace, double* out, void* stream) {
  const int blocks = blocks_for(pairs_of(Rows), chunks_of(grads)), each = chunks_each(grads, blocks);
  const int K = static_cast<int>(grads.num_tasks);
  const auto run = [&](const Table& table, bool first, bool last) {
    const Sums sums = sums_of(workspace, out, K, first, last, split, each);
    return launch<gram_kernel<T, Rows, Sum>>(dim3(grid_of(table, blocks, each)), kThreads, 0, stream, table, sums);
  };
  return for_each_table(grads, 0, K, run, each);
}

inline int64_t tile_sums(const RowBlocks& blocks) {
  const int64_t a = (blocks.rows_a + kTile - 1) / kTile, b = (blocks.rows_b + kTile - 1) / kTile;
  return (blocks.rows_b > 0 ? a * b : a * (a + 1) / 2) * kTile * kTile;
}

// 2. Up to kStagedRows rows with themselves, or two row blocks of that many with each other.
template <class T, int Rows, class Sum>
const char* gram_staged(const TaskView& grads, const RowBlocks& rows, int split, const Workspace& workspace,
                        double* out, void* stream) {
  const int blocks = blocks_for(tile_sums(rows), chunks_of(grads)), each = chunks_each(grads, blocks);
  const int K = static_cast<int>(grads.num_tasks);
  const auto run = [&](const Table& table, bool first, bool last) {
    const Sums sums = sums_of(workspace, out, K, first, last, split, each);
    const dim3 grid(grid_of(table, blocks, each));
    return launch<gram_staged_kernel<T, Rows, Sum>>(grid, kThreads, 0, stream, table, rows, sums);
  };
  Packer<decltype(run)> packer(rows.rows_a + rows.rows_b, run, each);
  for (int64_t t = 0; t < grads.num_tensors; ++t) {
    const void *const *a = grads.tensor(t) + rows.first_a, *const *b = grads.tensor(t) + rows.first_b;
    const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
    const int width_a = widest_access(a, rows.rows_a), width_b = widest_access(b, rows.rows_b);
    if (numel > 0)
      packer.add(numel, tag_of(grads, t, width_a < width_b ? width_a : width_b),
                 [&](int r) { return r < rows.rows_a ? a[r] : b[r - rows.rows_a]; });
  }
  return packer.finish();
}

// The row blocks of K > GramRows::most tasks: use(blocks) for each launch's.
template <class Use>
const char* for_each_row_blocks(int64_t num_tasks, int split, Use use) {
  const char* error = nullptr;
  const int K = static_cast<int>(num_tasks);
  const auto size = [&](int first, int end) { return end - first < kStagedRows ? end - first : kStagedRows; };
  for (int a = split; a < K && !error; a += kStagedRows) {
    const int end_b = split > 0 ? split : a;
    if (split == 0) error = use(RowBlocks{size(a, K), 0, a, a});
    for (int b = 0; b < end_b && !error; b += kStagedRows) error = use(RowBlocks{size(a, K), size(b, end_b), a, b});
  }
  return error;
}

template <class T, class Sum>
const char* gram_of(const TaskView& grads, int64_t split_at, const Workspace& workspace, double* out, void* stream) {
  const int split = static_cast<int>(split_at);
  if (grads.num_tasks <= GramRows<Sum>::most)
    return visit_rows(typename GramRows<Sum>::counts{}, grads.num_tasks,
                      [&]<int Rows>() { return gram_registers<T, Rows, Sum>(grads, split, workspace, out, stream); });
  return for_each_row_blocks(grads.num_tasks, split, [&](const RowBlocks& rows) {
    const int longer = rows.rows_a < rows.rows_b ? rows.rows_b : rows.rows_a;
    const int staged = rows.rows_b > 0 ? 2 * longer : longer;
    if (staged > kStagedRows) return gram_staged<T, 2 * kStagedRows, Sum>(grads, rows, split, workspace, out, stream);
    if (staged > 32) return gram_staged<T, kStagedRows, Sum>(grads, rows, split, workspace, out, stream);
    return gram_staged<T, 32, Sum>(grads, rows, split, workspace, out, stream);
  });
}

template <class T, class Sum>
int64_t gram_partials_of(const TaskView& grads, int64_t split) {
  const auto partials = [&](int64_t sums, int64_t rows) {
    return sums * most_blocks(grads, rows, blocks_for(sums, chunks_of(grads)));
  };
  if (grads.num_tasks <= GramRows<Sum>::most)
    return visit_rows(typename GramRows<Sum>::counts{}, grads.num_tasks,
                      [&]<int Rows>() { return partials(pairs_of(Rows), grads.num_tasks); });
  int64_t most = 0;
  for_each_row_blocks(grads.num_tasks, static_cast<int>(split), [&](const RowBlocks& rows) -> const char* {
    const int64_t count = partials(tile_sums(rows), rows.rows_a + rows.rows_b);
    most = most < count ? count : most;
    return nullptr;
  });
  return most;
}

template <class T>
const char* norms_of(const TaskView& grads, const Workspace& workspace, double* out, void* stream) {
  return for_each_rows(grads.num_tasks, [&](int64_t k, int rows) {
    const int blocks = row_blocks(grads, rows), each = chunks_each(grads, blocks);
    const auto run = [&](const Table& table, bool first, bool last) {
      Sums sums = sums_of(workspace, out + k, rows, first, last, 0, each);
      sums.size = static_cast<int>(grads.num_tasks);
      return launch<norms_kernel<T>>(dim3(grid_of(table, blocks, each), rows), kThreads, 0, stream, table, sums);
    };
    return for_each_table(grads, k, rows, run, each);
  });
}

template <class T>
const char* gram_plain_of(const TaskView& grads, double* out, void* stream) {
  const unsigned K = static_cast<unsigned>(grads.num_tasks);
  return for_each_table(grads, 0, grads.num_tasks, [&](const Table& table, bool first, bool) {
    return launch<gram_plain_kernel<T>>(dim3(K, K), kThreads, 0, stream, table, out, static_cast<int>(!first));
  });
}

// What each dtype's file instantiates: the fast sums, and the exact ones of dtypes that are not double themselves.
#define MTLFAST_GRAM_OF(keyword, T)                                                                             \
  keyword template const char* gram_of<T, Wide<T>>(const TaskView&, int64_t, const Workspace&, double*, void*); \
  keyword template const char* norms_of<T>(const TaskView&, const Workspace&, double*, void*);                  \
  keyword template const char* gram_plain_of<T>(const TaskView&, double*, void*);
#define MTLFAST_EXACT_GRAM_OF(keyword, T) \
  keyword template const char* gram_of<T, double>(const TaskView&, int64_t, const Workspace&, double*, void*);

}  // namespace mtlfast::cuda
