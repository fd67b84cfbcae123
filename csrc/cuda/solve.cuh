// w = f(G): one K x K solver on each group's Gram matrix, in double.
//
// Thread to work: one block for each group, whose threads are a Team (solve/team.h). Bytes moved: K * K doubles for
// each group, three times that with a mask. Deterministic, because solvers are.
#pragma once
#include "../solve/group.h"
#include "elements.cuh"

namespace mtlfast::cuda {

constexpr int kSolveThreads = 128;
constexpr int kMostParams = 16, kMostInputs = 4;

struct BlockTeam {
  int rank, size;
  __device__ void sync() const { __syncthreads(); }
  __device__ bool any(bool value) const { return __syncthreads_or(value); }
};

struct WarpTeam {
  int rank, size;
  __device__ void sync() const { __syncwarp(); }
};

__device__ inline solvers::Part<WarpTeam> part_of(const BlockTeam& team) {
  static_assert(kSolveThreads / 32 <= solvers::kMostParts);
  return {{team.rank % 32, 32}, team.rank / 32, team.size / 32};
}

// Every array but params and tasks is in global memory and has one part for each group.
struct Groups {
  int num_tasks, out_size, state_size, packed_size;
  int64_t workspace_size;
  const double* gram;                 // [groups, K, K]
  const double* inputs[kMostInputs];  // nullptr: absent
  int input_sizes[kMostInputs];
  const bool* mask;  // [groups, K], or nullptr
  double* state;     // [groups, state_size], or nullptr
  double* workspace;
  double* out;
  double params[kMostParams];
  int64_t tasks[solvers::kMostTasks];
  int has_tasks;
};

// The group's part of an input; nullptr if the input is absent.
__device__ inline const double* input_of(const Groups& groups, int n) {
  const long long group = blockIdx.x;
  return groups.inputs[n] ? groups.inputs[n] + group * groups.input_sizes[n] : nullptr;
}

// Grid: groups; block: kSolveThreads, with one block on a processor, because a quadratic program needs many registers.
template <class Method>
__global__ void __launch_bounds__(kSolveThreads, 1) solve_kernel(const Groups __grid_constant__ groups) {
  const int K = groups.num_tasks;
  const long long group = blockIdx.x;
  __shared__ const double* inputs[kMostInputs];
  // The Problem is in shared memory, because nvcc 13.0 miscompiles one in each thread's registers: it reads some fields
  // from the kernel's argument at the place of others.
  __shared__ solvers::Problem problem;
  // All inputs are set: the compiler may load a pointer that the method does not name before it knows that it is
  // unused.
  if (thread() < kMostInputs) inputs[thread()] = input_of(groups, thread());
  if (thread() == 0) {
    problem.num_tasks = K;
    problem.gram = groups.gram + group * K * K;
    problem.params = groups.params;
    problem.inputs = inputs;
    problem.state = groups.state ? groups.state + group * groups.state_size : nullptr;
    problem.state_size = groups.state_size;
    problem.tasks = groups.has_tasks ? groups.tasks : nullptr;
    problem.out = groups.out + group * groups.out_size;
  }
  __syncthreads();
  solvers::solve_group<Method>(BlockTeam{thread(), kSolveThreads}, problem, groups.input_sizes,
                               groups.mask ? groups.mask + group * K : nullptr,
                               {groups.workspace + group * groups.workspace_size, groups.packed_size});
}

}  // namespace mtlfast::cuda
