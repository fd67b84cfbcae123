// What a K x K solver is given: the workers that share it and the memory of one group. Host and device from one source.
#pragma once
#include "../host_device.h"

namespace mtlfast::solvers {

// K beyond which no solver is asked, on a GPU and on the CPU (mtlfast.ops.solve has the reference serve). On a GPU the
// tasks' indices travel in the kernel's argument; on the CPU sizes of scratch are computed in 32 bits.
constexpr int kMostTasks = 512, kMostTasksOnCpu = 8192;
constexpr int kMostParts = 4;  // into which a team splits, at most

// The workers of one solve: one thread on the CPU; a block's threads on CUDA, where sync is __syncthreads. All workers
// take the same branches: what decides them is read from memory after a sync, or computed by each. `any` syncs, and
// tells each worker whether one of them had true.
struct SerialTeam {
  static constexpr int rank = 0, size = 1;
  MTLFAST_HD void sync() const {}
  MTLFAST_HD bool any(bool value) const { return value; }
};

// A share of a team that works on its own: a warp of a block, or all of a serial team.
template <class Team>
struct Part {
  Team team;
  int index, count;
};

MTLFAST_HD inline Part<SerialTeam> part_of(const SerialTeam& team) { return {team, 0, 1}; }

// The first numbers of a state count, for the methods that keep a state and say so:
enum Counter : int {
  kUnconverged,  // solves that gave up
  kByNoise,      // solves that took something for zero since it is no larger than rounding
};

struct Problem {
  int num_tasks;                // K
  const double* gram;           // [K, K], finite (the launcher answers a non-finite Gram matrix with NaN)
  const double* params;         // the method's host constants: params[Param::rtol]
  const double* const* inputs;  // its device inputs in float64, nullptr for an absent one: inputs[Input::keys]
  double* state;                // [state_size], or nullptr where the method keeps none
  int state_size;               // 0 without a state
  const int64_t* tasks;         // [K] which of the user's tasks are present, or nullptr: all
  double* scratch;              // scratch_size(K) doubles
  double* out;                  // [K], or [K, K] for coefficients

  MTLFAST_HD int task(int k) const { return tasks ? static_cast<int>(tasks[k]) : k; }

  // Where a task stands among the K; that of the first for one that is not there.
  MTLFAST_HD int place(int task) const {
    for (int k = 0; k < num_tasks; ++k)
      if (this->task(k) == task) return k;
    return 0;
  }

  // Number i of an input, or `otherwise` where that input is absent.
  MTLFAST_HD double input_or(int input, int i, double otherwise) const {
    return inputs[input] ? inputs[input][i] : otherwise;
  }

  // Counts a solve, if there is a state that holds the counter.
  template <class Team>
  MTLFAST_HD void tally(const Team& team, Counter counter, bool happened) const {
    if (happened && team.rank == 0 && counter < state_size) state[counter] += 1;
  }

  // Task k's entry of an input that holds the tasks' preferences, 1 / K where it is absent.
  MTLFAST_HD double preference(int input, int k) const {
    return input_or(input, k, 1 / static_cast<double>(num_tasks));
  }
};

// What a method takes, by name, in the order in which the op takes it: Kind::rtol is an index, Kind::count tells how
// many there are, and Kind::names is their text, against which Python's table is tested.
#define MTLFAST_NAMES(Kind, ...)                       \
  struct Kind {                                        \
    enum : int { __VA_ARGS__, count };                 \
    static constexpr const char* names = #__VA_ARGS__; \
  }

struct NoNames {
  enum : int { count };
  static constexpr const char* names = "";
};

// What a method says about itself; each inherits this and hides what differs.
struct Method {
  using Param = NoNames;                                         // host constants, by MTLFAST_NAMES
  using Input = NoNames;                                         // device inputs, likewise
  static constexpr bool square = false;                          // coefficients [K, K] instead of weights [K]
  static int input_size(int /*input*/, int K) { return K; }      // elements of an input for K tasks
  static bool needs_input(int, const double*) { return false; }  // with these params?
  static int64_t state_size(int) { return 0; }                   // at least, for tasks up to that number
  static int64_t scratch_size(int) { return 0; }                 // for K tasks
};

}  // namespace mtlfast::solvers
