// UPGrad (Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024) and DualProj (Lopez-Paz and
// Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017): projections onto the dual cone of the
// gradients, the directions that no task minds.
//
// The projection of u J is v J with the v >= u of least v^T G v: min 1/2 x^T G x + (G u)^T x over x = v - u >= 0.
// DualProj projects the preferred combination; UPGrad projects each task's own part of it and adds the projections up.
// G is divided by its trace and reg_eps is added to the diagonal.
#pragma once
#include "nonnegative_qp.h"

namespace mtlfast::solvers {

// preferences: [K], 1 / K each without them. state: [1], solves that gave up.
template <bool Each>
struct DualCone : Method {
  MTLFAST_NAMES(Param, reg_eps);
  MTLFAST_NAMES(Input, preferences);

  // Of one part of the team: c, x and the solver's memory.
  MTLFAST_HD static int part_size(int K) { return 2 * K + NonnegativeQP::scratch_size(K); }
  static int64_t scratch_size(int K) { return 2 * K * K + K + (Each ? kMostParts : 1) * part_size(K); }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    double *G = p.scratch, *projections = G + K * K, *failed = projections + K * K, *rest = failed + K;
    const double size = trace(p.gram, K), scale = size > 0 ? 1 / size : 0;
    for (int i = team.rank; i < K; i += team.size)
      for (int j = 0; j < K; ++j) G[i * K + j] = p.gram[i * K + j] * scale + (i == j ? p.params[Param::reg_eps] : 0);
    team.sync();
    if constexpr (Each) {
      const auto part = part_of(team);
      double* memory = rest + part.index * part_size(K);
      for (int i = part.index; i < K; i += part.count) {
        const auto own = [&](int k) { return k == i ? p.preference(Input::preferences, k) : 0; };
        const bool solved = project(part.team, K, G, own, projections + i * K, memory);
        if (part.team.rank == 0) failed[i] = !solved;
      }
    } else {
      const bool solved =
          project(team, K, G, [&](int k) { return p.preference(Input::preferences, k); }, projections, rest);
      if (team.rank == 0) failed[0] = !solved;
    }
    team.sync();
    const int count = Each ? K : 1;
    sum_columns(team, count, K, projections, p.out);
    for (int i = 0; i < count && p.state && team.rank == 0; ++i) p.state[0] += failed[i];
    team.sync();
  }

  // v of one u. False if the solver gave up.
  template <class Team, class Preference>
  MTLFAST_HD static bool project(Team team, int K, const double* G, Preference u, double* v, double* memory) {
    double *c = memory, *x = c + K;
    for (int i = team.rank; i < K; i += team.size) {
      double sum = 0;
      for (int k = 0; k < K; ++k) sum += G[i * K + k] * u(k);
      c[i] = -sum;
    }
    team.sync();
    const bool solved = NonnegativeQP{K, G, c, x, x + K}.solve(team);
    for (int k = team.rank; k < K; k += team.size) v[k] = u(k) + x[k];
    team.sync();
    return solved;
  }
};

struct UPGrad : DualCone<true> {
  static constexpr const char* name = "upgrad";
};
struct DualProj : DualCone<false> {
  static constexpr const char* name = "dualproj";
};

}  // namespace mtlfast::solvers
