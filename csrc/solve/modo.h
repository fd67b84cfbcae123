// MoDo (Chen et al., "Three-Way Trade-Off in Multi-Objective Learning", NeurIPS 2023): one projected step of the
// weights on A = J_1 J_2^T, the products of two independent batches' gradients: w = P(w - gamma (A w + rho w)).
#pragma once
#include "simplex.h"

namespace mtlfast::solvers {

// The weights that a state keeps for each task, 1 / K for a task that was not there yet (NaN).
template <class Team>
MTLFAST_HD void load_weights(Team team, const Problem& p, double* w) {
  for (int k = team.rank; k < p.num_tasks; k += team.size) {
    const double kept = p.state[p.task(k)];
    w[k] = kept == kept ? kept : 1 / static_cast<double>(p.num_tasks);
  }
  team.sync();
}

template <class Team>
MTLFAST_HD void keep_weights(Team team, const Problem& p, const double* w) {
  for (int k = team.rank; k < p.num_tasks; k += team.size) p.state[p.task(k)] = w[k];
  team.sync();
}

// gram: A. state: w [n].
struct MoDo : Method {
  static constexpr const char* name = "modo";
  MTLFAST_NAMES(Param, gamma, rho);
  static int64_t state_size(int known) { return known; }
  static int64_t scratch_size(int K) { return 2 * K; }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    double *w = p.scratch, *gradient = w + K;
    load_weights(team, p, w);
    multiply(team, K, p.gram, w, gradient);
    team.sync();
    const double gamma = p.params[Param::gamma], rho = p.params[Param::rho];
    for (int k = team.rank; k < K; k += team.size) w[k] -= gamma * (gradient[k] + rho * w[k]);
    team.sync();
    project_onto_simplex(team, K, w, p.out);
    keep_weights(team, p, p.out);
  }
};

}  // namespace mtlfast::solvers
