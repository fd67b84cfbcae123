// From the blocks' partial sums to the result: fixed order, float64, no atomics on floats.
//
// An op with N sums runs on `blocks` blocks, a number that depends on sizes alone. Every block owns N doubles of
// partials [blocks, N]; the launches of one op add to them in turn. In the last launch, the block that finishes last
// adds the partials up in block order and writes the result.
#pragma once
#include "elements.cuh"
#include "table.h"

namespace mtlfast::cuda {

// Products added one after the other: promise 3's bounds, 1e-6 for float sums and 1e-13 for exact ones, leave no more.
template <class Sum>
constexpr int kMostAdds = sizeof(Sum) < 8 ? 64 : 512;

// Where the sums of one op go, the same for all its launches but for `first` and `last`.
struct Sums {
  double* partials;   // [blocks, N]
  unsigned* counter;  // of finished blocks: 0 before the op and 0 after it
  double* out;        // Gram kernels: [num_tasks, num_tasks]; norms: [num_tasks]
  int num_tasks;
  int first, last;  // is this the op's first launch, its last?
};

// Adds n sums to this block's partials: block_sum(i) gives the i-th.
template <class BlockSum>
__device__ inline void add_partials(const Sums& sums, double* partials, int n, BlockSum block_sum) {
  for (int i = thread(); i < n; i += kThreads) {
    const double sum = block_sum(i);
    partials[i] = sums.first ? sum : partials[i] + sum;
  }
}

// In the op's last launch, true in all threads of the block that is the last to come here.
__device__ inline bool is_last_block(const Sums& sums, unsigned blocks) {
  __shared__ unsigned finished;
  if (!sums.last) return false;
  __threadfence();  // this thread's partials are seen before the counter moves
  __syncthreads();
  if (thread() == 0) finished = atomicAdd(sums.counter, 1u);
  __syncthreads();
  if (finished != blocks - 1) return false;
  __threadfence();
  if (thread() == 0) *sums.counter = 0;
  return true;
}

// Adds the partials [blocks, n] up and hands each sum to use(i, sum). Few sums: segments of blocks side by side, then
// segment after segment.
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
        sum += __ldcg(partials + static_cast<long long>(block) * n + i);  // not from a stale first-level cache
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
