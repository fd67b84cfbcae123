// What a K x K solver is given: the workers that share it and the memory of one group. Host and device from one source.
#pragma once
#include "../host_device.h"

namespace mtlfast::solvers {

constexpr int kMostTasks = 128;  // K beyond which no solver is asked (mtlfast.ops.solve has the reference serve)
constexpr int kMostParts = 4;    // into which a team splits, at most

// The workers of one solve: one thread on the CPU; a block's threads on CUDA, where sync is __syncthreads. All workers
// take the same branches: what decides them is read from memory after a sync, or computed by each.
struct SerialTeam {
  static constexpr int rank = 0, size = 1;
  MTLFAST_HD void sync() const {}
};

// A share of a team that works on its own: a warp of a block, or all of a serial team.
template <class Team>
struct Part {
  Team team;
  int index, count;
};

MTLFAST_HD inline Part<SerialTeam> part_of(const SerialTeam& team) { return {team, 0, 1}; }

struct Problem {
  int num_tasks;                // K
  const double* gram;           // [K, K], finite (the launcher answers a non-finite Gram matrix with NaN)
  const double* params;         // the method's host constants
  const double* const* inputs;  // the method's device inputs, in float64
  int num_inputs;
  double* state;  // [state_size], or nullptr where the method keeps none
  int state_size;
  const int64_t* tasks;  // [K] which of the user's tasks are present, or nullptr: all
  double* scratch;       // scratch_size(K) doubles
  double* out;           // [K], or [K, K] for coefficients

  MTLFAST_HD int task(int k) const { return tasks ? static_cast<int>(tasks[k]) : k; }

  // Of methods whose input is the tasks' preferences: task k's, or 1 / K.
  MTLFAST_HD double preference(int k) const {
    return num_inputs > 0 ? inputs[0][k] : 1 / static_cast<double>(num_tasks);
  }

  // Of methods whose input is what the losses were multiplied by: that, or 1.
  MTLFAST_HD double loss_scale() const { return num_inputs > 0 ? inputs[0][0] : 1; }
};

// What a method says about itself; each inherits this and hides what differs.
struct Method {
  static constexpr bool square = false;  // coefficients [K, K] instead of weights [K]
  static constexpr int num_params = 0;
  static int input_size(int) { return 0; }                  // for K tasks; 0: it takes no input, else one at most
  static bool needs_input(const double*) { return false; }  // with these params?
  static int64_t state_size(int) { return 0; }              // at least, for tasks up to that number
  static int64_t scratch_size(int) { return 0; }            // for K tasks
};

}  // namespace mtlfast::solvers
