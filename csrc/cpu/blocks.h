// Cuts a range of the Jacobian's columns into blocks of K row pointers, for the kernels that sum over columns.
//
// Inside a tensor a block is the gradients' own memory, read in place. What is left of a tensor (a tail, or all of a
// small one) is copied behind what other tensors left, and handed over when a block is full, padded with zeros at the
// end. Where an element ends up depends on its column and on the sizes alone, never on an address: sums are bitwise
// the same wherever the allocator put the tensors.
#pragma once
#include "simd.h"

namespace mtlfast::MTLFAST_ISA {

// Float accumulators take one add a vector: 64 adds a lane, the most that promise 3's bound allows.
constexpr int64_t kBlock = 64 * kLanes;
constexpr int64_t kGrain = 64;  // every block is a multiple of this: no kernel has a scalar tail
constexpr int64_t kDirect = kBlock < 512 ? kBlock / 2 : 256;  // shorter pieces than this are gathered
alignas(64) inline const double kZeros[kBlock] = {};          // what a task that does not reach a tensor reads

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory for one walk: K row pointers, then K gathered rows of kBlock elements.
inline int64_t blocks_scratch(int64_t num_tasks, DType dtype) {
  return round_up(num_tasks * 8, 64) + num_tasks * kBlock * item_size(dtype);
}

// The tensor that holds column c (the last of several that begin there): binary search in the prefix sum.
inline int64_t tensor_of(const TaskView& grads, int64_t c) {
  int64_t low = 0, high = grads.num_tensors;  // offsets[low] <= c < offsets[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (grads.offsets[middle] <= c ? low : high) = middle;
  }
  return low;
}

// use(rows, n, in_place): rows[k] points to n elements of task k, n a positive multiple of kGrain and at most kBlock;
// in_place: they are the gradients' own memory, where more may follow.
template <class T, class Use>
void for_each_block(const TaskView& grads, int64_t begin, int64_t end, void* scratch, Use use) {
  const int64_t K = grads.num_tasks;
  const T** rows = static_cast<const T**>(scratch);
  T* gathered = reinterpret_cast<T*>(static_cast<char*>(scratch) + round_up(K * 8, 64));
  const T* zeros = reinterpret_cast<const T*>(kZeros);
  int64_t filled = 0;
  const auto flush = [&] {
    const int64_t n = round_up(filled, kGrain);
    for (int64_t k = 0; k < K; ++k) {
      __builtin_memset(gathered + k * kBlock + filled, 0, (n - filled) * sizeof(T));
      rows[k] = gathered + k * kBlock;
    }
    use(rows, n, false);
    filled = 0;
  };

  for (int64_t t = tensor_of(grads, begin), column = begin; column < end; ++t) {
    const void* const* data = grads.tensor(t);
    const int64_t last = grads.offsets[t + 1] < end ? grads.offsets[t + 1] : end;
    const int64_t first = grads.offsets[t];
    while (last - column >= kDirect) {
      const int64_t left = (last - column) / kGrain * kGrain, n = left < kBlock ? left : kBlock;
      for (int64_t k = 0; k < K; ++k) rows[k] = data[k] ? static_cast<const T*>(data[k]) + (column - first) : zeros;
      use(rows, n, true);
      column += n;
    }
    while (column < last) {
      const int64_t room = kBlock - filled, n = last - column < room ? last - column : room;
      for (int64_t k = 0; k < K; ++k) {
        T* to = gathered + k * kBlock + filled;
        if (data[k])
          __builtin_memcpy(to, static_cast<const T*>(data[k]) + (column - first), n * sizeof(T));
        else
          __builtin_memset(to, 0, n * sizeof(T));
      }
      filled += n;
      column += n;
      if (filled == kBlock) flush();
    }
  }
  if (filled > 0) flush();
}

}  // namespace mtlfast::MTLFAST_ISA
