// Cuts a range of the Jacobian's columns at tensor borders, for the kernels that write element by element.
#pragma once
#include "blocks.h"

namespace mtlfast::MTLFAST_ISA {

// Calls use(t, first, n) for each tensor t of which the range holds n > 0 elements, from its element `first` on.
template <class Use>
MTLFAST_INLINE void for_each_piece(const TaskView& grads, int64_t begin, int64_t end, Use use) {
  for (int64_t t = tensor_of(grads, begin), column = begin; column < end; ++t) {
    const int64_t last = grads.offsets[t + 1] < end ? grads.offsets[t + 1] : end;
    if (last > column) use(t, column - grads.offsets[t], last - column);
    column = last;
  }
}

}  // namespace mtlfast::MTLFAST_ISA
