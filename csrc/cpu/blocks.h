// Cuts a range of the Jacobian's columns into blocks of K row pointers, for the kernels that sum over columns.
//
// Inside a tensor a block is the gradients' own memory, which is read in place. The rest of a tensor (its tail, or all
// of a small one) is gathered: it is copied behind the rests of other tensors, and a full block is handed over. The
// last block is padded with zeros. An element's place in a block depends on its column and on the sizes alone, never on
// an address, so that sums are bitwise the same wherever the allocator put the tensors.
#pragma once
#include "simd.h"

namespace mtlfast::MTLFAST_ISA {

// Float accumulators take one add for each vector, so 64 adds a lane in a block. That is the most with which the error
// of fast sums stays below 1e-6 (docs/promises.md).
constexpr int64_t kBlock = 64 * kLanes;
constexpr int64_t kGrain = 64;  // every block is a multiple of this, so that no kernel has a scalar tail
constexpr int64_t kDirect = kBlock < 512 ? kBlock / 2 : 256;  // shorter pieces than this are gathered
alignas(64) inline const double kZeros[kBlock] = {};          // is read in place of a task that does not reach a tensor

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory for one walk: K row pointers, then K gathered rows of kBlock elements.
inline int64_t blocks_scratch(int64_t num_tasks, DType dtype) {
  return round_up(num_tasks * 8, 64) + num_tasks * kBlock * item_size(dtype);
}

// The tensor that holds column c, by binary search in the prefix sum. Of several that begin there it is the last.
inline int64_t tensor_of(const TaskView& grads, int64_t c) {
  int64_t low = 0, high = grads.num_tensors;  // offsets[low] <= c < offsets[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (grads.offsets[middle] <= c ? low : high) = middle;
  }
  return low;
}

// Calls use(rows, n, in_place) for each block. rows[k] points to n elements of task k; n is a positive multiple of
// kGrain and at most kBlock. in_place: they are the gradients' own memory, behind which more elements may follow.
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
