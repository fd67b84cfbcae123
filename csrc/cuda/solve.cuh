// w = f(G): one K x K solver on each group's Gram matrix, in double.
//
// Thread to work: a block a group, its threads a Team (solve/team.h). A group whose matrix or inputs are not finite
// gets NaN and keeps its state. Bytes moved: K * K doubles a group. Deterministic: solvers are.
#pragma once
#include "../solve/team.h"
#include "elements.cuh"

namespace mtlfast::cuda {

constexpr int kSolveThreads = 128;
constexpr int kMostParams = 16, kMostInputs = 4;

struct BlockTeam {
  int rank, size;
  __device__ void sync() const { __syncthreads(); }
};

struct WarpTeam {
  int rank, size;
  __device__ void sync() const { __syncwarp(); }
};

__device__ inline solvers::Part<WarpTeam> part_of(const BlockTeam& team) {
  static_assert(kSolveThreads / 32 <= solvers::kMostParts);
  return {{team.rank % 32, 32}, team.rank / 32, team.size / 32};
}

// Every array but params and tasks lies in global memory, one part for each group.
struct Groups {
  int num_tasks, out_size, state_size, scratch_size;
  const double* gram;                 // [groups, K, K]
  const double* inputs[kMostInputs];  // nullptr: absent
  int input_sizes[kMostInputs];
  double* state;  // [groups, state_size], or nullptr
  double* scratch;
  double* out;
  double params[kMostParams];
  int64_t tasks[solvers::kMostTasks];
  int has_tasks;
};

// The group's part of an input; nullptr where that is absent.
__device__ inline const double* input_of(const Groups& groups, int n) {
  const long long group = blockIdx.x;
  return groups.inputs[n] ? groups.inputs[n] + group * groups.input_sizes[n] : nullptr;
}

// Grid: groups; block: kSolveThreads, one on a processor: a quadratic program takes all the registers it can get.
template <class Method>
__global__ void __launch_bounds__(kSolveThreads, 1) solve_kernel(const Groups __grid_constant__ groups) {
  const int K = groups.num_tasks;
  const long long group = blockIdx.x;
  const double* gram = groups.gram + group * K * K;
  double* out = groups.out + group * groups.out_size;
  bool finite = true;
  for (int i = thread(); i < K * K; i += kSolveThreads) finite = finite && isfinite(gram[i]);
  for (int n = 0; n < Method::Input::count; ++n) {
    const double* input = input_of(groups, n);
    for (int i = thread(); input && i < groups.input_sizes[n]; i += kSolveThreads)
      finite = finite && isfinite(input[i]);
  }
  if (__syncthreads_or(!finite)) {
    for (int i = thread(); i < groups.out_size; i += kSolveThreads) out[i] = __longlong_as_double(0x7ff8000000000000);
    return;
  }
  __shared__ const double* inputs[kMostInputs];
  // All of them: a pointer that the method does not name may still be loaded, before it is known that nobody wants it.
  if (thread() < kMostInputs) inputs[thread()] = input_of(groups, thread());
  __syncthreads();
  const solvers::Problem problem{K,
                                 gram,
                                 groups.params,
                                 inputs,
                                 groups.state ? groups.state + group * groups.state_size : nullptr,
                                 groups.state_size,
                                 groups.has_tasks ? groups.tasks : nullptr,
                                 groups.scratch + group * groups.scratch_size,
                                 out};
  Method::solve(BlockTeam{thread(), kSolveThreads}, problem);
}

}  // namespace mtlfast::cuda
