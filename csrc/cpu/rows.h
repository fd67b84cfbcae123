// Walks a range of columns in blocks of all K rows, for the kernels that compute each element from its K gradients.
//
// Whole steps of a tensor are read in place. What is left at its end is copied and padded with zeros, so that every
// element goes through the same arithmetic. A task that does not reach a tensor has zeros there.
#pragma once
#include "pieces.h"

namespace mtlfast::MTLFAST_ISA {

// Memory for one walk: K row pointers, then K tails of one step.
inline int64_t rows_scratch(int64_t num_tasks) {
  return round_up(num_tasks * 8, 64) + num_tasks * kLanes * static_cast<int64_t>(sizeof(float));
}

// Calls use(rows, n, t, at) for each block: element at + i of tensor t, i < n <= kBlock, has the gradients rows[k][i].
// The rows can be read up to the next multiple of the step, which is InOrder<T>::kStep.
template <class T, class Use>
MTLFAST_INLINE void for_each_row_block(const TaskView& grads, int64_t begin, int64_t end, void* scratch, Use use) {
  constexpr int step = InOrder<T>::kStep;
  const int64_t K = grads.num_tasks;
  const T** rows = static_cast<const T**>(scratch);
  T* tails = reinterpret_cast<T*>(static_cast<char*>(scratch) + round_up(K * 8, 64));
  for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t length) {
    const void* const* data = grads.tensor(t);
    const int64_t whole = first + length / step * step;
    for (int64_t at = first; at < whole; at += kBlock) {
      for (int64_t k = 0; k < K; ++k)
        rows[k] = data[k] ? static_cast<const T*>(data[k]) + at : reinterpret_cast<const T*>(kZeros);
      use(rows, whole - at < kBlock ? whole - at : kBlock, t, at);
    }
    if (whole == first + length) return;
    __builtin_memset(tails, 0, K * step * sizeof(T));
    for (int64_t k = 0; k < K; ++k) {
      if (data[k])
        __builtin_memcpy(tails + k * step, static_cast<const T*>(data[k]) + whole,
                         (first + length - whole) * sizeof(T));
      rows[k] = tails + k * step;
    }
    use(rows, first + length - whole, t, whole);
  });
}

// Loads and stores of the first `left` elements of a vector, and of all if there are more.
template <class T>
MTLFAST_INLINE typename InOrder<T>::Vec load_first(const T* p, int64_t left) {
  if (left >= InOrder<T>::kStep) return InOrder<T>::load(p);
  T padded[InOrder<T>::kStep] = {};
  __builtin_memcpy(padded, p, left * sizeof(T));
  return InOrder<T>::load(padded);
}
template <class T>
MTLFAST_INLINE void store_first(T* p, typename InOrder<T>::Vec v, int64_t left) {
  if (left >= InOrder<T>::kStep) return InOrder<T>::store(p, v);
  T padded[InOrder<T>::kStep];
  InOrder<T>::store(padded, v);
  __builtin_memcpy(p, padded, left * sizeof(T));
}

}  // namespace mtlfast::MTLFAST_ISA
