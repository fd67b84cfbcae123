// What a K x K solver is given: the workers that share it and the memory of one group. Host and device from one source.
#pragma once
#include "../host_device.h"

namespace mtlfast::solvers {

constexpr int kMostTasks = 128;  // K beyond which no solver is asked (mtlfast.ops.solve has the reference serve)

// The workers of one solve: one thread on the CPU; a block's threads on CUDA, where sync is __syncthreads.
struct SerialTeam {
  static constexpr int rank = 0, size = 1;
  MTLFAST_HD void sync() const {}
};

struct Problem {
  int64_t num_tasks;            // K
  const double* gram;           // [K, K], finite (the launcher answers a non-finite Gram matrix with NaN)
  const double* params;         // the method's host constants
  const double* const* inputs;  // the method's device inputs, in float64
  int64_t num_inputs;
  double* state;         // [S], or nullptr where the method keeps none
  const int64_t* tasks;  // [K] which of the user's tasks are present, or nullptr: all
  double* scratch;       // scratch_size(K) doubles
  double* out;           // [K], or [K, K] for coefficients
};

}  // namespace mtlfast::solvers
