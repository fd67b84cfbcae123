// Adds the blocks' partial sums to the result, in float64 and in a fixed order, without atomics on floats.
//
// An op with N sums runs on `blocks` blocks, a number that depends on sizes alone. Every block owns N doubles of
// partials [blocks, N]; the launches of one op add to them in turn. In the last launch, the block that finishes last
// adds the partials up in block order and writes the result.
//
// With groups of tensors each launch finishes what it begins. The blocks that have a group's chunks (table.h) work as
// above with a counter of their own, and their sums are added to what an earlier launch wrote for the same group.
#pragma once
#include "elements.cuh"
#include "table.h"

namespace mtlfast::cuda {

// The most products that are added one after another. With more, the errors could exceed the bounds of
// docs/promises.md, 1e-6 for float sums and 1e-13 for exact ones.
template <class Sum>
constexpr int kMostAdds = sizeof(Sum) < 8 ? 64 : 512;

// Where the sums of one op go. All its launches get the same, except for `first` and `last`.
struct Sums {
  double* partials;   // [blocks, N]
  unsigned* counter;  // of finished blocks: 0 before the op and 0 after it; with groups one for each entry
  double* out;        // Gram kernels: [num_tasks, num_tasks], or [split, num_tasks - split]; norms: [num_tasks]
  int num_tasks;
  int first, last;  // whether this is the op's first and its last launch
  int split;        // above 0: the Gram kernels write the products of the tasks before it with those from it on
  int each;         // with groups: the chunks of a block, where first = last = 1; 0: no groups
  int size;         // with groups: how many numbers of `out` each group has
};

// The chunks that a block adds up: from `chunk` on, in steps, before `end`.
struct Share {
  long long chunk, end;
  int step;
};
__device__ inline Share share_of(const Table& table, const Sums& sums) {
  const int block = blockIdx.x, grid = gridDim.x;
  if (sums.each == 0) return {first_chunk_of(table, block, grid), table.num_chunks, grid};
  return {static_cast<long long>(block) * sums.each, end_of_block(table, sums.each, block), 1};
}

// The blocks whose sums make one result with this block's: all, or those of its group.
__device__ inline GroupBlocks blocks_of_result(const Table& table, const Sums& sums) {
  if (sums.each == 0) return {0, 0, 0, static_cast<int>(gridDim.x)};
  return blocks_of_group(table, sums.each, blockIdx.x);
}

// Writes a sum of these blocks to its place in their result.
__device__ inline double write_sum(const Table& table, const Sums& sums, const GroupBlocks& blocks, int place,
                                   double sum) {
  double* result = sums.out + static_cast<long long>(blocks.group) * sums.size + place;
  if (sums.each > 0 && blocks.entry == 0 && table.continues) sum += *result;
  return *result = sum;
}

// Writes the product of the tasks a >= b where the result has it.
__device__ inline void write_product(const Table& table, const Sums& sums, const GroupBlocks& blocks, int a, int b,
                                     double sum) {
  const int K = sums.num_tasks, split = sums.split;
  if (split == 0)
    sums.out[static_cast<long long>(blocks.group) * sums.size + b * K + a] =
        write_sum(table, sums, blocks, a * K + b, sum);
  else if (b < split && split <= a)
    write_sum(table, sums, blocks, b * (K - split) + a - split, sum);
}

// Adds n sums to this block's partials; block_sum(i) returns the i-th.
template <class BlockSum>
__device__ inline void add_partials(const Sums& sums, double* partials, int n, BlockSum block_sum) {
  for (int i = thread(); i < n; i += kThreads) {
    const double sum = block_sum(i);
    partials[i] = sums.first ? sum : partials[i] + sum;
  }
}

// True in all threads of the block that arrives here last in the op's last launch, of `blocks` that share a counter.
__device__ inline bool is_last_block(const Sums& sums, unsigned blocks, int counter = 0) {
  __shared__ unsigned finished;
  if (!sums.last) return false;
  __threadfence();  // makes this thread's partials visible before the counter changes
  __syncthreads();
  if (thread() == 0) finished = atomicAdd(sums.counter + counter, 1u);
  __syncthreads();
  if (finished != blocks - 1) return false;
  __threadfence();
  if (thread() == 0) sums.counter[counter] = 0;
  return true;
}

// Adds up the partials [blocks, n] and calls use(i, sum) for each sum. If there are few sums, the blocks are split into
// segments that are summed in parallel, and the segments are added one after another.
template <class Use>
__device__ inline void add_up(const double* partials, int blocks, int n, Use use) {
  __shared__ double of_segment[kThreads];
  const int segments = n < kThreads ? kThreads / n : 1, length = (blocks + segments - 1) / segments;
  for (int first = 0; first < n; first += kThreads) {
    const int i = segments > 1 ? thread() % n : first + thread(), segment = segments > 1 ? thread() / n : 0;
    double sum = 0;
    if (i < n && segment < segments) {
      const int end = (segment + 1) * length < blocks ? (segment + 1) * length : blocks;
#pragma unroll 4
      for (int block = segment * length; block < end; ++block)
        sum +=
            __ldcg(partials + static_cast<long long>(block) * n + i);  // past the first-level cache, which may be stale
    }
    if (segments > 1) {
      of_segment[thread()] = sum;
      __syncthreads();
      for (int s = 1; s < segments && segment == 0; ++s) sum += of_segment[s * n + i];
    }
    if (i < n && segment == 0) use(i, sum);
  }
}

}  // namespace mtlfast::cuda
