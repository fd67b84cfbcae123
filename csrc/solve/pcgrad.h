// PCGrad (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1) on the Gram matrix.
//
// Each gradient, written c J, starts at c = e_i and meets the other tasks in a random order. Where (G c)_j < 0 it loses
// its component along g_j:  c_j -= (G c)_j / G_jj.  The update is the sum of the K projected gradients.
// Work: K^2 per gradient. The order comes as keys: task i meets the others by ascending key[i, j], ties by index.
//
// One-sided: some tasks are protected. Their gradients stay as they are; the others meet the protected ones alone, in
// one order. With one protected task that is the projection of A-GEM (Chaudhry et al., "Efficient Lifelong Learning
// with A-GEM", ICLR 2019).
#pragma once
#include "algebra.h"
#include "order.h"

namespace mtlfast::solvers {

// C [K, K]: projected gradient i is sum_k C[i, k] g_k. Worker r takes gradients r, r + size, ...
// keys: [K, K], ascending order without them.
struct PCGradCoefficients : Method {
  static constexpr const char* name = "pcgrad_coefficients";
  MTLFAST_NAMES(Input, keys);
  static int input_size(int, int K) { return K * K; }
  static constexpr bool square = true;

  // `itself`: each gradient meets itself too, as it was, as public code has it; with three tasks or more that can
  // matter. `turns`: [K], or nullptr if no task is protected.
  template <class Team>
  MTLFAST_HD static void project(Team team, const Problem& p, double* coefficients, bool itself = false,
                                 const double* turns = nullptr) {
    const int K = p.num_tasks;
    for (int i = team.rank; i < K; i += team.size) {
      double* c = coefficients + i * K;
      for (int k = 0; k < K; ++k) c[k] = k == i;
      if (turns && turns[i] >= 0) continue;
      const Order order = turns ? Order{turns, K, i} : Order::of(p.inputs[Input::keys], K, i, itself);
      for (int j = order.next(-1); j >= 0; j = order.next(j)) {
        if (turns && turns[j] < 0) continue;
        const double product = dot(p.gram + j * K, c, K);
        if (product < 0) c[j] -= product / p.gram[j * K + j];
      }
    }
    team.sync();
  }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    project(team, p, p.out);
  }
};

// w [K] = column sums of C. mean: are they divided by K? itself: does each gradient meet itself too? keys: as above.
// turns: [K], at least 0 for a protected task, and the others meet those ascending; below 0 for a task that is not
// protected. With it the keys are not used.
struct PCGrad : Method {
  static constexpr const char* name = "pcgrad";
  MTLFAST_NAMES(Param, mean, itself);
  MTLFAST_NAMES(Input, keys, turns);
  static int input_size(int input, int K) { return input == Input::keys ? K * K : K; }
  static int64_t scratch_size(int K) { return K * K; }
  static_assert(static_cast<int>(Input::keys) == PCGradCoefficients::Input::keys);  // which reads it

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    PCGradCoefficients::project(team, p, p.scratch, p.params[Param::itself] != 0, p.inputs[Input::turns]);
    sum_columns(team, K, K, p.scratch, p.out);
    if (p.params[Param::mean] != 0)
      for (int k = team.rank; k < K; k += team.size) p.out[k] /= static_cast<double>(K);  // each its own
    team.sync();
  }
};

}  // namespace mtlfast::solvers
