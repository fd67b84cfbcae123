// What every kernel receives, on both devices. There is no torch header here, so that a kernel compiles alone.
#pragma once
#include <cstdint>

#include "dropping.h"

namespace mtlfast {

enum class DType : int32_t { Float32, Float64, BFloat16, Float16 };

inline int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::Float64:
      return 8;
    case DType::Float32:
      return 4;
    default:
      return 2;
  }
}

// Storage of the 16-bit formats. Kernels convert them to float or double and compute with that.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The task gradients as raw memory: K tasks x T tensors, each tensor dense, with one element order for all tasks.
// Column c of the Jacobian is element c - offsets[t] of tensor t, where offsets[t] <= c < offsets[t + 1].
struct TaskView {
  int64_t num_tasks;        // K
  int64_t num_tensors;      // T
  const void* const* data;  // [T, K]; nullptr: task k does not reach tensor t (zeros, never read)
  const int64_t* offsets;   // [T + 1], offsets[T] = P
  DType dtype;
  // [T] the group of each tensor, which has sums or weights of its own; nullptr: no groups. A kernel that sums takes
  // tensors in the order of their groups.
  const int64_t* groups = nullptr;

  int64_t group(int64_t t) const { return groups ? groups[t] : 0; }
  int64_t numel() const { return offsets[num_tensors]; }
  const void* const* tensor(int64_t t) const { return data + t * num_tasks; }
};

constexpr int64_t kMostSorted = 64;  // tasks that trimmed_mean takes

// Pairs are the lower triangle of the Gram matrix, row by row: (0,0) (1,0) (1,1) (2,0) ...
inline int64_t num_pairs(int64_t num_tasks) { return num_tasks * (num_tasks + 1) / 2; }

}  // namespace mtlfast
