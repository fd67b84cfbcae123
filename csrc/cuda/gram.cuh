// G = J J^T for few tasks, and the tasks' norms: one read of the K rows, all sums in registers. With a split (sums.cuh)
// all products are summed too, and those that are asked for are written: the kernel waits for memory either way.
//
// Thread to work: a chunk of a tensor is taken in steps of 256 groups, a group (16 bytes of each row) to a thread,
// which loads K groups and does K(K+1)/2 multiply-adds a column, in Sum: float, or double for exact sums and fp64 rows.
// Sums of narrower rows take at most kMostAdds adds; then the 32 lanes of a warp are added by shuffles and the lane
// that owns a pair adds the result to its double. Sums of fp64 rows meet the other lanes once, at the end. Warps are
// added in shared memory, blocks in sums.cuh.
//
// Bytes moved: K * P * itemsize. Deterministic: which columns meet in which sum depends on sizes alone.
#pragma once
#include "sums.cuh"

namespace mtlfast::cuda {

constexpr int kWarps = kThreads / 32;
MTLFAST_HD constexpr int pairs_of(int rows) { return rows * (rows + 1) / 2; }

// Adds up one sum of each lane, sum after sum; sum i's total goes to lane i % 32's run[i / 32]. Clears the sums.
template <class W, int N>
__device__ inline void fold_warp(W (&sums)[N], double (&run)[(N + 31) / 32]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    W sum = sums[i];
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    if (thread() % 32 == i % 32) run[i / 32] += static_cast<double>(sum);
    sums[i] = 0;
  }
}

// This block's pairs of the rows first_row .. first_row + Rows, in double: run[] as fold_warp leaves it. Rows that the
// table does not have are zeros.
template <class T, int Rows, class Sum>
__device__ inline void multiply_rows(const Table& table, const Share& share, int first_row,
                                     double (&run)[(pairs_of(Rows) + 31) / 32]) {
  Sum sums[pairs_of(Rows)] = {};
  int adds = 0;
  for (long long chunk = share.chunk; chunk < share.end; chunk += share.step) {
    const Piece piece = piece_of(table, static_cast<int>(chunk));
    for (int step = 0; step < piece.n; step += kThreads * kGroup<T>) {
      const int column = step + thread() * kGroup<T>;
      if (column < piece.n) {
        const T* from[Rows];
        Group<T> rows[Rows];
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const T* row = first_row + r < table.num_rows ? table.row<const T>(piece.entry, first_row + r) : nullptr;
          from[r] = row ? row + piece.begin + column : nullptr;
        }
        load_groups(from, piece.n - column, table.tag(piece.entry) & 31, rows);
#pragma unroll
        for (int e = 0; e < kGroup<T>; ++e)
#pragma unroll
          for (int i = 0; i < Rows; ++i)
#pragma unroll
            for (int j = 0; j <= i; ++j)
              sums[pairs_of(i) + j] += widen_to<Sum>(rows[i].element[e]) * widen_to<Sum>(rows[j].element[e]);
      }
      adds += kGroup<T>;
      if (sizeof(T) < 8 && adds == kMostAdds<Sum>) {
        fold_warp(sums, run);
        adds = 0;
      }
    }
  }
  fold_warp(sums, run);
}

// Adds what the warps' lanes own and writes N partial sums.
template <int N>
__device__ inline void add_warps(const Sums& sums, double* partials, const double (&run)[(N + 31) / 32]) {
  __shared__ double of_warp[kWarps][N];
#pragma unroll
  for (int i = 0; i < (N + 31) / 32; ++i) {
    const int owned = i * 32 + thread() % 32;
    if (owned < N) of_warp[thread() / 32][owned] = run[i];
  }
  __syncthreads();
  add_partials(sums, partials, N, [](int i) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp][i];
    return sum;
  });
}

// Grid: min(blocks for pairs_of(Rows) sums, chunks), with groups ceil(chunks of the table / each); block: kThreads.
// partials: [grid, pairs_of(Rows)].
template <class T, int Rows, class Sum>
__global__ void __launch_bounds__(kThreads) gram_kernel(const Table __grid_constant__ table, const Sums sums) {
  constexpr int pairs = pairs_of(Rows);
  double run[(pairs + 31) / 32] = {};
  multiply_rows<T, Rows, Sum>(table, share_of(table, sums), 0, run);
  add_warps<pairs>(sums, sums.partials + static_cast<long long>(blockIdx.x) * pairs, run);
  const GroupBlocks blocks = blocks_of_result(table, sums);
  if (!is_last_block(sums, blocks.count, blocks.entry)) return;
  add_up(sums.partials + static_cast<long long>(blocks.first) * pairs, blocks.count, pairs, [&](int pair, double sum) {
    int i = 0;
    while (pairs_of(i + 1) <= pair) ++i;
    if (i < sums.num_tasks) write_product(table, sums, blocks, i, pair - pairs_of(i), sum);
  });
}

// Grid: (blocks as for gram_kernel, rows of the table); block: kThreads. partials: [blocks, rows]; out: the rows'
// norms, of exact sums; with groups their squares, because several launches may add to them.
template <class T>
__global__ void __launch_bounds__(kThreads) norms_kernel(const Table __grid_constant__ table, const Sums sums) {
  double run[1] = {};
  multiply_rows<T, 1, double>(table, share_of(table, sums), blockIdx.y, run);
  add_warps<1>(sums, sums.partials + static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y, run);
  const GroupBlocks blocks = blocks_of_result(table, sums);
  if (!is_last_block(sums, blocks.count * gridDim.y, blocks.entry)) return;
  add_up(sums.partials + static_cast<long long>(blocks.first) * gridDim.y, blocks.count, gridDim.y,
         [&](int row, double sum) { write_sum(table, sums, blocks, row, sums.each > 0 ? sum : sqrt(sum)); });
}

}  // namespace mtlfast::cuda
